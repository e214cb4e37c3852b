"""`preprocess` on DICOM folders, with names everywhere that must come out nowhere."""

import csv
import json
import logging

import numpy as np
import pytest
from dicom_files import NAME, PATIENT, block, write_series

from bhsd_jax.configs import common
from bhsd_jax.ct import nifti, scan
from bhsd_jax.datasets import splits
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.datasets.rsna import TYPES
from bhsd_jax.settings import Settings
from bhsd_jax.shards import store
from bhsd_jax.verbs import evaluate, preprocess
from bhsd_jax.volume import Volume

SHAPE = (8, 24, 24)
CASES = 4


@pytest.fixture
def tree(tmp_path):
    """Four studies of a patient each, one tilted, one uneven; three have masks."""
    root = tmp_path / "in"
    for index in range(CASES):
        write_series(
            root / f"{NAME}_{index}" / "IMAGES",
            block(SHAPE, seed=index),
            study=f"1.2.{index}",
            series=f"1.2.{index}.7",
            patient=f"{PATIENT}-{index}",
            tilt_deg=15.0 if index == 1 else 0.0,
            places=np.array([0, 5, 10, 15, 20, 25, 33, 41]) if index == 3 else None,
        )
    for case in DICOM(root, show_ids=True, uneven="resample").cases():
        if "_3" not in case.id:
            volume, _ = scan.read(case.image)
            label = np.zeros(volume.voxels.shape, np.uint8)
            label[3:5, 8:12, 9:15] = 2
            mask = root / "masks" / f"{case.id}.nii.gz"
            mask.parent.mkdir(exist_ok=True)
            nifti.write_volume(mask, Volume(label, volume.affine, ""))
    return root


def configure(root, word="dicom", **data):
    config = common.get_config(f"data={word}")
    config.data.update(root=str(root), **data)
    config.preprocess.update(cases_per_shard=2, processes=1, spacing_mm=(5.0, 2.0, 1.5))
    return config


