"""Lesion-wise detection on drawn masks."""

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
    assert (found.tp, found.fp) == (3, 0)
    assert found.recall_below(1.0) == (2, 3)


def test_exchanging_the_masks_exchanges_missed_and_made_up():
    there = lesion.detect(REFERENCE, PREDICTED, ML)
    back = lesion.detect(PREDICTED, REFERENCE, ML)
    assert (there.hit, there.real) == (back.real, back.hit)
    assert (back.fp, there.hit.count(False)) == (1, 1)


def test_corners_connect():
    """26 neighbors: a diagonal across slices is one lesion."""
    diagonal = np.eye(3, dtype=bool)[:, :, None] & np.eye(3, dtype=bool)[:, None, :]
    assert lesion.detect(diagonal, diagonal, ML).reference_ml == (0.75,)


def test_one_prediction_may_hit_two_lesions():
    two = drawing("#..#")
    found = lesion.detect(two, drawing("####"), ML)
    assert (found.hit, found.real) == ((True, True), (True,))
    stray = lesion.detect(drawing("#..#..."), drawing("####..#"), ML)
    assert (stray.tp, stray.fp) == (2, 1)


def test_empty_masks_have_no_lesions():
    none = np.zeros((1, 2, 2), bool)
    assert lesion.detect(none, none, ML) == lesion.Detection((), (), (), ())
    only_false = lesion.detect(none, ~none, ML)
    assert (only_false.tp, only_false.fp) == (0, 1)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="must lie on the grid of the scan"):
        lesion.detect(REFERENCE, PREDICTED[..., :3], ML)
