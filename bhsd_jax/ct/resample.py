"""nnU-Net's resampling law: cubic images, linear labels and logits, thick slices treated apart.

Source: nnU-Net v2 2.8.1, `resample_data_or_seg`, which calls scikit-image's `resize` (half-pixel
grid, edge values outside, clipped to the range of its input) and, across thick slices, picks the
nearest one.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike
from scipy import ndimage

from bhsd_jax.volume import Millimeters, Shape

_ANISOTROPY = 3  # spacing ratio above which slices are resampled one by one


def resampled_shape(shape: Shape, old_mm: Millimeters, new_mm: Millimeters) -> Shape:
    """Shape at another spacing; halves round to even, as nnU-Net's do. Never below 1."""
    d, h, w = (
        max(1, round(old / new * n)) for n, old, new in zip(shape, old_mm, new_mm, strict=True)
    )
    return d, h, w


def separate_axis(old_mm: Millimeters, new_mm: Millimeters) -> int | None:
    """The axis across thick slices, if the old spacing (or else the new) has one; None: all alike.

    Two equally coarse axes are no slices: then nothing is treated apart.
    """
    for spacing in (old_mm, new_mm):
        if max(spacing) / min(spacing) > _ANISOTROPY:
            coarsest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_image(voxels: np.ndarray, shape: Shape, axis: int | None) -> np.ndarray:
    """Float32 image [D H W] at another shape: cubic, never outside the range of its source."""
    return _by_slices(voxels.astype(np.float32, copy=False), shape, axis, _cubic)


def resample_linear(voxels: np.ndarray, shape: Shape, axis: int | None) -> np.ndarray:
    """Float32 field [D H W], such as the logits of one class, at another shape."""
    return _by_slices(voxels.astype(np.float32, copy=False), shape, axis, _linear)


def resample_label(label: np.ndarray, shape: Shape, axis: int | None) -> np.ndarray:
    """Label map at another shape: the class with the largest interpolated share.

    Where shares are equal the nearest voxel's class stays.
    """
    return _by_slices(label, shape, axis, _vote)


def nearest_index(old: int, new: int) -> np.ndarray:
    """For each of `new` positions along an axis, the nearest of `old` ones (upper at a tie)."""
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    return np.clip(np.floor(position + 0.5).astype(int), 0, old - 1)


def _by_slices(
    voxels: np.ndarray,
    shape: Shape,
    axis: int | None,
    resize: Callable[[np.ndarray, tuple[int, ...]], np.ndarray],
) -> np.ndarray:
    if voxels.shape == tuple(shape):
        return voxels
    if axis is None:
        return resize(voxels, tuple(shape))
    slices = np.moveaxis(voxels, axis, 0)
    plane = tuple(n for i, n in enumerate(shape) if i != axis)
    index = nearest_index(len(slices), shape[axis])
    out = np.empty((len(index), *plane), voxels.dtype)
    previous = -1
    for place, chosen in enumerate(index):
        if chosen == previous:
            out[place] = out[place - 1]
        else:
            out[place] = (
                resize(slices[chosen], plane) if slices[chosen].shape != plane else slices[chosen]
            )
        previous = chosen
    return np.ascontiguousarray(np.moveaxis(out, 0, axis))


def _zoom(
    voxels: np.ndarray, shape: tuple[int, ...], order: int, kind: DTypeLike = np.float32
) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, voxels.shape, strict=True)]
    return ndimage.zoom(
        voxels, factors, output=kind, order=order, mode="nearest", grid_mode=True
    )


def _cubic(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(_zoom(voxels, shape, 3), voxels.min(), voxels.max())


def _linear(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return _zoom(voxels, shape, 1)


def _vote(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    present = np.unique(label)
    nearest = _zoom(label, shape, 0, label.dtype)
    if len(present) == 1:
        return nearest
    winner = np.zeros(shape, label.dtype)
    best = np.full(shape, -1.0)
    for value in present:
        # float64, and ties exact to the last bit: who wins there is part of the law.
        share = _zoom((label == value).astype(np.float64), shape, 1, np.float64)
        better = (share > best) | ((share == best) & (nearest == value))
        winner[better] = value
        best = np.maximum(best, share)
    return winner
