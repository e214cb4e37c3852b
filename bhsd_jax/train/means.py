"""Means of what the steps of a training report, over the steps since they were last taken."""

from collections.abc import Mapping
from typing import Any

import jax

from bhsd_jax.types import Metrics


class Means:
    """Keeps what every step reports where it is, on the devices, until the means are asked for.

    So a step costs nothing more, and nobody waits for it. Sums are Python's floats, of twice the
    precision of what is reported: in how many parts they are made does not show.
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
