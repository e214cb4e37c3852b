"""The verb on a tree of three scans whose scores are known by hand."""

import csv
import dataclasses
import json
import logging
import math

import numpy as np
import pytest
import seg_files

from bhsd_jax.assemble import origins
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.ct import nifti, scan
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import scores, threshold
from bhsd_jax.platform import faults, files
from bhsd_jax.settings import Settings
from bhsd_jax.shards import store
from bhsd_jax.verbs import calibrate, evaluate, pages, report
from bhsd_jax.verbs.chosen_scans import find_scans
from bhsd_jax.verbs.evaluate import Scored
from bhsd_jax.volume import HEMORRHAGE, Case, Volume

# One patient with two scans in the test part, another in the training part. A voxel is 1 mL.
FIRST, SECOND = "ID_aaaaaaaa_ID_0000000001", "ID_aaaaaaaa_ID_0000000002"
TRAINED = "ID_bbbbbbbb_ID_0000000003"
AFFINE = np.array([[0, 0, -10, 0], [0, -10, 0, 0], [10, 0, 0, 0], [0, 0, 0, 1.0]])
SHAPE = (4, 24, 24)
EDH, SAH = 1, 4


def labels(*boxes):
    """Boxes are (class, slice, row, columns)."""
    label = np.zeros(SHAPE, np.uint8)
    for value, d, h, w in boxes:
        label[d, h, w] = value
    return label


REFERENCE = {
    FIRST: labels((EDH, 1, 5, slice(4, 8))),
    SECOND: labels((SAH, 2, 8, slice(8, 10))),
    TRAINED: labels((EDH, 1, 1, slice(2, 4))),
}
PREDICTED = {
    FIRST: labels((EDH, 1, 5, slice(6, 10)), (SAH, 3, 20, slice(9, 10))),
    SECOND: labels((SAH, 2, 8, slice(8, 10))),
}


def head(mask):
    """Brain of 35 HU in a skull, blood at 65 HU where the mask is."""
    y, x = np.ogrid[: SHAPE[1], : SHAPE[2]]
    far = np.broadcast_to(np.hypot(y - 11.5, x - 11.5), SHAPE)
    hu = np.where(far < 11, np.where(far < 10, 35, 900), -1000)
    return np.where(mask > 0, 65, hu).astype(np.int16)


def write(path, voxels):
    nifti.write_volume(path, Volume(voxels, AFFINE, ""))


@pytest.fixture
def tree(tmp_path):
    """A small BHSD, and a run folder with predictions of its test part."""
    data, run = tmp_path / "data", tmp_path / "run"
    for case, label in REFERENCE.items():
        write(data / "label_192" / "images" / f"{case}.nii.gz", head(label))
        write(data / "label_192" / "ground truths" / f"{case}.nii.gz", label.astype(np.uint16))
    split = {"training": [f"{TRAINED}.nii.gz"], "test": [f"{FIRST}.nii.gz", f"{SECOND}.nii.gz"]}
    (data / "dataset.json").write_text(json.dumps(split))
    for case, label in PREDICTED.items():
        write(run / "predictions" / f"{case}.nii.gz", label)
    return data, run


def configure(data, **settings):
    config = common.get_config("data=bhsd")
    config.data.root = str(data)
    config.preprocess.processes = 1
    config.evaluate.update({"bootstrap": 20} | settings)
    return config


