"""Lesion-wise detection on drawn masks."""

import math

import numpy as np
import pytest

from bhsd_jax.metrics import lesion

ML = 0.25


def drawing(*rows):
    return np.array([[[letter == "#" for letter in row] for row in rows]])


REFERENCE = drawing(
    "##......",
    "##...#..",
    "........",
    "..#....#",
)
PREDICTED = drawing(
    "#.......",
    "........",
    "....#..#",
    "..##...#",
)


def test_a_drawn_case_is_counted_by_hand():
    """Lesions of 4, 1, 1, 1 voxels; hit are the square, the last two, not the touching one."""
    found = lesion.detect(REFERENCE, PREDICTED, ML)
    assert found.reference_ml == (1.0, 0.25, 0.25, 0.25)
    assert found.hit == (True, False, True, True)
    assert found.predicted_ml == (0.25, 0.75, 0.5)
    assert found.real == (True, True, True)
    assert (found.tp, found.fn, found.fp) == (3, 1, 0)
    assert (found.sensitivity, found.precision) == (3 / 4, 1.0)
    assert found.f1 == pytest.approx(6 / 7)
    assert found.recall_below(1.0) == (2, 3)


def test_exchanging_the_masks_exchanges_missed_and_made_up():
    there = lesion.detect(REFERENCE, PREDICTED, ML)
    back = lesion.detect(PREDICTED, REFERENCE, ML)
    assert (there.hit, there.real) == (back.real, back.hit)
    assert back.fp == there.fn == 1


def test_corners_connect():
    """26 neighbors: a diagonal across slices is one lesion."""
    diagonal = np.eye(3, dtype=bool)[:, :, None] & np.eye(3, dtype=bool)[:, None, :]
    assert lesion.detect(diagonal, diagonal, ML).reference_ml == (0.75,)


def test_more_overlap_can_be_asked_for():
    """A quarter of the square is predicted, with an intersection over union of a quarter."""
    assert lesion.detect(REFERENCE, PREDICTED, ML, min_overlap=0.24).hit[0]
    strict = lesion.detect(REFERENCE, PREDICTED, ML, min_overlap=0.25)
    assert strict.hit == (False, False, True, True)
    assert strict.real == (False, True, True)
    assert lesion.detect(REFERENCE, PREDICTED, ML, min_iou=0.25).hit[0]
    # The other hits lie in predictions of three and two voxels.
    by_iou = lesion.detect(REFERENCE, PREDICTED, ML, min_iou=0.4)
    assert by_iou.hit == (False, False, False, True)
    assert by_iou.fp == 2


def test_one_prediction_may_hit_two_lesions():
    two = drawing("#..#")
    found = lesion.detect(two, drawing("####"), ML)
    assert (found.hit, found.real) == ((True, True), (True,))
    assert found.f1 == 1.0
    stray = lesion.detect(drawing("#..#..."), drawing("####..#"), ML)
    assert (stray.tp, stray.fp, stray.precision) == (2, 1, 1 / 2)
    assert stray.f1 == pytest.approx(4 / 5)


def test_without_lesions_rates_are_not_defined():
    none = np.zeros((1, 2, 2), bool)
    found = lesion.detect(none, none, ML)
    assert math.isnan(found.sensitivity)
    assert math.isnan(found.precision)
    assert math.isnan(found.f1)
    only_false = lesion.detect(none, ~none, ML)
    assert math.isnan(only_false.sensitivity)
    assert (only_false.precision, only_false.f1, only_false.fp) == (0.0, 0.0, 1)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="must lie on the grid of the scan"):
        lesion.detect(REFERENCE, PREDICTED[..., :3], ML)
