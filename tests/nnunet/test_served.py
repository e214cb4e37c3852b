"""Regions and several channels through all that serves a run: folds, files, pages, Python."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from nnunet_raw import Reference, config
from scipy import ndimage

from bhsd_jax.api import Predictor, read_scan
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import from_run
from bhsd_jax.ct import channels, formats, geometry, probabilities
from bhsd_jax.infer import ensemble
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.labels import Labels
from bhsd_jax.nnunet import saved_probabilities
from bhsd_jax.settings import Settings
from bhsd_jax.verbs import calibrate, export, import_weights, predict
from bhsd_jax.volume import Channel

sitk = pytest.importorskip("SimpleITK", reason="the extra formats is not installed")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """The raw data set, and two runs of one plan: nnU-Net's weights, and others near them.

    Beside them lies a third run, `both`, that has both as its folds.
    """
    folder, golden = tmp_path_factory.mktemp("folds"), Path(__file__).parents[1] / "golden"
    root = Reference.load(golden, "regions").write(folder / "raw")
    known = json.loads((golden / "model_regions.json").read_text())
    with np.load(golden / "model_regions.npz") as stored:
        state = {k[8:]: stored[k] for k in stored.files if k.startswith("trained/")}
    given = {"plans": known["plans"], "dataset_json": known["dataset"]}
    beside = {"init_args": given, "inference_allowed_mirroring_axes": None}
    path = folder / "checkpoint_final.pth"
    path.write_bytes(b"stands for the digest")
    random, every = np.random.default_rng(0), {}
    for name in ("one", "other"):
        every[f"fold_{len(every)}"] = state
        weights = import_weights.WeightsFile(state, beside)
        source = import_weights.from_nnunet(weights, path)
        import_weights.write_run(config(root), source, {"network": state}, folder / name)
        noise = {k: random.normal(0, 0.05, v.shape).astype(v.dtype) for k, v in state.items()}
        state = {k: v + noise[k] for k, v in state.items()}
    source = dataclasses.replace(source, combine="logits")
    import_weights.write_run(config(root), source, every, folder / "both")
    return root, folder / "one", folder / "other"


def settings(run, root, out, **changes):
    """Of the run's own config, for one scan of the raw data set."""
    made = Settings.of(json.loads((run / "config.json").read_text()))
    scans = out.parent / "scans"
    scans.mkdir()
    for number in range(2):
        name = f"c0_{number:04d}.nii.gz"
        (scans / name).symlink_to(root / "imagesTr" / name)
    asked = {"images": str(scans), "out": str(out)} | changes
    return dataclasses.replace(made, predict=dataclasses.replace(made.predict, **asked))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_folds_of_regions_are_averaged_told_of_and_served(folds, tmp_path):
    root, one, other = folds
    out = tmp_path / "out"
    every = {"runs": (str(other),), "probabilities": True, "nnunet_probabilities": True}
    made = settings(one, root, out, confidence=True, report=True, **every)
    predict.run(made, one)
    label = read_scan(out / "c0.nii.gz")[0]
    meaning = Labels(
        ("background", "value_1", "value_2", "active"),
        (("whole", (1, 2, 3)), ("core", (2, 3)), ("active", (3,))),
        (1, 2, 3),
    )

    voxels = [read_scan(root / "imagesTr" / f"c0_{n:04d}.nii.gz") for n in range(2)]
    both, affine = np.stack([v for v, _ in voxels], -1), voxels[0][1]
    alone = [Predictor.from_run(run).predict(both, affine) for run in (one, other)]
    mean = np.mean([each.probabilities.values for each in alone], axis=0)
    # Probabilities are averaged where the network has answered, then brought to the scan's voxels.
    wrong = label != meaning.assemble(chance > 0.5 for chance in mean)
    assert np.count_nonzero(label) > 50
    assert wrong.sum() <= 20, f"{wrong.sum()} of {label.size}"
    together = Predictor.from_run(one, other).predict(both, affine)
    np.testing.assert_array_equal(together.labels, label)
    with pytest.raises(ValueError, match=r"the network takes 2 channels, \[i, j, k, 2\]"):
        Predictor.from_run(one)(both[..., 0], affine)

    stored = probabilities.load(out / "c0_probabilities.npz")
    assert stored.classes == ("whole", "core", "active")
    np.testing.assert_allclose(stored.values, together.probabilities.values, atol=1e-3)
    with np.load(out / "c0.npz") as theirs:
        found = theirs["probabilities"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, together.probabilities.values.transpose(0, 3, 2, 1))

    (row,) = json.loads((out / "volumes.json").read_text())["scans"]
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    for name, values in meaning.regions:
        want = np.isin(label, values).sum() * voxel_ml
        assert row["ml"][name] == pytest.approx(want)
        assert (row["bleeds"][name]["lesions"] > 0) == (want > 0)
    assert row["all_ml"] == pytest.approx(np.count_nonzero(label) * voxel_ml)
    assert 0 < row["disagreement"] < 1
    assert "whole (mL)" in (out / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_runs_prepared_in_another_way_are_averaged_on_the_scans_own_voxels(folds, tmp_path):
    """As by nnU-Net's `ensemble_folders`, where each configuration counts once."""
    root, one, other = folds
    coarse = tmp_path / "coarse"
    shutil.copytree(other, coarse)
    plan = json.loads((coarse / "plan.json").read_text())
    plan["spacing_mm"] = [1.4 * mm for mm in plan["spacing_mm"]]
    (coarse / "plan.json").write_text(json.dumps(plan))
    out, more = tmp_path / "out", (str(coarse), str(other))
    made = settings(one, root, out, runs=more, nnunet_probabilities=True)
    predict.run(made, one)
    voxels = [read_scan(root / "imagesTr" / f"c0_{n:04d}.nii.gz") for n in range(2)]
    both, affine = np.stack([v for v, _ in voxels], -1), voxels[0][1]
    groups = [Predictor.from_run(one, other), Predictor.from_run(coarse)]
    chances = [each.predict(both, affine).probabilities.values for each in groups]
    assert np.abs(chances[0] - chances[1]).max() > 0.1
    with np.load(out / "c0.npz") as stored:
        found = stored["probabilities"].transpose(0, 3, 2, 1)
    np.testing.assert_allclose(found, np.mean(chances, axis=0), atol=2e-6)
    label, want = read_scan(out / "c0.nii.gz")[0], np.zeros(found.shape[1:], np.uint8)
    for value, inside in zip((1, 2, 3), found > 0.5, strict=True):
        want[inside] = value
    np.testing.assert_array_equal(label, want)

    with pytest.raises(
        ValueError, match=r"spacing_mm of its plan .* prepared alike can be averaged"
    ):
        Predictor.from_run(one, coarse)
    asked = dataclasses.replace(made.predict, confidence=True)
    with pytest.raises(
        ValueError, match=r"predict\.confidence is of runs whose scans are prepared"
    ):
        predict.run(dataclasses.replace(made, predict=asked), one)
    plan["region_order"] = [3, 2, 1]
    (coarse / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"region_order of its plan .* that mean the same can be"):
        predict.run(made, one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_postprocessing_of_nnunet_is_applied_to_the_values_it_names(folds, tmp_path):
    root, one, _ = folds
    function = "remove_all_but_largest_component_from_segmentation"
    rules = [{"labels_or_regions": [1, 2, 3]}, {"labels_or_regions": 3}]
    stored = {"postprocessing_fns": [function] * 2, "postprocessing_kwargs": rules}
    (tmp_path / "postprocessing.json").write_text(json.dumps(stored))
    named = str(tmp_path / "postprocessing.json")
    predict.run(settings(one, root, tmp_path / "out", postprocessing=named), one)
    voxels = [read_scan(root / "imagesTr" / f"c0_{n:04d}.nii.gz") for n in range(2)]
    both, affine = np.stack([v for v, _ in voxels], -1), voxels[0][1]
    want = Predictor.from_run(one).predict(both, affine).labels
    removed = 0
    for values in ([1, 2, 3], [3]):
        mask = np.isin(want, values)
        parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        largest = np.bincount(parts[mask]).max()
        gone = mask & (np.bincount(parts.ravel())[parts] < largest)
        want, removed = np.where(gone, 0, want), removed + gone.sum()
    assert removed > 0
    np.testing.assert_array_equal(read_scan(tmp_path / "out" / "c0.nii.gz")[0], want)
    facts = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert facts["keep_largest"] == [["whole", "core", "active"], ["active"]]


def test_what_is_not_defined_for_regions_is_refused(folds, tmp_path):
    root, one, _ = folds
    made = settings(one, root, tmp_path / "out")
    asked = dataclasses.replace(made.predict, calibrated=True)
    with pytest.raises(ValueError, match="answers with regions; leave it out"):
        predict.run(dataclasses.replace(made, predict=asked), one)
    fractional = dataclasses.replace(made.predict.dicom, seg="fractional")
    asked = dataclasses.replace(made.predict, dicom=fractional)
    with pytest.raises(ValueError, match="fractional SEG is of classes"):
        predict.run(dataclasses.replace(made, predict=asked), one)
    with pytest.raises(ValueError, match="calibrate: a temperature is of classes"):
        calibrate.run(made, one)
    assert not (tmp_path / "out").exists()


def test_a_window_streams_the_regions_of_the_mean_of_several_networks():
    def forward(shift, image):
        return (image * shift,)

    random = np.random.default_rng(1)
    image = random.normal(0, 3, (9, 8, 7, 3)).astype(np.float32)
    networks = [np.float32(0.2), np.float32(-0.3), np.float32(1.0)]
    window = SlidingWindow(forward, (4, 8, 8), mirror=False, tiles_per_call=2, regions=(5, 2, 7))
    chances = [1 / (1 + np.exp(-np.moveaxis(image, -1, 0) * shift)) for shift in networks]
    mean = np.mean(chances, axis=0)
    want = np.zeros(image.shape[:3], np.uint8)
    for value, one in zip((5, 2, 7), mean, strict=True):
        want[one > 0.5] = value
    np.testing.assert_array_equal(window.labels(networks, image), want)
    logits = window.logits(networks, image)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), mean, atol=2e-6)
    parts = [(window.logits([one], image), 1) for one in networks]
    mean_for = ensemble.mean_for("probabilities", regions=True)
    np.testing.assert_allclose(mean_for(iter(parts)), logits, atol=1e-4)
    assert ensemble.mean_for("logits", regions=True) is ensemble.mean_of_logits


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_folds_of_an_imported_run_are_served_and_one_is_exported(folds, tmp_path):
    root, one, _ = folds
    both, out = one.parent / "both", tmp_path / "out"
    predict.run(settings(both, root, out), both)
    voxels = [read_scan(root / "imagesTr" / f"c0_{n:04d}.nii.gz") for n in range(2)]
    image, affine = np.stack([v for v, _ in voxels], -1), voxels[0][1]
    server = Predictor.from_run(both)
    assert server.members[0].networks == ("fold_0", "fold_1")
    found = server.predict(image, affine)
    np.testing.assert_array_equal(found.labels, read_scan(out / "c0.nii.gz")[0])
    alone = Predictor.from_run(both, networks=("fold_1",))
    assert alone.members[0].networks == ("fold_1",)
    first = Predictor.from_run(one).predict(image, affine)
    assert np.abs(found.probabilities.values - first.probabilities.values).max() > 1e-3
    run = Run.of(from_run.get_config(str(both)), both)
    with pytest.raises(ValueError, match=r"2 networks together.*one of fold_0, fold_1"):
        export._network(run)


