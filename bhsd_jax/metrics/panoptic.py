"""Panoptic quality of connected components, as panoptica gives it."""

import math
from dataclasses import dataclass

import numpy as np

from bhsd_jax.metrics import lesion

_LEAST_IOU = 0.5  # of a pair that matches


@dataclass(frozen=True)
class Panoptic:
    """One mask pair. Both empty: the qualities are not defined (NaN)."""

    pq: float  # sq * rq
    sq: float  # mean intersection over union of the matched pairs, 0 if there are none
    rq: float  # F1 of the matching
    tp: int
    fp: int
    fn: int


def panoptic_quality(reference: lesion.Mask, predicted: lesion.Mask) -> Panoptic:
    """26-connected components of both masks, matched one to one where their IoU suffices.

    Pairs are taken from the largest intersection over union downward; one of 0.5 is enough.

    Raises:
        ValueError: If the shapes differ.

    Source: Kirillov et al. 2019, arXiv:1801.00868; panoptica 2.1.7 on semantic masks, with
    `ConnectedComponentsInstanceApproximator()` and `NaiveThresholdMatching()`.
    """
    if reference.shape != predicted.shape:
        raise ValueError(
            f"panoptic: reference has shape {reference.shape}, prediction {predicted.shape}; "
            "both must lie on the grid of the scan"
        )
    in_reference, reference_size = lesion.components(reference)
    in_predicted, predicted_size = lesion.components(predicted)
    count = len(reference_size), len(predicted_size)
    if not sum(count):
        return Panoptic(math.nan, math.nan, math.nan, 0, 0, 0)
    pairs, shared = lesion.touching(in_reference, in_predicted)
    iou = shared / (reference_size[pairs[0]] + predicted_size[pairs[1]] - shared)
    taken: tuple[set[int], set[int]] = set(), set()
    matched = []
    for at in np.argsort(-iou, kind="stable"):
        one, other = (int(number) for number in pairs[:, at])
        if iou[at] >= _LEAST_IOU and one not in taken[0] and other not in taken[1]:
            taken[0].add(one)
            taken[1].add(other)
            matched.append(float(iou[at]))
    tp = len(matched)
    sq = sum(matched) / tp if tp else 0.0
    rq = 2 * tp / sum(count)
    return Panoptic(sq * rq, sq, rq, tp, count[1] - tp, count[0] - tp)