def everything(folder):
    """All that a run left, as one text; shards are searched by their records' headers."""
    texts = [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    texts += [str(path.relative_to(folder)) for path in folder.rglob("*")]
    if (folder / "shards" / "index.json").is_file():
        found = store.Shards(folder / "shards")
        texts += [repr(found.load(entry.id)) for entry in found.entries]
    return "\n".join(texts)


def leaks(text):
    return [
        secret for secret in (NAME, "Roe", PATIENT, "MRN", "1.2.0.7", "19700101") if secret in text
    ]


def test_series_and_masks_become_shards_and_no_name_comes_along(tree, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    preprocess.run(configure(tree, uneven="resample"), tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    assert sorted(entry.split for entry in found.entries) == ["train"] * 3 + ["unlabeled"]
    assert not leaks(everything(tmp_path / "run"))
    assert not leaks(caplog.text)
    config = configure(tree, uneven="resample")
    cases = {
        case.id: case
        for case in preprocess.data.data_set(Settings.of(config), tmp_path / "run").cases()
    }
    assert set(cases) == {entry.id for entry in found.entries}, "the salt stays with the shards"
    for id, case in cases.items():
        made = found.load(id)
        volume, _ = scan.read(case.image)
        np.testing.assert_allclose(made.grid.native_affine, volume.affine)
        assert made.image.min() >= -1024
        if case.label:
            assert sorted(np.flatnonzero(np.bincount(made.label.ravel())).tolist()) == [0, 2]
            assert made.volume_ml[2] == pytest.approx(2 * 4 * 6 * 5 * 2 * 1.5 / 1000, rel=1e-5)
            shown = made.label.any(axis=(1, 2)).astype(int).tolist()
            assert [row[1] for row in made.slice_labels] == shown
    with (tmp_path / "run" / "integrity.csv").open(newline="") as file:
        said = [row["warnings"] for row in csv.DictReader(file)]
    assert sum("interpolated to" in text for text in said) == 1
    assert sum("gantry tilt of 15.0 degrees" in text for text in said) == 1


def test_one_salt_gives_the_shards_of_two_folders_the_same_ids(tree, tmp_path):
    """So folds, labeled scans and the stages of a cascade are of the same scans."""
    found = []
    for salt in ("", "ours"):
        config = Settings.of(configure(tree, uneven="resample", salt=salt))
        sets = [preprocess.data.data_set(config, tmp_path / run).survey() for run in "ab"]
        found += [{case.id for case in one.cases} for one in sets]
    assert not found[0] & found[1]
    assert found[2] == found[3]
    with pytest.raises(ValueError, match=r"no label map of 3 of 3 .* the same --data\.salt"):
        preprocess._cascaded(sets[0], {})


def test_folds_and_draws_are_the_same_whatever_the_salt(tree, tmp_path):
    """Runs with shards of their own were trained and validated on other scans, without a word."""
    found = []
    for run in "ab":
        config = Settings.of(configure(tree, uneven="resample"))
        preprocess.run(config, tmp_path / run)
        entries = store.Shards(tmp_path / run / "shards").entries
        whose = {entry.id: (entry.shape, entry.volume_ml, entry.sorted_by) for entry in entries}
        roles, _ = splits.roles(entries, fold=-1, labeled=1, seed=3)
        found.append([{whose[id] for id in part} for part in (roles.train, roles.unlabeled)])
        assert all(entry.sorted_by for entry in entries)
        assert roles.train == tuple(sorted(roles.train))
    assert found[0] == found[1]


def test_a_series_that_is_refused_is_in_the_ledger_without_its_name(tree, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ValueError, match=r"1 of 4 cases skipped.*uneven steps") as caught:
        preprocess.run(configure(tree), tmp_path / "run")
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == 3
    assert "uneven steps" in (tmp_path / "run" / "skipped.csv").read_text()
    assert not leaks(everything(tmp_path / "run") + caplog.text + str(caught.value))


def test_a_mask_that_is_refused_names_no_patient(tree, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    mask = next((tree / "masks").iterdir())
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1 of 4 cases skipped.*its mask: damaged gzip") as caught:
        preprocess.run(configure(tree, uneven="resample"), tmp_path / "run")
    assert not leaks(everything(tmp_path / "run") + caplog.text + str(caught.value))


def test_label_maps_on_the_series_are_evaluated(tree, tmp_path):
    """The masks themselves as predictions, stored in another voxel order."""
    preprocess.run(configure(tree, uneven="resample"), tmp_path / "run")
    config = configure(tree, uneven="resample")
    config.evaluate.update(split="train", bootstrap=10)
    config.preprocess.processes = 1
    (tmp_path / "run" / "plan.json").write_bytes(
        (tmp_path / "run" / "shards" / "plan.json").read_bytes()
    )
    for case in preprocess.data.data_set(Settings.of(config), tmp_path / "run").cases():
        if case.label:
            mask = nifti.read(case.label)
            affine = mask.affine.copy()
            affine[:3, 3] += affine[:3, 2] * (SHAPE[2] - 1)
            affine[:3, 2] *= -1
            turned = Volume(np.ascontiguousarray(mask.voxels[:, :, ::-1]), affine, "")
            nifti.write_volume(tmp_path / "run" / "predictions" / f"{case.id}.nii.gz", turned)
    evaluate.run(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["n_cases"] == 3
    assert found["conventions"]["nnunet"]["IPH"]["dice"] == 1.0


def test_slice_labels_of_the_challenge_reach_the_prepared_slices(tmp_path):
    """With BHSD's outlined scans to plan from; the pool's are cropped and resampled."""
    slices = [f"ID_0000000{k}{k}" for k in range(8)]
    rows = [(0, int(k == 3), 0, 0, int(k in (4, 5))) for k in range(8)]
    head = block(SHAPE)
    root = tmp_path / "rsna"
    study = {"patient": "ID_0b000002", "study": "ID_00000000b2", "series": "ID_s"}
    write_series(root / "a", head, instances=slices, **study)
    lines = ["ID,Label"]
    for name, row in zip(slices, rows, strict=True):
        lines += [
            f"{name}_{kind},{v}" for kind, v in zip((*TYPES, "any"), (*row, max(row)), strict=True)
        ]
    (root / "stage_2_train.csv").write_text("\n".join(lines) + "\n")
    base, id = tmp_path / "bhsd", "ID_0a000001_ID_00000000a1"
    affine = np.array([[0, 0, -1.5, 0], [0, 2.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    label = np.zeros(SHAPE, np.uint8)
    label[3, 8:12, 9:15] = 2
    for folder, voxels in (("images", head.astype(np.int16)), ("ground truths", label)):
        nifti.write_volume(base / "label_1" / folder / f"{id}.nii.gz", Volume(voxels, affine, ""))
    (base / "dataset.json").write_text(json.dumps({"training": [f"{id}.nii.gz"]}))
    config = configure(root, "rsna", bhsd=str(base))
    config.preprocess.spacing_mm = (2.5, 2.0, 1.5)
    preprocess.run(config, tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    assert [(e.id, e.split, e.bleeding) for e in found.entries] == [
        (id, "train", True),
        ("ID_0b000002_ID_00000000b2", "unlabeled", True),
    ]
    made = found.load("ID_0b000002_ID_00000000b2")
    first, last = made.grid.crop_start[0], made.grid.crop_stop[0]
    assert len(made.slice_labels) == len(made.image) == 2 * (last - first)
    assert made.slice_labels == tuple(row for row in rows[first:last] for _ in range(2))
