"""Counts and what follows from them."""

import math

import numpy as np
import pytest

from bhsd_jax.metrics import overlap
from bhsd_jax.metrics.overlap import Counts


def test_counts_of_a_hand_made_map():
    reference = np.array([[0, 0, 1, 1], [1, 2, 2, 0]], np.uint8)
    predicted = np.array([[0, 1, 1, 2], [1, 2, 0, 0]], np.uint8)
    background, one, two = overlap.count(reference, predicted, 3)
    assert background == Counts(tp=2, fp=1, fn=1)
    assert one == Counts(tp=2, fp=1, fn=1)
    assert two == Counts(tp=1, fp=1, fn=1)
    assert (one.reference, one.predicted) == (3, 3)


@pytest.mark.parametrize(
    ("counts", "dice", "iou", "sensitivity", "precision"),
    [
        (Counts(3, 1, 2), 6 / 9, 3 / 6, 3 / 5, 3 / 4),
        (Counts(0, 0, 0), math.nan, math.nan, math.nan, math.nan),
        (Counts(0, 2, 0), 0.0, 0.0, math.nan, 0.0),
        (Counts(0, 0, 2), 0.0, 0.0, 0.0, math.nan),
        (Counts(8, 0, 0), 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_measures_by_hand(counts, dice, iou, sensitivity, precision):
    found = (counts.dice, counts.iou, counts.sensitivity, counts.precision)
    assert found == pytest.approx((dice, iou, sensitivity, precision), rel=1e-12, nan_ok=True)


def test_exchanging_the_masks_exchanges_sensitivity_and_precision():
    one, other = np.random.default_rng(0).integers(0, 4, (2, 3, 8, 8)).astype(np.uint8)
    for there, back in zip(overlap.count(one, other, 4), overlap.count(other, one, 4), strict=True):
        assert (there.dice, there.iou) == (back.dice, back.iou)
        assert there.sensitivity == back.precision


def test_dice_is_nan_only_for_the_class_in_neither():
    reference = np.array([[[0, 1, 1, 2]]], np.uint8)
    predicted = np.array([[[0, 1, 0, 0]]], np.uint8)
    dice = [each.dice for each in overlap.count(reference, predicted, 4)[1:]]
    np.testing.assert_array_equal(dice, [2 / 3, 0.0, np.nan])


def test_another_grid_or_class_is_refused():
    label = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"reference has shape \(2, 3, 4\), prediction"):
        overlap.count(label, label[:, :2], 2)
    with pytest.raises(ValueError, match="prediction holds values 0 to 3; expected 0 to 2"):
        overlap.count(label, np.full_like(label, 3) * (np.arange(4) > 1), 3)


def mask(*on):
    made = np.zeros((2, 3, 2), bool)
    made.ravel()[list(on)] = True
    return made


def test_agreement_is_the_mean_dice_over_pairs():
    masks = [mask(0, 1, 2, 3), mask(2, 3), mask(3, 4, 5, 6)]
    assert overlap.mean_pairwise_dice(masks) == pytest.approx((4 / 6 + 2 / 8 + 2 / 6) / 3)


def test_nothing_drawn_is_agreed_upon_and_something_is_not():
    assert overlap.mean_pairwise_dice([mask(), mask()]) == 1
    assert overlap.mean_pairwise_dice([mask(), mask(1)]) == 0
    with pytest.raises(ValueError, match="two masks or more; got 1"):
        overlap.mean_pairwise_dice([mask()])
