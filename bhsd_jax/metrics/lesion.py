"""Lesion-wise detection: which connected bleeds were found, and which were made up."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Int

from bhsd_jax.volume import bounding_box

Mask = Bool[np.ndarray, "_ _ _"]  # shapes are compared below, with a message

SMALL_ML = 1.0
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbors


@dataclass(frozen=True)
class Detection:
    """Lesions of one mask pair: sizes, and which have a counterpart."""

    reference_ml: tuple[float, ...]  # one per lesion of the reference
    hit: tuple[bool, ...]  # of the same length
    predicted_ml: tuple[float, ...]
    real: tuple[bool, ...]  # overlaps a lesion that was hit

    @property
    def tp(self) -> int:
        """Lesions of the reference that were found."""
        return sum(self.hit)

    @property
    def fn(self) -> int:
        """Lesions of the reference that were missed."""
        return len(self.hit) - self.tp

    @property
    def fp(self) -> int:
        """Predicted lesions without a counterpart."""
        return len(self.real) - sum(self.real)

    @property
    def sensitivity(self) -> float:
        """Share of lesions found; NaN without any."""
        return rate(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> float:
        """Share of predicted lesions that are real; NaN without any."""
        return rate(sum(self.real), len(self.real))

    @property
    def f1(self) -> float:
        """Of found, missed and made-up lesions, as challenges count; NaN where there are none.

        One prediction may find several lesions, so that it is no mean of the two shares above.
        """
        return rate(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def recall_below(self, size_ml: float = SMALL_ML) -> tuple[int, int]:
        """How many lesions smaller than this were hit, and how many there are."""
        small = [hit for ml, hit in zip(self.reference_ml, self.hit, strict=True) if ml < size_ml]
        return sum(small), len(small)


def detect(
    reference: Mask,
    predicted: Mask,
    voxel_ml: float,
    *,
    min_overlap: float = 0.0,
    min_iou: float = 0.0,
) -> Detection:
    """Finds 26-connected components in both masks and pairs those that overlap.

    A lesion of the reference is hit if more than the share `min_overlap` of it is predicted, and,
    with `min_iou` above 0, if it and all predicted components it touches, taken together, have at
    least that intersection over union. By default a single common voxel is a hit. One prediction
    may hit several lesions, and several predictions one.

    Raises:
        ValueError: If the shapes differ.
    """
    if reference.shape != predicted.shape:
        raise ValueError(
            f"lesion: reference has shape {reference.shape}, prediction {predicted.shape}; "
            "both must lie on the grid of the scan"
        )
    in_reference, reference_size = components(reference)
    in_predicted, predicted_size = components(predicted)
    lesions = len(reference_size), len(predicted_size)
    pairs, shared = touching(in_reference, in_predicted)
    covered = np.bincount(pairs[0], shared, lesions[0])
    touched = np.bincount(pairs[0], predicted_size[pairs[1]], lesions[0])
    union = reference_size + touched - covered
    hit = (covered > 0) & (covered > min_overlap * reference_size) & (covered >= min_iou * union)
    real = np.bincount(pairs[1], hit[pairs[0]], lesions[1]) > 0
    return Detection(
        tuple((reference_size * voxel_ml).tolist()),
        tuple(hit.tolist()),
        tuple((predicted_size * voxel_ml).tolist()),
        tuple(real.tolist()),
    )


def touching(
    one: Int[np.ndarray, "_ _ _"], other: Int[np.ndarray, "_ _ _"]
) -> tuple[Int[np.ndarray, "2 P"], Int[np.ndarray, " P"]]:
    """Pairs of components, each counted from 0, that have voxels in common, and how many."""
    both = (one > 0) & (other > 0)
    first, second = (numbers[both].astype(np.int64) - 1 for numbers in (one, other))
    count = int(second.max(initial=0)) + 1
    # One number for each pair: sorting those is many times as fast as sorting pairs.
    found, shared = np.unique(first * count + second, return_counts=True)
    return np.stack(np.divmod(found, count)), shared


def rate(above: float, below: float) -> float:
    """A share; NaN of nothing."""
    return above / below if below else math.nan


def components(mask: Mask) -> tuple[Int[np.ndarray, "_ _ _"], Int[np.ndarray, " N"]]:
    """Component number per voxel, from 1, and voxels per component."""
    numbers = np.zeros(mask.shape, np.int32)
    box = bounding_box(mask)
    if box is None:
        return numbers, np.zeros(0, np.int64)
    numbers[box] = scipy.ndimage.label(mask[box], _TOUCHING)[0]  # pyright: ignore[reportIndexIssue]
    return numbers, np.bincount(numbers[box].ravel())[1:]
