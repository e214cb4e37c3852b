"""Jobs in three steps, of which several run at a time: the next job is read, the last written.

NumPy, zlib and XLA leave Python's lock while they compute, so that threads are enough.
"""

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

_Job = TypeVar("_Job")
_Ready = TypeVar("_Ready")
_Done = TypeVar("_Done")
Claim = Callable[[int], bool]  # bytes that a job will take -> whether it had to wait for them
Check = Callable[[], None]  # does nothing, or ends the step that calls it

_LAST = object()
_LONGEST_END_S = 10.0  # of a thread that is to end and waits for a disk, say


class _Halted(BaseException):
    """Ends the step in the middle because another one has failed."""


def run(
    jobs: Iterable[_Job],
    before: Callable[[_Job, Claim], _Ready],
    work: Callable[[_Ready, Check], _Done],
    after: Callable[[_Done], None],
    *,
    memory: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Takes every job through three steps, each of which sees the jobs in their order.

    `before` and `after` run in threads of their own and `work` in this one. While `work` has a job,
    `before` has at most the next one and `after` at most the one in front of it.

    An error of `before` or `work` is raised once the jobs in front of that one are done with. An
    error of `after`, or an interrupt, ends the other steps where they are, as an interrupt would.

    Args:
        jobs: In their order.
        before: May call `claim` once, before it takes much memory: it waits until what all jobs
            that are under way have claimed, and this one, fit into `memory` or it is alone.
        work: May call `check` now and then.
        after: Its result is not used.
        memory: Bytes; 0: any number.
        meanwhile: Called in this thread before the first `work`, beside the first `before`.
    """
    line = _Line(jobs, before, after, memory)
    try:
        meanwhile()
        line.drive(work)
    except Exception as error:
        line.finish()  # with those in front of the job that has failed
        raise line.after_failed or error from None
    except _Halted:
        pass  # the reason is raised below
    finally:
        line.end()
    failed = line.after_failed or line.before_failed
    if failed:
        raise failed


class _Line:
    """The threads of `before` and `after`, and what lies between the steps."""

    def __init__(
        self,
        jobs: Iterable[Any],
        before: Callable[[Any, Claim], Any],
        after: Callable[[Any], None],
        memory: int,
    ) -> None:
        self.ready, self.done = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
        # How many jobs may enter `before`, and leave `work`: one, and one more when it has gone on.
        self.ahead, self.behind = threading.Semaphore(), threading.Semaphore()
        self.before_failed: BaseException | None = None
        self.after_failed: BaseException | None = None
        self.halted = threading.Event()
        self.room = _Room(memory)
        loops = (partial(self._before, jobs, before), partial(self._after, after))
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self.threads:
            thread.start()

    def drive(self, work: Callable[[Any, Check], Any]) -> None:
        """The step in the middle, for all jobs; and waits for the last to be done with."""
        for number, job in iter(self.ready.get, _LAST):
            self.ahead.release()
            made = work(job, self.check)
            self.behind.acquire()
            self.check()
            self.done.put((number, made))
            del job, made  # else they would be held while the next one is waited for
        self.finish()

    def check(self) -> None:
        """Ends `work` if `after` has failed."""
        if self.halted.is_set():
            raise _Halted

    def finish(self) -> None:
        """Waits until all that left `work` are done with."""
        self.done.put(_LAST)
        self.threads[1].join()

    def end(self) -> None:
        """Ends what still runs as an interrupt would: what is half-written is removed."""
        self.halted.set()
        running = [thread for thread in self.threads if thread.is_alive()]
        for thread in running:
            _interrupt(thread)
        self.room.close()
        self.ahead.release()
        self.done.put(_LAST)
        for thread in running:
            thread.join(_LONGEST_END_S)

    def _before(self, jobs: Iterable[Any], before: Callable[[Any, Claim], Any]) -> None:
        try:
            for number, job in enumerate(jobs):
                self.ahead.acquire()
                if self.halted.is_set():  # an interrupt may be lost in what swallows exceptions
                    return
                self.ready.put((number, before(job, partial(self.room.claim, number))))
                del job
        except SystemExit:
            return
        except BaseException as error:
            self.before_failed = error
        self.ready.put(_LAST)

    def _after(self, after: Callable[[Any], None]) -> None:
        try:
            for number, job in iter(self.done.get, _LAST):
                after(job)
                del job
                self.room.leave(number)
                self.behind.release()
        except SystemExit:
            return
        except BaseException as error:
            self.after_failed = error
            self.halted.set()
            self.ready.put(_LAST)
            self.behind.release()


class _Room:
    """Memory that jobs under way have claimed."""

    def __init__(self, size: int) -> None:
        self.size, self.claims, self.closed = size, dict[int, int](), False
        self.changed = threading.Condition()

    def claim(self, number: int, needed: int) -> bool:
        """Waits until there are so many bytes, or no other job has any; whether it had to."""
        waited = False
        with self.changed:
            while self.claims and 0 < self.size < sum(self.claims.values()) + needed:
                waited = True
                self.changed.wait()
                if self.closed:
                    raise SystemExit
            self.claims[number] = needed
        return waited

    def leave(self, number: int) -> None:
        """Gives back what a job has claimed, if anything."""
        with self.changed:
            self.claims.pop(number, None)
            self.changed.notify_all()

    def close(self) -> None:
        """Ends whoever waits."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def _interrupt(thread: threading.Thread) -> None:
    """Raises SystemExit in a thread, between two of its bytecodes."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
