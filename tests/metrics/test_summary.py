"""Conventions, counts and intervals."""

import dataclasses
import math

import numpy as np
import pytest

from bhsd_jax.metrics import scores, summary


def row(case, tp=0, predicted=0, reference=0, name="SDH", patient=None, **more):
    """A row with these voxel counts; a voxel is 0.5 mL."""
    total = predicted + reference
    values = {
        "case": case,
        "patient": patient or case,
        "name": name,
        "voxels_ref": reference,
        "voxels_pred": predicted,
        "tp": tp,
        "fp": predicted - tp,
        "fn": reference - tp,
        "dice": 2 * tp / total if total else math.nan,
        "iou": math.nan,
        "sensitivity": math.nan,
        "precision": math.nan,
        "hd95_mm": math.nan,
        "nsd": math.nan,
        "volume_ref_ml": 0.5 * reference,
        "volume_pred_ml": 0.5 * predicted,
        "volume_error_ml": 0.5 * (predicted - reference),
        "relative_volume_error": abs(predicted - reference) / reference if reference else math.nan,
        "lesions_ref": 0,
        "lesions_pred": 0,
        "lesions_hit": 0,
        "lesions_false": 0,
        "small_lesions_ref": 0,
        "small_lesions_hit": 0,
    }
    return scores.ClassScore(**values | more)


def means(rows, classes=("SDH",), resamples=0, seed=0):
    return summary.summarize(rows, classes, resamples=resamples, seed=seed)


@pytest.mark.parametrize(
    ("present", "dice", "false_rate", "nnunet", "only_present", "both_empty"),
    [
        (10, 0.30, 0.00, 30.0, 30.0, 92.7),
        (10, 0.30, 0.05, 21.0, 30.0, 88.2),
        (10, 0.30, 0.25, 9.5, 30.0, 70.3),
        (10, 0.00, 0.00, 0.0, 0.0, 89.6),
        (85, 0.55, 0.30, 52.9, 55.0, 56.7),
    ],
)
def test_a_rare_class_under_three_conventions(
    present, dice, false_rate, nnunet, only_present, both_empty
):
    """Percent on 96 cases; twenty times as many here, so that every rate is a whole number."""
    absent = 96 - present
    rows = [
        row(f"p{i}", tp=round(20 * dice), predicted=20, reference=20) for i in range(20 * present)
    ]
    false = round(20 * absent * false_rate)
    rows += [row(f"a{i}", predicted=5 if i < false else 0) for i in range(20 * absent)]
    found = {key: values["SDH"] for key, values in means(rows).items()}
    assert 100 * found["nnunet"].dice == pytest.approx(nnunet, abs=0.051)
    assert 100 * found["present"].dice == pytest.approx(only_present, abs=0.051)
    assert 100 * found["both-empty=1"].dice == pytest.approx(both_empty, abs=0.051)
    assert found["nnunet"].n == 20 * present + false
    assert found["present"].n == 20 * present
    assert found["both-empty=1"].n == 20 * 96
    assert {mean.n_false_positive for mean in found.values()} == {false}


def test_all_conventions_by_hand():
    rows = [
        row("a", tp=5, predicted=10, reference=10),  # 0.5
        row("b", tp=90, predicted=90, reference=110),  # 0.9
        row("c", predicted=20),
        row("d"),
    ]
    found = {key: values["SDH"].dice for key, values in means(rows).items()}
    assert found["nnunet"] == pytest.approx(1.4 / 3)
    assert found["present"] == pytest.approx(0.7)
    assert found["both-empty=1"] == pytest.approx(2.4 / 4)
    assert found["pooled"] == pytest.approx(190 / 240)


def test_a_class_in_no_case_is_nan_with_n_0_and_left_out_of_the_mean():
    rows = [row("a", tp=5, predicted=10, reference=10)]
    found = means(rows, ("SDH", "EDH"), resamples=20)
    empty = found["nnunet"]["EDH"]
    assert (empty.n, empty.n_present, empty.n_false_positive) == (0, 0, 0)
    assert all(map(math.isnan, (empty.dice, empty.low, empty.high)))
    assert math.isnan(found["pooled"]["EDH"].dice)
    assert found["both-empty=1"]["EDH"].dice == 1.0
    assert (found["nnunet"]["mean"].dice, found["nnunet"]["mean"].n) == (0.5, 1)


