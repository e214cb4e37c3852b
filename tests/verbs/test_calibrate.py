"""A temperature is fitted on validation, stored with the run, shown, and used on request."""

import contextlib
import dataclasses
import json
import re

import nibabel as nib
import numpy as np
import pytest
import tiny_run

from bhsd_jax.assemble import calibrated, data, devices, ensemble
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.ct import probabilities
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.metrics import calibration
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.page import Picture
from bhsd_jax.verbs import calibrate, pages, predict
from bhsd_jax.volume import Case


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with two validation scans; one of the two has a mask."""
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)
    made = tiny_run.make(tmp_path / "run")
    voxels = tiny_run.head()
    label = np.where(voxels > 90, 2, np.where(voxels > 60, 1, 0)).astype(np.uint8)
    for name, array in (("scan", voxels), ("mask", label)):
        nib.save(nib.Nifti1Image(array, tiny_run.upright()), tmp_path / f"{name}.nii.gz")
    scan, mask = tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"

    class Small:
        name, classes, modality, license = "tiny", tiny_run.CLASSES, "ct", "CC0"

        def cases(self):
            yield Case("a", "a", scan, mask, "train")
            yield Case("b", "b", scan, None, "train")

    roles = Roles(train=(), unlabeled=(), val=("a", "b"), test=())
    monkeypatch.setattr(data, "data_set", lambda config, workdir: Small())
    monkeypatch.setattr(data, "roles", lambda config, workdir: (roles, []))
    return made


def test_a_temperature_makes_probabilities_fit_and_is_used_on_request(run, tmp_path):
    opened = ensemble.run_of(run)
    predict_one = dataclasses.replace(
        opened.config.predict, images=str(tmp_path / "scan.nii.gz"), probabilities=True
    )
    on = dataclasses.replace(predict_one, calibrated=True)
    with pytest.raises(ValueError, match="run the verb `calibrate` first"):
        predict.run(dataclasses.replace(opened.config, predict=on), run)
    calibrate.run(opened.config, run)
    found = json.loads((run / "calibration.json").read_text())
    assert found["scans"] == 1
    assert found["made_with"].keys() == {"infer", "precision"}, "of one network none are combined"
    assert found["voxels"] == 7 * 26 * 20, "all voxels of a small scan"
    assert found["after"]["nll"] < found["before"]["nll"] - 1e-3, "a random network is off"
    written = {}
    for name, settings in (("off", predict_one), ("on", on)):
        settings = dataclasses.replace(settings, out=str(tmp_path / name))
        predict.run(dataclasses.replace(opened.config, predict=settings), run)
        written[name] = probabilities.load(tmp_path / name / "scan_probabilities.npz").values
        label = (tmp_path / name / "scan.nii.gz").read_bytes()
        written[f"{name} label"] = label
    assert written["on label"] == written["off label"]
    stays = {"out": str(tmp_path / "on"), "overwrite": False}
    for settings, temperature, differs in (
        (on, found["temperature"], ""),
        (predict_one, found["temperature"], "-> None"),
        (on, 1.5, "-> 1.5"),  # calibrated again
    ):
        (run / "calibration.json").write_text(json.dumps(found | {"temperature": temperature}))
        text = rf"made otherwise: calibrated \(.* {differs}\)"
        with pytest.raises(ValueError, match=text) if differs else contextlib.nullcontext():
            changed = dataclasses.replace(settings, **stays)
            predict.run(dataclasses.replace(opened.config, predict=changed), run)
    before, after = (written[name].astype(np.float64) for name in ("off", "on"))
    inside = (before.min(0) > 0.02) & (after.min(0) > 0.02)  # float16 below is coarse
    assert inside.sum() > 100
    odds = [np.log(one[1][inside] / one[0][inside]) for one in (before, after)]
    np.testing.assert_allclose(odds[0] / found["temperature"], odds[1], atol=0.05)

    section = pages.calibration(opened, pages.Origin(tmp_path / "on"))
    assert section is not None
    assert isinstance(section.parts[-1], Picture)
    assert section.parts[0].startswith("Of the checkpoint of step 0. On 3640 voxels")
    assert f"{found['after']['brier']:.5f}" in section.parts[1].to_markdown()

    found["networks"][0]["weights_sha256"] = "0"
    (run / "calibration.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="fitted to other networks"):
        predict.run(dataclasses.replace(opened.config, predict=on), run)


def test_the_page_says_what_a_calibration_is_of(run, tmp_path):
    """Trained on and predicted again since, or calibrated together with other runs."""
    opened, maps = ensemble.run_of(run), tmp_path / "maps"
    logits = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    measured = dataclasses.asdict(calibration.measure(logits, np.arange(100) % 3, 1.0))
    made = {"temperature": 1.5, "scans": 1, "voxels": 100, "before": measured, "after": measured}

    def told(weights, predicted, **more):
        networks = [{"weights_sha256": one, "networks": ["a"]} for one in weights]
        files.write_json(run / calibrated.NAME, made | {"networks": networks} | more)
        if predicted is not None:
            files.write_json(maps / "predictions.json", {"weights_sha256": predicted})
        section = pages.calibration(opened, pages.Origin(maps))
        return section.parts[0].partition(". On ")[0]

    assert told(["0"], None, steps=[8]) == "Of the checkpoint of step 8", "of another tool's maps"
    assert told(["0"], ["0"], steps=[8]) == "Of the checkpoint of step 8"
    other = ", not of the label maps above"
    assert told(["0"], ["1"], steps=[8]) == f"Of the checkpoint of step 8{other}"
    assert told(["0"], ["1"]) == f"Of a checkpoint of unknown step{other}", "of an older version"
    assert told(["0", "1"], ["0"], steps=[8, 9]) == f"Of 2 runs together{other}"
    files.write_json(run / calibrated.NAME, {})
    with pytest.raises(ValueError, match=r"calibration\.json: damaged.*`calibrate`"):
        pages.calibration(opened, pages.Origin(maps))


def test_a_temperature_is_of_logits_that_are_made_alike(run, caplog):
    """The mean of probabilities is less sure than that of logits."""
    opened = ensemble.run_of(run)
    alone, two = (Member(run, 0, names) for names in (("a",), ("a", "b")))
    rest = {"before": {}, "after": {}, "scans": 1, "voxels": 1}

    def fit(member, made_with):
        made = {"temperature": 1.5, "networks": calibrated.key([member])} | rest | made_with
        files.write_json(run / calibrated.NAME, made)

    def changed(**fields):
        groups = {"infer": opened.config.infer, "predict": opened.config.predict}
        new = {name: dataclasses.replace(groups[name], **of) for name, of in fields.items()}
        return dataclasses.replace(opened, config=dataclasses.replace(opened.config, **new))

    logits = changed(predict={"combine": "logits"})
    exact = dataclasses.replace(opened.config, precision="float32")
    fit(two, {"made_with": calibrated.made_with(opened, [two])})
    for other, text in (
        (logits, "combine (probabilities -> logits)"),
        (changed(infer={"mirror": True}), "infer.mirror (False -> True)"),
        (changed(infer={"law": "monai"}), "infer.law (nnunet -> monai)"),
        (dataclasses.replace(opened, config=exact), "precision ("),
    ):
        with pytest.raises(UserError, match=re.escape(f"logits made otherwise: {text}")):
            calibrated.temperature(other, [two])
    assert calibrated.temperature(changed(infer={"tiles": 1}), [two]) == 1.5
    fit(alone, {"made_with": calibrated.made_with(opened, [alone])})
    assert calibrated.temperature(logits, [alone]) == 1.5, "nothing is averaged over networks"
    assert not caplog.text
    fit(two, {})  # as older versions did
    assert calibrated.temperature(logits, [two]) == 1.5
    assert "does not say how its networks were averaged, mirrored and tiled" in caplog.text


def test_runs_that_were_trained_on_the_scans_are_not_calibrated_and_said_to_be(
    run, tmp_path, monkeypatch, caplog
):
    """By their roles; where their shards are gone, by their folds."""
    fold, seed = tiny_run.make(tmp_path / "fold1", 1), tiny_run.make(tmp_path / "seed1", 2)
    theirs = {
        run: Roles(train=(), unlabeled=(), val=("a", "b"), test=()),
        fold: Roles(train=("a", "c"), unlabeled=("b",), val=("d",), test=()),
        seed: Roles(train=("c",), unlabeled=(), val=("a", "b"), test=()),
    }
    monkeypatch.setattr(data, "roles", lambda config, workdir: (theirs[workdir], []))
    opened = ensemble.run_of(run, runs=(str(seed), str(fold)))
    with pytest.raises(ValueError, match=r"fold1 was, or may .* 1 of the 1 validation scans of"):
        calibrate.run(opened.config, run)
    settings = dataclasses.replace(opened.config.predict, split="val", out=str(tmp_path / "out"))
    predict.run(dataclasses.replace(opened.config, predict=settings), run)
    assert "fold1 was, or may have been, trained on 2 of these 2 scans of split val" in caplog.text
    assert "seed1 was" not in caplog.text
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["seen_in_training"] == 2
    assert "that is tried" not in caplog.text
    monkeypatch.setattr(calibration, "fit_temperature", lambda logits, labels: 20.0)
    calibrate.run(ensemble.run_of(run, runs=(str(seed),)).config, run)
    assert "temperature 20 is the highest that is tried: the network knows next to" in caplog.text

    monkeypatch.undo()
    assert ensemble.seen(opened, (fold,), ("a", "b")) == {}, "the same fold of this data set"
    config = json.loads((fold / "config.json").read_text())
    config["split"]["fold"] = 1
    (fold / "config.json").write_text(json.dumps(config))
    assert ensemble.seen(opened, (seed, fold), ("a", "b")) == {str(fold): 2}


def test_without_masks_there_is_nothing_to_fit(run, monkeypatch):
    opened = ensemble.run_of(run)
    roles = Roles(train=(), unlabeled=(), val=("b",), test=())
    monkeypatch.setattr(data, "roles", lambda config, workdir: (roles, []))
    with pytest.raises(ValueError, match="none of its scans has a mask"):
        calibrate.run(opened.config, run)
    assert pages.calibration(opened, pages.Origin(run / "predictions")) is None
    assert calibration.BINS == 10


def test_several_processes_are_refused(run, monkeypatch):
    config = ensemble.run_of(run).config
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(UserError, match="calibrate runs in one process"):
        calibrate.run(config, run)
    assert not (run / "calibration.json").exists()