def test_the_normalization_of_every_channel_is_told(folds):
    _, one, _ = folds
    run = Run.of(from_run.get_config(str(one)), one)
    told = export._normalization(run)
    names = [channel.name for channel in run.plan.channels]
    assert [channel["name"] for channel in told["channels"]] == names
    assert told["when"] == "before resampling"
    for scheme in channels.SCHEMES:
        assert "x" in export._of_channel(Channel("a", scheme, (1.0, 2.0, 3.0, 4.0)))["formula"]
    ct = export._of_channel(Channel("a", "CTNormalization", (1.0, 2.0, 3.0, 4.0)))
    assert (ct["low"], ct["mean"], ct["std"], ct["high"]) == (1, 2, 3, 4)


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, -1, 0, 1, 0, 0, 0, 0, 1)])
def test_the_pickle_says_what_itk_says(tmp_path, direction):
    image = sitk.GetImageFromArray(np.pad(np.ones((3, 5, 6), np.int16), ((1, 0), (0, 2), (1, 1))))
    image.SetSpacing((0.5, 0.75, 4.0))
    image.SetOrigin((3.0, -7.0, 11.0))
    image.SetDirection(direction)
    path = tmp_path / "a.mha"
    sitk.WriteImage(image, str(path))
    volume = formats.read(path)
    grid = geometry.locate(volume, spacing_mm=volume.spacing_mm, axes="file")
    target = tmp_path / "out" / "a.mha"
    chances = np.ones((2, *volume.voxels.shape), np.float32)
    saved_probabilities.write(target, path, grid, chances)
    assert saved_probabilities.is_whole(target, chances.shape)
    assert not saved_probabilities.is_whole(target, (3, *chances.shape[1:]))
    found = pickle.loads((tmp_path / "out" / "a.pkl").read_bytes())
    for name, want in (
        ("spacing", image.GetSpacing()),
        ("origin", image.GetOrigin()),
        ("direction", image.GetDirection()),
    ):
        np.testing.assert_allclose(found["sitk_stuff"][name], want, atol=1e-12)
    np.testing.assert_allclose(found["spacing"], (4.0, 0.75, 0.5))
    assert found["shape_before_cropping"] == (4, 7, 8)
    assert found["bbox_used_for_cropping"] == [[1, 4], [0, 5], [1, 7]]
    assert found["shape_after_cropping_and_before_resampling"] == (3, 5, 6)
    flipped = geometry.locate(volume, spacing_mm=(4.0, 0.75, 0.5))
    box = saved_probabilities.properties(path, flipped)["bbox_used_for_cropping"]
    assert sorted(map(tuple, box)) == [(0, 5), (1, 4), (1, 7)]
