"""BLAST-CT's law of resampling: grids whose first voxel centers coincide. NumPy only.

A scan is turned to run to superior, posterior and left, and gets the spacing of the network from
the center of its first voxel on; intensities are linear in between, and those of integer scans
lose their fraction. Label maps take the nearest voxel. Where an axis runs the other way in the
file, BLAST-CT begins one voxel beyond the scan: there its lowest intensity goes on, and the scan's
last voxel is never seen.

Source: commit ccfa6ef of biomedia-mira/blast-ct, `nifti/rescale.py`, `nifti/savers.py`, with the
interpolators of SimpleITK 2.5.7.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Num, Shaped

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
) -> Num[np.ndarray, "_ _ _"]:
    """Linear in between; integers lose their fraction. `flip`: axes that the file has reversed."""
    lowest = float(voxels.min())
    voxels = _begun_outside(voxels, flip, lowest)
    whole = voxels.dtype if np.issubdtype(voxels.dtype, np.integer) else None
    out, inside = voxels.astype(np.float64), np.ones((1, 1, 1), bool)
    for axis in (2, 1, 0):  # the order in which ITK adds up, so that rounding is the same
        old = voxels.shape[axis]
        place = np.arange(shape[axis]) * (new_mm[axis] / old_mm[axis])
        low = np.clip(np.floor(place).astype(np.int64), 0, old - 1)
        share = place - low
        share[low == old - 1] = 0
        first, second = out.take(low, axis), out.take(np.minimum(low + 1, old - 1), axis)
        out = first + (second - first) * _along(share, axis)
        inside = inside & _along(place < old - 0.5, axis)
    out = np.where(inside, out, lowest)
    return out.astype(np.float32) if whole is None else np.trunc(out).astype(whole)


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
