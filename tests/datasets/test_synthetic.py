import csv
import hashlib
import json
import re

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.datasets.synthetic import Synthetic
from bhsd_jax.phantom import tree as phantom_tree
from bhsd_jax.phantom.case import Options, make_case
from bhsd_jax.phantom.defects import spoil
from bhsd_jax.phantom.files import case_id, write_image
from bhsd_jax.phantom.tree import generate
from bhsd_jax.volume import HEMORRHAGE

SMALL = {"size": 48, "slices": 10}
TREE = {"train": 3, "test": 2, "bleeding": 2, "nonbleeding": 1, "size": 32, "slices": 6}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    generate(root, processes=1, **TREE)
    return root


def _hashes(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_scaled_files_give_the_values_back_within_half_a_slope(tmp_path):
    hu, _, truth = make_case(8, Options(**SMALL, pad_hu=-3024))
    path = tmp_path / "scan.nii.gz"
    write_image(path, hu, truth.scan.stored_affine, scaled=True)
    image = nib.load(path)
    read = np.asarray(image.dataobj).transpose(2, 1, 0)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.dataobj.slope, (float(hu.max()) + 3024) / 65535, rtol=1e-6)
    np.testing.assert_allclose(read, hu, atol=image.dataobj.slope / 2 + 1e-3)
    assert (read != hu).any()
    write_image(path, hu, truth.scan.stored_affine, scaled=False)
    np.testing.assert_array_equal(nib.load(path).get_fdata().transpose(2, 1, 0), hu)


def test_the_tree_is_laid_out_as_bhsd(tree):
    folders = {
        "label_192/images": 5,
        "label_192/ground truths": 5,
        "unlabel_2000/anybleed": 2,
        "unlabel_2000/nobleed": 1,
    }
    for folder, count in folders.items():
        names = [p.name for p in (tree / folder).iterdir()]
        assert len(names) == count
        assert all(re.fullmatch(r"ID_[0-9a-f]{8}_ID_[0-9a-f]{10}\.nii\.gz", n) for n in names)
    assert sorted(p.name for p in tree.iterdir()) == [
        "dataset.json",
        "label_192",
        "slice_labels.csv",
        "synthetic.json",
        "unlabel_2000",
    ]
    lists = json.loads((tree / "dataset.json").read_text())
    assert (lists["numTraining"], lists["numTest"]) == (3, 2)
    assert lists["labels"]["1"] == "epidural"
    assert all(item["label"].startswith("./labelsTr/ID_") for item in lists["training"])
    assert not (tree / lists["test"][0]).exists()


def test_headers_are_those_of_bhsd(tree):
    for path in tree.rglob("*.nii.gz"):
        image = nib.load(path)
        header = image.header
        assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
        assert (header["qform_code"], header["sform_code"], header["xyzt_units"]) == (1, 0, 2)
        assert header["descrip"] == b""
        assert image.shape == (32, 32, 6)
        is_label = path.parent.name == "ground truths"
        assert image.get_data_dtype() == (np.uint16 if is_label else np.int16)


def test_the_header_shows_the_tilt(tmp_path):
    hu, _, truth = make_case(1, Options(**SMALL, tilt_deg=-22.5, classes=()))
    write_image(tmp_path / "a.nii.gz", hu, truth.scan.stored_affine, scaled=True)
    affine = nib.load(tmp_path / "a.nii.gz").affine
    assert np.rad2deg(np.arctan2(affine[2, 1], affine[1, 1])) == pytest.approx(-22.5, abs=1e-3)
    np.testing.assert_allclose(affine[:, :3], truth.scan.stored_affine[:, [2, 1, 0]], atol=1e-4)


def test_slice_labels_say_which_classes_a_slice_shows(tree):
    with (tree / "slice_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "slice", "any", *HEMORRHAGE[1:]]
    assert len(rows) == 8 * 6
    for path in (tree / "label_192/ground truths").iterdir():
        label = np.asarray(nib.load(path).dataobj)
        own = [r for r in rows if r["case"] == path.name.removesuffix(".nii.gz")]
        for row in own:
            shown = label[:, :, int(row["slice"])]
            assert [int(row[c]) for c in HEMORRHAGE[1:]] == [
                int((shown == i).any()) for i in range(1, 6)
            ]
            assert int(row["any"]) == int(shown.any())
    for folder, bleeds in (("anybleed", True), ("nobleed", False)):
        for path in (tree / "unlabel_2000" / folder).iterdir():
            own = [r for r in rows if r["case"] == path.name.removesuffix(".nii.gz")]
            assert any(r["any"] == "1" for r in own) == bleeds


def test_two_processes_make_the_files_of_one(tree, tmp_path):
    generate(tmp_path / "two", processes=2, **TREE)
    assert _hashes(tmp_path / "two") == _hashes(tree)


def test_more_cases_leave_the_first_as_they_are(tree, tmp_path):
    generate(tmp_path / "more", processes=1, **TREE | {"train": 4, "bleeding": 0})
    more, fewer = _hashes(tmp_path / "more"), _hashes(tree)
    images = [name for name in fewer if name.startswith("label_192")]
    assert {name: more[name] for name in images} == {name: fewer[name] for name in images}


def test_a_stopped_run_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    make, made = phantom_tree._make, []

    def stop_after_two(root, job):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.id)
        return make(root, job)

    monkeypatch.setattr(phantom_tree, "_make", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "t", processes=1, **TREE)
    again = []
    monkeypatch.setattr(
        phantom_tree, "_make", lambda root, job: again.append(job.id) or make(root, job)
    )
    generate(tmp_path / "t", processes=1, **TREE)
    assert len(again) == 8 - 2
    assert not set(again) & set(made)
    assert _hashes(tmp_path / "t") == _hashes(tree)


