"""Lesion-wise scores of the BraTS 2023 challenges, where each lesion counts like any other."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage

from bhsd_jax.metrics import lesion, surface
from bhsd_jax.volume import Millimeters, bounding_box

MISSED_MM = 374.0  # counted for a lesion that was missed, or made up: the diagonal of their scans
# Neighbors in a dilation: those across faces and edges, 18 in all.
_GROWTH = scipy.ndimage.generate_binary_structure(3, 2)
_Box = tuple[slice, ...]  # of D, H, W


@dataclass(frozen=True)
class LesionWise:
    """One mask pair; both empty is perfect: Dice 1 and 0 mm."""

    dice: float
    hd95_mm: float
    found: int  # lesions of the reference, above the least volume, that a predicted one is near
    missed: int
    false: int  # predicted components far from every lesion


def lesion_wise(
    reference: lesion.Mask,
    predicted: lesion.Mask,
    spacing_mm: Millimeters,
    *,
    dilation: int = 3,
    least_mm3: float = 50.0,
) -> LesionWise:
    """Means over lesions of the reference, and of predicted components that are near none (Dice 0).

    Components of the reference whose dilations touch are one lesion. It is compared with all
    predicted components, whole, that its own dilation meets. A lesion of no more than `least_mm3`
    does not count itself, but what meets it is not false.

    Args:
        reference: Mask [D H W].
        predicted: Likewise.
        spacing_mm: D, H, W.
        dilation: Voxels by which lesions are dilated: 3 for gliomas and children's tumors, 1 for
            meningiomas and metastases.
        least_mm3: 50, for metastases 2.

    Raises:
        ValueError: If the shapes differ.

    Source: `get_LesionWiseScores` and `get_LesionWiseResults` of BraTS-2023-Metrics 43c9052.
    """
    if reference.shape != predicted.shape:
        raise ValueError(
            f"brats: reference has shape {reference.shape}, prediction {predicted.shape}; "
            "both must lie on the grid of the scan"
        )
    box = bounding_box(reference | predicted)
    if box is None:
        return LesionWise(1.0, 0.0, 0, 0, 0)
    box = _wider(box, dilation + 1, reference.shape)
    reference, predicted = reference[box], predicted[box]
    components, sizes = lesion.components(predicted)
    grown, _ = lesion.components(_dilated(reference, dilation))
    lesions = np.where(reference, grown, 0)
    near: set[int] = set()
    scores: list[tuple[float, float]] = []
    found = 0
    for number, place in enumerate(scipy.ndimage.find_objects(lesions), start=1):
        around = _wider(place, dilation, lesions.shape)
        reached = _dilated(lesions[around] == number, dilation)
        met = np.unique(components[around][reached])
        met = met[met > 0]
        near |= set(met.tolist())
        own = lesions == number
        if own.sum() * math.prod(spacing_mm) <= least_mm3:
            continue
        found += bool(met.size)
        scores.append(_compare(own, np.isin(components, met), spacing_mm))
    false = len(sizes) - len(near)
    count = len(scores) + false
    if not count:
        return LesionWise(1.0, 0.0, 0, 0, 0)
    dice = sum(dice for dice, _ in scores) / count
    hd95 = (sum(hd95 for _, hd95 in scores) + false * MISSED_MM) / count
    return LesionWise(dice, hd95, found, len(scores) - found, false)


def _compare(
    reference: lesion.Mask, predicted: lesion.Mask, spacing_mm: Millimeters
) -> tuple[float, float]:
    """Dice and HD95 in mm of a lesion and what is held against it."""
    dice = 2 * (reference & predicted).sum() / (reference.sum() + predicted.sum())
    hd95 = surface.hausdorff(surface.element_distances(reference, predicted, spacing_mm), 95)
    return float(dice), hd95 if math.isfinite(hd95) else MISSED_MM


def _dilated(mask: lesion.Mask, times: int) -> lesion.Mask:
    """0 times: as it is (SciPy would dilate until nothing changes)."""
    if not times:
        return mask
    return np.asarray(scipy.ndimage.binary_dilation(mask, _GROWTH, iterations=times), bool)


def _wider(box: _Box, margin: int, shape: tuple[int, ...]) -> _Box:
    """A box with so many voxels more on every side, within the array."""
    return tuple(
        slice(max(side.start - margin, 0), min(side.stop + margin, size))
        for side, size in zip(box, shape, strict=True)
    )