def test_what_counts_in_one_patient_has_no_interval():
    """Every resample is that patient again, so that the limits would be the mean itself."""
    rows = [row(f"s{i}", tp=5 + i, predicted=10, reference=10) for i in range(6)]
    rows += [row("s0", tp=4, predicted=8, reference=8, name="EDH", patient="s0")]
    found = means(rows, ("SDH", "EDH"), resamples=50)
    for convention in ("nnunet", "present", "pooled"):
        rare, common = found[convention]["EDH"], found[convention]["SDH"]
        assert (rare.dice, rare.n) == (0.5, 1)
        assert math.isnan(rare.low)
        assert math.isnan(rare.high)
        assert common.low < common.dice < common.high
        assert found[convention]["mean"].low < found[convention]["mean"].high
    assert found["both-empty=1"]["EDH"].low < found["both-empty=1"]["EDH"].high
    twice = [row(f"v{i}", tp=5 + i, predicted=10, reference=10, patient="p") for i in range(3)]
    alone = means(twice, resamples=50)["nnunet"]
    assert alone["SDH"].dice == pytest.approx(0.6)
    assert math.isnan(alone["SDH"].low)
    assert math.isnan(alone["mean"].high)


def test_nothing_at_all_is_not_an_error():
    found = means([], ("SDH", "EDH"), resamples=5)
    for values in found.values():
        assert all(math.isnan(mean.dice) and mean.n == 0 for mean in values.values())


def test_the_mean_over_classes_weighs_classes_not_cases():
    rows = [row("a", tp=5, predicted=10, reference=10), row("b", tp=9, predicted=10, reference=10)]
    rows += [row("a", tp=1, predicted=10, reference=10, name="EDH")]
    assert means(rows, ("SDH", "EDH"))["nnunet"]["mean"].dice == pytest.approx((0.7 + 0.1) / 2)


def slow_interval(rows, resamples, seed):
    """One patient after the other, with the generator's draws."""
    patients = sorted({each.patient for each in rows})
    share = np.full(len(patients), 1 / len(patients))
    draws = np.random.default_rng(seed).multinomial(len(patients), share, size=resamples)
    values = []
    for draw in draws:
        picked = [
            each.dice
            for patient, times in zip(patients, draw, strict=True)
            for _ in range(times)
            for each in rows
            if each.patient == patient and not math.isnan(each.dice)
        ]
        if picked:
            values.append(np.mean(picked))
    return np.percentile(values, (2.5, 97.5))


def test_intervals_are_those_of_resampling_patients_one_by_one():
    random = np.random.default_rng(3)
    rows = [
        row(f"c{i}", tp=int(tp), predicted=10, reference=10 * (i % 4 > 0), patient=f"p{i // 2}")
        for i, tp in enumerate(random.integers(0, 11, 12) * (np.arange(12) % 4 > 0))
    ]
    found = means(rows, resamples=200, seed=7)["nnunet"]["SDH"]
    np.testing.assert_allclose((found.low, found.high), slow_interval(rows, 200, 7), rtol=1e-12)


def test_cases_of_one_patient_are_drawn_together():
    rows = [row(f"c{i}", tp=i, predicted=10, reference=10, patient="one") for i in range(10)]
    rows += [row(f"d{i}", tp=10 - i, predicted=10, reference=10, patient="two") for i in range(10)]
    found = means(rows, resamples=50)["nnunet"]["SDH"]
    # Of two patients there are three resamples: either of them twice, or both.
    assert (found.low, found.dice, found.high) == pytest.approx((0.45, 0.5, 0.55))


def test_the_interval_of_two_patients_spans_both():
    rows = [row("a", tp=0, predicted=10, reference=10), row("b", tp=10, predicted=10, reference=10)]
    found = means(rows, resamples=500)["pooled"]["SDH"]
    assert (found.low, found.dice, found.high) == (0.0, 0.5, 1.0)


def test_the_same_seed_gives_the_same_intervals_and_the_order_of_rows_does_not_matter():
    rows = [row(f"c{i}", tp=i, predicted=10, reference=10) for i in range(8)]
    assert means(rows, resamples=30) == means(rows[::-1], resamples=30)
    assert means(rows, resamples=30, seed=1) != means(rows, resamples=30, seed=2)


def test_a_row_twice_or_of_another_class_is_refused():
    with pytest.raises(ValueError, match="case a, class 'SDH': comes twice"):
        means([row("a"), row("a")])
    with pytest.raises(ValueError, match="class 'IVH': is not one of"):
        means([row("a", name="IVH")])


