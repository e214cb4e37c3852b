"""A scan onto the grid a network works on, and exactly back."""

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from bhsd_jax.ct.resample import (
    nearest_index,
    resample_image,
    resample_label,
    resample_linear,
    resampled_shape,
    separate_axis,
)
from bhsd_jax.volume import Grid, Millimeters, Shape, Volume

_TARGETS = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]])  # D up, H back, W to the patient's left
_MARGIN_MM = 5.0  # around the head
_DECIMATE_MM = 2.0  # voxels of this size are enough to find the head


def canonical(affine: np.ndarray) -> tuple[Shape, tuple[bool, bool, bool]]:
    """Which native axis runs along the prepared D, H, W, and whether it runs against it.

    Prepared, D goes inferior to superior, H anterior to posterior, W to the patient's left. Oblique
    scans get the assignment with the largest sum of cosines, so no axis is used twice.

    Args:
        affine: [4 4], columns D, H, W of the file to x, y, z (RAS+) in mm.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = _TARGETS @ axes  # [prepared axis, native axis]
    _, native = linear_sum_assignment(-np.abs(cosines))
    d, h, w = (int(axis) for axis in native)
    fd, fh, fw = (bool(cosines[i, axis] < 0) for i, axis in enumerate((d, h, w)))
    return (d, h, w), (fd, fh, fw)


def locate(
    volume: Volume,
    *,
    spacing_mm: Millimeters,
    transpose: Shape = (0, 1, 2),
    crop_hu: float | None = None,
) -> Grid:
    """Where the prepared array lies in the scan.

    Args:
        volume: The scan.
        spacing_mm: Of the prepared array, along its own axes.
        transpose: Canonical axis behind each prepared one.
        crop_hu: Crop to the largest connected component above it, with 5 mm around; None: to the
            non-zero voxels. A scan with nothing of the kind is kept whole.
    """
    order, flip = canonical(volume.affine)
    order = tuple(order[axis] for axis in transpose)
    flip = tuple(flip[axis] for axis in transpose)
    turned = _turn(volume.voxels, order, flip)
    native_mm = tuple(volume.spacing_mm[axis] for axis in order)
    start, stop = _head(turned, crop_hu, native_mm) if crop_hu is not None else _nonzero(turned)
    cropped = tuple(b - a for a, b in zip(start, stop, strict=True))
    return Grid(
        native_shape=volume.voxels.shape,
        native_affine=tuple(tuple(float(v) for v in row) for row in volume.affine),
        order=order,
        flip=flip,
        crop_start=start,
        crop_stop=stop,
        shape=resampled_shape(cropped, native_mm, spacing_mm),
        spacing_mm=tuple(float(v) for v in spacing_mm),
    )  # pyright: ignore[reportArgumentType]


def to_grid(voxels: np.ndarray, grid: Grid, kind: str) -> np.ndarray:
    """A native array [D H W] as prepared: "image" (float32) or "label" (its own type).

    Raises:
        ValueError: If it has another shape than the grid's scan, or `kind` is neither.
    """
    if voxels.shape != tuple(grid.native_shape):
        raise ValueError(f"array of {voxels.shape} on a grid for {grid.native_shape} (D, H, W)")
    if kind not in ("image", "label"):
        raise ValueError(f"kind is image or label; got {kind!r}")
    cropped = _turn(voxels, grid.order, grid.flip)[_box(grid)]
    resample = resample_image if kind == "image" else resample_label
    done = resample(cropped, grid.shape, _axis(grid))
    return np.ascontiguousarray(done.astype(np.float32, copy=False) if kind == "image" else done)


def label_from_grid(label: np.ndarray, grid: Grid) -> np.ndarray:
    """A prepared label map on the scan's own voxels, uint8: each takes the nearest one."""
    index = [nearest_index(o, n) for o, n in zip(grid.shape, grid.cropped_shape, strict=True)]
    return _paste(label[np.ix_(*index)].astype(np.uint8), grid, 0)


def argmax_from_grid(logits: np.ndarray, grid: Grid) -> np.ndarray:
    """Logits [K D H W] resampled class by class to the scan's voxels; the largest wins, uint8.

    Only two classes are at full size at a time. The lower class wins a tie; outside the crop is
    background.
    """
    axis = _axis(grid)
    best = resample_linear(logits[0], grid.cropped_shape, axis)
    winner = np.zeros(grid.cropped_shape, np.uint8)
    for index in range(1, len(logits)):
        candidate = resample_linear(logits[index], grid.cropped_shape, axis)
        better = candidate > best
        winner[better] = index
        best = np.where(better, candidate, best)
    return _paste(winner, grid, 0)


def probabilities_from_grid(probabilities: np.ndarray, grid: Grid) -> np.ndarray:
    """Probabilities [K D H W] on the scan's voxels, float32; all background outside the crop."""
    axis = _axis(grid)
    whole = [
        _paste(resample_linear(p, grid.cropped_shape, axis), grid, float(index == 0))
        for index, p in enumerate(probabilities)
    ]
    return np.stack(whole)


def _axis(grid: Grid) -> int | None:
    return separate_axis(grid.native_spacing_mm, grid.spacing_mm)


def _box(grid: Grid) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(grid.crop_start, grid.crop_stop, strict=True))


def _turn(voxels: np.ndarray, order: tuple[int, ...], flip: tuple[bool, ...]) -> np.ndarray:
    """A view with the prepared axes' order and direction."""
    return voxels.transpose(order)[tuple(slice(None, None, -1 if f else 1) for f in flip)]


def _paste(cropped: np.ndarray, grid: Grid, outside: float) -> np.ndarray:
    """Undoes crop, direction and order."""
    native = np.full(grid.native_shape, outside, cropped.dtype)
    _turn(native, grid.order, grid.flip)[_box(grid)] = cropped  # a view: writes into `native`
    return native


def _nonzero(voxels: np.ndarray) -> tuple[Shape, Shape]:
    return _bounds(voxels != 0, voxels.shape)


def _head(voxels: np.ndarray, crop_hu: float, spacing_mm: tuple[float, ...]) -> tuple[Shape, Shape]:
    """Box of the largest component above a threshold, found on every so manyth voxel."""
    step = tuple(max(1, int(_DECIMATE_MM / mm)) for mm in spacing_mm)
    coarse = voxels[tuple(slice(None, None, s) for s in step)] > crop_hu
    labels, count = ndimage.label(coarse)
    if count == 0:
        return (0, 0, 0), voxels.shape
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    start, stop = _bounds(largest, coarse.shape)
    margin = [int(np.ceil(_MARGIN_MM / mm)) for mm in spacing_mm]
    # A coarse voxel stands for the ones up to its neighbors, so both ends move out by one step.
    low = tuple(max(0, (a - 1) * s - m) for a, s, m in zip(start, step, margin, strict=True))
    high = tuple(
        min(n, b * s + m) for b, s, m, n in zip(stop, step, margin, voxels.shape, strict=True)
    )
    return low, high  # pyright: ignore[reportReturnType]


def _bounds(mask: np.ndarray, shape: tuple[int, ...]) -> tuple[Shape, Shape]:
    """Start and stop of what is true; the whole array if nothing is."""
    start, stop = [], []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        found = np.flatnonzero(mask.any(axis=others))
        start.append(int(found[0]) if len(found) else 0)
        stop.append(int(found[-1]) + 1 if len(found) else shape[axis])
    return tuple(start), tuple(stop)  # pyright: ignore[reportReturnType]
