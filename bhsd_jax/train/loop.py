"""The loop: one step after the other, and what happens between them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax

from bhsd_jax.train.step import TrainStep
from bhsd_jax.types import Batch, Metrics, TrainState

Action = Callable[[int, TrainState, Metrics], None]


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """The machine asks the run to end; the state has been saved."""


@dataclass(frozen=True)
class Every:
    """Runs an action at multiples of any of `steps`, after the last step, and by the clock."""

    steps: tuple[int, ...]
    last: int
    action: Action
    seconds: float = math.inf  # also when the last time is so long ago
    _ran: list[float] = field(default_factory=lambda: [time.monotonic()])

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
        due = step == self.last or any(step % every == 0 for every in self.steps)
        if due or time.monotonic() - self._ran[0] > self.seconds:
            self.action(step, state, metrics)
            self._ran[0] = time.monotonic()  # after it: an action waits for all steps before it


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    train_step: TrainStep,
    actions: Sequence[Action],
    steps: int,
) -> TrainState:
    """Trains up to `steps` in all; after each step runs the actions in order."""
    done = int(state.step)
    for step in range(done + 1, steps + 1):
        batch = next(batches)
        # The batch is on the device already, so any transfer here is a mistake.
        with (
            jax.profiler.StepTraceAnnotation("train", step_num=step),
            jax.transfer_guard("disallow"),
        ):
            state, metrics = train_step(state, batch)
        for action in actions:
            action(step, state, metrics)
    return state