def test_measures_besides_dice_by_hand():
    """In scan a one predicted lesion covers two of the reference, and one is made up."""
    made_up = {"lesions_pred": 2, "lesions_false": 1}
    rows = [
        row("a", 5, 10, 20, hd95_mm=2.0, nsd=0.5, lesions_ref=3, lesions_hit=2, **made_up),
        row("b", 9, 14, 10, hd95_mm=6.0, nsd=0.9, lesions_ref=1, lesions_pred=1, lesions_hit=1),
        row("c", 0, 8, 0, hd95_mm=math.inf, nsd=0.0, lesions_pred=2, lesions_false=2),
        row("d", small_lesions_ref=4, small_lesions_hit=1),
    ]
    found = summary.measures(rows, ("SDH",))["SDH"]
    assert (found["hd95_mm_median"], found["hd95_n"], found["hd95_missed"]) == (4.0, 2, 1)
    assert found["nsd_mean"] == pytest.approx(1.4 / 3)
    assert found["abs_volume_error_ml_mean"] == pytest.approx((5 + 2 + 4 + 0) / 4)
    assert found["volume_bias_ml_mean"] == pytest.approx((-5 + 2 + 4 + 0) / 4)
    assert found["relative_volume_error_median"] == pytest.approx(0.45)
    assert found["lesion_sensitivity"] == pytest.approx(3 / 4)
    assert found["lesion_precision"] == pytest.approx(2 / 5)
    assert found["lesion_f1"] == pytest.approx(6 / 10)
    assert found["small_lesion_sensitivity"] == pytest.approx(1 / 4)


def test_nan_becomes_null_at_any_depth():
    assert summary.without_nan({"a": math.nan, "b": {"c": math.inf, "d": 1.0, "e": [2]}}) == {
        "a": None,
        "b": {"c": None, "d": 1.0, "e": [2]},
    }


def test_rows_survive_a_csv_file(tmp_path):
    rows = [row("a", 5, 10, 20, hd95_mm=math.inf, nsd=1 / 3), row("b", name="EDH", patient="p")]
    scores.write_csv(tmp_path / "cases.csv", rows)
    header, _, last = (tmp_path / "cases.csv").read_text().splitlines()
    assert header.startswith("case,patient,class,voxels_ref,")
    assert ",nan," in last
    back = scores.read_csv(tmp_path / "cases.csv")
    for one, other in zip(rows, back, strict=True):
        np.testing.assert_equal(dataclasses.asdict(one), dataclasses.asdict(other))


def test_a_csv_file_without_a_column_is_refused(tmp_path):
    (tmp_path / "cases.csv").write_text("case,patient,class\na,a,SDH\n")
    with pytest.raises(ValueError, match=r"has no column voxels_ref, .*; write it with `evaluate`"):
        scores.read_csv(tmp_path / "cases.csv")


def test_a_scan_is_scored_class_by_class():
    reference = np.zeros((3, 6, 6), np.uint8)
    predicted = np.zeros_like(reference)
    reference[1, 1:3, 1:3] = 1
    predicted[1, 1:3, 2:4] = 1
    predicted[2, 5, 5] = 2
    scan = scores.Scan("s", "p", (5.0, 1.0, 1.0), 0.005)
    one, two = scores.score(reference, predicted, scan, ("background", "EDH", "IPH"), 1.0)
    assert (one.name, one.tp, one.fp, one.fn, one.dice) == ("EDH", 2, 2, 2, 0.5)
    assert (one.hd95_mm, one.nsd) == (1.0, 1.0)
    assert (one.volume_ref_ml, one.volume_error_ml) == pytest.approx((0.02, 0.0))
    assert (one.lesions_ref, one.lesions_hit, one.small_lesions_hit) == (1, 1, 1)
    assert (two.name, two.dice, two.hd95_mm, two.lesions_false) == ("IPH", 0.0, math.inf, 1)
    assert math.isnan(two.relative_volume_error)


def test_volumes_of_a_scan_in_ml():
    reference, predicted = np.zeros((2, 1, 8, 8), np.uint8)
    reference[0, :5], predicted[0, 4:6] = 1, 1
    scan = scores.Scan("s", "p", (5.0, 1.0, 1.0), 0.1)
    (found,) = scores.score(reference, predicted, scan, ("background", "EDH"), 1.0)
    assert (found.volume_ref_ml, found.volume_pred_ml) == pytest.approx((4.0, 1.6))
    assert found.volume_error_ml == pytest.approx(-2.4)
    assert found.relative_volume_error == pytest.approx(0.6)
