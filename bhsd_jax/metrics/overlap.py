"""Overlap of two label maps, class by class, from voxel counts; NaN where it is not defined."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, UInt8

from bhsd_jax.labels import Labels


@dataclass(frozen=True)
class Counts:
    """Voxels of one class against all others, and every overlap measure that follows from them."""

    tp: int
    fp: int
    fn: int
    tn: int

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
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union; NaN where both are empty."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """Share of the reference that was found; NaN where the reference is empty."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """Share of what is not the class and was left alone; NaN where the class fills the scan.

        Close to 1 for every small lesion, however bad the prediction.
        """
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        """Share of the prediction that is right; NaN where the prediction is empty."""
        return _ratio(self.tp, self.tp + self.fp)


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
        Counts(int(tp), int(p - tp), int(r - tp), int(table.sum() - r - p + tp))
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
    found, total = [], int(np.count_nonzero(seen))
    for truth, guess in zip(labels.masks(reference), labels.masks(predicted), strict=True):
        tp = int(np.count_nonzero(truth & guess & seen))
        fn = int(np.count_nonzero(truth & seen)) - tp
        fp = int(np.count_nonzero(guess & seen)) - tp
        found.append(Counts(tp, fp, fn, total - tp - fp - fn))
    return tuple(found)


@dataclass(frozen=True)
class VolumeError:
    """How much too large or too small a prediction is, wherever it lies."""

    reference_ml: float
    predicted_ml: float

    @property
    def signed_ml(self) -> float:
        """Positive if too much was predicted."""
        return self.predicted_ml - self.reference_ml

    @property
    def absolute_ml(self) -> float:
        """Size of the error without its sign."""
        return abs(self.signed_ml)

    @property
    def relative(self) -> float:
        """Absolute error as a share of the reference volume; NaN where that is 0.

        Source: the RVD of the INSTANCE 2022 challenge.
        """
        return _ratio(self.absolute_ml, self.reference_ml)


def volume_error(counts: Counts, voxel_ml: float) -> VolumeError:
    """Volumes of one class; `voxel_ml` is of the voxel as it was, tilted gantry and all."""
    return VolumeError(counts.reference * voxel_ml, counts.predicted * voxel_ml)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
