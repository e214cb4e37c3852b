"""Traces of a few steps, for xprof and TensorBoard."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """The steps from `first` to `last`, both traced."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, steps: int) -> "Span | None":
        """`"10:15"`, or a single step `"10"`; None if empty.

        Raises:
            ValueError: If it is neither, or not among the steps of the run.
        """
        if not text:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= steps:
            raise UserError(
                f"train.profile: steps to trace, like 10:15, within 1..{steps}; got {text!r}"
            )
        return cls(first, last)


@dataclass
class Profile:
    """An action of the loop: writes a trace of a span of steps to a folder."""

    span: Span
    folder: Path
    _on: bool = field(default=False, init=False)

    def begin(self, step: int) -> None:
        """Starts if the step after this one is to be traced."""
        if not self._on and self.span.first <= step + 1 <= self.span.last:
            jax.profiler.start_trace(str(self.folder))
            self._on = True

    def __call__(self, step: int, state: Any, metrics: Any) -> None:
        """Starts before the first step of the span, ends after the last."""
        if step == self.span.first - 1 or (self._on and step >= self.span.last):
            jax.block_until_ready(metrics)  # steps before the span do not belong to it
        if self._on and step >= self.span.last:
            self.close()
        self.begin(step)

    def close(self) -> None:
        """Writes what there is, should the run end amid the span."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            logger.info("steps %d to %d are traced in %s", *vars(self.span).values(), self.folder)


@contextlib.contextmanager
def profiling(span: Span | None, folder: Path, position: int) -> Iterator[Callable[..., None]]:
    """An action of the loop that traces the span, if any, of a run that has done so many steps."""
    if span is None:
        yield lambda *_: None
        return
    profile = Profile(span, folder)
    profile.begin(position)
    try:
        yield profile
    finally:
        profile.close()
