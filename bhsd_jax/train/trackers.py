"""Where the figures of a training go besides `metrics.jsonl`: one small interface for all of them.

TensorBoard's event files are always written. Weights & Biases and MLflow are extras, named in
`train.trackers`; both read where to send what from their own environment variables, such as
`WANDB_MODE=offline` and `MLFLOW_TRACKING_URI`. What they are sent is a copy: a training goes on
without one that fails.
"""

import contextlib
import importlib
import importlib.util
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, explain_extra

logger = logging.getLogger(__name__)

_PROJECT = "bhsd_jax"


class End(Enum):
    """How a training ended, which decides how a tracker shows it."""

    DONE = "done"  # all of its steps
    STOPPED = "stopped"  # asked to, and saved: it is to go on
    FAILED = "failed"


@runtime_checkable
class Tracker(Protocol):
    """Takes figures of one step after the other."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite figures of a step, by names such as `train/loss`; a step may come in parts."""
        ...

    def close(self, end: End = End.DONE) -> None:
        """Nothing comes after it; what is kept back is written."""
        ...


class TensorBoard:
    """Event files in a folder; those of a run that goes on hide what comes after its first step.

    Not by the library's `SummaryWriter`: that has a thread, which a full disk ends without a word,
    and whoever hands it figures after that waits for ever.
    """

    def __init__(self, folder: Path, resumed_at: int):
        library = importlib.import_module("tensorboardX.event_file_writer")
        self._kinds = importlib.import_module("tensorboardX.proto.event_pb2")
        self._scalar = importlib.import_module("tensorboardX.summary").scalar
        purge = resumed_at + 1 if resumed_at or any(folder.glob("events.*")) else None
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = library.EventsWriter(str(folder / "events"))
        if purge is not None:
            begins = self._kinds.SessionLog(status=self._kinds.SessionLog.START)
            self._add(purge, file_version="brain.Event:2")
            self._add(purge, session_log=begins)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._add(step, summary=self._scalar(key, value))
        self.writer.flush()

    def _add(self, step: int, **what: Any) -> None:
        self.writer.write_event(self._kinds.Event(step=step, wall_time=time.time(), **what))

    def close(self, end: End = End.DONE) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; a training that resumes goes on with the same run, a copy not."""

    def __init__(self, folder: Path, resumed_at: int, name: str, facts: Mapping[str, Any]):
        library = importlib.import_module("wandb")
        place = folder / "wandb_run"
        # A random id, because another training may have had this path, or have it in a container.
        called = _begun(place, resumed_at) or secrets.token_hex(8)
        self.run = library.init(
            project=_PROJECT,
            name=name,
            id=called,
            resume="allow",
            dir=str(folder),
            config=dict(facts),
        )
        _note(place, called)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, end: End = End.DONE) -> None:
        if end is End.STOPPED:
            self.run.mark_preempting()  # with a code other than 0 it is then shown as preempted
        if end is End.DONE:
            self.run.finish()
        else:
            self.run.finish(exit_code=1)


class MLflow:
    """A run of MLflow, in the experiment `bhsd_jax` unless `MLFLOW_EXPERIMENT_NAME` says so."""

    def __init__(self, folder: Path, resumed_at: int, name: str, facts: Mapping[str, Any]):
        library = importlib.import_module("mlflow")
        self.client, self.metric = library.MlflowClient(), library.entities.Metric
        experiment = library.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or _PROJECT
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        place = folder / "mlflow_run"
        self.run = _begun(place, resumed_at)
        if self.run:
            self.client.update_run(self.run, "RUNNING")  # it was ended where it stopped
        else:
            self.run = self.client.create_run(number, run_name=name).info.run_id
            self.client.log_dict(self.run, dict(facts), "config.json")
        _note(place, self.run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # One request for all figures, because the training waits for the answer.
        now_ms = int(1000 * time.time())
        batch = [self.metric(key, value, now_ms, step) for key, value in values.items()]
        self.client.log_batch(self.run, metrics=batch)

    def close(self, end: End = End.DONE) -> None:
        if end is End.DONE:
            self.client.set_terminated(self.run)
        else:
            self.client.set_terminated(self.run, "KILLED" if end is End.STOPPED else "FAILED")


def _begun(place: Path, resumed_at: int) -> str:
    """The run that a training goes on in; "" where it begins, in whatever folder, or is a copy.

    A copied run folder names the run of its original, which would get the figures of two trainings.
    A copy is known by its original, which still lies where it was; what was moved, or is seen at
    another place in a container, has none.
    """
    if not resumed_at or not place.is_file():
        return ""
    run, _, folder = place.read_text().strip().partition("\n")
    original = Path(folder) / place.name
    with contextlib.suppress(OSError):  # there is none, or it is nobody's business
        if folder and not original.samefile(place) and original.read_text().startswith(f"{run}\n"):
            logger.warning(
                "%s: a copy of %s, whose figures go to the run %s of its tracker; this one begins "
                "a run of its own there",
                *(place.parent, folder, run),
            )
            return ""
    return run


def _note(place: Path, run: str) -> None:
    """Keeps the name of a run, and in which folder it is trained."""
    files.write_text(place, f"{run}\n{place.parent.absolute()}\n")


_EXTRAS = {"wandb": ("wandb", WeightsAndBiases), "mlflow": ("mlflow", MLflow)}


def require(names: Sequence[str]) -> None:
    """Refuses a tracker whose extra is not installed, before anything is trained.

    Raises:
        ValueError: Names the extra.
    """
    for name in names:
        if importlib.util.find_spec(_EXTRAS[name][0]) is None:
            raise UserError(f"config.train.trackers: needs {name}; {explain_extra(name)}")


def start(
    names: Sequence[str], folder: Path, resumed_at: int, name: str, facts: Mapping[str, Any]
) -> tuple[Tracker, ...]:
    """TensorBoard, and those named.

    Args:
        names: Of `train.trackers`.
        folder: Of the run.
        resumed_at: The step it goes on from; 0: from its beginning.
        name: Of the run, for a reader.
        facts: What it is trained with; no path and no name of a scan is in it.

    Raises:
        UserError: As `require`; or if one cannot be reached, or does not take what it is told.
    """
    require(names)
    others = []
    for one in names:
        try:
            others.append(_EXTRAS[one][1](folder, resumed_at, name, facts))
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"config.train.trackers: {one} did not begin ({type(error).__name__}: {error}); "
                "look at its server and its environment variables, or leave it out: metrics.jsonl "
                "and TensorBoard have the same figures"
            ) from error
    return TensorBoard(folder / "events", resumed_at), *others
