"""Prediction on the scans' own grids, and the verb on a real, tiny run folder."""

import csv
import dataclasses
import gzip
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from dicom_files import NAME, PATIENT, write_series
from enhanced_files import write_enhanced
from nibabel import orientations
from pydicom import dcmread
from tiny_run import CLASSES, PLAN, TILE

from bhsd_jax.assemble import data, deployed, devices, origins, predictor, wiring
from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.ct import geometry, plausibility
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.prepare import prepare_case
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.experiments.local import free_port
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.platform import faults, files
from bhsd_jax.settings import Settings
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.verbs import evaluate, parts, predict
from bhsd_jax.verbs.predict_scans import Found
from bhsd_jax.volume import Case, Series

ROOT = Path(__file__).parents[2]
DEAD = 2**22 + 1  # above the largest number of a process
SPACING = (5.0, 2.0, 2.0)  # D H W


def find_scans(config, folder):
    return predict.find_scans(Settings.of(config), folder)


def head(seed=0):
    """HU [x y z] in RAS order, 20 x 26 x 7 voxels: air, a head, two bleeds off its center."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 26, 7)), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[x**2 + y**2 + (0.8 * z) ** 2 < 0.8] = 30
    hu[(x - 0.4) ** 2 + (y + 0.2) ** 2 + (z - 0.2) ** 2 < 0.06] = 75
    hu[(x + 0.3) ** 2 + (y - 0.4) ** 2 + (z + 0.3) ** 2 < 0.04] = 100
    noise = np.random.default_rng(seed).normal(0, 3, x.shape)
    return np.rint(hu + np.where(hu > -500, noise, 0)).astype(np.int16)


def upright(spacing=SPACING):
    """RAS affine (x, y, z) for spacing D, H, W."""
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = (-17.25, -31.0, 44.5)
    return affine


def rotation(axis, degrees):
    """About x, y or z of the world."""
    a, b = [i for i in range(3) if i != axis]
    turn = np.eye(4)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
    return turn


def write(path, voxels, affine):
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def stored_as(codes):
    """The head with its axes in another order and direction, e.g. "LAS"."""
    image = nib.Nifti1Image(head(), upright())
    change = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes)
    )
    return image.as_reoriented(change)


def thresholds(params, raw):
    """Class 1 above 60 HU, class 2 above 90, of the very voxel."""
    hu = raw[..., 0]
    return (jnp.stack([jnp.zeros_like(hu), hu - 60, 2 * hu - 150], -1),)


def threshold_predictor(plan=PLAN, **changes):
    window = SlidingWindow(thresholds, TILE, mirror=False, tiles_per_call=2)
    settings = {"fill": -1000.0, "classes": CLASSES, "probabilities": False} | changes
    return predictor.Predictor(window=window, networks=[{}], plan=plan, **settings)


def predicted(tmp_path, image, name="scan", **changes):
    source, target = tmp_path / f"{name}.nii.gz", tmp_path / "out" / f"{name}.nii.gz"
    target.parent.mkdir(exist_ok=True)
    nib.save(image, source)
    row = threshold_predictor(**changes)(Case(name, name, source, None, "test"), target, name)
    return nib.load(target), nib.load(source), row


def test_a_threshold_network_gives_the_thresholded_scan(tmp_path):
    label, scan, _ = predicted(tmp_path, nib.Nifti1Image(head(), upright()))
    hu = np.asanyarray(scan.dataobj)
    want = np.where(hu > 90, 2, np.where(hu > 60, 1, 0))
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(label.dataobj), want)
    assert len(np.unique(want)) == 3


@pytest.mark.parametrize("codes", ["LAS", "LPS", "RPI", "SAR", "PIL"])
def test_a_scan_stored_another_way_has_the_same_label_map(tmp_path, codes):
    want, _, _ = predicted(tmp_path, nib.Nifti1Image(head(), upright()), "ras")
    label, scan, _ = predicted(tmp_path, stored_as(codes), codes)
    assert nib.aff2axcodes(label.affine) == tuple(codes)
    assert label.shape == scan.shape
    np.testing.assert_array_equal(label.affine, scan.affine)
    back = nib.as_closest_canonical(label)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(want.dataobj))


@pytest.mark.parametrize(("axis", "degrees"), [(0, 20), (0, -14.5), (1, 9), (2, 30)])
def test_an_oblique_scan_keeps_voxels_affine_and_milliliters(tmp_path, axis, degrees, caplog):
    caplog.set_level(logging.INFO)
    want, _, straight = predicted(tmp_path, nib.Nifti1Image(head(), upright()), "straight")
    turned = nib.Nifti1Image(head(), rotation(axis, degrees) @ upright())
    label, scan, row = predicted(tmp_path, turned, "turned")
    np.testing.assert_array_equal(label.affine, scan.affine)
    np.testing.assert_array_equal(np.asanyarray(label.dataobj), np.asanyarray(want.dataobj))
    tilt = degrees if axis == 0 else 0
    assert row.tilt_deg == pytest.approx(tilt, abs=1e-3)
    for name in CLASSES[1:]:
        assert row.ml[name] == pytest.approx(straight.ml[name], rel=1e-5)
    assert not row.tilt_corrected
    said = bool(tilt) == ("taken as it is: right for an oblique reformat" in caplog.text)
    assert said


def test_milliliters_of_a_set_whose_slice_step_is_the_tables_feed_are_corrected(tmp_path):
    turned = nib.Nifti1Image(head(), rotation(0, 18) @ upright())
    nib.save(turned, tmp_path / "scan.nii.gz")
    target = tmp_path / "out.nii.gz"
    rows = [
        threshold_predictor()(
            Case("a", "a", tmp_path / "scan.nii.gz", None, "test", table_feed=feed), target, "a"
        )
        for feed in (True, False)
    ]
    assert [row.tilt_corrected for row in rows] == [True, False]
    assert [row.flat()["tilt_corrected"] for row in rows] == [1, 0]
    cosine = math.cos(math.radians(18))
    for name in CLASSES[1:]:
        assert rows[0].ml[name] == pytest.approx(cosine * rows[1].ml[name], rel=1e-5)
    pairs = list(zip(rows[0].lesions, rows[1].lesions, strict=True))
    assert pairs
    for corrected, plain in pairs:
        for field in ("ml", "abc2_ml"):
            assert corrected[field] == pytest.approx(cosine * plain[field], rel=1e-5)


def test_volumes_are_counts_times_the_voxel(tmp_path):
    label, _, row = predicted(tmp_path, nib.Nifti1Image(head(), upright()))
    counts = np.bincount(np.asanyarray(label.dataobj).ravel())
    assert row.ml == pytest.approx({"IPH": counts[1] * 0.02, "SDH": counts[2] * 0.02})
    assert row.tilt_deg == 0


def test_a_resampled_scan_comes_back_at_its_own_shape_and_place(tmp_path):
    image = nib.Nifti1Image(head(), upright((7.5, 1.5, 1.6)))
    label, scan, _ = predicted(tmp_path, image)
    assert label.shape == scan.shape
    np.testing.assert_array_equal(label.affine, scan.affine)
    hu = np.asanyarray(scan.dataobj)
    found = np.argwhere(np.asanyarray(label.dataobj) == 2).mean(0)
    np.testing.assert_allclose(found, np.argwhere(hu > 90).mean(0), atol=0.5)


def test_probabilities_lie_on_the_scan_and_agree_with_the_label_map(tmp_path):
    label, scan, _ = predicted(tmp_path, nib.Nifti1Image(head(), upright()), probabilities=True)
    found = np.load(tmp_path / "out" / "scan_probabilities.npz")["probabilities"]
    assert found.dtype == np.float16
    assert found.shape == (3, *scan.shape[::-1])
    np.testing.assert_allclose(found.astype(np.float32).sum(0), 1, atol=2e-3)
    np.testing.assert_array_equal(found.argmax(0).T, np.asanyarray(label.dataobj))


def test_the_sides_and_sizes_of_the_two_bleeds_are_told(tmp_path):
    """The one of class 1 lies to the right of the middle (x grows to the right), above it."""
    voxels = np.kron(head(), np.ones((4, 4, 1), np.int16))  # wide enough for a head
    _, _, row = predicted(tmp_path, nib.Nifti1Image(voxels, upright()), present_ml=0.5)
    told = row.bleeds()
    assert {name: told[name]["side"] for name in told} == {"IPH": "right", "SDH": "left"}
    assert row.flat()["IPH_side"] == "right"
    assert told["IPH"]["present"]
    assert told["IPH"]["first_slice"] > told["SDH"]["first_slice"]
    for name in CLASSES[1:]:
        assert sum(one["ml"] for one in row.lesions if one["name"] == name) == pytest.approx(
            row.ml[name]
        )
    less = dataclasses.replace(row, present_ml=1e6)
    assert {less.flat()[f"{name}_present"] for name in CLASSES[1:]} == {"no"}
    none = dataclasses.replace(row, lesions=(), ml={"IPH": 0.0}, present_ml=0.0)
    assert none.flat()["IPH_present"] == "no", "nothing is never there"


def test_a_bleed_has_no_side_where_the_file_does_not_say_which_side_is_which(tmp_path):
    voxels = np.kron(head(), np.ones((4, 4, 1), np.int16))
    image = nib.Nifti1Image(voxels, None)  # neither sform nor qform
    image.header.set_zooms((2.0, 2.0, 5.0))
    _, _, row = predicted(tmp_path, image)
    assert row.lesions
    assert {lesion["side"] for lesion in row.lesions} == {""}
    assert row.flat()["IPH_side"] == ""
    assert "no position in the header" in row.warning


def test_a_scan_that_is_not_in_hu_has_lesions_without_sides_where_networks_take_it(tmp_path):
    """As nnU-Net's, which take scans as they lie: windowed to 8 bits, they still have bleeds."""
    bytes_ = np.clip((head().astype(np.float32) + 160) / 400 * 255, 0, 255).astype(np.uint8)
    voxels = np.kron(bytes_, np.ones((4, 4, 1), np.uint8))
    assert plausibility.in_hu(voxels.T) is None
    plan = dataclasses.replace(PLAN, normalize_first=True, foreground=(0.0, 0.0, 1.0, 255.0))
    plan = dataclasses.replace(plan, crop_hu=None)
    label, _, row = predicted(tmp_path, nib.Nifti1Image(voxels, upright()), plan=plan)
    assert np.asanyarray(label.dataobj).any()
    assert row.lesions
    assert {lesion["side"] for lesion in row.lesions} == {""}
    assert "taken as it lies" in row.warning


