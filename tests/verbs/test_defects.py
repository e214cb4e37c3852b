"""One tree with every defect known from real copies of BHSD goes through `preprocess`."""

import csv
import json
import logging

import numpy as np
import pytest

from bhsd_jax.configs import common
from bhsd_jax.ct import prepare
from bhsd_jax.ct.integrity import checkup
from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.phantom.defects import DEFECTS, spoil
from bhsd_jax.phantom.tree import generate
from bhsd_jax.shards import store
from bhsd_jax.verbs import preprocess

# What `spoil` did, what the integrity table calls it, the outcome, words of what it says.
NAMED = [
    ("file without .nii.gz", "file without .nii.gz", "repaired", "first bytes"),
    ("padding of -2048", "padding below -1024 HU", "repaired", "voxels below"),
    ("padding of -3024", "padding below -1024 HU", "repaired", "voxels below"),
    ("metal", "metal beyond 3071 HU", "repaired", "4 above"),
    ("16-bit wrap", "16-bit wrap of metal", "repaired", "undone in 4 voxels"),
    ("12-bit overflow", "12-bit overflow", "repaired", "wrapped back"),
    (
        "mask elsewhere",
        "mask that lies elsewhere than its image",
        "repaired",
        "mm off the image's, which is taken",
    ),
    ("mask mirrored", "mask that may be mirrored", "kept", "look whether the mask is"),
    ("empty mask", "empty mask of a scan that bleeds", "refused", "the mask is empty"),
    (
        "label values out of range",
        "label values out of range",
        "refused",
        "label values must be integers in 0..5; got ",
    ),
    ("slice step of 0.5 mm", "doubtful size", "kept", "height of 4 mm in all"),
    ("truncated file", "damaged gzip stream", "refused", "before the end-of-stream"),
    ("flipped bit", "damaged gzip stream", "refused", "CRC check failed"),
    ("scan that is not there", "image that is not there", "refused", "no image for"),
    ("mask that is not there", "mask that is not there", "refused", "no mask for"),
    ("patient scanned twice", "patient scanned twice", "repaired", "in the same fold"),
    ("in both official lists", "in both official lists", "refused", "and in 'test'"),
    ("in no official list", "in no official list", "refused", "not in dataset.json"),
    (
        "unlabeled scan of a test patient",
        "unlabeled scan of a test patient",
        "repaired",
        "is tested on; left out of the pool",
    ),
    ("copy of a test scan", "one scan under two names", "repaired", "the same voxels as"),
    (
        "scan that bleeds and does not",
        "scan that bleeds and does not",
        "refused",
        "lies in anybleed and in nobleed",
    ),
    ("labeled scan in the pool", "labeled scan in the pool", "repaired", "has a mask"),
    ("link in a circle", "link that leads nowhere", "refused", "a link in a circle"),
]
OF_ALL = [  # of the layout, of nearly every scan, or of no scan at all
    ("space in a folder's name", "the data set", "repaired", "ground truths"),
    ("dead paths in dataset.json", "the data set", "repaired", "20 paths such as ./imagesTr/ID_"),
    ("path that leads out of the data set", "the data set", "repaired", "'../imagesTs/ID_"),
    ("leftover of macOS", "the data set", "repaired", "._ID_"),
    ("folder that holds another number than its name says", "the data set", "kept", "holds 20 sc"),
    ("labels in a table without a scan", "the data set", "kept", "rows of 6 scans"),
    ("HU behind scale factors", "17 scans", "repaired", "scale factors applied: "),
    ("position in the qform only", "17 scans", "repaired", "no sform"),
    ("mask not stored in 8 bits", "13 scans", "repaired", "stored as uint16"),
]
TREE = {"train": 17, "test": 3, "bleeding": 5, "nonbleeding": 2, "size": 32, "slices": 8}
LEFT_OUT = ("unlabeled scan of a test patient", "copy of a test scan")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("spoiled")
    generate(root, **TREE, seed=3, processes=1)
    return root, spoil(root)


def configure(root, **settings):
    config = common.get_config("data=bhsd")
    config.data.root = str(root)
    config.preprocess.update(processes=1, spacing_mm=(20.0, 7.8, 7.8), **settings)
    return config


@pytest.fixture(scope="module")
def run(tree, tmp_path_factory):
    """The whole verb; the page as logged, the folder it wrote, and the scans by defect."""
    root, done = tree
    folder = tmp_path_factory.mktemp("run")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    checkup.logger.addHandler(handler)
    level = checkup.logger.level
    checkup.logger.setLevel(logging.INFO)
    try:
        with pytest.raises(ValueError, match=r"10 of 28 cases skipped, see .*skipped\.csv"):
            preprocess.run(configure(root), folder)
    finally:
        checkup.logger.removeHandler(handler)
        checkup.logger.setLevel(level)
    return next(text for text in records if "Defects" in text), folder, done


def block(page, defect):
    """The outcome a defect stands under, how many scans have it, and what is said of it."""
    lines = page.splitlines()
    (at,) = (i for i, text in enumerate(lines) if text.startswith(f"  {defect} ("))
    above = [text for text in lines[:at] if text and not text.startswith(" ")]
    below = []
    for text in lines[at + 1 :]:
        if not text.startswith("    "):
            break
        below.append(text.strip())
    count = lines[at].strip().removeprefix(f"{defect} (").removesuffix(")")
    return above[-1].partition(":")[0], count, "\n".join(below)