def test_a_whole_tree_is_kept_and_a_lost_file_made_again(tmp_path, caplog):
    root = tmp_path / "t"
    generate(root, processes=1, **TREE)
    before = _hashes(root)
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    with caplog.at_level("INFO"):
        generate(root, processes=1, **TREE)
    assert "complete, 8 scans" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == times
    next((root / "label_192/images").iterdir()).unlink()
    generate(root, processes=1, **TREE)
    assert _hashes(root) == before


def test_other_arguments_in_the_same_folder_are_refused(tree):
    with pytest.raises(ValueError, match="seed 0 instead of 7"):
        generate(tree, processes=1, seed=7, **TREE)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "label_192").mkdir()
    with pytest.raises(ValueError, match="not generated; choose an empty folder"):
        generate(tmp_path, processes=1, **TREE)


def test_a_negative_count_is_refused(tmp_path):
    with pytest.raises(ValueError, match="test must not be negative; got -1"):
        generate(tmp_path, **TREE | {"test": -1})


def test_ids_are_unique():
    ids = [case_id(0, group, i) for group in range(4) for i in range(500)]
    assert len({name[:11] for name in ids}) == 2000


def test_the_data_set_makes_itself_and_reads_as_bhsd(tmp_path):
    data = Synthetic(
        tmp_path / "s",
        labeled=2,
        test=1,
        bleeding=1,
        nonbleeding=1,
        size=32,
        slices=6,
        difficulty="easy",
    )
    with pytest.raises(FileNotFoundError, match="preprocess"):
        list(data.cases())
    data.prepare()
    cases = list(data.cases())
    assert cases == list(BHSD(tmp_path / "s").cases())
    assert sorted(c.split for c in cases) == ["test", "train", "train", "unlabeled", "unlabeled"]
    assert {c.bleeding for c in cases if c.split == "unlabeled"} == {True, False}
    assert data.classes == BHSD(tmp_path).classes
    for case in cases:
        assert case.slice_labels is not None
        assert len(case.slice_labels) == 6
        if case.bleeding is False:
            assert not np.any(case.slice_labels)
        if case.label is not None:
            label = np.asarray(nib.load(case.label).dataobj).transpose(2, 1, 0)
            shown = [[int((s == c).any()) for c in range(1, 6)] for s in label]
            np.testing.assert_array_equal(case.slice_labels, shown)


def test_a_data_set_without_a_folder_says_so():
    with pytest.raises(ValueError, match=r"set config\.data\.root"):
        Synthetic("").prepare()


def test_metal_and_rater_noise_are_asked_for_by_the_tree(tmp_path, tree):
    generate(tmp_path / "t", processes=1, **TREE, metal=0.5, rater_noise=True)
    folder = "label_192/images"
    brightest = [nib.load(p).get_fdata().max() for p in sorted((tmp_path / "t" / folder).iterdir())]
    assert 0 < sum(value > 30_000 for value in brightest) < len(brightest)
    masks = [
        [nib.load(p).get_fdata() for p in sorted((root / "label_192/ground truths").iterdir())]
        for root in (tree, tmp_path / "t")
    ]
    assert any((a != b).any() for a, b in zip(*masks, strict=True))
    with pytest.raises(ValueError, match="metal is a share"):
        generate(tmp_path / "u", processes=1, **TREE, metal=2)


def test_a_tree_begun_before_there_was_metal_goes_on(tmp_path):
    generate(tmp_path, processes=1, **TREE)
    path = tmp_path / "synthetic.json"
    old = json.loads(path.read_text())
    del old["metal"], old["rater_noise"]
    path.write_text(json.dumps(old))
    generate(tmp_path, processes=1, **TREE)
    with pytest.raises(ValueError, match=r"metal 0\.0 instead of 0\.5"):
        generate(tmp_path, processes=1, **TREE, metal=0.5)


def test_a_tree_too_small_for_every_defect_is_left_as_it_is(tree):
    before = _hashes(tree)
    with pytest.raises(ValueError, match="needs 17 training scans, 2 for testing and 3"):
        spoil(tree)
    assert _hashes(tree) == before