# The verb, on a run folder with a random network.


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compiling for eight devices takes longer; `tests/infer` does it."""
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


def configure(images, **changes):
    config = common.get_config()
    config.infer.update(mirror=False, tiles=4)
    config.predict.update(images=str(images), **changes)
    return config


@pytest.fixture(scope="module")
def weights():
    """Config, and parameters of two random networks."""
    config = configure("")
    model = wiring.model(Run.of(config, Path("run"), PLAN))
    image = jax.ShapeDtypeStruct((1, *TILE, 1), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    random = np.random.default_rng(0)

    def draw():
        return jax.tree.map(
            lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), shapes["params"]
        )

    return model, draw(), draw()


@pytest.fixture
def folder(tmp_path, weights):
    """A run folder as training leaves it."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "plan.json").write_text(json.dumps(PLAN.to_json()))
    save_networks(workdir / "checkpoints", weights[1], config={}, plan=PLAN.to_json())
    return workdir


@pytest.fixture
def scans(tmp_path):
    """Two scans, one of them gzipped without saying so."""
    images = tmp_path / "images"
    images.mkdir()
    nib.save(stored_as("LAS"), images / "ID_1.nii.gz")
    other = nib.Nifti1Image(head(seed=1)[:, 2:, :], rotation(0, 18) @ upright((6.0, 2.0, 1.8)))
    (images / "ID_2").write_bytes(gzip.compress(other.to_bytes()))
    return images


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_label_map_is_the_networks(folder, scans, weights):
    predict.run(configure(scans), folder)
    model, params, _ = weights
    normalize = Run.of(configure(""), Path("run"), PLAN).normalization
    window = SlidingWindow(
        lambda p, x: model.apply({"params": p}, normalize(x), train=False), TILE, mirror=False
    )
    for name, file in (("ID_1", "ID_1.nii.gz"), ("ID_2", "ID_2")):
        prepared = prepare_case(Case(name, name, scans / file, None, "test"), PLAN)
        image = prepared.image[..., None].astype(np.float32)
        logits = window.logits([params], image, fill=normalize.pad_value("air"))
        want = geometry.argmax_from_grid(logits, prepared.grid)
        found = nib.load(folder / "predictions" / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(found.dataobj).T, want)
        assert len(np.unique(want)) > 1


