"""BLAST-CT's law of resampling: grids whose first voxel centers coincide. NumPy only.

A scan is turned to run to superior, posterior and left, and gets the spacing of the network from
the center of its first voxel on; intensities are linear in between. Label maps take the nearest
voxel. Where an axis runs the other way in the file, BLAST-CT begins one voxel beyond the scan:
there its lowest intensity goes on, and the scan's last voxel is never seen.

Integers lose their fraction in either step, and in the first one voxels that should be as they
were lose 1 HU: SimpleITK finds their places by way of the world, and rounding puts many just
before the voxel. Networks were trained on such scans. The places are computed here in ITK's order
of additions, so that scans along the axes of the world come out as BLAST-CT's program has them,
to the last bit. Those of a turned scan get the same rounding as if it were not turned, and differ
by 1 HU in some voxels.

Source: commit ccfa6ef of biomedia-mira/blast-ct, `nifti/rescale.py`, `nifti/savers.py`, with
SimpleITK 2.5.7 (`ResampleImageFilter::LinearThreadedGenerateData`, linear interpolation).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Num, Shaped

from bhsd_jax.volume import Millimeters, Shape

_Flip = tuple[bool, bool, bool]


def shape_for(shape: Shape, old_mm: Millimeters, new_mm: Millimeters) -> Shape:
    """Number of voxels from the center of the first voxel to that of the last one."""
    d, h, w = (
        max(1, round((n - 1) * a / b + 1)) for n, a, b in zip(shape, old_mm, new_mm, strict=True)
    )
    return d, h, w


def to_centers(
    voxels: Num[np.ndarray, "_ _ _"],
    shape: Shape,
    old_mm: Millimeters,
    new_mm: Millimeters,
    flip: _Flip,
    *,
    origin_mm: Millimeters = (0.0, 0.0, 0.0),
    order: tuple[int, int, int] = (0, 1, 2),
) -> Num[np.ndarray, "_ _ _"]:
    """Linear in between; integers lose their fraction.

    Args:
        voxels: Of the turned scan.
        shape: To get.
        old_mm: Spacing of the scan.
        new_mm: Spacing to get.
        flip: Axes that the file has reversed.
        origin_mm: Where the file's first voxel lies, along superior, posterior and left.
        order: Which axis of the file, slices first, each axis is; the file's last one is
            interpolated first.
    """
    lowest = float(voxels.min())
    in_file = np.flip(voxels, tuple(axis for axis in range(3) if flip[axis]))
    turned = []
    for axis, (n, mm) in enumerate(zip(voxels.shape, old_mm, strict=True)):
        sign = -1.0 if flip[axis] else 1.0
        begun = origin_mm[axis] + (sign * (n * mm) if flip[axis] else 0.0)
        turned.append(_places(n, mm, begun, origin_mm[axis], sign / mm, along_rows=axis == 2))
    first_to_last = sorted(range(3), key=lambda axis: -order[axis])
    upright = _linear(in_file, turned, first_to_last, lowest)
    places = []
    for axis, (n, mm) in enumerate(zip(shape, new_mm, strict=True)):
        begun = origin_mm[axis] - (voxels.shape[axis] * old_mm[axis] if flip[axis] else 0.0)
        places.append(_places(n, mm, begun, begun, 1 / old_mm[axis], along_rows=axis == 2))
    return _linear(upright, places, (2, 1, 0), lowest)


def _places(
    count: int, mm: float, begun: float, origin: float, per_mm: float, *, along_rows: bool
) -> Float64[np.ndarray, " n"]:
    """Where voxels lie, counted in voxels of the scan from its `origin` on, as ITK rounds it.

    Along rows ITK finds the first and the one behind the last, and divides what is in between.
    """
    index = np.array([0.0, count]) if along_rows else np.arange(float(count))
    found = (mm * index + begun - origin) * per_mm
    if not along_rows:
        return found
    return found[0] + np.arange(float(count)) / count * (found[1] - found[0])


def _linear(
    voxels: np.ndarray, places: Sequence[np.ndarray], order: Sequence[int], outside: float
) -> np.ndarray:
    """At these places of every axis, one axis of `order` after another; integers are truncated."""
    kind, inside = voxels.dtype, np.ones((1, 1, 1), bool)
    out = voxels.astype(np.float64)
    for axis in order:  # ITK's, so that rounding is the same
        old, place = voxels.shape[axis], places[axis]
        low = np.clip(np.floor(place).astype(np.int64), 0, old - 1)
        share = np.maximum(place - low, 0)
        share[low == old - 1] = 0
        first = out.take(low, axis)
        if share.any():
            second = out.take(np.minimum(low + 1, old - 1), axis)
            first += (second - first) * _along(share, axis)
        out = first
        inside = inside & _along((place >= -0.5) & (place < old - 0.5), axis)
    out = np.where(inside, out, outside)
    return np.trunc(out).astype(kind) if np.issubdtype(kind, np.integer) else out.astype(np.float32)


def label_to_centers(
    label: Shaped[np.ndarray, "_ _ _"],
    shape: Shape,
    old_mm: Millimeters,
    new_mm: Millimeters,
    flip: _Flip,
) -> Shaped[np.ndarray, "_ _ _"]:
    """The class of the nearest voxel; 0 outside."""
    label = _begun_outside(label, flip, 0)
    indices = [
        _nearest(label.shape[axis], shape[axis], new_mm[axis], old_mm[axis]) for axis in range(3)
    ]
    return _taken(label, indices, 0)


def from_centers(
    voxels: Shaped[np.ndarray, "_ _ _"],
    native_shape: Shape,
    native_mm: Millimeters,
    mm: Millimeters,
    flip: _Flip,
    outside: float = 0,
) -> Shaped[np.ndarray, "_ _ _"]:
    """The nearest voxel of the grid at every voxel of the turned scan."""
    indices = []
    for axis in range(3):
        # Of one voxel more than the scan has: the first or the last is the one outside.
        index = _nearest(voxels.shape[axis], native_shape[axis] + 1, native_mm[axis], mm[axis])
        indices.append(index[1:] if flip[axis] else index[:-1])
    return _taken(voxels, indices, outside)


def _begun_outside(voxels: np.ndarray, flip: _Flip, outside: float) -> np.ndarray:
    """With a voxel of `outside` before each axis that was reversed, in place of its last one."""
    for axis, reversed_ in enumerate(flip):
        if reversed_:
            edge = np.full_like(voxels.take([0], axis), outside)
            voxels = np.concatenate([edge, voxels.take(range(voxels.shape[axis] - 1), axis)], axis)
    return voxels


def _nearest(old: int, new: int, new_mm: float, old_mm: float) -> Int[np.ndarray, " n"]:
    """Of `old` voxels, the one nearest to each of `new`; -1 beyond them."""
    place = np.arange(new) * (new_mm / old_mm)
    return np.where(place < old - 0.5, np.floor(place + 0.5).astype(np.int64), -1)


def _taken(voxels: np.ndarray, indices: Sequence[np.ndarray], outside: float) -> np.ndarray:
    """The voxels at these indices along every axis; `outside` where an index is -1."""
    d, h, w = (_along(index >= 0, axis) for axis, index in enumerate(indices))
    found = voxels[np.ix_(*(np.maximum(index, 0) for index in indices))]
    return np.where(d & h & w, found, voxels.dtype.type(outside))


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    sizes: Sequence[int] = [-1 if axis == other else 1 for other in range(3)]
    return values.reshape(sizes)
