"""Distances between the surfaces of two masks, in mm.

Two families, because published numbers come from both. *Elements* (the headline: `hd95_mm`,
`nsd`): the surface between voxels, every piece weighted by its area; what DeepMind's
`surface-distance` computes. *Edge voxels*: mask voxels with a neighbor outside, each counting the
same; what MONAI computes. With thick slices the second counts caps as much as walls and is off by
up to a slice.

Empty masks, here and below: both empty, nothing is defined (NaN); one empty, every distance is
infinite, hence Hausdorff distances are infinite and surface Dice is 0.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Int

from bhsd_jax.metrics import surface_area
from bhsd_jax.volume import Millimeters, cropped_alike

Mask = Bool[np.ndarray, "_ _ _"]  # shapes are compared below, with a message


@dataclass(frozen=True)
class Distances:
    """Two surfaces seen from each other: how far each of their parts is from the other surface."""

    to_predicted_mm: np.ndarray  # [N] from each part of the reference's surface, ascending
    reference_weight: np.ndarray  # [N] area in mm^2, or 1 per edge voxel
    to_reference_mm: np.ndarray  # [M] from each part of the prediction's surface, ascending
    predicted_weight: np.ndarray  # [M]

    @property
    def empty(self) -> tuple[bool, bool]:
        """Whether reference and prediction have no surface at all."""
        return not self.to_predicted_mm.size, not self.to_reference_mm.size


def element_distances(reference: Mask, predicted: Mask, spacing_mm: Millimeters) -> Distances:
    """Distances and areas of surface elements, which lie between eight voxels each.

    Raises:
        ValueError: If the shapes differ or a spacing is not positive.

    Source: DeepMind `surface-distance` 0.1.
    """
    masks = _cropped(reference, predicted, spacing_mm)
    areas = surface_area.table(spacing_mm)
    codes = [_codes(mask) for mask in masks]
    points = [np.argwhere((code != 0) & (code != 255)) for code in codes]
    weights = [areas[code[tuple(at.T)]] for code, at in zip(codes, points, strict=True)]
    return _between(points, weights, spacing_mm)


def edge_distances(
    reference: Mask, predicted: Mask, spacing_mm: Millimeters, *, single: bool = True
) -> Distances:
    """Distances of edge voxels, those with one of their six neighbors outside; weights are 1.

    Raises:
        ValueError: If the shapes differ or a spacing is not positive.

    Source: MONAI 1.6.1, `monai.metrics.utils`, including its `single` precision, which decides
    whether a distance equal to a tolerance is within it.
    """
    masks = _cropped(reference, predicted, spacing_mm)
    inner = [np.asarray(scipy.ndimage.binary_erosion(mask), bool) for mask in masks]
    points = [np.argwhere(mask & ~eroded) for mask, eroded in zip(masks, inner, strict=True)]
    weights = [np.ones(len(at)) for at in points]
    distances = _between(points, weights, spacing_mm)
    if not single:
        return distances
    return Distances(
        distances.to_predicted_mm.astype(np.float32),
        distances.reference_weight,
        distances.to_reference_mm.astype(np.float32),
        distances.predicted_weight,
    )


def hausdorff(distances: Distances, percent: float = 100.0) -> float:
    """Distance within which so many percent of the area of each surface lies of the other.

    The larger of both directions. Infinite as soon as one mask is empty, also if both are, as in
    the reference code; `hd95_mm` has the rule of this module.

    Source: `compute_robust_hausdorff` of DeepMind `surface-distance` 0.1.
    """
    return max(
        _within(distances.to_predicted_mm, distances.reference_weight, percent),
        _within(distances.to_reference_mm, distances.predicted_weight, percent),
    )


def hd95_mm(distances: Distances) -> float:
    """`hausdorff` at 95 percent; NaN if both masks are empty, infinite if one is."""
    return math.nan if all(distances.empty) else hausdorff(distances, 95)


def edge_hausdorff(
    distances: Distances, percent: float = 100.0, *, directed: bool = False
) -> float:
    """Percentile of the distances, interpolated, every edge voxel counting the same.

    The larger of both directions, or from prediction to reference only if `directed`. With one
    mask empty: infinite at 100 percent, else NaN, for the reference code interpolates between
    infinities.

    Source: `compute_hausdorff_distance` of MONAI 1.6.1.
    """
    if any(distances.empty):
        return math.nan if all(distances.empty) or percent < 100 else math.inf
    forth = float(np.percentile(distances.to_reference_mm, percent))
    back = float(np.percentile(distances.to_predicted_mm, percent))
    return forth if directed else max(forth, back)


def average_distance(distances: Distances) -> tuple[float, float]:
    """Weighted mean distance from reference to prediction, and from prediction to reference.

    NaN for the direction that starts at an empty mask.
    """
    return (
        _mean(distances.to_predicted_mm, distances.reference_weight),
        _mean(distances.to_reference_mm, distances.predicted_weight),
    )


def average_symmetric_distance(distances: Distances) -> float:
    """Weighted mean distance over both surfaces together (ASSD); infinite if one mask is empty."""
    return _mean(
        np.concatenate([distances.to_predicted_mm, distances.to_reference_mm]),
        np.concatenate([distances.reference_weight, distances.predicted_weight]),
    )


def surface_overlap(distances: Distances, tolerance_mm: float) -> tuple[float, float]:
    """Share of the reference's and of the prediction's surface within the tolerance of the other.

    NaN for the surface of an empty mask.
    """
    return (
        _share(distances.to_predicted_mm, distances.reference_weight, tolerance_mm),
        _share(distances.to_reference_mm, distances.predicted_weight, tolerance_mm),
    )


def surface_dice(distances: Distances, tolerance_mm: float) -> float:
    """Share of both surfaces together within the tolerance; a distance equal to it counts.

    NaN if both masks are empty, 0 if one is. A tolerance below the slice step forgives nothing
    across slices.

    Source: Nikolov et al. 2018, arXiv:1809.04430.
    """
    return _share(
        np.concatenate([distances.to_predicted_mm, distances.to_reference_mm]),
        np.concatenate([distances.reference_weight, distances.predicted_weight]),
        tolerance_mm,
    )


def _cropped(reference: Mask, predicted: Mask, spacing_mm: Millimeters) -> tuple[Mask, Mask]:
    """Both masks in the box that holds them, with one empty voxel around it."""
    if reference.shape != predicted.shape:
        raise ValueError(
            f"surface: reference has shape {reference.shape}, prediction {predicted.shape}; "
            "both must lie on the grid of the scan"
        )
    if not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise ValueError(f"surface: spacing {spacing_mm} mm (D, H, W); must be positive")
    reference, predicted = cropped_alike(reference, predicted)
    return np.pad(reference, 1), np.pad(predicted, 1)


def _codes(mask: Mask) -> np.ndarray:
    """Bit i of a code is the voxel at corner i of the 2 x 2 x 2 neighborhood."""
    size = [n - 1 for n in mask.shape]
    codes = np.zeros(size, np.uint8)
    for bit, corner in enumerate(surface_area.CORNERS):
        shifted = mask[tuple(slice(c, c + n) for c, n in zip(corner, size, strict=True))]
        codes |= shifted.astype(np.uint8) << bit
    return codes


def _between(
    points: list[np.ndarray], weights: list[np.ndarray], spacing_mm: Millimeters
) -> Distances:
    forth = _sorted(_nearest(points[0], points[1], spacing_mm), weights[0])
    back = _sorted(_nearest(points[1], points[0], spacing_mm), weights[1])
    return Distances(*forth, *back)


def _nearest(
    start: Int[np.ndarray, "N 3"], goal: Int[np.ndarray, "M 3"], spacing_mm: Millimeters
) -> np.ndarray:
    """Distance from every start to the nearest goal, in mm.

    A tree of points takes a tenth of the time of a distance transform on a head CT: surfaces are
    thin. Distances are formed from whole voxels, so that they do not depend on where a mask lies.
    Where both surfaces run there is nothing to look for.
    """
    if not len(start) or not len(goal):
        return np.full(len(start), math.inf)
    spacing = np.asarray(spacing_mm)
    there = np.zeros(np.maximum(start.max(0), goal.max(0)) + 1, bool)
    there[tuple(goal.T)] = True
    away = ~there[tuple(start.T)]
    distance = np.zeros(len(start))
    from scipy import spatial  # here, for it takes long to import, and most verbs measure nothing

    tree = spatial.KDTree(goal * spacing, balanced_tree=False, compact_nodes=False)
    _, index = tree.query(start[away] * spacing)
    distance[away] = np.sqrt((((start[away] - goal[index]) * spacing) ** 2).sum(1))
    return distance


def _sorted(distance: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((weight, distance))
    return distance[order], weight[order]


def _within(distance: np.ndarray, weight: np.ndarray, percent: float) -> float:
    if not distance.size:
        return math.inf
    share = np.cumsum(weight) / weight.sum()
    index = int(np.searchsorted(share, percent / 100))
    return float(distance[min(index, distance.size - 1)])


def _mean(distance: np.ndarray, weight: np.ndarray) -> float:
    if not distance.size:
        return math.nan
    return float((distance * weight).sum() / weight.sum())


def _share(distance: np.ndarray, weight: np.ndarray, tolerance_mm: float) -> float:
    if not distance.size:
        return math.nan
    return float(weight[distance <= tolerance_mm].sum() / weight.sum())