def test_tables_say_what_was_done(folder, scans, caplog):
    caplog.set_level(logging.INFO)
    predict.run(configure(scans), folder)
    out = folder / "predictions"
    assert {path.name for path in out.iterdir()} == {
        *("ID_1.nii.gz", "ID_2.nii.gz"),
        *("volumes.csv", "volumes.json", "lesions.csv", "predictions.json", origins.NAME),
    }
    facts = json.loads((out / "predictions.json").read_text())
    assert facts["step"] == 0
    assert facts["networks"] == ["student"]
    assert facts["license"] == "CC0"
    assert facts["split"] is None
    assert "Research use only" in facts["notice"]
    assert "Research use only" in caplog.text
    assert "2 scans, about 12 tiles each" in caplog.text, "3 by 2 by 2 on 7 x 24 x 20"
    rows = rows_of(out / "volumes.csv")
    assert [row["case"] for row in rows] == ["ID_1", "ID_2"]
    assert float(rows[1]["tilt_deg"]) == pytest.approx(18, abs=0.01)
    label = np.asanyarray(nib.load(out / "ID_2.nii.gz").dataobj)
    each = 6.0 * 2.0 * 1.8 / 1000
    assert [row["tilt_corrected"] for row in rows] == ["0", "0"]
    for index, name in enumerate(CLASSES[1:], start=1):
        assert float(rows[1][f"{name}_ml"]) == pytest.approx(
            (label == index).sum() * each, abs=1e-3
        )
    listed = json.loads((out / "volumes.json").read_text())["scans"]
    assert listed[0]["ml"]["IPH"] == pytest.approx(float(rows[0]["IPH_ml"]), abs=1e-4)
    lesions = rows_of(out / "lesions.csv")
    assert [row["case"] for row in lesions] == sorted(row["case"] for row in lesions)
    for row, scan in zip(rows, listed, strict=True):
        for name in CLASSES[1:]:
            own = [r for r in lesions if (r["case"], r["class"]) == (row["case"], name)]
            assert int(row[f"{name}_lesions"]) == len(own) == scan["bleeds"][name]["lesions"]
            assert sum(float(r["ml"]) for r in own) == pytest.approx(
                float(row[f"{name}_ml"]), abs=1e-4 * (len(own) + 1)
            )
            if own:
                assert row[f"{name}_first_slice"] == str(min(int(r["first_slice"]) for r in own))
                assert float(row[f"{name}_diameter_mm"]) == max(
                    float(r["diameter_mm"]) for r in own
                )
            there = float(row[f"{name}_ml"]) >= 0.1
            assert row[f"{name}_present"] == ("yes" if there else "no")
        assert row["present_from_ml"] == "0.1"


