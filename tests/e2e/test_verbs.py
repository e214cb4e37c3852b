"""The five verbs as a user runs them, in subprocesses, on a small synthetic set."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.train.checkpoint import load_networks

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/cps.py:smoke"
# Long enough to be killed on the way.
LONGER = (
    "--config.train.steps=24",
    "--config.train.log_every=4",  # checkpoints lie between lines
    "--config.train.save_every=5",
    "--config.train.validate_every=24",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation cache for all processes of these tests."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    eager = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return os.environ | cache | eager


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, environment):
    """A folder with shards, for every run of this file."""
    workdir = tmp_path_factory.mktemp("prepared")
    run("preprocess", workdir, environment)
    return workdir


@pytest.fixture(scope="module")
def whole(prepared, environment, tmp_path_factory):
    """The folder of a run that nobody disturbed; its checkpoints are only read."""
    workdir = tmp_path_factory.mktemp("whole")
    run("train", workdir, environment, CONFIG, *share(prepared), *LONGER, config=())
    return workdir


def command(verb, workdir, *extra, config=(CONFIG,)):
    words = [verb, *config, f"--workdir={workdir}", *extra]
    return [sys.executable, "-m", "bhsd_jax.main", *words]


def run(verb, workdir, environment, *extra, code=0, config=(CONFIG,)):
    done = subprocess.run(
        command(verb, workdir, *extra, config=config),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def share(prepared):
    """Options that let another run use the shards of the first."""
    return (
        f"--config.preprocess.shards={prepared / 'shards'}",
        f"--config.data.root={prepared / 'synthetic'}",
    )


def test_from_nothing_to_a_report(prepared, whole, environment):
    for verb in ("predict", "evaluate", "report"):
        run(verb, whole, environment, config=())
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = {key for r in records for key in r}
    assert {"train/loss", "val/dice/any", "val_b/dice/any", "val_ensemble/dice/any"} <= logged
    assert {"val/dice/a", "val/dice/b", "val/dice/ensemble"} <= logged
    assert (whole / "progress.png").read_bytes().startswith(b"\x89PNG")

    data = json.loads((prepared / "synthetic" / "dataset.json").read_text())
    asked = {Path(path).name for path in data["test"]}
    made = {path.name for path in (whole / "predictions").glob("*.nii.gz")}
    assert made == asked
    scans = prepared / "synthetic" / "label_192" / "images"
    for name in made:
        mask, scan = nib.load(whole / "predictions" / name), nib.load(scans / name)
        assert mask.shape == scan.shape
        np.testing.assert_array_equal(mask.affine, scan.affine)
        assert set(np.unique(np.asanyarray(mask.dataobj))) <= {0, 1}

    with (whole / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {f"{row['case']}.nii.gz" for row in rows} == asked
    check_dice_by_hand(rows, whole / "predictions", scans.parent / "ground truths")
    html = (whole / "report.html").read_text()
    assert "Research use only" in html
    assert "data:image/png;base64," in html
    assert not [name for name in asked if name.removesuffix(".nii.gz") in html], "ids stay hidden"


def check_dice_by_hand(rows, predictions, references):
    """The table against counts made here."""
    for row in rows:
        name = f"{row['case']}.nii.gz"
        predicted = np.asanyarray(nib.load(predictions / name).dataobj) > 0
        reference = np.asanyarray(nib.load(references / name).dataobj) > 0
        total = predicted.sum() + reference.sum()
        want = 2 * (predicted & reference).sum() / total if total else float("nan")
        assert float(row["dice"]) == pytest.approx(want, abs=1e-6, nan_ok=True)


def test_a_killed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(
    prepared, whole, environment, tmp_path
):
    options = (*share(prepared), *LONGER)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("train", killed, *options),
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(killed / "metrics.jsonl", '"checkpoint/step": 5,', process)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "killed before it was done"
    text = run("train", killed, environment, *options)
    assert "resuming after step" in text

    step, undisturbed, _ = load_networks(whole / "checkpoints", "last")
    again, resumed, _ = load_networks(killed / "checkpoints", "last")
    assert (step, again) == (24, 24)
    assert leaves(undisturbed) == leaves(resumed)
    steps = [
        json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert len([s for s in steps if s == 8]) == 1, "no step is logged twice"
    # Of lines that begin and end alike; a slow machine writes more of them.
    ours, theirs = mean_losses(whole), mean_losses(killed)
    assert len(ours.keys() & theirs.keys()) >= 3
    assert {span: ours[span] for span in ours.keys() & theirs.keys()}.items() <= theirs.items()


def mean_losses(workdir):
    """By the steps after and up to which they are taken."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    starts = [0, *(line["step"] for line in lines)]
    return {
        (start, line["step"]): line["train/loss"]
        for start, line in zip(starts, lines, strict=False)
    }


def leaves(tree):
    if isinstance(tree, dict):
        return {key: leaves(value) for key, value in tree.items()}
    return np.asarray(tree).tobytes()


def wait_for(path, words, process, limit_s=1200):
    """Returns when the log of the run says so: steps may be done before a checkpoint is on disk."""
    begun = time.monotonic()
    while time.monotonic() - begun < limit_s:
        assert process.poll() is None, "ended before it could be killed"
        if path.is_file() and words in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("never got there")


def test_sigterm_saves_and_asks_to_be_started_again(prepared, environment, tmp_path):
    # What is trained does not matter here: one network without augmentation compiles fastest.
    options = (
        *share(prepared),
        "--config.augment.spatial=()",
        "--config.augment.intensity=()",
        *(f"--config.train.{name}=100000" for name in ("steps", "save_every", "validate_every")),
    )
    process = subprocess.Popen(
        command("train", tmp_path, *options, config=("--config=configs/suponly.py:smoke",)),
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(tmp_path / "metrics.jsonl", '{"step": 3,', process)
        process.terminate()
        assert process.wait(600) == 75
    finally:
        process.kill()
    step, _, _ = load_networks(tmp_path / "checkpoints", "last")
    assert step >= 3


def test_errors_are_one_line(prepared, environment, tmp_path):
    text = run("train", tmp_path, environment, code=1)
    assert text.strip().splitlines()[-1].startswith("train: ")
    assert "preprocess" in text
    few = ("--config.input.patch=(8,33,32)",)
    text = run("train", tmp_path, environment, *share(prepared), *few, code=1)
    assert "33" in text.strip().splitlines()[-1]
    assert "Traceback" not in text
