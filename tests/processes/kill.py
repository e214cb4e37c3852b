"""Kills a training of two processes at random moments, then compares it with an undisturbed one.

    python tests/processes/kill.py [--kills 20] [--in-save 5] [--steps 4000] [--seed 0]

Not part of the suite: it takes many minutes. Prints a row per kill: where it hit, which step had
been saved by then, and where the next start went on. Ends with 1 if a saved step was lost, or if
the parameters in the end are not those of the undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bhsd_jax.train.checkpoint import load_networks  # noqa: E402  (the path comes first)

TINY = Path(__file__).with_name("tiny.py")


def main() -> None:
    """Trains twice, once with kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-save", type=int, default=5, help="of them, while a step is written")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        flags = [
            f"--config={TINY}:suponly",
            f"--config.preprocess.shards={root / 'shards'}",
            f"--config.data.root={root / 'synthetic'}",
            f"--config.train.steps={args.steps}",
            "--config.train.save_every=20",
            "--config.train.log_every=5",
            f"--config.train.validate_every={args.steps}",
        ]
        wait(start("preprocess", root, flags))
        wait(start("train", root / "whole", flags))
        failures = harass(root / "killed", flags, args, rng)
        same = parameters(root / "whole") == parameters(root / "killed")
    print(f"{len(failures)} of {args.kills} kills lost a saved step; parameters same: {same}")
    sys.exit(0 if same and not failures else 1)


def harass(workdir: Path, flags: list[str], args: argparse.Namespace, rng: random.Random) -> list:
    """Kills the training again and again, then lets it end; the kills that lost something."""
    failures, kept = [], []
    aims = ["in a save"] * args.in_save + ["anywhere"] * (args.kills - args.in_save)
    rng.shuffle(aims)
    for number, aim in enumerate([*aims, "never"]):
        log = workdir.with_name(f"start-{number}.log")
        process = start("train", workdir, flags, log)
        if kept:
            resumed = went_on(process, log)
            print(f"        went on after {resumed}", flush=True)
            failures += [number] if resumed < kept[-1] else []
        if aim == "never":
            wait(process)
            break
        until_it_trains(workdir, kept, process)
        time.sleep(rng.uniform(0, 3))
        hit = until_it_saves(workdir, process) if aim == "in a save" else "anywhere"
        kill_all(log)
        process.wait()
        kept = saved(workdir)
        print(f"kill {number + 1:2d} {hit:<18} saved {kept}", flush=True)
    return failures


def start(verb: str, workdir: Path, flags: list[str], log: Path | None = None) -> subprocess.Popen:
    """Two processes in a group of their own."""
    words = ["bash", "launch/local.sh", "2", verb, *flags, f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["BHSD_KILL"] = str(log)  # by which they are found
    out = log.open("w") if log else subprocess.DEVNULL
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
    )


def wait(process: subprocess.Popen) -> None:
    """Until it has ended well."""
    if process.wait() != 0:
        sys.exit(f"a run ended with {process.returncode}")


def saved(workdir: Path) -> list[int]:
    """Steps whose folders are there by their final name."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def logged(workdir: Path) -> int:
    """The newest step in the log."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def until_it_trains(workdir: Path, before: list[int], process: subprocess.Popen) -> None:
    """Until a new step is saved."""
    while saved(workdir) == before:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with {process.returncode}")
        time.sleep(0.02)


def until_it_saves(workdir: Path, process: subprocess.Popen) -> str:
    """Until a step is being written; its name."""
    while process.poll() is None:
        for path in workdir.glob("checkpoints/*.unfinished"):
            return path.name
        time.sleep(0.0005)
    sys.exit("the run ended before a save was seen")


def went_on(process: subprocess.Popen, log: Path) -> int:
    """The step that a start says it goes on from."""
    while process.poll() is None:
        found = re.search(r"resuming after step (\d+)", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.1)
    sys.exit(f"the next start ended with {process.returncode}: {log.read_text()[-2000:]}")


def kill_all(log: Path) -> None:
    """Kills launcher and processes at one moment: those left alone would be asked to save."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"BHSD_KILL={log}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # another user's, or gone
            continue
    for number in sorted(found, reverse=True):
        os.kill(number, signal.SIGKILL)


def parameters(workdir: Path) -> list[bytes]:
    """Of the last checkpoint, bit by bit."""
    _, params, ema = load_networks(workdir / "checkpoints", "last")
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, ema))]


if __name__ == "__main__":
    main()
