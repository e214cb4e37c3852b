"""Many independent jobs on several processes, and word of how far they are."""

import concurrent.futures
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, runtime_checkable

import rich.console
import rich.progress

from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)


@runtime_checkable
class Pool(Protocol):
    """What runs functions on many arguments: here, in processes, or on other machines."""

    def __enter__(self) -> "Pool": ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None: ...

    def each(
        self, function: Callable[[Any], Any], jobs: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of argument and result, in any order."""
        ...


class Workers:
    """Runs jobs in this process if one is enough, else in spawned ones that stay for the next."""

    def __init__(self, processes: int):
        self.processes = processes
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool:
            # After an error others end what they write: nothing of it is left lying about.
            wait = kind is None or issubclass(kind, Exception)
            self._pool.shutdown(wait=wait, cancel_futures=True)

    def each(
        self, function: Callable[[Any], Any], jobs: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of argument and result, in the order in which they are done.

        Raises:
            ValueError: If a process died.
        """
        if min(self.processes, len(jobs)) < 2:
            yield from ((job, function(job)) for job in jobs)
            return
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork copies locks other threads hold
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.processes, spawn, _end_with_parent
            )
        futures = {self._pool.submit(function, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for memory; the same command goes on "
                "from here, with a smaller --config.preprocess.processes if need be"
            ) from error


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone; the pool alone would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


class Progress:
    """A bar on a terminal; else a line a minute, however long one job takes."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.start = time.monotonic()
        self._stop = threading.Event()
        self._bar = None
        if sys.stderr.isatty():
            console = rich.console.Console(stderr=True)
            self._bar = rich.progress.Progress(console=console)
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._bar:
            self._bar.stop()
        else:
            self._thread.join()
        self._say()

    def advance(self, cases: int) -> None:
        self.done += cases
        if self._bar:
            self._bar.advance(self._task, cases)

    def _beat(self) -> None:
        while not self._stop.wait(machine.log_every_s()):
            self._say()

    def _say(self) -> None:
        wall_s = time.monotonic() - self.start
        rate = self.done / max(wall_s, 1e-9)
        left = (
            f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else ""
        )
        logger.info(
            "%s: %d of %d cases, %.1f s, %.2f cases/s%s",
            *(self.what, self.done, self.total, wall_s, rate, left),
        )
