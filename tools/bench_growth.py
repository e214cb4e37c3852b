"""How time and memory of every verb grow with the number of scans.

    python tools/bench_growth.py [--scans 8,32,128] [--size 96] [--slices 16]

For each number a set of so many training and so many test scans is generated; a small network is
trained on it for two steps, and the test scans are predicted, scored and shown. Every verb is a
process of its own; its CPU time includes that of its workers, and the memory is the largest
resident set of any of them. For every number the verbs compile anew. What a verb takes beyond its
start should grow as the scans do, and memory not at all. How prediction grows with the size of a
scan: `tools/bench_infer.py --volume`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_pair import processor

from bhsd_jax.phantom.tree import generate
from bhsd_jax.platform import machine

VERBS = ("preprocess", "train", "predict", "evaluate", "report")


def main() -> None:
    """Measures, and prints a line per verb and number."""
    options = arguments()
    counts = [int(count) for count in options.scans.split(",")]
    print(processor())
    found: dict[str, dict[int, dict[str, float]]] = {verb: {} for verb in VERBS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            size = {"size": options.size, "slices": options.slices}
            generate(root, train=count, test=count, bleeding=0, nonbleeding=0, **size)
            for verb in VERBS:
                found[verb][count] = measure(verb, Path(folder), flags(root))
                print(line(verb, count, found[verb][count]), flush=True)
    if len(counts) > 1:
        print("from the fewest scans to the most, CPU time of one more scan:")
        few, many = min(counts), max(counts)
        for verb, rows in found.items():
            each = (rows[many]["cpu"] - rows[few]["cpu"]) / (many - few)
            print(f"{verb:12}{each:8.3f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", default="8,32,128", help="numbers of training and test scans")
    parser.add_argument("--size", type=int, default=96, help="rows and columns of a scan")
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


def flags(root: Path) -> list[str]:
    """A small supervised experiment on a generated set."""
    fields = {
        "data.root": root,
        "preprocess.spacing_mm": "10.0,2.4,2.4",
        "input.patch": "8,32,32",
        "input.unlabeled": 0,
        "model.features": "4,8,16",
        "train.steps": 2,
        "train.validate_every": 2,
        "train.save_every": 2,
        "infer.mirror": False,
        "evaluate.bootstrap": 100,
    }
    return [
        "--config=supervised:data=bhsd",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def measure(verb: str, folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and GB of one verb.

    Raises:
        SystemExit: If the verb fails; with what it printed last.
    """
    log = folder / f"{verb}.txt"
    command = [sys.executable, "-m", "bhsd_jax.main", verb, str(folder / "run"), *words]
    # Programs of the number before, or of the user's own runs, would be found ready.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    begun = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | cache
        )
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"bench_growth: {verb} failed:\n{log.read_text()[-2000:]}")
    return {"wall": time.monotonic() - begun, **_of(used)}


def _of(used: resource.struct_rusage) -> dict[str, float]:
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "gb": machine.resident_bytes(used.ru_maxrss) / 1e9,
    }


def line(verb: str, count: int, row: dict[str, float]) -> str:
    """A row of the table."""
    return (
        f"{verb:12}{count:5} scans {row['wall']:8.1f} s wall {row['cpu']:8.1f} s of CPU time, "
        f"peak {row['gb']:.2f} GB"
    )


if __name__ == "__main__":
    main()