def table(run, name="cases.csv"):
    with (run / name).open(newline="") as file:
        return {(row["case"], row["class"]): row for row in csv.DictReader(file)}


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_cases_are_scored_as_by_hand(tree):
    data, run = tree
    evaluate.run(configure(data), run)
    rows = table(run)
    assert len(rows) == 2 * 5
    row = rows[FIRST, "EDH"]
    assert (row["patient"], row["tp"], row["fp"], row["fn"]) == ("ID_aaaaaaaa", "2", "2", "2")
    assert [float(row[key]) for key in ("dice", "iou", "sensitivity", "precision")] == (
        pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 2])
    )
    assert float(row["hd95_mm"]) == pytest.approx(20.0)
    assert float(row["volume_ref_ml"]) == pytest.approx(4.0)
    assert float(row["volume_error_ml"]) == pytest.approx(0.0)
    assert (row["lesions_ref"], row["lesions_hit"], row["lesions_false"]) == ("1", "1", "0")
    assert rows[FIRST, "IVH"]["dice"] == "nan"
    false = rows[FIRST, "SAH"]
    assert (false["dice"], false["hd95_mm"], false["nsd"]) == ("0.0", "inf", "0.0")
    assert (false["relative_volume_error"], false["lesions_false"]) == ("nan", "1")
    merged = table(run, "cases_binary.csv")[FIRST, "any"]
    assert float(merged["dice"]) == pytest.approx(2 * 2 / (4 + 5))


