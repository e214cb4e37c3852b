"""Scores under other names equal those of the packages that own the names, on 30 mask pairs each.

`tools/record_published_metrics.py` recorded them: MONAI 1.6.1, medpy 0.5.2 and 0.4.0, panoptica
2.1.7, BraTS-2023-Metrics 43c9052 and the evaluation in codecat0/MBH-Seg-25 69f3f0c. The first three
pairs are empty on both sides or on one; spacings are those of thick slices, cubes and others.
"""

import math

import numpy as np
import pytest

from bhsd_jax.metrics import also, brats, panoptic, raters

PAIRS = 30
DOUBLE = 1e-12  # what may differ of numbers in double precision
SINGLE = 1e-6
CHALLENGES = ({"dilation": 3, "least_mm3": 50.0}, {"dilation": 1, "least_mm3": 2.0})


@pytest.fixture(scope="module")
def pairs(request):
    """Reference, prediction and spacing of every pair, and the scores by package."""
    folder = request.config.rootpath / "tests" / "golden"
    found = {}
    for name in ("others", "brats", "medpy_0_4"):
        with np.load(folder / f"published_{name}.npz") as file:
            found |= dict(file)
    shape = found["shape"]
    assert shape[0] == PAIRS
    count = np.prod(shape)
    masks = [
        np.unpackbits(found[name], count=count).reshape(shape).astype(bool)
        for name in ("reference", "predicted")
    ]
    return list(zip(*masks, found["spacing"].tolist(), strict=True)), found


def farthest(ours, theirs):
    """Largest difference, of values above 1 relative; not defined on one side only is infinite."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert ours.shape == theirs.shape
    alike = (np.isnan(ours) & np.isnan(theirs)) | (ours == theirs)
    apart = np.abs(np.where(alike, 0, ours) - np.where(alike, 0, theirs))
    apart /= np.maximum(np.where(alike, 1, np.abs(theirs)), 1)
    return float(np.where(np.isnan(apart), math.inf, apart).max())


def test_the_pairs_are_empty_anisotropic_and_various(pairs):
    rows, found = pairs
    empty = [(not reference.any(), not predicted.any()) for reference, predicted, _ in rows]
    assert empty[:3] == [(True, True), (True, False), (False, True)]
    assert {tuple(spacing) for *_, spacing in rows} > {(5.0, 0.5, 0.5)}
    assert np.isfinite(found["medpy"]).all(1).sum() >= 20
    assert len(set(found["panoptica"][:, 3].tolist())) > 2, "numbers of matched lesions"


def test_medpy(pairs):
    rows, found = pairs
    ours = [list(also.medpy(a, b, tuple(spacing)).values()) for a, b, spacing in rows]
    assert farthest(ours, np.concatenate([found["medpy"], found["medpy_0_4"]], 1)) < DOUBLE
    both = found["medpy"][3:]
    assert np.abs(both[:, 2] - found["medpy_0_4"][3:, 0]).max() > 0.1, "two quantities of one name"


def test_monai(pairs):
    rows, found = pairs
    wanted = also.Also(("monai",))
    ours = [list(also.of_masks(a, b, tuple(spacing), wanted).values()) for a, b, spacing in rows]
    # Its place among 500 distances is reckoned in single precision: 3e-5 of the way to the next.
    assert farthest(ours, found["monai"]) < 5e-6


def test_pooled_and_separate_directions_are_far_apart(pairs):
    """Why a figure needs the name of its code."""
    _, found = pairs
    assert np.nanmax(np.abs(found["medpy"][:, 0] - found["monai"][:, 0])) > 2


def test_brats(pairs):
    rows, found = pairs
    for number, (a, b, spacing) in enumerate(rows):
        for which, settings in enumerate(CHALLENGES):
            ours = brats.lesion_wise(a, b, tuple(spacing), **settings)
            found_by = [ours.dice, ours.hd95_mm, ours.found, ours.missed, ours.false]
            # Single because the spacing in a NIfTI header is.
            assert farthest(found_by, found["brats"][number, which]) < SINGLE, number


def test_panoptica(pairs):
    rows, found = pairs
    for number, (a, b, _) in enumerate(rows):
        ours = panoptic.panoptic_quality(a, b)
        found_by = [ours.pq, ours.sq, ours.rq, ours.tp, ours.fp, ours.fn]
        assert farthest(found_by, found["panoptica"][number]) < DOUBLE, number


@pytest.mark.parametrize("multiclass", [False, True])
def test_mbhseg(pairs, multiclass):
    _, found = pairs
    for number in range(PAIRS):
        sides = [found[f"{name}/{number}"] for name in ("raters", "answers")]
        if not multiclass:
            sides = [(side > 0).astype(np.uint8) for side in sides]
        ours = raters.agreement(*map(list, sides), multiclass=multiclass)
        found_by = [
            *(ours.ged, ours.dice_soft, ours.dice_match, ours.dice_max, ours.dice_max_reverse),
            np.mean(ours.dice_each),
        ]
        want = found[f"mbhseg/{number}"][int(multiclass)]
        assert farthest(found_by, want) < SINGLE, number


def test_brats_scores_by_hand():
    """Two components within reach are one lesion; a third was missed, a fourth made up."""
    reference, predicted = np.zeros((2, 1, 7, 60), bool)
    reference[0, 3, [1, 2, 4, 5]] = True
    reference[0, 3, 20:22] = True
    predicted[0, 3, 1:3] = True
    predicted[0, 3, 40:50] = True
    ours = brats.lesion_wise(reference, predicted, (1.0, 1.0, 1.0), dilation=3, least_mm3=1)
    assert (ours.found, ours.missed, ours.false) == (1, 1, 1)
    assert ours.dice == pytest.approx((2 * 2 / 6) / 3)
    small = brats.lesion_wise(reference, predicted, (1.0, 1.0, 1.0), dilation=3, least_mm3=2)
    assert small.dice == pytest.approx((2 * 2 / 6) / 2), "what is small does not count"


def test_one_rater_and_one_answer_have_the_dice_of_a_pair():
    one, other = np.zeros((2, 2, 3, 4), np.uint8)
    one[0, 0, :2], other[0, 0, 1:4] = 1, 1
    found = raters.agreement([one], [other])
    dice = pytest.approx(2 * 1 / 5)
    assert found.dice_max == found.dice_max_reverse == found.dice_match == found.dice_soft == dice
    assert found.ged == pytest.approx(2 * (1 - 1 / 4))


def test_shapes_that_differ_are_refused():
    a, b = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool)
    for score in (brats.lesion_wise, panoptic.panoptic_quality):
        arguments = (a, b, (1.0, 1.0, 1.0)) if score is brats.lesion_wise else (a, b)
        with pytest.raises(ValueError, match="grid of the scan"):
            score(*arguments)
    with pytest.raises(ValueError, match="one grid"):
        raters.agreement([a.astype(np.uint8)], [b.astype(np.uint8)])
    with pytest.raises(ValueError, match="at least one"):
        raters.agreement([], [a.astype(np.uint8)])
