"""The best plain HU threshold for bleeding on head CT: what a network has to beat.

Voxels between -20 and 110 HU are tissue, and are smoothed in the plane among themselves: bone and
air do not enter, or the rim of the brain would look like blood (0.28 instead of 0.53 Dice on
generated heads). The inside of the skull is then found: where at least half of the surroundings is
tissue; 3 mm are taken off in the plane, which cuts the bridges through sutures and skull base; the
largest connected piece in 3D is the brain (the scalp is thinner, and outside the bone); it gets
its 3 mm back and, slice by slice, its holes filled.

The band is chosen on the very cases it is scored on, so the result is an upper bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Int, Num

from bhsd_jax.volume import Millimeters

_TISSUE_HU = (-20.0, 110.0)
_BRIDGE_MM = 3.0  # what erosion must cut
_SMOOTH_MM = 1.5  # standard deviation in the plane
_LOWEST, _HIGHEST = 20, 140  # HU; the grid has steps of 1 HU
_Scan = Num[np.ndarray, "D H W"]
_Mask = Bool[np.ndarray, "D H W"]


@dataclass(frozen=True)
class Histogram:
    """Voxels inside the skull by smoothed HU, one bin per HU: all that scoring a band needs.

    Voxels that the reference does not annotate are not among them.
    """

    bleeding: Int[np.ndarray, " bins"]  # of them, voxels of the mask
    inside: Int[np.ndarray, " bins"]
    mask: int  # voxels of the mask, inside the skull or not


@dataclass(frozen=True)
class Band:
    """The best band and the Dice it reaches; NaN where neither mask nor band has a voxel."""

    hu: tuple[float, float]  # lower bound belongs to it, upper does not
    dice: tuple[float, ...]  # per case
    mean_dice: float  # over the cases where it is defined


def histogram(
    hu: _Scan, mask: _Mask, spacing_mm: Millimeters, annotated: _Mask | None = None
) -> Histogram:
    """Prepares one case; slices lie along the first axis.

    Only `annotated` voxels count, if they are given: what bleeds elsewhere is no false alarm.
    """
    value, tissue = smooth(hu, spacing_mm)
    inside = brain(tissue, spacing_mm)
    if annotated is not None:
        inside, mask = inside & annotated, mask & annotated
    edges = np.arange(_LOWEST, _HIGHEST + 1)
    return Histogram(
        np.histogram(value[inside & mask], edges)[0],
        np.histogram(value[inside], edges)[0],
        int(mask.sum()),
    )


def best_band(cases: Sequence[Histogram]) -> Band:
    """Tries all bands between 20 and 140 HU and takes the one with the largest mean case Dice.

    Case Dice by the `nnunet` convention: cases without bleeding count 0 if the band finds any.

    Raises:
        ValueError: If there are no cases.
    """
    if not cases:
        raise ValueError("threshold: no cases to choose a band on")
    dice = np.stack([_dice_of_all_bands(case) for case in cases])
    defined = np.isfinite(dice)
    counted = defined.sum(0)
    mean = np.where(defined, dice, 0).sum(0) / np.maximum(counted, 1)
    low, high = np.unravel_index(int(mean.argmax()), mean.shape)
    dice_there = float(mean[low, high]) if counted[low, high] else math.nan
    band = (float(_LOWEST + low), float(_LOWEST + high))
    return Band(band, tuple(dice[:, low, high].tolist()), dice_there)


def brain(tissue: Float[np.ndarray, "D H W"], spacing_mm: Millimeters) -> _Mask:
    """The inside of the skull from the share of tissue around each voxel; may be empty."""
    soft = tissue >= 0.5
    disk = _disk(_BRIDGE_MM, spacing_mm)
    core = scipy.ndimage.binary_erosion(soft, disk)
    numbers, count = scipy.ndimage.label(core)  # pyright: ignore[reportGeneralTypeIssues]
    if not count:
        return np.zeros(soft.shape, bool)
    largest = numbers == np.bincount(numbers.ravel())[1:].argmax() + 1
    grown = scipy.ndimage.binary_dilation(largest, disk)
    for index, each in enumerate(grown):
        grown[index] = scipy.ndimage.binary_fill_holes(each)
    return grown


def smooth(
    hu: _Scan, spacing_mm: Millimeters
) -> tuple[Float[np.ndarray, "D H W"], Float[np.ndarray, "D H W"]]:
    """HU averaged over the tissue around each voxel, and the share of tissue there."""
    sigma = (0.0, _SMOOTH_MM / spacing_mm[1], _SMOOTH_MM / spacing_mm[2])
    tissue = (hu >= _TISSUE_HU[0]) & (hu <= _TISSUE_HU[1])
    value = scipy.ndimage.gaussian_filter(np.where(tissue, hu, 0).astype(np.float32), sigma)
    share = scipy.ndimage.gaussian_filter(tissue.astype(np.float32), sigma)
    return value / np.maximum(share, 1e-3), share


def _disk(radius_mm: float, spacing_mm: Millimeters) -> Bool[np.ndarray, "1 rows columns"]:
    """A disk of that radius in the plane, with at least the four neighbors of its center."""
    rows, columns = (max(1, round(radius_mm / s)) for s in spacing_mm[1:])
    y, x = np.ogrid[-rows : rows + 1, -columns : columns + 1]
    return ((y / rows) ** 2 + (x / columns) ** 2 <= 1)[None]


def _dice_of_all_bands(case: Histogram) -> Float[np.ndarray, "low high"]:
    """Entry [i, j] is the band from bin i up to before bin j; -1 where there is none."""
    hit, drawn = (np.concatenate([[0], np.cumsum(h)]) for h in (case.bleeding, case.inside))
    tp, predicted = (c[None, :] - c[:, None] for c in (hit, drawn))
    total = predicted + case.mask
    dice = np.divide(2 * tp, total, out=np.full(total.shape, math.nan), where=total > 0)
    return np.where(np.arange(len(hit))[None, :] > np.arange(len(hit))[:, None], dice, -1.0)
