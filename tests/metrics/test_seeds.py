"""Means, spreads and intervals over seeds, against numbers made by hand."""

import math

import numpy as np
import pytest

from bhsd_jax.metrics.scores import ClassScore
from bhsd_jax.metrics.seeds import over_seeds, paired
from bhsd_jax.metrics.summary import resampled, summarize


def row(case, name, tp, fp, fn):
    rest = dict.fromkeys(ClassScore.__dataclass_fields__, 0)
    total = 2 * tp + fp + fn
    return ClassScore(
        **rest
        | {"case": case, "patient": case, "name": name, "tp": tp, "fp": fp, "fn": fn}
        | {"voxels_ref": tp + fn, "voxels_pred": tp + fp}
        | {"dice": 2 * tp / total if total else math.nan}
    )


ROWS = [
    row("p", "EDH", 5, 5, 0),  # 10 / 15
    row("q", "EDH", 0, 0, 0),
    row("p", "SDH", 4, 0, 4),  # 8 / 12
    row("q", "SDH", 0, 3, 0),  # 0 by nnU-Net's rule
]


def test_a_mean_over_seeds_has_the_sample_standard_deviation():
    runs = [np.array([0.2, 0.1, 0.3]), np.array([0.5, 0.3, 0.7]), np.array([0.5, 0.5, 0.5])]
    found = over_seeds(runs)
    assert found.mean == pytest.approx(0.4)
    assert found.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.01) / 2))
    assert found.seeds == 3
    means = [0.3, 0.5]  # of each resample over the runs
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


def test_one_seed_has_no_standard_deviation_and_no_run_no_mean():
    one = over_seeds([np.array([0.2, 0.1])])
    assert math.isnan(one.sd)
    assert one.mean == pytest.approx(0.2)
    nothing = over_seeds([])
    assert math.isnan(nothing.mean)
    assert nothing.seeds == 0


def test_a_seed_in_which_the_class_is_not_defined_does_not_count():
    found = over_seeds([np.array([0.2, 0.2]), np.array([math.nan, math.nan])])
    assert (found.mean, found.seeds) == (pytest.approx(0.2), 1)
    assert (found.low, found.high) == pytest.approx((0.2, 0.2))


def test_a_seed_without_resamples_leaves_no_interval_of_the_mean():
    found = over_seeds([np.array([0.8, math.nan, math.nan]), np.array([0.4, 0.0, 0.8])])
    assert (found.mean, found.seeds) == (pytest.approx(0.6), 2)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_runs_with_different_numbers_of_resamples_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] resamples"):
        over_seeds([np.zeros(2), np.zeros(3)])


def test_a_paired_difference_is_taken_resample_by_resample():
    ours = [np.array([0.5, 0.1, 0.9]), np.array([0.6, 0.2, 1.0])]
    base = [np.array([0.4, 0.0, 0.8]), np.array([0.4, 0.0, 0.8])]
    found = paired(ours, base)
    assert found.mean == pytest.approx(0.15)
    assert (found.low, found.high) == pytest.approx((0.15, 0.15)), "patients do not matter here"
    assert found.sd == pytest.approx(0.1 / math.sqrt(2))


def test_the_first_draw_is_the_sample_and_the_interval_is_the_summarys():
    values = resampled(ROWS, ("EDH", "SDH"), resamples=200, seed=3)
    means = summarize(ROWS, ("EDH", "SDH"), resamples=200, seed=3)
    assert values["nnunet"]["EDH"][0] == pytest.approx(10 / 15)
    assert values["nnunet"]["SDH"][0] == pytest.approx(8 / 24)
    assert values["nnunet"]["mean"][0] == pytest.approx((10 / 15 + 8 / 24) / 2)
    for convention, of in values.items():
        for name, draws in of.items():
            alone, mean = over_seeds([draws]), means[convention][name]
            np.testing.assert_array_equal(
                (alone.mean, alone.low, alone.high), (mean.dice, mean.low, mean.high)
            )