def test_a_scan_that_is_not_in_hu_is_marked_in_every_output_or_refused(folder, scans, caplog):
    """ID_1 lost its intercept, which is put back; ID_2 was scaled to 8 bits."""
    predict.run(configure(scans), folder)
    out = folder / "predictions"
    assert [row["warning"] for row in rows_of(out / "volumes.csv")] == ["", ""]
    assert json.loads((out / "predictions.json").read_text())["doubtful"] == {}
    whole = (out / "ID_1.nii.gz").read_bytes()
    image = nib.load(scans / "ID_1.nii.gz")
    hu = np.asanyarray(image.dataobj)
    nib.save(nib.Nifti1Image((hu + 1024).astype(np.int16), image.affine), scans / "ID_1.nii.gz")
    lost = np.clip((head(seed=1)[:, 2:, :] + 160) / 400, 0, 1) * 255
    (scans / "ID_2").write_bytes(nib.Nifti1Image(lost.astype(np.uint8), image.affine).to_bytes())
    for overwrite in (True, False):
        caplog.clear()
        with pytest.raises(ValueError, match=r"1 of 2 scans skipped.*ID_2: no CT in HU"):
            predict.run(configure(scans, overwrite=overwrite), folder)
        assert (out / "ID_1.nii.gz").read_bytes() == whole
        (row,) = rows_of(out / "volumes.csv")
        assert "rescale intercept put back" in row["warning"]
        (listed,) = json.loads((out / "volumes.json").read_text())["scans"]
        facts = json.loads((out / "predictions.json").read_text())
        assert {"ID_1": listed["warning"]} == facts["doubtful"] == {"ID_1": row["warning"]}
        if overwrite:
            said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            assert any("ID_1: rescale intercept put back" in text for text in said)


def test_a_broken_scan_does_not_stop_the_others(folder, scans):
    whole = (scans / "ID_1.nii.gz").read_bytes()
    (scans / "ID_1.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 2 scans skipped.*ID_1"):
        predict.run(configure(scans), folder)
    out = folder / "predictions"
    assert not (out / "ID_1.nii.gz").exists()
    assert (out / "ID_2.nii.gz").exists()
    assert [row["case"] for row in rows_of(out / "skipped.csv")] == ["ID_1"]
    assert [row["case"] for row in rows_of(out / "volumes.csv")] == ["ID_2"]

    (scans / "ID_1.nii.gz").write_bytes(whole)
    before = (out / "ID_2.nii.gz").stat().st_mtime_ns
    predict.run(configure(scans, overwrite=False), folder)
    assert not (out / "skipped.csv").exists()
    assert (out / "ID_2.nii.gz").stat().st_mtime_ns == before
    rows = rows_of(out / "volumes.csv")
    assert [row["case"] for row in rows] == ["ID_1", "ID_2"]
    assert rows[1]["seconds"] == ""
    assert float(rows[1]["tilt_deg"]) == pytest.approx(18, abs=0.01)


