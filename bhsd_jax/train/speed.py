"""How fast a run is, how much memory it takes, and which of its steps are slow."""

import collections
import contextlib
import logging
import math
import re
import resource
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bhsd_jax.platform import machine
from bhsd_jax.types import Batch

logger = logging.getLogger(__name__)

_SLOW, _LEAST_S = 10, 0.2  # a slow step takes so many times the median, and so many seconds
_ENOUGH = 10  # steps from which there is a median to speak of

# Dense bfloat16 products (float16 where a device has no bfloat16), 10^12 a second and JAX device,
# from the vendors' data sheets. The first name that a device's own begins with counts.
_PEAKS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA GH200": 989.4,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10G": 70.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "Tesla V100": 125.0,
    "Tesla T4": 65.0,
}


def peak_flops(kind: str) -> float | None:
    """FLOP/s of one device in bfloat16 products; None if the kind is not known."""
    for name, tera in _PEAKS.items():
        if re.match(rf"{re.escape(name)}\b", kind):
            return tera * 1e12
    return None


def memory() -> dict[str, float]:
    """Gigabytes in use: of this process, and the most of any of its devices where they tell."""
    usage = machine.resident_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
    values = {"memory/host_gb": _resident_gb() or usage, "memory/host_peak_gb": usage}
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        sizes = [stats[key] for stats in told if key in stats]
        if sizes:
            values[f"memory/{name}_gb"] = max(sizes) / 1e9
    return values


def _resident_gb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return 0.0
    return pages * resource.getpagesize() / 1e9


class Timed:
    """Batches on their way to the step; knows how long the step waited for them."""

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self.waited = 0.0  # seconds in all
        self.asked_at: float | None = None  # when the batch that is being waited for was asked for
        self.begun_at = 0.0  # when the newest one was

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.begun_at = self.asked_at = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.waited += time.monotonic() - self.begun_at
            self.asked_at = None


@dataclass
class Speed:
    """What of `metrics.jsonl` tells the speed of a run."""

    input: Timed
    patches: int  # of a step, labeled and unlabeled, all devices together
    flops: float  # of a step, all devices together, as XLA counts them; NaN where it does not
    peak: float | None  # FLOP/s of all devices together
    _waited: float = 0.0

    def since(self, steps: int, seconds: float) -> dict[str, float]:
        """Figures for the log of `steps` that took `seconds`, and the memory in use now."""
        wait, self._waited = self.input.waited - self._waited, self.input.waited
        rate = steps / max(seconds, 1e-9)
        values = {
            "speed/steps_s": rate,
            "speed/patches_s": rate * self.patches,
            "speed/input_wait": min(wait / max(seconds, 1e-9), 1.0),  # share of the time
        }
        if math.isfinite(self.flops):
            values["speed/tflops"] = rate * self.flops / 1e12
            if self.peak:
                values["speed/share_of_peak"] = rate * self.flops / self.peak
        return values | memory()


class Watch:
    """Says so while a step takes ten times the median, and what it waits for.

    A step begins when its batch is asked for and ends when its loss is there. Steps are queued on
    the device ahead of time, so a thread of its own looks when each is done.
    """

    def __init__(self, batches: Timed):
        self._input = batches
        self._pending: collections.deque[tuple[int, Any, float]] = collections.deque()
        self._times: collections.deque[float] = collections.deque(maxlen=200)
        self._newest, self._done_at, self._said = 0, 0.0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """An action of the loop: the step is on its way."""
        self._newest = step
        self._pending.append((step, metrics["loss"], self._input.begun_at))

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(min(max(self._median() / 20, 0.001), 0.05)):
            while self._pending and self._pending[0][1].is_ready():
                step, _, begun = self._pending.popleft()
                now = time.monotonic()
                seconds = now - max(begun, self._done_at)
                self._done_at = now
                self._judge(step, seconds, "took")
                self._times.append(seconds)
            self._look_at_what_goes_on()

    def _look_at_what_goes_on(self) -> None:
        asked, now = self._input.asked_at, time.monotonic()
        if self._pending:
            step, _, begun = self._pending[0]
            self._judge(step, now - max(begun, self._done_at), "has taken")
        elif asked is not None:
            self._judge(self._newest + 1, now - asked, "has waited for its patches for")

    def _judge(self, step: int, seconds: float, words: str) -> None:
        median = self._median()
        slow = seconds > max(_SLOW * median, _LEAST_S) and len(self._times) >= _ENOUGH
        # Told once as soon as the step is slow, and once more when it is known how long it took.
        rank = 2 * step + (words == "took")
        if slow and rank > self._said:
            self._said = rank
            logger.warning("step %d %s %.1f s; the median is %.2f s", step, words, seconds, median)

    def _median(self) -> float:
        return statistics.median(self._times) if self._times else 0.0


@contextlib.contextmanager
def watching(batches: Timed) -> Iterator[Watch]:
    """A watch for the time of the block."""
    watch = Watch(batches)
    try:
        yield watch
    finally:
        watch.close()
