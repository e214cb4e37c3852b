"""nnU-Net's law of resampling, in SciPy: voxel grids that share their outer faces.

A voxel i of n new ones has its center at (i + 0.5) * old / n - 0.5 old voxels; outside, the edge
goes on. Where one axis is far coarser than the others, planes across it are resampled in 2D and
picked by nearest center along it, so that thick slices are never blended.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int, Num, UInt8
from scipy import ndimage

from bhsd_jax.volume import Millimeters, Shape

ANISOTROPY = 3.0  # coarsest over finest spacing above which an axis is treated separately


def resampled_shape(shape: Shape, old_mm: Millimeters, new_mm: Millimeters) -> Shape:
    """Number of voxels that cover the same extent at another spacing.

    Halves are rounded to the even neighbor; an axis never vanishes.

    Source: nnU-Net v2.8.1, `compute_new_shape` (which may return 0).
    """
    d, h, w = (max(1, round(a / b * n)) for n, a, b in zip(shape, old_mm, new_mm, strict=True))
    return d, h, w


def separate_axis(old_mm: Millimeters, new_mm: Millimeters) -> int | None:
    """The axis along which slices are picked, not blended; None if all three are interpolated.

    The old spacing is asked first, the new one only if the old is not anisotropic. An anisotropic
    spacing whose coarsest value is shared by two axes has no separate axis, whatever the other is.

    Source: nnU-Net v2.8.1, `determine_do_sep_z_and_axis`.
    """
    for spacing in (old_mm, new_mm):
        if max(spacing) / min(spacing) > ANISOTROPY:
            coarsest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def nearest_index(old: int, new: int) -> Int[np.ndarray, " new"]:
    """Index of the old voxel nearest to the center of each new one; the later one in a tie."""
    position = old / new * (np.arange(new) + 0.5) - 0.5
    return np.clip(np.floor(position + 0.5).astype(np.int64), 0, old - 1)


def resample_image(
    voxels: Num[np.ndarray, "_ _ _"], new_shape: Shape, axis: int | None
) -> Float32[np.ndarray, "_ _ _"]:
    """Cubic splines in the planes across `axis`, or in 3D if there is none.

    Overshoot is clipped to the range of the plane (without `axis`: of the whole array). An array
    that has the shape already is not copied.

    Source: nnU-Net v2.8.1, `resample_data_or_seg` with order 3 and order_z 0; equal to
    `skimage.transform.resize(order=3, mode="edge", anti_aliasing=False)` per plane.
    """
    if voxels.shape == new_shape:
        return voxels.astype(np.float32, copy=False)
    return _resample(voxels, new_shape, axis, _cubic, np.dtype(np.float32))


def resample_linear(
    voxels: Num[np.ndarray, "_ _ _"],
    new_shape: Shape,
    axis: int | None,
    wanted: Bool[np.ndarray, " _"] | None = None,
) -> Float32[np.ndarray, "_ _ _"]:
    """Linear in the planes across `axis`, or in 3D if there is none: for logits, one class a call.

    Planes across `axis` that are not `wanted` become -inf, and take no time.

    Source: nnU-Net v2.8.1, `resample_data_or_seg` with order 1 and order_z 0.
    """
    if voxels.shape == new_shape:
        return voxels.astype(np.float32, copy=False)
    return _resample(voxels, new_shape, axis, _linear, np.dtype(np.float32), wanted)


def resample_label(
    label: UInt8[np.ndarray, "_ _ _"], new_shape: Shape, axis: int | None
) -> UInt8[np.ndarray, "_ _ _"]:
    """Each class's indicator linearly, then the largest wins; no new class can appear.

    In a tie the label of the nearest old voxel wins if it is among the tied, else the lowest.

    Source: nnU-Net v2.8.1 with batchgenerators 0.25.5, `resize_segmentation` with order 1.
    """
    if label.shape == new_shape:
        return label
    return _resample(label, new_shape, axis, _vote, label.dtype)


def _resample(
    voxels: np.ndarray,
    new_shape: Shape,
    axis: int | None,
    resize: Callable[[np.ndarray, Sequence[int]], np.ndarray],
    dtype: np.dtype,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    if axis is None:
        return resize(voxels, new_shape)
    out = np.empty(new_shape, dtype)
    planes, sources = np.moveaxis(out, axis, 0), np.moveaxis(voxels, axis, 0)
    picked = nearest_index(len(sources), len(planes))
    for index, source in enumerate(picked):
        if index and source == picked[index - 1]:
            planes[index] = planes[index - 1]
        elif wanted is not None and not wanted[source]:
            planes[index] = -np.inf
        elif sources.shape[1:] == planes.shape[1:]:
            planes[index] = sources[source]
        else:
            planes[index] = resize(sources[source], planes.shape[1:])
    return out


def _cubic(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    out = _zoom(array, shape, 3, np.float32)
    return np.clip(out, np.float32(array.min()), np.float32(array.max()), out=out)


def _linear(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return _zoom(array, shape, 1, np.float32)


def _vote(label: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    present = np.flatnonzero(np.bincount(label.ravel())).astype(label.dtype)
    winner = np.full(shape, present[0], label.dtype)
    if len(present) == 1:
        return winner
    nearest = label[np.ix_(*map(nearest_index, label.shape, shape))]
    best = np.zeros(shape)  # float64: ties are exact equality
    of_nearest = np.zeros(shape)
    for value in present:
        score = _zoom((label == value).astype(np.float64), shape, 1, np.float64)
        np.copyto(winner, value, where=score > best)
        np.copyto(of_nearest, score, where=nearest == value)
        np.maximum(best, score, out=best)
    np.copyto(winner, nearest, where=of_nearest == best)
    return winner


def _zoom(array: np.ndarray, shape: Sequence[int], order: int, dtype: type) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    out = np.empty(tuple(shape), dtype)
    ndimage.zoom(array, factors, out, order=order, mode="nearest", grid_mode=True)
    return out
