"""Overlap of two label maps, class by class, from voxel counts; NaN where it is not defined."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from bhsd_jax.labels import Labels


@dataclass(frozen=True)
class Counts:
    """Voxels of one class against all others, and every overlap measure that follows from them."""

    tp: int
    fp: int
    fn: int

    @property
    def reference(self) -> int:
        """Voxels of the class in the reference."""
        return self.tp + self.fn

    @property
    def predicted(self) -> int:
        """Voxels of the class in the prediction."""
        return self.tp + self.fp

    @property
    def dice(self) -> float:
        """NaN where both are empty, 0 where one is."""
        return rate(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union; NaN where both are empty."""
        return rate(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """Share of the reference that was found; NaN where the reference is empty."""
        return rate(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> float:
        """Share of the prediction that is right; NaN where the prediction is empty."""
        return rate(self.tp, self.tp + self.fp)


def rate(above: float, below: float) -> float:
    """The ratio of two counts or volumes; NaN where the second is 0."""
    return above / below if below else math.nan


def count(
    reference: Integer[np.ndarray, "..."],
    predicted: Integer[np.ndarray, "..."],
    num_classes: int,
) -> tuple[Counts, ...]:
    """Counts per class, background first, in one pass over the voxels.

    Raises:
        ValueError: If the shapes differ, or a value is not in 0..num_classes-1.
    """
    if reference.shape != predicted.shape:
        raise ValueError(
            f"overlap: reference has shape {reference.shape}, prediction {predicted.shape}; "
            "both must lie on the grid of the scan"
        )
    for name, label in (("reference", reference), ("prediction", predicted)):
        if label.size and not 0 <= label.min() <= label.max() < num_classes:
            raise ValueError(
                f"overlap: {name} holds values {label.min()} to {label.max()}; "
                f"expected 0 to {num_classes - 1}"
            )
    pairs = reference.astype(np.int64).ravel() * num_classes + predicted.ravel()
    table = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    hits, in_reference, in_prediction = np.diag(table), table.sum(1), table.sum(0)
    return tuple(
        Counts(int(tp), int(p - tp), int(r - tp))
        for tp, r, p in zip(hits, in_reference, in_prediction, strict=True)
    )


def count_targets(
    reference: UInt8[np.ndarray, "..."], predicted: UInt8[np.ndarray, "..."], labels: Labels
) -> tuple[Counts, ...]:
    """Counts per class or region, over the voxels that the reference annotates.

    Raises:
        ValueError: If the shapes differ.

    Source: nnU-Net v2.8.1, `compute_metrics`.
    """
    if reference.shape != predicted.shape:
        raise ValueError(
            f"overlap: reference has shape {reference.shape}, prediction {predicted.shape}"
        )
    seen = labels.annotated(reference)
    found = []
    for truth, guess in zip(labels.masks(reference), labels.masks(predicted), strict=True):
        tp = int(np.count_nonzero(truth & guess & seen))
        fn = int(np.count_nonzero(truth & seen)) - tp
        fp = int(np.count_nonzero(guess & seen)) - tp
        found.append(Counts(tp, fp, fn))
    return tuple(found)


def mean_pairwise_dice(masks: Sequence[Bool[np.ndarray, "*_"]]) -> float:
    """Mean Dice over all pairs; two empty masks agree: 1.

    Raises:
        ValueError: If there are fewer than two.

    Source: Roy et al., NeuroImage 195 (2019), section 2.4: their mean Dice of sample pairs.
    """
    if len(masks) < 2:
        raise ValueError(f"agreement: want two masks or more; got {len(masks)}")
    return float(np.mean([_pair_dice(*pair) for pair in itertools.combinations(masks, 2)]))


def _pair_dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
