"""Runs of one, two and four real processes are one run: numbers, checkpoints, predictions."""

import csv
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import plain_code
import pytest

from bhsd_jax.train.checkpoint import load_networks

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")
# The whole square of experiments and processes takes minutes more.
ALL = bool(os.environ.get("BHSD_TEST_ALL"))
METHODS = ("supervised", "mean_teacher", "cps")
QUICK = "supervised"  # compiles fastest


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Runs a verb in so many processes; what they said."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_"))}
    clean |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        # Every process compiles. The whole square computes as a user's processes do.
        **({} if ALL else plain_code.environment()),
    }

    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def launched(processes, verb, workdir, *flags, method=QUICK, code=0, stop_at=""):
        words = [f"--config={TINY}:{method}", f"--workdir={workdir}", *flags]
        with subprocess.Popen(
            ["bash", ROOT / "launch" / "local.sh", str(processes), verb, *words],
            cwd=elsewhere,
            env=clean,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            said = ""
            while stop_at and stop_at not in said and (line := running.stderr.readline()):
                said += line
            if stop_at:
                running.send_signal(signal.SIGTERM)
            said += running.communicate(timeout=600)[1]
        assert running.returncode == code, said[-4000:]
        return said

    return launched


@pytest.fixture(scope="session")
def shards(launch, tmp_path_factory):
    """Flags that name shards made by two processes."""
    folder = tmp_path_factory.mktemp("shards")
    launch(2, "preprocess", folder)
    return (
        f"--config.preprocess.shards={folder / 'shards'}",
        f"--config.data.root={folder / 'synthetic'}",
    )


@pytest.fixture(scope="session")
def train(launch, shards, tmp_path_factory):
    """Folder of a run of an experiment by so many processes; each is trained once."""
    made = {}

    def trained(method, processes):
        if (method, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{method}-{processes}")
            launch(processes, "train", folder, *shards, method=method)
            made[method, processes] = folder
        return made[method, processes]

    return trained


def metrics(workdir):
    """What was logged of the training and the validation, by step and name."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], key): value
        for line in lines
        for key, value in line.items()
        if key.startswith(("train/", "val")) and value is not None
    }


def require_same(one, other):
    """Logged numbers and parameters to 1e-5."""
    ours, theirs = metrics(one), metrics(other)
    assert ours.keys() == theirs.keys()
    assert {step for step, _ in ours} == {1, 2, 3, 4, 5}
    for key, value in ours.items():
        assert value == pytest.approx(theirs[key], abs=1e-5), key
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def arrays(workdir):
    """Parameters and moving averages of the last checkpoint."""
    step, params, ema = load_networks(workdir / "checkpoints", "last")
    assert step == 5
    return jax.tree.leaves((params, ema))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_what_one_trains(train, method, processes):
    # Twins are two networks that must agree; an average of one is checked over devices.
    if not ALL and ((processes == 4 and method != QUICK) or method == "mean_teacher"):
        pytest.skip("set BHSD_TEST_ALL to train every experiment in two and in four processes")
    require_same(train(method, 1), train(method, processes))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_goes_on_where_two_stopped(
    train, launch, shards, tmp_path, processes
):
    whole = train(QUICK, 2)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in (4, 5):  # as if it had been killed after the save of step 2
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    said = launch(processes, "train", tmp_path, *shards)
    assert "resuming after step 2" in said
    require_same(tmp_path, whole)
    if processes == 2:
        for a, b in zip(arrays(tmp_path), arrays(whole), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def predicted(train, launch, shards, tmp_path_factory):
    """What one, two and four processes predict from the checkpoint of two."""
    run = train(QUICK, 2)
    folders = {}
    for processes in (1, 2, *((4,) if ALL else ())):
        folders[processes] = tmp_path_factory.mktemp(f"predictions-{processes}")
        out = f"--config.predict.out={folders[processes]}"
        launch(processes, "predict", run, *shards, out)
    return run, folders


def test_a_prediction_that_is_asked_to_stop_ends_at_once(train, launch, shards, tmp_path):
    out = f"--config.predict.out={tmp_path}"
    asked = {"stop_at": "process 0 of 2", "code": 128 + signal.SIGTERM}
    launch(2, "predict", train(QUICK, 2), *shards, out, **asked)
    assert not list(tmp_path.glob("*.nii.gz"))


def table(path):
    """Rows of a table, but for how long they took."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_predictions_do_not_depend_on_the_number_of_processes(predicted):
    _, folders = predicted
    alone = folders.pop(1)
    maps = sorted(path.name for path in alone.glob("*.nii.gz"))
    assert len(maps) > 2
    for folder in folders.values():
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            path.name for path in alone.iterdir()
        )
        for name in (*maps, "predictions.json"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
        assert table(folder / "volumes.csv") == table(alone / "volumes.csv")


def test_scores_do_not_depend_on_the_number_of_processes(predicted, launch, shards):
    run, folders = predicted
    found = []
    for processes in (1, 2):
        out = f"--config.evaluate.predictions={folders[2]}"
        launch(processes, "evaluate", run, *shards, out)
        found.append([(run / name).read_bytes() for name in ("cases.csv", "summary.json")])
    assert found[0] == found[1]
