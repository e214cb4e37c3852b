"""Figures of a training reach every tracker, without a network."""

import contextlib
import importlib.util
import json
import resource
import shutil
import struct
import sys
import threading
import types

import pytest

from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import trackers
from bhsd_jax.train.log import Log
from bhsd_jax.train.loop import Interrupted

FACTS = {"seed": 3, "model": {"name": "nnunet.PlainConvUNet"}}


def missing(name):
    return importlib.util.find_spec(name) is None


def scalars(folder):
    """(step, tag, value) of all event files, in the order they were written."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status == 1:
                found.append((event.step, "start", 0.0))
    return found


def log_to(folder, tracked, resumed_at=0):
    log = Log(folder / "metrics.jsonl", 10, resumed_at, tracked=tracked)
    log.write(resumed_at + 1, {"train/loss": 0.5, "val/dice/SDH": float("nan")})
    log.write(resumed_at + 2, {"train/loss": 0.25})
    log.close()


def test_tensorboard_is_always_written_and_purged_on_resuming(tmp_path):
    log_to(tmp_path, trackers.start((), tmp_path, 0, "run", FACTS))
    assert scalars(tmp_path / "events") == [
        (1, "train/loss", 0.5),
        (2, "train/loss", 0.25),
    ], "what is not a number is left out"
    log_to(tmp_path, trackers.start((), tmp_path, 1, "run", FACTS), resumed_at=1)
    steps = [step for step, tag, _ in scalars(tmp_path / "events") if tag == "start"]
    assert steps == [2], "TensorBoard hides step 2 and later of before"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    log_to(tmp_path, trackers.start((), tmp_path, 0, "run", FACTS))
    steps = [step for step, tag, _ in scalars(tmp_path / "events") if tag == "start"]
    assert steps == [1], "all of it, where a run begins anew"


def test_a_full_disk_is_said_every_time_and_no_thread_waits_for_room(tmp_path):
    """A thread of the library's own would end at the first error and leave its callers waiting."""
    threads = threading.active_count()
    (tracker,) = trackers.start((), tmp_path, 0, "run", FACTS)
    tracker.write(1, {"train/loss": 0.5})
    assert threading.active_count() == threads
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128, hard))
    try:
        for step in (2, 3, 4):
            with pytest.raises(OSError, match="File too large"):
                tracker.write(step, {f"train/{number}": 0.5 for number in range(9)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.write(5, {"train/loss": 0.25})
    tracker.close()
    found = scalars(tmp_path / "events")
    assert (found[0], found[-1]) == ((1, "train/loss", 0.5), (5, "train/loss", 0.25))
    assert len(found) == 29, "what there was no room for has followed"


def test_what_is_not_installed_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=f"needs {name}; install the extra `{name}`"):
            trackers.require((name,))
    trackers.require(())


def test_weights_and_biases_is_told_steps_and_goes_on_in_the_run_it_resumes(tmp_path, monkeypatch):
    """Against a stand-in that keeps what it is told; the real one is below."""
    told = []
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end")
    )
    library = types.ModuleType("wandb")
    library.init = lambda **options: told.append(options) or run
    library.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", library)
    for step in (0, 2, 0):
        log_to(tmp_path, trackers.start(("wandb",), tmp_path, step, "run", FACTS), step)
    first, again, anew = (one for one in told if isinstance(one, dict))
    assert first["id"] == again["id"] != anew["id"]
    elsewhere = trackers.start(("wandb",), tmp_path / "other", 0, "run", FACTS)
    assert told[-1]["id"] not in (first["id"], anew["id"])
    log_to(tmp_path / "other", elsewhere)
    assert (first["resume"], first["config"], first["name"]) == ("allow", FACTS, "run")
    assert told[1:4] == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.25}), "end"]


@pytest.mark.skipif(missing("wandb"), reason="the extra `wandb` is missing")
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_to(tmp_path, trackers.start(("wandb",), tmp_path, 0, "run", FACTS))
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in kept.read_bytes()


class Server:
    """Stands in for MLflow: keeps what it is told, and may be `away`; the real one is below."""

    def __init__(self):
        self.told, self.away, self.names = [], False, iter(("run 1", "run 2"))
        self.states = []  # of runs, in turn

    def get_experiment_by_name(self, name):
        self.answer()
        return types.SimpleNamespace(experiment_id="7")

    def create_run(self, number, run_name):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=next(self.names)))

    def log_dict(self, run, facts, name):
        assert facts == FACTS

    def log_batch(self, run, metrics):
        self.answer()
        assert all(one.timestamp > 1.7e12 for one in metrics), "milliseconds"
        self.told.append((run, [(one.key, one.value, one.step) for one in metrics]))

    def update_run(self, run, status):
        self.states.append((run, status))

    def set_terminated(self, run, status="FINISHED"):
        self.told.append("end")
        self.states.append((run, status))

    def answer(self):
        if self.away:
            raise RuntimeError("no answer")