def test_ids_can_be_kept_out_of_names_tables_and_log(folder, scans, caplog):
    caplog.set_level(logging.DEBUG, logger="bhsd_jax")
    (scans / "ID_3.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(ValueError, match="1 of 3 scans skipped") as caught:
        predict.run(configure(scans, show_ids=False), folder)
    out = folder / "predictions"
    said = [str(caught.value), caplog.text, *(path.name for path in out.iterdir())]
    said += [path.read_text() for path in out.iterdir() if path.suffix in (".csv", ".json")]
    assert not [text for text in said if "ID_" in text]
    names = [row["case"] for row in rows_of(out / "volumes.csv")]
    assert all((out / f"{name}.nii.gz").is_file() for name in names)
    predict.run(configure(scans / "ID_2", show_ids=False), folder)
    assert rows_of(out / "volumes.csv")[0]["case"] in names, "the salt stays"


def test_twins_are_averaged_on_request(folder, scans, weights):
    _, first, second = weights
    twins = {"a": first, "b": second}
    save_networks(folder / "twins" / "checkpoints", twins, config={}, plan=PLAN.to_json())
    (folder / "twins" / "plan.json").write_text(json.dumps(PLAN.to_json()))
    config = configure(scans / "ID_2", networks=("a", "b"))
    config.objective = {"name": "cps.CrossPseudoSupervision"}
    _, networks = deployed.load(Run.of(config, folder / "twins"))
    assert list(networks) == ["a", "b"]
    config.predict.networks = ("ensemble",)
    _, networks = deployed.load(Run.of(config, folder / "twins"))
    assert list(networks) == ["a", "b"]
    predict.run(config, folder / "twins")
    facts = json.loads((folder / "twins" / "predictions" / "predictions.json").read_text())
    assert facts["networks"] == ["a", "b"]
    config.predict.networks = ("a", "teacher")
    with pytest.raises(ValueError, match="no 'teacher'; this objective has a, b"):
        deployed.load(Run.of(config, folder / "twins"))


def test_a_checkpoint_of_another_network_is_refused(folder, scans):
    config = configure(scans)
    config.model.features = (6, 8)
    with pytest.raises(ValueError, match=r"not of the config's network.*from_run"):
        predict.run(config, folder)


def test_scans_of_a_split_come_from_the_data_set(folder, scans, monkeypatch):
    class Small:
        def cases(self):
            for name, file in (("ID_1", "ID_1.nii.gz"), ("ID_2", "ID_2")):
                yield Case(name, name, scans / file, scans / "a mask", "train")

    roles = Roles(train=("ID_1",), unlabeled=(), val=("ID_2",), test=("ID_9",))
    monkeypatch.setattr(data, "data_set", lambda config, workdir: Small())
    monkeypatch.setattr(data, "roles", lambda config, workdir: (roles, []))
    (found,) = find_scans(configure("", split="val"), folder)
    assert (found.id, found.image, found.label) == ("ID_2", scans / "ID_2", None)
    with pytest.raises(ValueError, match="1 of its 1 scans are not in the data set"):
        find_scans(configure("", split="test"), folder)
    with pytest.raises(ValueError, match="val or test; got 'train'"):
        find_scans(configure("", split="train"), folder)
    roles = Roles(train=("ID_1",), unlabeled=(), val=(), test=())
    for split, fold, why in (("val", -1, ", as config.split.fold is -1"), ("test", -1, "")):
        config = configure("", split=split)
        config.split.fold = fold
        with pytest.raises(ValueError, match=f"split {split}: this run has no such scans{why};"):
            find_scans(config, folder)


def test_scans_come_from_a_file_or_a_folder(tmp_path, scans):
    with pytest.raises(FileNotFoundError, match="a pattern stands for no scans: name their"):
        find_scans(configure(scans / "*.nii.gz"), tmp_path)
    (found,) = find_scans(configure(scans / "ID_1.nii.gz"), tmp_path)
    assert found.id == "ID_1"
    (scans / "ID_4_0000.nii.gz").write_bytes(b"")
    (scans / "notes.txt").write_text("not a scan")
    found = find_scans(configure(scans), tmp_path)
    assert [case.id for case in found] == ["ID_1", "ID_2", "ID_4"], "nnU-Net's suffix is dropped"
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=wrong):
            find_scans(configure(tmp_path / wrong), tmp_path)


def test_archives_are_to_be_unpacked(tmp_path):
    (tmp_path / "study.ZIP").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"study\.ZIP: an archive .* unpack it and name the folder"
    ):
        find_scans(configure(tmp_path / "study.ZIP"), tmp_path)
    with pytest.raises(FileNotFoundError, match="unpack the archives in it: 1"):
        find_scans(configure(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError, match="unpack the archives in it: 1"):
        dicom_cases.DICOM(tmp_path).survey()


# DICOM series.


def as_dicom(folder, voxels, **options):
    """The head [x y z] in RAS order as slices: rows to the back, columns to the left."""
    return write_series(folder, voxels.transpose(2, 1, 0)[:, ::-1, ::-1], **options)


def test_a_dicom_series_gets_its_label_map_on_its_own_voxels_and_no_name(folder, tmp_path, caplog):
    """Beside a NIfTI file; nested, tilted, with names in paths and headers."""
    caplog.set_level(logging.DEBUG)
    images = tmp_path / "images"
    paths = as_dicom(images / NAME / "ct", head(), tilt_deg=14.0, spacing_mm=(5.0, 2.0, 2.0))
    as_dicom(images / NAME / "torn", head(1), series="1.2.9", places=[0, 5, 10, 20, 25, 30, 35])
    nib.save(stored_as("LAS"), images / "ID_1.nii.gz")
    with pytest.raises(
        ValueError, match=r"1 of 3 scans skipped.*series 2: 1 slice is missing"
    ) as no:
        predict.run(configure(images), folder)
    out = folder / "predictions"
    rows = rows_of(out / "volumes.csv")
    assert len(rows) == 2
    (name,) = (row["case"] for row in rows if row["case"] != "ID_1")
    assert f"{name}: gantry tilt of 14.0 degrees, kept as shear in the affine" in caplog.text
    assert {row["case"]: float(row["tilt_deg"]) for row in rows} == {"ID_1": 0.0, name: 14.0}
    label = nib.load(out / f"{name}.nii.gz")
    assert label.get_data_dtype() == np.uint8
    for place in (0, 3, 6):
        data = dcmread(paths[place])
        corner = np.asarray(data.ImagePositionPatient, float) * (-1, -1, 1)
        found = label.affine @ (0, label.shape[1] - 1, place, 1)  # the first voxel of the slice
        np.testing.assert_allclose(found[:3], corner, atol=1e-4)
    series = out / "series.csv"  # its purpose is to lead back; nobody else may read it
    assert [row["SeriesInstanceUID"] for row in rows_of(series)] == ["1.2.3.4", "1.2.9"]
    assert {row["StudyInstanceUID"] for row in rows_of(series)} == {"1.2.3"}
    assert rows_of(series)[0]["case"] == name
    assert series.stat().st_mode & 0o777 == 0o600
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != series]
    assert not [word for word in (NAME, "Roe", PATIENT) if word in series.read_text()]
    texts.append(gzip.decompress((out / f"{name}.nii.gz").read_bytes()))
    texts += [text.encode() for text in (caplog.text, str(no.value), *map(str, out.iterdir()))]
    for secret in (NAME, "Roe", PATIENT, "1.2.3.4", "19700101"):
        assert not [text for text in texts if secret.encode() in text]
    header = label.header
    assert not any(
        bytes(header[field]).strip(b"\0") for field in ("descrip", "aux_file", "db_name")
    )
    assert not header.extensions

    predict.run(
        configure(images, show_ids=True, dicom={"uneven": "resample", "unshear": True}), folder
    )
    found = {row["case"]: row for row in rows_of(out / "volumes.csv")}
    assert set(found) == {"ID_1", f"{NAME}_ct", f"{NAME}_torn"}
    again = nib.load(out / f"{NAME}_ct.nii.gz")
    assert again.shape == label.shape
    np.testing.assert_array_equal(again.affine, label.affine)


