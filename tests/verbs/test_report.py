"""The page of a run: whose scans, which label maps, and other runs beside it."""

import csv
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import EDH, FIRST, PREDICTED, REFERENCE, SECOND, configure, head, labels, write

from bhsd_jax.platform import files
from bhsd_jax.report import figures
from bhsd_jax.verbs import evaluate, report
from bhsd_jax.volume import HEMORRHAGE


@pytest.fixture
def tree(tmp_path, plan):
    """A small BHSD of two test scans, and a run folder with predictions of them."""
    data, run = tmp_path / "data", tmp_path / "run"
    for case in PREDICTED:
        label = REFERENCE[case]
        write(data / "label_192" / "images" / f"{case}.nii.gz", head(label))
        write(data / "label_192" / "ground truths" / f"{case}.nii.gz", label.astype(np.uint16))
        write(run / "predictions" / f"{case}.nii.gz", PREDICTED[case])
    split = {"training": [], "test": [f"{case}.nii.gz" for case in PREDICTED]}
    (data / "dataset.json").write_text(json.dumps(split))
    files.write_json(run / "plan.json", plan | {"classes": HEMORRHAGE})
    return data, run


@pytest.fixture
def drawn(monkeypatch):
    """The overlays a report would draw."""
    found = []
    monkeypatch.setattr(figures, "overlay_png", lambda one: found.append(one) or b"\x89PNG")
    return found


def texts(run):
    return [(run / name).read_text() for name in ("report.md", "report.html")]


def test_the_pictures_are_of_the_label_maps_that_were_scored(tree, drawn, tmp_path):
    data, run = tree
    other = tmp_path / "other"
    for case, label in REFERENCE.items():
        if case in PREDICTED:
            write(other / f"{case}.nii.gz", label)
    files.write_json(other / "predictions.json", {"step": 77})
    evaluate.run(configure(data, predictions=str(other)), run)
    report.run(configure(data), run)
    assert len(drawn) == 2
    for overlay in drawn:
        np.testing.assert_array_equal(overlay.predicted, overlay.reference)
    with (run / "names.csv").open(newline="") as file:
        listed = {row["label_map"] for row in csv.DictReader(file)}
    assert listed == {f"../other/{case}.nii.gz" for case in PREDICTED}
    for text in texts(run):
        assert "step 77" in text
        assert "The label maps are of another folder" in text
        assert str(tmp_path) not in text
    noted = json.loads((run / "summary.json").read_text())["scored"]
    assert noted.pop("resampled") == "patients"
    assert noted == {"predictions": "../other", "references": None, "split": "test"}
    assert "bootstrap resamples of patients" in texts(run)[0]


def test_a_linked_run_folder_leads_to_the_label_maps_too(tree, drawn, tmp_path):
    data, run = tree
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "deep" / "er" / "link"
    link.symlink_to(run)
    other = tmp_path / "other"
    for case in PREDICTED:
        write(other / f"{case}.nii.gz", REFERENCE[case])
    evaluate.run(configure(data, predictions=str(other)), link)
    report.run(configure(data), link)
    assert len(drawn) == 2


def test_masks_of_a_folder_are_drawn_where_there_is_a_scan(tree, drawn, tmp_path, caplog):
    data, run = tree
    masks, maps = tmp_path / "masks", tmp_path / "maps"
    mine = labels((EDH, 1, 5, slice(3, 12)))  # other than the data set's
    for case, label in ((FIRST, mine), ("stranger", REFERENCE[SECOND])):
        write(masks / f"{case}.nii.gz", label)
        write(maps / f"{case}.nii.gz", label)
    with caplog.at_level(logging.INFO):
        evaluate.run(configure(data, predictions=str(maps), references=str(masks)), run)
    assert "20 resamples of scans" in caplog.text, "whose they are is not known"
    with caplog.at_level(logging.WARNING):
        report.run(configure(data), run)
    (overlay,) = drawn
    assert np.count_nonzero(overlay.reference) == np.count_nonzero(mine)
    said = [r.message for r in caplog.records if r.name == "bhsd_jax.verbs.pages"]
    assert len(said) == 1
    assert said[0].startswith("no pictures of 1 of the 2 scans that were scored")
    assert "stranger" in said[0]
    for text in texts(run):
        assert "whether the network has seen them is not known" in text
        assert "never saw" not in text
        assert "bootstrap resamples of scans" in text
        assert "with other scans" in text
        assert str(tmp_path) not in text
    # Nor is the data set needed then.
    report.run(configure(tmp_path / "gone"), run)
    assert len(drawn) == 1
    assert "What it looks like" not in texts(run)[0]


