"""Lesion-wise detection: which connected bleeds were found, and which were made up."""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Int

from bhsd_jax.volume import bounding_box

Mask = Bool[np.ndarray, "_ _ _"]  # shapes are compared below, with a message

SMALL_ML = 1.0  # lesions below it are counted apart
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbors


@dataclass(frozen=True)
class Detection:
    """Lesions of one mask pair: sizes, and which have a counterpart."""

    reference_ml: tuple[float, ...]  # one per lesion of the reference
    hit: tuple[bool, ...]  # of the same length
    predicted_ml: tuple[float, ...]
    real: tuple[bool, ...]  # overlaps a lesion of the reference

    @property
    def tp(self) -> int:
        """Lesions of the reference that were found."""
        return sum(self.hit)

    @property
    def fp(self) -> int:
        """Predicted lesions without a counterpart."""
        return len(self.real) - sum(self.real)

    def recall_below(self, size_ml: float) -> tuple[int, int]:
        """How many lesions smaller than this were hit, and how many there are."""
        small = [hit for ml, hit in zip(self.reference_ml, self.hit, strict=True) if ml < size_ml]
        return sum(small), len(small)


def detect(reference: Mask, predicted: Mask, voxel_ml: float) -> Detection:
    """Finds 26-connected components in both masks and pairs those that overlap.

    A single common voxel is a hit. One prediction may hit several lesions, and several predictions
    one.

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
    pairs, _ = touching(in_reference, in_predicted)
    hit = np.bincount(pairs[0], minlength=len(reference_size)) > 0
    real = np.bincount(pairs[1], minlength=len(predicted_size)) > 0
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


def components(mask: Mask) -> tuple[Int[np.ndarray, "_ _ _"], Int[np.ndarray, " N"]]:
    """Component number per voxel, from 1, and voxels per component."""
    numbers = np.zeros(mask.shape, np.int32)
    box = bounding_box(mask)
    if box is None:
        return numbers, np.zeros(0, np.int64)
    numbers[box] = scipy.ndimage.label(mask[box], _TOUCHING)[0]  # pyright: ignore[reportIndexIssue]
    return numbers, np.bincount(numbers[box].ravel())[1:]