def test_a_series_has_the_label_map_of_the_same_scan_as_nifti(tmp_path):
    as_dicom(tmp_path / "dicom", head(), spacing_mm=SPACING)
    (case,) = dicom_cases.scans(tmp_path / "dicom", uneven="refuse", unshear=False)
    run, target = threshold_predictor(), tmp_path / "out.nii.gz"
    row = run(case, target, "scan")
    label = nib.as_closest_canonical(nib.load(target))
    hu = head()
    want = np.where(hu > 90, 2, np.where(hu > 60, 1, 0))
    np.testing.assert_array_equal(np.asanyarray(label.dataobj), want)
    assert row.ml["SDH"] == pytest.approx(0.02 * (want == 2).sum())
    assert run.finished(case, target, "scan").ml == pytest.approx(dict(row.ml))


def test_probabilities_of_unsheared_series_are_refused(folder, tmp_path):
    as_dicom(tmp_path / "dicom", head(), tilt_deg=14.0)
    options = {"uneven": "refuse", "unshear": True}
    with pytest.raises(ValueError, match="own voxels; set unshear=False"):
        predict.run(configure(tmp_path / "dicom", dicom=options, probabilities=True), folder)


def test_a_seg_for_the_archive_comes_on_request_and_is_the_only_file_that_names_anyone(
    folder, tmp_path, caplog
):
    caplog.set_level(logging.DEBUG)

    def complete(k, data):
        data.FrameOfReferenceUID, data.StudyID = "1.2.3.8", "7"

    images = tmp_path / "images"
    as_dicom(images / NAME, head(), spacing_mm=SPACING, tilt_deg=14.0, change=complete)
    nib.save(stored_as("LAS"), images / "ID_1.nii.gz")
    predict.run(configure(images, dicom={"seg": "binary"}), folder)
    out = folder / "predictions"
    (made,) = (out / "seg").iterdir()
    name = made.name.removesuffix(".dcm")
    seg = highdicom.seg.segread(made)
    assert seg.PatientName == NAME
    assert [item.SegmentLabel for item in seg.SegmentSequence] == list(CLASSES[1:])
    label = np.asanyarray(nib.load(out / f"{name}.nii.gz").dataobj).T
    (case,) = dicom_cases.scans(images, uneven="refuse", unshear=False)
    slices = [item.instance for item in dicom_series.arrange(case.image).slices]
    found = seg.get_pixels_by_source_instance(
        slices, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found[:, ::-1], label)
    assert label.any()
    others = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != made}
    for path in list(others):
        if path.name.endswith(".gz"):
            others[path] = gzip.decompress(others[path])
    said = [*others.values(), caplog.text.encode(), *(str(path).encode() for path in others)]
    assert not [text for text in said for word in (NAME, "Roe", PATIENT) if word.encode() in text]

    before = made.stat().st_mtime_ns
    predict.run(configure(images, dicom={"seg": "binary"}, overwrite=False), folder)
    assert made.stat().st_mtime_ns == before
    predict.run(configure(images, dicom={"seg": "fractional"}, overwrite=False), folder)
    assert highdicom.seg.segread(made).SegmentationType == "FRACTIONAL"
    assert not list(out.glob("*.npz"))