def test_the_summary_holds_every_convention(tree):
    data, run = tree
    evaluate.run(configure(data), run)
    found = summary(run)
    assert (found["convention"], found["n_cases"], found["nsd_mm"]) == ("nnunet", 2, 1.0)
    assert found["classes"] == list(HEMORRHAGE[1:])
    dice = {key: value["SAH"]["dice"] for key, value in found["conventions"].items()}
    assert dice == pytest.approx(
        {"nnunet": 0.5, "present": 1.0, "pooled": 0.8, "both-empty=1": 0.5}
    )
    sah = found["conventions"]["nnunet"]["SAH"]
    assert (sah["n"], sah["n_present"], sah["n_false_positive"]) == (2, 1, 1)
    # Both scans are of one patient, so that there is nothing to resample.
    assert sah["low"] is sah["high"] is None
    assert found["conventions"]["nnunet"]["mean"]["dice"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["conventions"]["nnunet"]["mean"]["n"] == 2
    assert found["metrics"]["SAH"]["hd95_missed"] == 1
    assert found["binary"]["dice"] == pytest.approx((4 / 9 + 1) / 2)
    assert found["binary"]["conventions"]["pooled"]["any"]["dice"] == pytest.approx(8 / 13)
    assert "baseline" not in found


def test_a_class_in_no_case_is_null_in_the_file_and_words_in_the_log(tree, caplog):
    data, run = tree
    with caplog.at_level(logging.INFO):
        evaluate.run(configure(data), run)
    ivh = summary(run)["conventions"]["nnunet"]["IVH"]
    assert (ivh["dice"], ivh["n"]) == (None, 0)
    said = [r.message for r in caplog.records if r.name == "bhsd_jax.verbs.evaluate"]
    assert "IVH           not in reference (n=0)" in said
    assert not any("nan" in line.lower() for line in said)


def test_binary_merges_before_counting(tree):
    data, run = tree
    config = configure(data)
    config.split.binary = True
    evaluate.run(config, run)
    assert set(table(run)) == {(FIRST, "any"), (SECOND, "any")}
    found = summary(run)
    assert found["classes"] == ["any"]
    assert found["conventions"]["nnunet"]["any"]["dice"] == pytest.approx((4 / 9 + 1) / 2)
    assert found["binary"]["dice"] == found["conventions"]["nnunet"]["mean"]["dice"]


def test_references_may_come_from_a_folder(tree):
    """Patients are not known then: each scan counts as one."""
    data, run = tree
    masks = run.parent / "masks"
    for case in PREDICTED:
        write(masks / f"{case}.nii.gz", REFERENCE[case])
    evaluate.run(configure(data, references=str(masks)), run)
    assert table(run)[SECOND, "SAH"]["patient"] == SECOND
    assert summary(run)["conventions"]["present"]["SAH"]["dice"] == 1.0


def test_several_processes_give_the_same_files(tree):
    data, run = tree
    evaluate.run(configure(data), run)
    names = ("cases.csv", "cases_binary.csv", "summary.json")
    alone = [(run / name).read_bytes() for name in names]
    config = configure(data)
    config.preprocess.processes = 2
    evaluate.run(config, run)
    assert [(run / name).read_bytes() for name in names] == alone


def test_the_threshold_baseline_finds_blood_that_a_band_separates(tree):
    data, run = tree
    evaluate.run(configure(data, baseline=True), run)
    baseline = summary(run)["baseline"]
    low, high = baseline["band_hu"]
    assert 35 < low < 65 < high
    assert baseline["dice"] == pytest.approx(1.0)


def test_blood_that_is_not_annotated_is_no_false_alarm_of_the_threshold(tree):
    """One scan's blood is outlined, half of the other's has the label to ignore."""
    data, run = tree
    jobs = evaluate.comparisons(Settings.of(configure(data, baseline=True)), run)
    known = Labels(("background", "blood"), ignore=2)
    outlined = [(REFERENCE[job.case] > 0).astype(np.uint8) for job in jobs]
    outlined[1][2, 8, 9] = 2
    histograms = []
    for job, label in zip(jobs, outlined, strict=True):
        path = run / f"{job.case}.nii.gz"
        write(path, label)
        own = {"classes": known.classes, "labels": known, "reference": path, "predicted": path}
        scored = evaluate.score_case(dataclasses.replace(job, **own))
        histograms.append(scored.histogram)
    assert [one.mask for one in histograms] == [4, 1]
    assert threshold.best_band(histograms).dice == pytest.approx((1.0, 1.0))


def test_the_split_that_was_predicted_is_the_one_that_is_scored(tree):
    data, run = tree
    for case in PREDICTED:
        (run / "predictions" / f"{case}.nii.gz").unlink()
    write(run / "predictions" / f"{TRAINED}.nii.gz", REFERENCE[TRAINED])
    (run / "predictions" / "predictions.json").write_text(json.dumps({"split": "train"}))
    evaluate.run(configure(data), run)
    assert summary(run)["n_cases"] == 1
    assert summary(run)["conventions"]["nnunet"]["EDH"]["dice"] == 1.0


def prepare(run, plan, *cases):
    """Shards as far as roles need them; cases are (id, split, whether there is a mask)."""
    files.write_json(run / "shards" / "plan.json", plan | {"classes": HEMORRHAGE})
    shape, none = (1, 1, 1), ()
    entries = [
        store.Entry(case, case[:11], split, masked, None, shape, none, none, "a", 0)
        for case, split, masked in cases
    ]
    store.write_index(run / "shards", entries)


def test_a_scan_that_was_refused_is_not_asked_for(tree, plan, caplog):
    """As `preprocess.allow_skipped` leaves it: `predict` is not given the scan either."""
    data, run = tree
    prepare(run, plan, (TRAINED, "train", True), (FIRST, "test", True))
    (run / "predictions" / f"{SECOND}.nii.gz").unlink()
    config = configure(data)
    config.split.fold = -1
    with caplog.at_level(logging.WARNING):
        evaluate.run(config, run)
    assert {case for case, _ in table(run)} == {FIRST}
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said == [
        "split 'test': 1 cases of the data set are not scored, as they were not prepared or have "
        f"no mask: {SECOND}"
    ]
    (run / "predictions" / f"{FIRST}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 cases have no prediction .*: {FIRST}; run"):
        evaluate.run(config, run)


def test_a_validation_scan_without_a_mask_is_not_asked_for(tree, plan, caplog):
    data, run = tree
    prepare(run, plan, (TRAINED, "train", True), (FIRST, "val", True), (SECOND, "val", False))
    config = Settings.of(configure(data))
    cases = {case: Case(case, case, run, None, "val") for case in (FIRST, SECOND)}
    with caplog.at_level(logging.WARNING):
        assert evaluate._members(config, run, cases, "val") == (FIRST,)
    assert SECOND in caplog.text
    del cases[FIRST]
    with pytest.raises(FileNotFoundError, match=f"not in the data set: {FIRST}; look at config"):
        evaluate._members(config, run, cases, "val")


def test_scans_outlined_in_bhsd_are_used_without_a_look_at_rsnas_slices(tree, plan):
    """Where there are none: whoever looked would say so."""
    data, run = tree
    prepare(run, plan, (TRAINED, "val", True), (FIRST, "test", True), (SECOND, "test", True))
    files.write_json(run / "plan.json", plan | {"classes": HEMORRHAGE})
    config = common.get_config("data=rsna")
    config.data.update({"root": str(data / "none"), "bhsd": str(data)})
    config.split.fold = -1
    config.preprocess.processes = 1
    config.evaluate.bootstrap = 20
    evaluate.run(config, run)
    assert {case for case, _ in table(run)} == {FIRST, SECOND}
    config.predict.split = "test"
    predicted = find_scans(Settings.of(config), run)
    assert [case.id for case in predicted] == [FIRST, SECOND]
    opened = Run.of(config, run)
    shown = pages.scans(opened, pages.Origin(run / "predictions", split="test"), [FIRST])
    assert shown[FIRST].label is not None
    config.predict.split = "val"
    (calibrating,) = calibrate._cases(Run.of(config, run), run)
    assert calibrating.id == TRAINED
    masks = pages.Origin(run / "predictions", references=run / "predictions")
    assert not pages.scans(opened, masks, [FIRST]), "any of RSNA's scans may have such a mask"


def test_missing_predictions_are_listed(tree):
    data, run = tree
    (run / "predictions" / f"{SECOND}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 cases have no prediction .*: {SECOND}; run"):
        evaluate.run(configure(data), run)
    assert not (run / "summary.json").exists()


def test_predictions_without_a_reference_are_listed(tree):
    data, run = tree
    write(run / "predictions" / "stranger.nii.gz", PREDICTED[FIRST])
    with pytest.raises(FileNotFoundError, match=r"1 predictions have no .*: stranger; put them"):
        evaluate.run(configure(data), run)


def test_label_maps_that_a_stopped_call_did_not_come_to_are_not_scored(tree, caplog):
    """They are of the network before: half of the scores would be of another checkpoint."""
    data, run = tree
    record, names = origins.Origins(run / "predictions", {"step": 1}), [FIRST, SECOND]
    record.begin(names, overwrite=True)
    for name in names:
        record.note(name)
    evaluate.run(configure(data), run)
    record = origins.Origins(run / "predictions", {"step": 2})
    record.begin(names, overwrite=True)
    record.note(FIRST)
    with pytest.raises(ValueError, match=rf"1 of 2 label maps are of a call before .*{SECOND}; "):
        evaluate.run(configure(data), run)
    origins.Origins(run / "predictions", {"step": 1}).note(SECOND)
    evaluate.run(configure(data), run)
    assert "made in 2 ways (other networks or options): 1, 1 of them" in caplog.text


def readers_masks(run, change):
    """A folder of masks that a reader has drawn in numbers of his own."""
    masks = run.parent / "masks"
    for case in PREDICTED:
        write(masks / f"{case}.nii.gz", change(REFERENCE[case]))
    return str(masks)


def test_masks_that_know_one_value_are_told_where_label_maps_know_classes(tree, caplog):
    data, run = tree
    masks = readers_masks(run, lambda label: np.minimum(label, 1))
    evaluate.run(configure(data, references=masks), run)
    assert "no mask holds another value than 1, which is taken for EDH" in caplog.text
    assert "config.split.binary" in caplog.text
    caplog.clear()
    evaluate.run(configure(data, references=readers_masks(run, lambda label: label)), run)
    assert "another value" not in caplog.text


def test_merged_classes_are_compared_with_masks_of_any_numbers(tree):
    data, run = tree
    wanted = configure(data)
    wanted.split.binary = True
    evaluate.run(wanted, run)
    want = summary(run)["binary"]["dice"]
    masks = readers_masks(run, lambda label: np.where(label > 0, 255 - label, 0).astype(np.uint8))
    config = configure(data, references=masks)
    with pytest.raises(ValueError, match=r"got 254\. To compare .* set config\.split\.binary"):
        evaluate.run(config, run)
    config.split.binary = True
    evaluate.run(config, run)
    assert summary(run)["binary"]["dice"] == want


@pytest.fixture
def read_series(tmp_path):
    """A run with the label map of a tilted series, as `predict` writes it, and what it shows."""
    seg_files.make(tmp_path / "dicom", "tilted")
    (case,) = dicom_cases.scans(tmp_path / "dicom", uneven="refuse", unshear=False)
    out, answer = tmp_path / "run" / "predictions", seg_files.label_of(seed=1)
    scan.write(out / "0a1b.nii.gz", answer[:, ::-1], like=case.image)
    dicom_cases.write_series(out, [case], {case.id: "0a1b"})
    return out.parent, answer


def test_dicom_segs_are_references_by_their_series(tmp_path, read_series, caplog):
    run, answer = read_series
    drawn = seg_files.label_of()
    seg_files.write(tmp_path / "dicom", tmp_path / "masks" / "reader.dcm", drawn)
    config = configure(tmp_path, references=str(tmp_path / "masks"))
    series = run / "predictions" / "series.csv"
    series.write_text(series.read_text().replace(",", ";"), encoding="utf-8-sig")  # by Excel
    evaluate.run(config, run)
    for index, name in enumerate(HEMORRHAGE[1:], start=1):
        ours, theirs = answer == index, drawn == index
        both = ours.sum() + theirs.sum()
        want = 2 * (ours & theirs).sum() / both if both else math.nan
        found = float(table(run)["0a1b", name]["dice"])
        assert found == pytest.approx(want, abs=1e-12, nan_ok=True)
    (tmp_path / "masks" / "reader.dcm").rename(tmp_path / "masks" / "0a1b.dcm")
    kept = series.rename(run / "series.csv")
    before = table(run)
    evaluate.run(config, run)
    assert table(run) == before, "without the table by its name, as `predict` names its own"
    seg_files.write(tmp_path / "dicom", tmp_path / "masks" / "more.dcm", drawn)
    kept.rename(series)
    with pytest.raises(ValueError, match=r"two masks of 0a1b, one of them more\.dcm; keep one"):
        evaluate.run(config, run)
    (tmp_path / "masks" / "0a1b.nii.gz").write_bytes(
        (run / "predictions" / "0a1b.nii.gz").read_bytes()
    )
    evaluate.run(config, run)
    assert summary(run)["binary"]["dice"] == 1, "the mask in NIfTI, which may be the SEG converted"
    assert "passed over: 2" in caplog.text
    config.evaluate.also = ("raters",)
    (tmp_path / "masks" / "0a1b.nii.gz").unlink()
    (tmp_path / "masks" / "more.dcm").unlink()
    with pytest.raises(ValueError, match=r"raters compares with .* 1 cases have one mask: 0a1b"):
        evaluate.run(config, run)


def test_a_seg_of_any_bleeding_is_compared_where_classes_are_merged(tmp_path, read_series):
    run, answer = read_series
    drawn = np.minimum(seg_files.label_of(), 1)
    path, names = tmp_path / "masks" / "reader.dcm", ("background", "Hemorrhage")
    seg_files.write(tmp_path / "dicom", path, drawn, classes=names)
    config = configure(tmp_path, references=str(tmp_path / "masks"))
    with pytest.raises(ValueError, match=r"reader\.dcm: its segment 1 is labeled as none of"):
        evaluate.run(config, run)
    config.split.binary = True
    evaluate.run(config, run)
    want = 2 * np.minimum(answer, drawn).sum() / (np.count_nonzero(answer) + drawn.sum())
    assert summary(run)["binary"]["dice"] == pytest.approx(want)


def test_a_label_map_without_an_affine_is_measured_by_the_mask(tree):
    """As another program has written it, from an array."""
    data, run = tree
    masks = run.parent / "masks"
    for case in PREDICTED:
        nifti.write_volume(masks / f"{case}.nii.gz", Volume(REFERENCE[case], AFFINE, ""))
    config = configure(data, references=str(masks))
    evaluate.run(config, run)
    want = table(run)
    for case in PREDICTED:
        path = run / "predictions" / f"{case}.nii.gz"
        voxels = nifti.read(path).voxels.astype(np.uint8)
        nifti.write_volume(path, Volume(voxels, np.eye(4)[:, [2, 1, 0, 3]], ""))
    evaluate.run(config, run)
    assert table(run) == want


def test_a_mask_that_lost_its_affine_is_measured_by_the_label_map(tree, caplog):
    """A millimeter for each voxel, as of an array, made 4 mL of 4000."""
    data, run = tree
    masks = run.parent / "masks"
    evaluate.run(configure(data), run)
    want = table(run)[FIRST, "EDH"]
    for case in PREDICTED:
        path = masks / f"{case}.nii.gz"
        nifti.write_volume(path, Volume(REFERENCE[case], np.eye(4)[:, [2, 1, 0, 3]], ""))
    config = configure(data, references=str(masks))
    evaluate.run(config, run)
    found = table(run)[FIRST, "EDH"]
    for name in ("hd95_mm", "volume_ref_ml", "volume_pred_ml", "dice"):
        assert float(found[name]) == pytest.approx(float(want[name]))
    assert "lost its affine: mm and mL are by the label map's, 10 x 10 x 10 mm" in caplog.text
    nifti.write_volume(path, Volume(REFERENCE[case], AFFINE @ np.diag([0.5, 1, 1, 1]), ""))
    with pytest.raises(ValueError, match=r"mask has voxels of 5 x 10 x 10 mm .* 10 x 10 x 10 mm"):
        evaluate.run(config, run)


def test_without_predictions_the_verb_to_run_is_named(tree):
    data, run = tree
    with pytest.raises(FileNotFoundError, match="run the verb `predict` first"):
        evaluate.run(configure(data), run.parent / "elsewhere")


@pytest.mark.parametrize("field", ["predictions", "references"])
def test_a_file_in_place_of_a_folder_is_told(tree, field):
    data, run = tree
    config = configure(data)
    config.evaluate[field] = str(run / "predictions" / f"{FIRST}.nii.gz")
    with pytest.raises(ValueError, match=rf"is a file; name the folder .*evaluate\.{field}"):
        evaluate.run(config, run)


def test_a_prediction_on_another_grid_is_refused(tree):
    data, run = tree
    write(run / "predictions" / f"{SECOND}.nii.gz", PREDICTED[SECOND][:3])
    with pytest.raises(ValueError, match=rf"{SECOND}.nii.gz: label .*\(3, 24, 24\)"):
        evaluate.run(configure(data), run)


def test_the_baseline_needs_the_scans(tree):
    data, run = tree
    with pytest.raises(ValueError, match="needs the CT scans of the data set"):
        evaluate.run(configure(data, baseline=True, references=str(run)), run)


def test_printed_numbers_say_what_is_not_defined():
    head = {"dice": 0.5, "low": math.nan, "high": math.nan, "n": 1}
    head |= {"n_present": 1, "n_false_positive": 0}
    names = ("nnunet", "present", "pooled", "both-empty=1")
    found = {
        "n_cases": 1,
        "bootstrap": 0,
        "classes": ["any"],
        "conventions": {name: {"any": head, "mean": head} for name in names},
        "metrics": {"any": {"hd95_mm_median": math.nan, "nsd_mean": 0.25}},
    }
    _, _, line, mean = evaluate.table(found)
    numbers = ("0.500", "[n/a,", "n/a]", "0.500", "0.500", "0.500", "1")
    assert line.split() == ["any", *numbers, "1", "0", "n/a", "0.250"]
    assert mean.split() == ["mean", *numbers], "a scan with two classes counts twice in sums"


def test_what_a_process_has_scored_survives_a_trip_through_a_file(tree, tmp_path):
    """With nan, inf and the histogram of the baseline."""
    data, run = tree
    jobs = evaluate.comparisons(Settings.of(configure(data, baseline=True)), run)
    for scored in evaluate._score(jobs, 1).values():
        files.write_json(tmp_path / "part.json", scored.to_json())
        back = Scored.from_json(files.read_json(tmp_path / "part.json"))
        assert repr((back.rows, back.merged, back.warnings)) == repr(
            (scored.rows, scored.merged, scored.warnings)
        )
        for name in ("bleeding", "inside"):
            mine, theirs = getattr(back.histogram, name), getattr(scored.histogram, name)
            assert (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist())
        assert back.histogram.mask == scored.histogram.mask


@pytest.mark.parametrize(
    ("name", "damage", "verb"),
    [
        ("summary.json", lambda text: text[:-9], "evaluate"),
        ("summary.json", lambda text: text.replace('"binary"', '"binari"'), "evaluate"),
        ("cases.csv", lambda text: text.replace(",4,", ",4#,"), "evaluate"),
        ("cases.csv", lambda text: text[: len(text) // 2], "evaluate"),
        ("cases.csv", lambda text: "", "evaluate"),
        ("predictions/predictions.json", lambda text: "{", "predict"),
    ],
)
def test_a_damaged_file_is_named_where_it_is_read(tree, plan, name, damage, verb):
    data, run = tree
    config = configure(data)
    files.write_json(run / "plan.json", plan | {"classes": HEMORRHAGE})
    evaluate.run(config, run)
    files.write_json(run / "predictions" / "predictions.json", {"step": 1, "split": "test"})
    path = run / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"damaged|has no column") as caught:
        report.run(config, run)
    assert str(caught.value).startswith(f"{path}: ")
    assert f"`{verb}`" in str(caught.value)


def test_a_full_disk_ends_it_before_anything_is_scored(tree, disk):
    data, run = tree
    place = disk("size=8k")
    with pytest.raises(OSError, match="No space"):
        (place / "fill").write_bytes(bytes(9000))
    with pytest.raises(faults.WriteError, match="No space"):
        evaluate.run(configure(data, predictions=str(run / "predictions")), place)
    assert [path.name for path in place.iterdir()] == ["fill"]


@pytest.mark.parametrize("table_feed", [True, False])
def test_volumes_and_lesions_say_whether_they_are_corrected_for_tilt(tmp_path, table_feed):
    cos, sin = math.cos(math.radians(20)), math.sin(math.radians(20))
    turn = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    mask = labels((EDH, 1, 5, slice(4, 8)))
    nifti.write_volume(tmp_path / "a.nii.gz", Volume(mask, turn @ AFFINE, ""))
    job = evaluate.Comparison(
        *("a", "a", tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", None, HEMORRHAGE, "ct"),
        *(False, 1.0, False, table_feed),
    )
    (row, *_) = evaluate.score_case(job).rows
    assert row.tilt_corrected == int(table_feed)
    assert row.volume_ref_ml == pytest.approx(4 * (cos if table_feed else 1), rel=1e-5)
    scores.write_csv(tmp_path / "cases.csv", [row])
    assert scores.read_csv(tmp_path / "cases.csv")[0].tilt_corrected == int(table_feed)
    old = [line.rsplit(",", 1)[0] for line in (tmp_path / "cases.csv").read_text().splitlines()]
    (tmp_path / "old.csv").write_text("\n".join(old) + "\n")
    assert scores.read_csv(tmp_path / "old.csv")[0].tilt_corrected == 0