@pytest.fixture
def mlflow(monkeypatch):
    class Metric:
        def __init__(self, key, value, timestamp, step):
            self.key, self.value, self.timestamp, self.step = key, value, timestamp, step

    server, library = Server(), types.ModuleType("mlflow")
    library.MlflowClient, library.entities = lambda: server, types.SimpleNamespace(Metric=Metric)
    name = types.SimpleNamespace(get=lambda: None)
    library.environment_variables = types.SimpleNamespace(MLFLOW_EXPERIMENT_NAME=name)
    library.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", library)
    return server


def test_a_copied_run_folder_begins_a_run_of_its_own_and_a_moved_one_goes_on(
    tmp_path, mlflow, caplog
):
    """The copy's figures went to the original's run."""

    def begin(folder, step):
        tensorboard, tracker = trackers.start(("mlflow",), folder, step, "run", FACTS)
        tensorboard.close()
        return tracker.run

    first, copy, moved = (tmp_path / name for name in ("first", "copy", "moved"))
    assert begin(first, 0) == "run 1"
    shutil.copytree(first, copy)
    assert begin(copy, 3) == "run 2"
    assert f"{copy}: a copy of {first}, whose figures go to the run run 1" in caplog.text
    assert (begin(first, 3), begin(copy, 5)) == ("run 1", "run 2"), "each with its own"
    first.rename(moved)
    assert begin(moved, 5) == "run 1"
    moved.rename(first)
    (tmp_path / "linked").symlink_to(first)
    assert begin(tmp_path / "linked", 7) == "run 1"
    (first / "mlflow_run").write_text("run 1")  # of an older version
    assert begin(first, 9) == "run 1"


def test_mlflow_is_asked_once_for_all_figures_of_a_line(tmp_path, mlflow):
    for step in (0, 5, 0):
        tensorboard, tracker = trackers.start(("mlflow",), tmp_path, step, "run", FACTS)
        tensorboard.close()
        tracker.write(step, {"train/loss": 0.5, "train/lr": 0.1})
        tracker.close()
    lines = [("run 1", 0), ("run 1", 5), ("run 2", 0)]
    assert mlflow.told[::2] == [
        (run, [("train/loss", 0.5, step), ("train/lr", 0.1, step)]) for run, step in lines
    ], "what begins anew is a run of its own"
    assert set(mlflow.told[1::2]) == {"end"}


@pytest.mark.parametrize(
    ("error", "mlflow_says", "wandb_says"),
    [
        (None, "FINISHED", ["finish {}"]),
        (Interrupted("SIGTERM"), "KILLED", ["preempting", "finish {'exit_code': 1}"]),
        (FloatingPointError("loss nan"), "FAILED", ["finish {'exit_code': 1}"]),
    ],
)
def test_trackers_are_told_how_a_training_ended(
    tmp_path, mlflow, monkeypatch, error, mlflow_says, wandb_says
):
    """One that had diverged, or was stopped, was shown as finished."""
    told = []
    run = types.SimpleNamespace(
        finish=lambda **how: told.append(f"finish {how}"),
        mark_preempting=lambda: told.append("preempting"),
    )
    library = types.ModuleType("wandb")
    library.init = lambda **options: run
    library.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", library)
    for resumed_at in (0, 5):
        tracked = trackers.start(("mlflow", "wandb"), tmp_path, resumed_at, "run", FACTS)
        log = Log(tmp_path / "metrics.jsonl", 10, resumed_at, tracked=tracked)
        with pytest.raises(type(error)) if error else contextlib.nullcontext(), log.ending():
            if error:
                raise error
    states = [("run 1", mlflow_says), ("run 1", "RUNNING"), ("run 1", mlflow_says)]
    assert mlflow.states == states, "one that goes on runs again"
    assert told == 2 * wandb_says


def test_a_server_that_is_away_ends_no_training_but_begins_none(tmp_path, mlflow, caplog):
    tracked = trackers.start(("mlflow",), tmp_path, 0, "run", FACTS)
    mlflow.away = True
    log_to(tmp_path, tracked)
    assert caplog.text.count("MLflow gets no more figures (RuntimeError: no answer)") == 1
    assert mlflow.told == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert [step for step, _, _ in scalars(tmp_path / "events")] == [1, 2]
    with pytest.raises(UserError, match=r"train\.trackers: mlflow did not begin .*no answer"):
        trackers.start(("mlflow",), tmp_path, 2, "run", FACTS)


@pytest.mark.skipif(missing("mlflow"), reason="the extra `mlflow` is missing")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_offline_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_to(tmp_path, trackers.start(("mlflow",), tmp_path, 0, "run", FACTS))
    log_to(tmp_path, trackers.start(("mlflow",), tmp_path, 2, "run", FACTS), resumed_at=2)
    import mlflow

    client = mlflow.MlflowClient()
    number = client.get_experiment_by_name("bhsd_jax").experiment_id
    (run,) = client.search_runs([number])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 0.25), (3, 0.5), (4, 0.25)]
    assert run.info.run_name == "run"