def test_pictures_beside_a_series_are_passed_over(tmp_path, caplog):
    """As on a CD from a hospital: a logo beside the folder of the slices."""
    for name in ("logo.png", "logo.bmp"):  # of one name, which scans may not have
        (tmp_path / name).touch()
    as_dicom(tmp_path / "slices", head())
    (found,) = find_scans(configure(tmp_path), tmp_path)
    assert isinstance(found.image, Series)
    assert "pictures (.png, .bmp, .tif) beside volumes are no scans; passed over: 2" in caplog.text


def test_one_slice_is_no_scan(tmp_path):
    paths = as_dicom(tmp_path / "dicom", head())
    with pytest.raises(ValueError, match="this DICOM file is one slice"):
        find_scans(configure(paths[0]), tmp_path)


def test_one_file_of_an_enhanced_ct_is_a_scan(tmp_path):
    paths = as_dicom(tmp_path / "dicom", head())
    (one,) = write_enhanced(tmp_path / "enhanced" / "one.dcm", paths)
    write_enhanced(tmp_path / "enhanced" / "other.dcm", paths)
    (case,) = find_scans(configure(one), tmp_path)
    assert (case.id, case.image.files) == ("one", (one,))
    assert len(dicom_series.arrange(case.image).slices) == len(paths)


