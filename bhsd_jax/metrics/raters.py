"""Answers and raters as two sets of label maps: the scores of the MBH-Seg 2025 challenge."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from jaxtyping import Float

from bhsd_jax.metrics.scores import Label

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a set that mark a voxel, one after another
_SMOOTH = 1e-8


@dataclass(frozen=True)
class Agreement:
    """How near a set of answers is to a set of raters, for one scan."""

    ged: float  # generalized energy distance with 1 - IoU: 0 at best
    dice_soft: float
    dice_match: float  # best one-to-one pairs; a rater left over takes the answer nearest to it
    dice_max: float  # of each answer with the rater nearest to it
    dice_max_reverse: float  # of each rater with the answer nearest to it
    dice_each: tuple[float, ...]  # of each rater's pair in `dice_match`


def agreement(
    raters: Sequence[Label], answers: Sequence[Label], *, multiclass: bool = False
) -> Agreement:
    """The challenge's scores, to its conventions.

    Label maps of 0 and 1 are compared as masks. Two empty ones have Dice 1 but, in the energy
    distance, an IoU of 0; where all of a set are empty the distance is 1, where all of both are 0.

    Of several classes (`multiclass`) Dice is averaged over the foreground classes that the rater
    has, 0 if there is none. The energy distance then knows the classes of the raters, but takes
    any class of an answer for class 1, and the soft Dice averages class numbers: both are so in the
    challenge's tool, and are to be read only beside figures that come from it.

    Raises:
        ValueError: If a set is empty, or the shapes differ.

    Source: `metrics_set.py`, `diverse_performance.py` in codecat0/MBH-Seg-25 69f3f0c, which holds
    the challenge's evaluation; energy distance of Kohl et al. 2018, arXiv:1806.05034.
    """
    if not raters or not answers:
        raise ValueError("raters: need at least one rater and one answer")
    shapes = {label.shape for label in (*raters, *answers)}
    if len(shapes) > 1:
        raise ValueError(f"raters: label maps of shapes {sorted(shapes)}; all must lie on one grid")
    pair = _dice_of_classes if multiclass else _dice
    table = np.array([[pair(rater, answer) for answer in answers] for rater in raters])
    rows, columns = scipy.optimize.linear_sum_assignment(1 - table)
    partner = {int(row): int(column) for row, column in zip(rows, columns, strict=True)}
    each = tuple(
        float(row[partner[i]] if i in partner else row.max()) for i, row in enumerate(table)
    )
    return Agreement(
        ged=energy_distance(raters, answers),
        dice_soft=_soft_dice(raters, answers),
        dice_match=float(np.mean(each)),
        dice_max=float(table.max(0).mean()),
        dice_max_reverse=float(table.max(1).mean()),
        dice_each=each,
    )


def energy_distance(raters: Sequence[Label], answers: Sequence[Label]) -> float:
    """Twice the mean distance across the sets, less the mean distances within each.

    The distance of two label maps is 1 - IoU, averaged over the foreground classes up to the
    raters' highest; within a set every label map also meets itself.
    """
    marked = [(answer > 0).astype(np.uint8) for answer in answers]
    some = any(label.any() for label in raters), any(label.any() for label in marked)
    if not all(some):
        return 0.0 if some[0] == some[1] else 1.0
    highest = max(1, *(int(label.max()) for label in raters))
    across = _distance(raters, marked, highest)
    return 2 * across - _distance(raters, raters, highest) - _distance(marked, marked, highest)


def _distance(first: Sequence[Label], second: Sequence[Label], highest: int) -> float:
    """Mean over all pairs of 1 - IoU; a class that both lack has an IoU of 0."""
    total = 0.0
    counts = [
        [np.bincount(label.ravel(), minlength=highest + 1) for label in side]
        for side in (first, second)
    ]
    for one, size in zip(first, counts[0], strict=True):
        for other, other_size in zip(second, counts[1], strict=True):
            same = np.bincount(one[one == other].ravel(), minlength=highest + 1)
            iou = same / (size + other_size - same + _SMOOTH)
            total += 1 - float(iou[1 : highest + 1].mean())
    return total / (len(first) * len(second))


def _dice(rater: Label, answer: Label) -> float:
    return _ratio(int((rater * (answer > 0)).sum()), int(rater.sum() + (answer > 0).sum()))


def _dice_of_classes(rater: Label, answer: Label) -> float:
    shown = [index for index in np.unique(rater).tolist() if index]
    values = []
    for index in shown:
        one, other = rater == index, answer == index
        values.append(_ratio(int((one & other).sum()), int(one.sum() + other.sum())))
    return float(np.mean(values)) if values else 0.0


def _soft_dice(raters: Sequence[Label], answers: Sequence[Label]) -> float:
    """Mean Dice of the voxels that more than a share of either set marks, over five shares."""
    # Single precision, as in the tool, decides whether 3 of 10 count as more than 0.3.
    rater, answer = (_mean(side) for side in (raters, answers))
    values = []
    for share in np.asarray(_SHARES, np.float32):
        one, other = rater > share, answer > share
        values.append(_ratio(int((one & other).sum()), int(one.sum() + other.sum())))
    return float(np.mean(values))


def _mean(labels: Sequence[Label]) -> Float[np.ndarray, "_ _ _"]:
    return np.asarray(np.stack(labels).astype(np.float32).mean(0))


def _ratio(shared: int, total: int) -> float:
    return (2 * shared + _SMOOTH) / (total + _SMOOTH)