def test_the_headline_says_whose_scans_were_scored(tree, drawn):
    data, run = tree
    config = configure(data)
    config.report.overlays = False
    evaluate.run(config, run)
    made = {"step": 3, "options": {"predict": {"checkpoint": "best"}}}
    found = json.loads((run / "summary.json").read_text())
    averaged, seen = {"averaged_with": [{"run": "fold1"}]}, "seen_in_training"
    doubt = "scans, on which some of the averaged runs may have been trained"
    for split, words, more in (
        ("test", "scans the network never saw", {}),
        ("val", "validation scans, which the network never saw", {}),
        ("train", "scans of the training part, which the network may have seen", {}),
        (None, "scans scored", {}),  # a summary of an older version
        ("val", f"val {doubt}", averaged),  # an older version, which did not look
        ("test", "scans the network never saw", averaged),
        ("val", f"val {doubt}", averaged | {seen: 1}),
        ("test", f"test {doubt}", averaged | {seen: 1}),
        ("val", "validation scans, which the network never saw", averaged | {seen: 0}),
        (None, "scans scored", averaged | {seen: 1}),
    ):
        files.write_json(run / "predictions" / "predictions.json", made | more)
        noted = {"predictions": "predictions", "references": None, "split": split}
        old = {name: value for name, value in found.items() if name != "scored"}
        files.write_json(run / "summary.json", found | {"scored": noted} if split else old)
        report.run(config, run)
        text = texts(run)[0]
        assert f"- **2** {words}\n" in text
        assert ("chosen on these very scans" in text) == (split == "val")


def test_a_distance_says_of_how_many_scans_it_is(tree):
    """SAH is in both masks of one scan, and made up in the other."""
    data, run = tree
    config = configure(data)
    config.report.overlays = False
    evaluate.run(config, run)
    report.run(config, run)
    lines = [line.strip("| ").split(" | ") for line in texts(run)[0].splitlines()]
    head = next(i for i, line in enumerate(lines) if "HD95, median (mm)" in line)
    columns, row = lines[head], next(line for line in lines[head:] if line[0] == "SAH")
    found = dict(zip(columns, row, strict=True))
    names = ("HD95, median (mm)", "of scans", "in one mask only", "of those drawn, real")
    assert [found[name] for name in names] == ["0.000", "1", "1", "0.500"]


def test_a_summary_of_an_older_version_has_its_pictures(tree, drawn, caplog):
    data, run = tree
    evaluate.run(configure(data), run)
    found = json.loads((run / "summary.json").read_text())
    del found["scored"]
    files.write_json(run / "summary.json", found)
    lines = (run / "cases.csv").read_text().replace(SECOND, "ID_cccccccc_ID_0000000009")
    (run / "cases.csv").write_text(lines)  # scored with masks of a folder, which it does not say
    with caplog.at_level(logging.WARNING):
        report.run(configure(data), run)
    assert len(drawn) == 1
    assert "no pictures of 1 of the 2" in caplog.text


def summary(dice, classes=("EDH", "SDH"), **more):
    return dict.fromkeys(report._SUMMARY) | {
        "binary": {"dice": dice},
        "classes": list(classes),
        "conventions": {"nnunet": {"mean": {"dice": dice}}},
        "n_cases": 2,
        **more,
    }


def compared(this, others, own=0.1):
    """Names and Dice of the rows."""
    section = report._comparison([str(other) for other in others], summary(own), this)
    return [row[:2] for row in section.parts[0].rows]


