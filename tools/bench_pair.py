"""The method of every benchmark here: two processes take turns on one machine.

A worker is a process of its own, because each side wants all cores and its own peak of memory. It
sets up, says what it found, then runs one named job whenever it is asked to; while it runs, the
other one sleeps. The ratio of a round comes from two runs seconds apart, so that a machine whose
speed drifts does not favor a side. Nothing here imports JAX or PyTorch.
"""

import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Jobs = dict[str, Callable[[], None]]
Run = dict[str, float]  # wall, cpu: seconds; peak: bytes of memory since the jobs began

# Blocks stay with the process: glibc otherwise faults every page of every activation in anew.
_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # a machine's defaults for NumPy's BLAS


def processor() -> str:
    """Name of the CPU, the widest instructions it has, and the cores this process may use."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"(?:flags|Features)\s*: (.*)", text)
    known = flags[1].split() if flags else []
    sets = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
    widest = next((each for each in sets if each in known), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name[1] if name else 'unknown processor'}, {widest or 'no AVX'}, {cores} cores"


class Worker:
    """One side: a process that runs its jobs when asked."""

    def __init__(self, python: str, script: Path, options: Sequence[str], **settings: str) -> None:
        env = {k: v for k, v in os.environ.items() if k not in _REMOVED} | _SETTINGS | settings
        self._process = subprocess.Popen(
            [python, str(script), "--worker", *options],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def run(self, job: str) -> Run:
        """Runs one job once."""
        assert self._process.stdin is not None
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))}: ended; see above")
        return json.loads(line)


def serve(setup: Callable[[], tuple[dict, Jobs]], device_peak: Callable[[], int | None]) -> None:
    """The worker's side: sets up, then answers until its input ends.

    Memory is that of the device if it tells, else the high-water mark of the resident set above
    what the process held when its libraries were loaded.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    begun, floor = time.perf_counter(), _status("VmRSS")
    facts, jobs = setup()
    facts |= {"setup_s": time.perf_counter() - begun, "setup_peak": _status("VmHWM") - floor}
    _forget_peak()

    def say(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say(facts)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        jobs[line.strip()]()
        run = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        peak = device_peak()
        say(run | {"peak": _status("VmHWM") - floor if peak is None else peak})


def take_turns(ours: Worker, peer: Worker | None, job: str, rounds: int) -> list[tuple[Run, ...]]:
    """Both sides run the job `rounds` times, the first one alternating."""
    found = []
    for index in range(rounds):
        sides = [worker for worker in (ours, peer) if worker is not None]
        order = sides if index % 2 == 0 else sides[::-1]
        runs = {id(worker): worker.run(job) for worker in order}
        found.append(tuple(runs[id(worker)] for worker in sides))
    return found


def summarize(rounds: Sequence[tuple[Run, ...]]) -> dict:
    """Medians of each side, and the ratio peer / ours of the rounds with its quartiles."""
    names = ("ours", "peer")[: len(rounds[0])]
    table: dict = {}
    for side, name in enumerate(names):
        runs = [turn[side] for turn in rounds]
        table[name] = {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu")}
        table[name]["peak_gb"] = max(run["peak"] for run in runs) / 1e9
    if len(names) == 2:
        for key in ("wall", "cpu"):
            ratios = [theirs[key] / ours[key] for ours, theirs in rounds]
            low, middle, high = quartiles(ratios)
            table[f"ratio_{key}"] = {"median": middle, "low": low, "high": high}
    return table


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 %; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def show(title: str, table: dict) -> None:
    """One line per side and one for the ratio."""
    print(title)
    for name in ("ours", "peer"):
        if name in table:
            side = table[name]
            print(
                f"  {name}: {side['wall']:.4g} s wall, {side['cpu']:.4g} s of CPU time,"
                f" peak {side['peak_gb']:.2f} GB"
            )
    if "ratio_wall" in table:
        texts = [
            "{median:.2f} [{low:.2f}, {high:.2f}]".format(**table[f"ratio_{key}"])
            for key in ("wall", "cpu")
        ]
        print(f"  ours is faster by {texts[0]} in wall time, {texts[1]} in CPU time", flush=True)


def _status(field: str) -> int:
    """Bytes; 0 where the system does not tell (it is not Linux)."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> None:
    """Gives free memory back and starts the high-water mark anew."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
