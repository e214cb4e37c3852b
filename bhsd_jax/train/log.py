"""What a run says while it trains: `metrics.jsonl`, a progress line, the NaN stop."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from bhsd_jax.platform import files, machine, step_log
from bhsd_jax.train.loop import Interrupted
from bhsd_jax.train.speed import Speed
from bhsd_jax.train.trackers import End, TensorBoard, Tracker
from bhsd_jax.types import Metrics, TrainState

logger = logging.getLogger(__name__)

_OF_THE_STEP = ("lr", "weight")  # follow a schedule; all else is a mean since the line before


class Means:
    """Means of what the steps report, over the steps since they were last taken.

    What a step reports stays on the devices until the means are asked for, so that no step waits.
    Sums are Python's floats, of twice the precision of what is reported: in how many parts they
    are made does not show.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        """Goes on from what `state` gave, such as before a run was stopped; None: from nothing."""
        state = state or {}
        self._count: int = state.get("count", 0)
        self._sums: dict[str, float] = dict(state.get("sums", {}))
        self._pending: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """Takes what one step reports; does not wait for it."""
        self._pending.append(metrics)

    def take(self) -> dict[str, float]:
        """The mean of every metric; counts anew from here. Empty if no step was added.

        Waits for the steps that were added.
        """
        self._fold()
        means = {key: value / self._count for key, value in self._sums.items()}
        self._count, self._sums = 0, {}
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON; waits like `take`."""
        self._fold()
        return {"count": self._count, "sums": dict(self._sums)}

    def _fold(self) -> None:
        """Adds what has been kept to the sums, one transfer for all of it."""
        pending, self._pending = self._pending, []
        for metrics in jax.device_get(pending):
            for key, value in metrics.items():
                self._sums[key] = self._sums.get(key, 0.0) + float(value)
            self._count += 1


class Log:
    """Writes one JSON object per logged step, `train/loss` and the like, and a progress line.

    Losses and gradient norms are means over the steps since the line before; rates and weights that
    follow a schedule are those of the step. On a resumed run, lines past the restored step are
    dropped first, so that no step is there twice, and the first mean goes on from `means`, what the
    checkpoint kept of the steps since the last line. Only the main process writes.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        resumed_at: int,
        *,
        writes: bool = True,
        speed: Speed | None = None,
        means: Mapping[str, Any] | None = None,
        tracked: Sequence[Tracker] = (),
        validate_every: int = 0,
    ):
        """Goes on after step `resumed_at`; `validate_every` is 0 where nothing validates."""
        self.means = Means(means)
        self.path, self.steps, self.writes, self.speed = path, steps, writes, speed
        self.started = self.since = time.monotonic()
        self.since_step = resumed_at
        self.paused = 0.0
        self.validate_every = validate_every
        self.validation_s: float | None = None  # of the last one
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _drop_after(path, resumed_at)
            timed = [line["time/validation_s"] for line in kept if line.get("time/validation_s")]
            self.validation_s = timed[-1] if timed else None
        self.tracked = tuple(tracked)

    def count(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Takes in what the step reports, for the next line; does not wait for it."""
        self.means.add(metrics)

    def train(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Logs the steps since the line before; all of them were counted.

        Raises:
            FloatingPointError: If the loss is not finite; says since which step.
        """
        values = self.finite(step, metrics)
        means = self.means.take() | {key: values[key] for key in _OF_THE_STEP if key in values}
        now = time.monotonic()
        steps, passed = max(step - self.since_step, 1), now - self.since - self.paused
        seconds = passed / steps
        self.since, self.since_step, self.paused = now, step, 0.0
        told = {f"train/{k}": v for k, v in means.items()} | {"time/step_s": seconds}
        self.write(step, told | (self.speed.since(steps, passed) if self.speed else {}))
        logger.info(
            "step %d/%d  loss %.4f  %.2f s/step  %s left",
            step,
            self.steps,
            means["loss"],
            seconds,
            self._left(step, seconds),
        )

    def _left(self, step: int, step_s: float) -> str:
        """The time that steps and validations after this line take; these are counted until timed.

        A validation of this very step comes after its line, and the last step always has one.
        """
        every, seconds = self.validate_every, (self.steps - step) * step_s
        ahead = 0
        if every:
            ahead = self.steps // every - (step - 1) // every + bool(self.steps % every)
        if not ahead or self.validation_s is not None:
            return _clock(seconds + ahead * (self.validation_s or 0.0))
        return f"{_clock(seconds)} and {ahead} validation{'s' * (ahead > 1)}"

    def finite(self, step: int, metrics: Metrics) -> dict[str, float]:
        """What the step reports, as numbers; waits for it. Before its state is saved, too.

        Raises:
            FloatingPointError: If loss or gradients are not finite, and so the weights are not.
        """
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise FloatingPointError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}, after "
                f"step {self.since_step} was finite; lower optimizer.lr or look at the data of "
                "these steps. The last checkpoint is untouched"
            )
        return values

    def pause(self, seconds: float) -> None:
        """Leaves time spent on something else out of the step time."""
        self.paused += seconds

    def validated(self, seconds: float) -> None:
        """Leaves the time of a validation out of the step time, and expects it of those to come."""
        self.pause(seconds)
        self.validation_s = seconds

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; not-a-number (class absent) is written as null.

        Raises:
            faults.WriteError: If the system says no, such as on a full disk.
        """
        if not self.writes:
            return
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        elapsed = round(time.monotonic() - self.started, 1)  # of this process
        line = json.dumps({"step": step, **clean, "time/elapsed_s": elapsed})
        files.append(self.path, line + "\n")
        finite = {key: value for key, value in clean.items() if value is not None}
        self._tell(lambda tracker: tracker.write(step, finite))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Closes it after the block, and tells the trackers how the training ended."""
        end = End.FAILED
        try:
            yield
            end = End.DONE
        except Interrupted:
            end = End.STOPPED
            raise
        finally:
            self.close(end)

    def close(self, end: End = End.DONE) -> None:
        """Tells the trackers how the training ended; no line comes after it."""
        self._tell(lambda tracker: tracker.close(end))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tells every tracker; one that fails, such as a server that is away, is told no more."""
        for tracker in self.tracked:
            try:
                what(tracker)
            except Exception as error:  # each library has errors of its own
                if isinstance(tracker, TensorBoard):  # a file of ours, as `metrics.jsonl` is
                    raise
                self.tracked = tuple(other for other in self.tracked if other is not tracker)
                logger.warning(
                    "train.trackers: %s gets no more figures (%s: %s); the training goes on, and "
                    "metrics.jsonl has them all",
                    type(tracker).__name__,
                    type(error).__name__,
                    error,
                )


@contextmanager
def heartbeat(what: str, *, begins: bool = True) -> Iterator[None]:
    """Says that something long `begins`, and again and again that it still goes on."""
    done, begun = threading.Event(), time.monotonic()
    if begins:
        logger.info("%s", what)

    def beat() -> None:
        while not done.wait(machine.log_every_s()):
            logger.info("%s ... %.0f s", what, time.monotonic() - begun)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps; those that stay."""
    kept = [record for record in step_log.read(path) if record["step"] <= step]
    files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
