"""Commands that a series runs, each in its place: their words, and how they are stopped."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from bhsd_jax.experiments.places import Place
from bhsd_jax.platform import cluster

ASKS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # to end, as `Preemption` has them


class Stopped(Exception):  # noqa: N818  (a request, not an error)
    """Raised where a signal has asked a series of trials to end."""


class Children:
    """The child processes that run at this moment."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.asked = False

    def call(self, place: Place = Place(), prefix: str = "") -> "Call":  # noqa: B008  (frozen)
        """A function that runs commands on the devices of one place, one command at a time."""
        self.calls.append(Call(self, place, prefix))
        return self.calls[-1]

    def stop(self, *_: object) -> None:
        """Sends SIGTERM to all children; a training saves before it ends."""
        self.asked = True
        for call in self.calls:
            if call.child is not None and call.child.poll() is None:
                call.child.terminate()


class Call:
    """Runs a command, copying its output to a log file; returns exit code and last line."""

    def __init__(self, children: Children, place: Place, prefix: str) -> None:
        self.children, self.place, self.prefix = children, place, prefix
        self.child: subprocess.Popen[str] | None = None
        self.cpu_s: float | None = None  # of the last command, over all its threads and processes

    def __call__(self, command: Sequence[str], log: Path) -> tuple[int, str]:
        if self.children.asked:
            raise Stopped("asked to stop")
        with (
            log.open("a") as file,
            subprocess.Popen(
                [*self.place.prefix, *command],
                env={**cluster.apart(), **self.place.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as self.child,
        ):
            assert self.child.stdout is not None  # it is a pipe
            try:
                if self.children.asked:  # while it was started
                    self.child.terminate()
                file.write(f"$ {shlex.join(command)}\n")
                last = self._copy(self.child.stdout, file) or "no word of why"
                self.cpu_s = _cpu_seconds(self.child.pid)
            except BaseException:
                # Such as a time limit: nobody else would ask the child, which is waited for. A
                # training saves now, and says so; a closed pipe would stop it.
                self.child.terminate()
                self._copy(self.child.stdout, file)
                raise
        code = self.child.returncode
        if self.children.asked and code:
            raise Stopped("asked to stop")
        return code, last

    def _copy(self, output: Iterable[str], log: TextIOWrapper) -> str:
        """Copies lines to the log and to the terminal until there are no more; the last of them."""
        last = ""
        for line in output:
            log.write(line)
            log.flush()
            last = line.strip() or last
            say(f"  {self.prefix}{line}")
        return last


def say(text: str) -> None:
    """To standard error, where anybody reads it: Ctrl-C ends `| tee log` before it reaches us."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)


def heed(numbers: Iterable[int], handler: Callable[..., None]) -> Mapping[int, Any]:
    """Handles these signals, but not SIGHUP under `nohup`; what handled them before."""
    ignored = [] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [signal.SIGHUP]
    return {number: signal.signal(number, handler) for number in numbers if number not in ignored}


def heed_again(before: Mapping[int, Any]) -> None:
    """Undoes `heed`."""
    for number, handler in before.items():
        signal.signal(number, handler)


def _cpu_seconds(process: int) -> float | None:
    """CPU time of a child that has ended or is about to, and of its own children; Linux only.

    It is read before the child is waited for: afterwards the system has forgotten it.
    """
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None


@contextmanager
def running() -> Iterator[Children]:
    """A context that passes what asks it to end on to the children, and leaves none running."""
    children = Children()
    before = heed(ASKS, children.stop)
    try:
        yield children
    finally:
        heed_again(before)
        children.stop()
        for call in children.calls:
            if call.child is not None:
                call.child.wait()