def test_every_run_that_is_compared_has_a_row(tmp_path, monkeypatch):
    for name, dice in (("cps/seed0", 0.1), ("ict/seed0", 0.2), ("b/ict/seed0", 0.3), ("w2s", 0.4)):
        files.write_json(tmp_path / name / "summary.json", summary(dice))
    (tmp_path / "link").symlink_to(tmp_path / "w2s")
    this = tmp_path / "cps" / "seed0"
    others = [tmp_path / name for name in ("ict/seed0", "b/ict/seed0", "w2s", "cps/seed0", "link")]
    rows = compared(this, others)
    assert rows == [
        ("cps/seed0 (this run)", "0.100"),
        (f"{tmp_path.name}/ict/seed0", "0.200"),
        ("b/ict/seed0", "0.300"),
        ("w2s", "0.400"),
    ]
    monkeypatch.chdir(tmp_path / "cps")
    assert compared(Path("seed0"), ["../w2s"]) == [("seed0 (this run)", "0.100"), ("w2s", "0.400")]
    assert compared(this, [this]) == [("seed0 (this run)", "0.100")]


def test_a_binary_dice_never_stands_among_means_over_classes(tmp_path):
    for name, classes in (("binary", ["any"]), ("other", ["EDH", "SAH", "SDH"])):
        files.write_json(tmp_path / name / "summary.json", summary(0.7, classes))
    own = summary(0.4)

    def shown(*others):
        folders = [str(tmp_path / name) for name in others]
        table, *words = report._comparison(folders, own, tmp_path / "own").parts
        return [row[1:3] for row in table.rows], words

    rows, words = shown("binary")
    assert rows == [("0.400", "0.400"), ("0.700", "n/a")]
    assert words == ["The runs have different classes: no two means over others can be compared."]
    assert shown("other") == ([("0.400", "0.400"), ("0.700", "0.700")], words)
    own = summary(0.4, ["any"])
    assert shown("binary") == ([("0.400", "0.400"), ("0.700", "0.700")], [])


def test_runs_that_were_scored_on_other_scans_or_masks_are_said_to_be(tmp_path):
    told = "The runs were scored on different scans or masks: no two such rows can be compared."
    this, other = tmp_path / "this", tmp_path / "deep" / "other"
    test = {"split": "test", "references": None}

    def words(ours, theirs, **more):
        own = summary(0.1) | ({"scored": ours} if ours else {})
        noted = {"scored": theirs} if theirs else {}
        files.write_json(other / "summary.json", summary(0.2, **noted, **more))
        return report._comparison([str(other)], own, this).parts[1:]

    assert words(test, test) == words(None, test) == ()
    assert words(test, test | {"split": "val"}) == (told,)
    assert words(None, test, n_cases=3) == (told,)
    masks = {"split": None, "references": "../masks"}
    assert words(masks, masks | {"references": "../../masks"}) == (), "one folder"
    assert words(masks, masks) == (told,)


def test_label_maps_of_any_format_that_is_scored_are_shown(tree, drawn):
    data, run = tree
    (tmp := run / "predictions").rename(run / "zipped")
    tmp.mkdir()
    label = (run / "zipped" / f"{FIRST}.nii.gz").read_bytes()
    (tmp / f"{FIRST}.nii").write_bytes(gzip.decompress(label))
    itk = pytest.importorskip("SimpleITK")
    name = str(run / "zipped" / f"{SECOND}.nii.gz")
    itk.WriteImage(itk.ReadImage(name), str(run / "second.nrrd"))
    (run / "second.nrrd").rename(tmp / f"{SECOND}.NRRD")
    evaluate.run(configure(data), run)
    report.run(configure(data), run)
    assert [np.count_nonzero(overlay.predicted) for overlay in drawn] == [4, 2]
    with (run / "names.csv").open(newline="") as file:
        listed = {row["label_map"] for row in csv.DictReader(file)}
    assert listed == {f"predictions/{FIRST}.nii", f"predictions/{SECOND}.NRRD"}