def rows(folder, name):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_defect_is_another_scans_and_is_looked_for(tree):
    root, done = tree
    assert {name for name, *_ in NAMED} == set(done)
    assert len(set(done.values())) == len(done)
    before = sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*"))
    assert spoil(root) == done == json.loads((root / DEFECTS).read_text())
    assert sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*")) == before


@pytest.mark.parametrize(
    ("made", "defect", "outcome", "words"), NAMED, ids=[row[0] for row in NAMED]
)
def test_the_integrity_table_names_the_defect(run, made, defect, outcome, words):
    page, folder, done = run
    found, count, text = block(page, defect)
    said = [
        row["done"]
        for row in rows(folder, "defects.csv")
        if row["case"] == done[made] and row["defect"] == defect and words in row["text"]
    ]
    assert set(said) == {found} == {outcome}
    cases = {row["case"] for row in rows(folder, "defects.csv") if row["defect"] == defect}
    assert count == ("1 scan" if len(cases) == 1 else f"{len(cases)} scans")
    if len(cases) <= 2:
        assert done[made] in text
        assert words in text


@pytest.mark.parametrize(
    ("defect", "count", "outcome", "words"), OF_ALL, ids=[row[0] for row in OF_ALL]
)
def test_the_integrity_table_names_what_the_whole_set_has(run, defect, count, outcome, words):
    page, folder, _ = run
    found, counted, text = block(page, defect)
    assert (found, counted) == (outcome, count)
    assert words in text
    assert defect in {row["defect"] for row in rows(folder, "defects.csv")}


def test_the_table_has_no_other_defects(run):
    page, folder, _ = run
    expected = {row[1] for row in NAMED} | {row[0] for row in OF_ALL}
    assert {row["defect"] for row in rows(folder, "defects.csv")} == expected
    totals = json.loads((folder / "integrity.json").read_text())
    assert {found["defect"] for found in totals["defects"]} == expected
    heads = [text for text in page.splitlines() if text.startswith("  ") and text[2] != " "]
    assert {head.strip().partition(" (")[0] for head in heads} == expected


def test_the_sums_of_the_table_are_those_of_what_is_left(run):
    page, folder, _ = run
    assert "BHSD: 17 scans can be used, 10 are refused" in page
    lines = {line.split("  ")[0]: line.split()[-4:] for line in page.splitlines()}
    assert lines["usable"] == ["10", "3", "4", "17"]
    assert lines["with a mask"] == ["10", "3", "0", "13"]
    assert lines["known not to bleed"] == ["0", "0", "2", "2"]
    totals = json.loads((folder / "integrity.json").read_text())
    assert (totals["cases"], totals["skipped"], totals["splits"]["test"]["cases"]) == (17, 10, 3)
    table = rows(folder, "integrity.csv")
    assert len(table) == 17
    tilted = [row for row in table if abs(float(row["tilt_deg"])) > 0.5]
    assert {row["tilt_corrected"] for row in tilted} == {"1"}, "BHSD's slice step is the feed"
    assert totals["tilt_corrected"] == len(tilted) == totals["tilted"]
    assert f"scans, mL corrected in {len(tilted)})" in page
    volumes = [float(row["ml_IPH"]) for row in table if row["split"] == "train"]
    assert totals["splits"]["train"]["classes"]["IPH"]["ml"] == pytest.approx(sum(volumes))
    (flat,) = (row for row in table if row["field_mm"].startswith("4x"))
    assert flat["case"] == run[2]["slice step of 0.5 mm"]


def test_refused_scans_are_in_the_ledger_and_all_others_in_the_shards(run):
    _, folder, done = run
    refused = {done[made] for made, _, outcome, _ in NAMED if outcome == "refused"}
    assert {row["case"] for row in rows(folder, "skipped.csv")} == refused
    entries = {entry.id for entry in store.Shards(folder / "shards").entries}
    left_out = {done[made] for made in LEFT_OUT}
    others = set(done.values()) - refused - left_out - {done["labeled scan in the pool"]}
    assert others <= entries
    assert not entries & (refused | left_out)
    assert len(entries) == 17


def test_repaired_scans_are_prepared_as_if_they_had_been_whole(run, tree, tmp_path):
    """12 bits and padding come back to what was there; a mask follows its image."""
    _, folder, done = run
    generate(tmp_path / "whole", **TREE, seed=3, processes=1)
    whole = {case.id: case for case in BHSD(tmp_path / "whole").cases()}
    found = store.Shards(folder / "shards")
    for made, floor, near in (
        ("file without .nii.gz", -1024, 0),
        ("mask elsewhere", -1024, 1),
        ("12-bit overflow", -1000, 3),
    ):
        clean = prepare.prepare_case(whole[done[made]], found.plan)
        got = found.load(done[made])
        np.testing.assert_array_equal(got.label, clean.label)
        floored = [np.maximum(image.astype(int), floor) for image in (got.image, clean.image)]
        assert np.abs(floored[0] - floored[1]).max() <= near, made


def test_what_is_missing_is_only_said_if_that_is_allowed(tree, tmp_path, caplog):
    root, done = tree
    config = configure(root, verify_only=True, allow_skipped=True)
    config.data.allow_missing = True
    with caplog.at_level(logging.INFO, logger="bhsd_jax"):
        preprocess.run(config, tmp_path / "run")
    page = next(text for text in caplog.messages if "Defects" in text)
    assert block(page, "image that is not there")[0] == "kept"
    assert "9 of 27 cases skipped" in caplog.messages[-1]
    assert done["scan that is not there"] not in (tmp_path / "run" / "skipped.csv").read_text()
    assert not (tmp_path / "run" / "shards").exists()