def test_long_scans_say_how_far_they_are(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    teller = predictor.Teller("scan 7")
    teller.tiles(1, 27)
    assert caplog.text == ""
    monkeypatch.setattr(predictor, "_SAY_EVERY_S", 0.0)
    teller.tiles(2, 27)
    assert "scan 7: tile 2 of 27" in caplog.text


# Files that were damaged, and disks that take no more.


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def moved(path):
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    nib.save(nib.Nifti1Image(voxels, np.diag([9.0, 9, 9, 1]) @ image.affine), path)


@pytest.mark.parametrize("damage", [cut, flipped, moved, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("suffix", [".nii.gz", "_probabilities.npz"])
def test_a_damaged_output_is_not_taken_for_finished(tmp_path, caplog, damage, suffix):
    if damage is moved and suffix != ".nii.gz":
        damage = lambda path: np.savez(path, probabilities=np.zeros((3, 2, 2, 2), np.float16))  # noqa: E731
    source, target = tmp_path / "scan.nii.gz", tmp_path / "out" / "scan.nii.gz"
    nib.save(nib.Nifti1Image(head(), upright()), source)
    run, case = threshold_predictor(probabilities=True), Case("scan", "scan", source, None, "test")
    row = run(case, target, "scan")
    assert run.finished(case, target, "scan").ml == row.ml
    assert caplog.text == ""
    path = target.with_name(f"scan{suffix}")
    damage(path)
    assert run.finished(case, target, "scan") is None
    (line,) = caplog.messages
    assert line.startswith(f"scan: predicted again, for {path}: ")


def test_only_a_truncated_label_map_is_predicted_again(folder, scans):
    predict.run(configure(scans), folder)
    out = folder / "predictions"
    whole = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    before = (out / "ID_1.nii.gz").stat().st_mtime_ns
    cut(out / "ID_2.nii.gz")
    left = out / f".ID_1.nii.gz.{files._host()}-{DEAD}.tmp"
    left.write_bytes(b"half")
    predict.run(configure(scans, overwrite=False), folder)
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == whole
    assert (out / "ID_1.nii.gz").stat().st_mtime_ns == before
    assert [row["seconds"] == "" for row in rows_of(out / "volumes.csv")] == [True, False]
    assert not left.exists()


def test_a_disk_that_is_full_at_some_scan_keeps_what_there_is_and_says_so(
    folder, tmp_path, scans, disk
):
    """The second scan is large: its probabilities do not fit, those of the first do."""
    large = nib.Nifti1Image(np.tile(head(seed=2), (3, 3, 2)), upright())
    (scans / "ID_2").write_bytes(large.to_bytes())
    nib.save(nib.Nifti1Image(head(seed=2), upright()), scans / "ID_3.nii.gz")
    place = disk("size=9m")
    config = configure(scans, probabilities=True, out=str(place / "out"))
    predict.run(config, folder)
    whole = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    sizes = {name: -(-len(content) // 4096) * 4 for name, content in whole.items()}
    room = sum(sizes[f"ID_1{end}"] for end in (".nii.gz", "_probabilities.npz"))
    lesions = [line for line in whole["lesions.csv"].splitlines() if line.startswith(b"ID_1")]
    room += 2 * -(-sum(map(len, lesions)) // 4096) * 4  # the old table and the new one
    shutil.rmtree(place / "out")
    disk(f"size={room + 36}k", again=True)
    with pytest.raises(ValueError, match=r"ID_2.*no space left on the device") as caught:
        predict.run(config, folder)
    said = str(caught.value)
    assert f"1 of 3 label maps are in {place / 'out'}, the tables tell of them; with" in said
    assert "\n" not in said
    found = {path.name for path in (place / "out").iterdir()}
    tables = {"volumes.csv", "volumes.json", "lesions.csv", "predictions.json", "skipped.csv"}
    tables.add(origins.NAME)
    assert found == {"ID_1.nii.gz", "ID_1_probabilities.npz", *tables}
    assert [row["case"] for row in rows_of(place / "out" / "volumes.csv")] == ["ID_1"]
    skipped = rows_of(place / "out" / "skipped.csv")
    assert [row["case"] for row in skipped] == ["ID_2", "ID_3"]
    assert all("not predicted: " in row["reason"] for row in skipped)
    disk("size=9m", again=True)
    config.predict.overwrite = False
    predict.run(config, folder)
    again = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    assert again.keys() == whole.keys()
    assert all(again[name] == whole[name] for name in whole if name.startswith(("ID", "pred")))


def test_a_full_disk_is_noticed_before_the_network_is_read(folder, scans, disk):
    place = disk("ro,size=64k")
    (folder / "checkpoints").rename(folder / "away")
    with pytest.raises(faults.WriteError, match="Read-only"):
        predict.run(configure(scans, out=str(place)), folder)


@pytest.mark.parametrize("name", ["seg.nii.gz", "seg.nii", "seg.nrrd"])
def test_no_folder_is_made_of_the_name_of_a_file(folder, scans, name):
    with pytest.raises(ValueError, match=rf"out: .*{name} is the name of a file; name the folder"):
        predict.run(configure(scans, out=str(folder / name)), folder)
    assert not (folder / name).exists()


@pytest.mark.parametrize("index", [0, 1])
def test_the_first_process_draws_the_salt_before_the_others_look_for_it(index, monkeypatch):
    """Not every file system that processes share settles who was first."""
    order = []
    monkeypatch.setattr(parts.barrier, "place", lambda: (index, 2))
    monkeypatch.setattr(parts.barrier, "wait_for_all", order.append)
    assert parts.first_alone(lambda: order.append("draw") or "drawn") == "drawn"
    assert order == (["first", "draw"] if index else ["draw", "first"])
    with pytest.raises(ZeroDivisionError):  # which the others must not wait for
        parts.first_alone(lambda: 1 / 0)
    assert order[2:] == ["first"]


@pytest.mark.parametrize(
    "part", [{"rows": [ScanVolumes("5c1f", 0.0, 1.0, {"IPH": 2.0})]}, {"skipped": {"5c1f": "cut"}}]
)
def test_a_scan_that_another_process_calls_otherwise_is_not_lost(part, tmp_path, monkeypatch):
    theirs = dataclasses.asdict(Found(**part))
    monkeypatch.setattr(predict.parts, "gather", lambda folder, name, part: [part, theirs])
    with pytest.raises(ValueError, match=r"does not know by their names \(5c1f\); .* same \.salt"):
        predict._gather(tmp_path, Found(), {"ID_1": "77aa"})


TOGETHER = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, images, out, folder, references = *map(int, sys.argv[1:3]), *sys.argv[3:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from pathlib import Path
from bhsd_jax.verbs import evaluate, predict
from bhsd_jax.configs import common
config = common.get_config()
config.infer.update(mirror=False, tiles=4)
config.predict.update(images=images, out=out, show_ids=False)
config.preprocess.processes = 1
try:
    predict.run(config, Path(folder))
    print("whole")
except ValueError as error:
    print(error)
config.evaluate.update(predictions=out, references=references, bootstrap=10)
evaluate.run(config, Path(folder))
"""


def test_two_processes_leave_the_files_of_one(folder, tmp_path, scans):
    """Real processes, one on each side; one scan of the four is broken."""
    (scans / "ID_3.nii.gz").write_bytes(b"not a scan")
    nib.save(nib.Nifti1Image(head(seed=2), upright()), scans / "ID_4.nii.gz")
    references = tmp_path / "references"
    words = [str(free_port()), str(scans), str(tmp_path / "two"), str(folder), str(references)]
    (folder / ".salt").write_text("0" * 32)
    config = configure(scans, out=str(references), show_ids=False)
    with pytest.raises(ValueError, match="1 of 4 scans skipped") as caught:
        predict.run(config, folder)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(index), *words],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    done = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    said = [text.splitlines()[-1] for text, _ in done]
    assert said[0] == str(caught.value).replace(str(references), str(tmp_path / "two"))
    assert said[1] == "whole"
    one, two = ({p.name: p for p in place.iterdir()} for place in (references, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, path in two.items():
        if not name.startswith(("volumes", origins.NAME)):  # seconds, and who came first
            assert path.read_bytes() == one[name].read_bytes(), name
    tables = [rows_of(place["volumes.csv"]) for place in (one, two)]
    measured = [[row.pop("seconds") for row in table] for table in tables]
    assert tables[0] == tables[1]
    assert all(float(seconds) > 0 for seconds in measured[1])

    both = {name: (folder / name).read_bytes() for name in ("cases.csv", "summary.json")}
    config.preprocess.processes = 1
    config.evaluate.update(predictions=str(tmp_path / "two"), bootstrap=10)
    config.evaluate.references = str(references)
    evaluate.run(config, folder)
    assert {name: (folder / name).read_bytes() for name in both} == both
    assert not list(tmp_path.rglob(".*.parts"))
