"""`info` and the manifest of a prediction say what the files say."""

import hashlib
import json
import subprocess
import sys

import nibabel as nib
import pytest
import tiny_run

from bhsd_jax import command_line, main
from bhsd_jax.assemble import devices, ensemble
from bhsd_jax.command_line import UsageError, parse
from bhsd_jax.train import checkpoint_files
from bhsd_jax.verbs import info, predict


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [tiny_run.make(root / f"fold{seed}", seed) for seed in range(2)]


def test_info_is_what_config_plan_and_checkpoints_say(runs):
    run = ensemble.run_of(runs[0])
    found = json.loads(info.text(run.config, runs[0], as_json=True))
    assert found["classes"] == ["background", "IPH", "SDH"]
    assert found["spacing_mm"] == [5.0, 2.0, 2.0]
    assert found["windows"] == {"clip": [10.0, 110.0], "mean": 60.0, "std": 20.0}
    assert (found["license"], found["trained_on"]["dataset"]) == ("CC0", "tiny")
    assert found["scores"] is None
    (saved,) = found["checkpoints"]
    sums = (runs[0] / "checkpoints" / "0" / checkpoint_files.SUMS).read_bytes()
    named = b"".join(line for line in sums.splitlines(keepends=True) if not line.startswith(b"#"))
    assert saved == {
        "step": 0,
        "validation_dice": None,
        "weights_sha256": hashlib.sha256(named).hexdigest(),
    }
    text = info.text(run.config, runs[0])
    assert "license      CC0" in text
    assert "scores       none; run the verb `evaluate`" in text


def test_scores_are_those_of_the_evaluation(runs):
    run = ensemble.run_of(runs[0])
    dice = {"dice": 0.5, "n": 3}
    made = {"binary": dice, "conventions": {"nnunet": {"IPH": dice, "SDH": {"dice": None}}}}
    path = runs[0] / "summary.json"
    path.write_text(json.dumps(made | {"metrics": {}, "n_cases": 3, "nsd_mm": 1.0, "rows": []}))
    found = json.loads(info.text(run.config, runs[0], as_json=True))["scores"]
    text = info.text(run.config, runs[0])
    path.unlink()
    assert found["binary"]["dice"] == 0.5
    assert "rows" not in found
    assert "Dice 0.500, all classes merged, 3 scans" in text
    assert "Dice 0.500 IPH" in text


def test_a_temperature_is_given_only_of_the_checkpoint_that_predicts(tmp_path):
    run = tiny_run.make(tmp_path / "run")
    folder = run / "checkpoints"
    for step, dice in ((7, 0.9), (9, 0.1)):
        path = checkpoint_files.unfinished(folder, step)
        path.mkdir()
        (path / "made by hand").write_text(str(step))
        checkpoint_files.finish(folder, step, dice, {})
    best, last = (checkpoint_files.digest(folder, step) for step in (7, 9))

    def told(*digests, checkpoint="best"):
        made = dict.fromkeys(("before", "after", "scans", "voxels"), 0)
        made |= {"networks": [{"weights_sha256": one} for one in digests]}
        made |= {"temperature": 1.25, "steps": [7]}
        (run / "calibration.json").write_text(json.dumps(made))
        config = ensemble.run_of(run, checkpoint=checkpoint).config
        found = json.loads(info.text(config, run, as_json=True))
        return found["temperature"], found.get("calibration"), info.text(config, run)

    assert told(best)[:2] == told(last, checkpoint="last")[:2] == (1.25, None)
    assert told(best, checkpoint=7)[:2] == told(last, checkpoint="9")[:2] == (1.25, None)
    assert "temperature  1.25\n" in told(best)[2]
    other = "temperature 1.25 of the checkpoint of step 7, not of the checkpoint that predicts"
    assert told(best, checkpoint="last")[:2] == told("0")[:2] == (None, other)
    assert f"calibration  {other}\n" in told("0")[2]
    assert "\ntemperature" not in told("0")[2]
    together = "temperature 1.25 of 2 runs together, not of the checkpoint that predicts"
    assert told(best, last)[:2] == (None, together)


def test_the_program_prints_it(runs):
    words = [sys.executable, "-m", "bhsd_jax.main", "info", str(runs[0]), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert json.loads(done.stdout)["classes"] == list(tiny_run.CLASSES)


def test_every_prediction_leaves_a_manifest(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)
    images = tmp_path / "ROE^JANE"
    images.mkdir()
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), images / "a.nii.gz")
    out = tmp_path / "out"
    opened = ensemble.run_of(
        runs[0], images=str(images), out=str(out), runs=(str(runs[1]),), report=False
    )
    predict.run(opened.config, runs[0])
    text = (out / "predictions.json").read_text()
    found = json.loads(text)
    assert found["versions"]["bhsd_jax"] == main.__version__
    assert {"jax", "numpy", "python"} <= found["versions"].keys()
    assert found["weights_sha256"] == [
        checkpoint_files.digest(run / "checkpoints", 0) for run in runs
    ]
    assert found["options"]["infer"]["mirror"] is False
    assert found["options"]["predict"]["checkpoint"] == "best"
    assert "ROE" not in text, "a folder's name may be a patient's"


def test_words_after_the_run_are_scans_and_their_folder(runs):
    flags = parse(["predict", str(runs[0]), "in", "out", "--checkpoint=last"], "").flags
    for flag in ("--config.predict.images=in", "--config.predict.out=out", "--workdir="):
        assert [one for one in flags if one.startswith(flag)]
    assert "--config.predict.checkpoint=last" in flags
    assert parse(["predict", str(runs[0]), "in"], "").flags == tuple(
        flag
        for flag in flags
        if not flag.startswith(("--config.predict.out", "--config.predict.c"))
    )
    assert "bhsd predict [RUN] [IMAGES] [OUT]" in command_line.help_on("predict")
    for words, text in (
        (
            ["predict", "a", "b", "c", "d"],
            "takes a run folder, images, out; got a and b and c and d",
        ),
        (["predict", "a", "b", "--images=c"], "b and --images both name images"),
        (["predict", "a", "b", "c", "--config.predict.out=d"], "both name out"),
        (["train", "a", "--json"], "--json is for `bhsd info`"),
    ):
        with pytest.raises(UsageError, match=text):
            parse(words, "")
