"""One run in several processes of this machine: what `launch/local.sh` runs."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from bhsd_jax.experiments import children, places
from bhsd_jax.platform import cluster
from bhsd_jax.platform.errors import UserError

_USAGE = "launch/local.sh N VERB --config=configs/FILE.py:WORDS --workdir=FOLDER"
_LAST_WORDS_S = 60.0  # for the others, once one has ended with an error or was asked to stop twice
_KILL_S = 15.0  # between SIGTERM and SIGKILL
_ASKED = (signal.SIGINT, *children.ASKS)


def cli(arguments: Sequence[str]) -> int:
    """Runs a verb in N processes of this machine; returns the first exit code that is not 0, or 0.

    Raises:
        ValueError: If N is no number, or there are fewer GPUs.
    """
    if len(arguments) < 2 or not arguments[0].isdecimal() or arguments[1].startswith("-"):
        raise UserError(f"local: {_USAGE}; got {' '.join(arguments)!r}")
    count = int(arguments[0])
    shared = places.share(count, option="local: N")
    for gpu in places.idle(count):
        children.say(f"local: GPU {gpu} is idle, for {count} processes get as many each\n")
    command = [sys.executable, "-m", "bhsd_jax.main", *arguments[1:]]
    meeting = _meeting(count)
    group = Group(
        [[*place.prefix, *command] for place in shared],
        [{**place.environment, **_who(meeting, i, count)} for i, place in enumerate(shared)],
    )
    return group.run()


class Group:
    """Processes of one run: where one ends badly the others are stopped."""

    def __init__(
        self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]
    ) -> None:
        self.commands, self.environments = commands, environments
        self.children: list[subprocess.Popen[str]] = []
        self.asked = 0  # how often we were asked to stop

    def run(self) -> int:
        """Starts all and waits; returns the exit code of the first that failed, or 0."""
        before = children.heed(_ASKED, self._pass_on)
        threads: list[threading.Thread] = []
        try:
            for index, command in enumerate(self.commands):
                child = subprocess.Popen(
                    command,
                    env=cluster.apart() | self.environments[index],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if index else None,
                    stderr=subprocess.STDOUT if index else None,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
                    preexec_fn=_die_with_parent,
                )
                self.children.append(child)
                if index:
                    assert child.stdout is not None  # it is a pipe
                    threads.append(threading.Thread(target=_relay, args=(child.stdout, index)))
                    threads[-1].start()
            return self._wait()
        finally:
            self._end(signal.SIGKILL)
            for thread in threads:
                thread.join(timeout=5.0)
            children.heed_again(before)

    def _wait(self) -> int:
        """Until all have ended; what outlives a failure by a minute is ended."""
        code, deadline, ended = 0, None, False
        while alive := [child for child in self.children if child.poll() is None]:
            time.sleep(0.05)
            code = code or self._first_bad()
            if code and deadline is None:
                # Those that save get the minute. A process that died is waited for in vain.
                last_words = (
                    _LAST_WORDS_S - _KILL_S if code == cluster.TRY_AGAIN or self.asked else 5.0
                )
                deadline = time.monotonic() + last_words
            if deadline is not None and time.monotonic() > deadline:
                self._end(signal.SIGKILL if ended else signal.SIGTERM)
                if not ended:
                    children.say(f"local: a process ended with {code}; ending {len(alive)}\n")
                ended, deadline = True, time.monotonic() + _KILL_S
        return code or self._first_bad()

    def _first_bad(self) -> int:
        codes = [child.returncode for child in self.children if child.returncode]
        return next((128 - code if code < 0 else code for code in codes), 0)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Asks all to save and stop; asked again, does not wait for it."""
        self.asked += 1
        self._end(signal.SIGTERM if self.asked < 3 else signal.SIGKILL)

    def _end(self, number: int) -> None:
        for child in self.children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)


def _relay(lines: IO[str], index: int) -> None:
    """What other processes than the first say, with their number."""
    for line in lines:
        children.say(f"[{index}] {line}")


def _meeting(count: int) -> str:
    """An address on this machine where nobody listens; not to be reached from outside."""
    if count == 1:
        return ""
    return f"127.0.0.1:{free_port()}"


def free_port() -> int:
    """A port of this machine where nobody listens.

    Of those below what Linux gives to clients, none of which can take it until it is used.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise UserError("local: no free port between 20000 and 32767 on 127.0.0.1")


def _who(meeting: str, index: int, count: int) -> dict[str, str]:
    """The variables by which a process knows its number."""
    if not meeting:
        return {}
    proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy")]
    return {
        "JAX_COORDINATOR_ADDRESS": meeting,
        "JAX_COORDINATOR_BIND_ADDRESS": meeting,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        **({"no_grpc_proxy": "127.0.0.1"} if proxies else {}),
    }


def _die_with_parent() -> None:
    """On Linux, SIGTERM if we are killed: nobody is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    from bhsd_jax.experiments import launch

    launch.main(cli)
