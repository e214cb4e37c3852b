"""How fast the verb `train` itself is, input and all, as its own log tells.

    python tools/bench_train.py [--configs supervised,cps] [--patch 20,320,256] [--steps 60]

Makes shards of head-like 34 x 512 x 512 volumes in a temporary folder and trains each experiment on
them: nnU-Net's network for the patch, nnU-Net's augmentation, the precision that suits the device.
Prints steps and patches a second, FLOP/s and its share of the device's peak where that is known,
the share of the time spent waiting for patches, memory, and how long compiling took. What follows
`--` goes to the verb: `-- --config.train.remat=blocks`. On an accelerator this and

    python tools/bench_step.py --device gpu --preset bhsd --peer-python PYTHON_WITH_TORCH

are the two commands that measure it.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_input import PATCH, make_shards
from bench_pair import processor

from bhsd_jax.nnunet import planner
from bhsd_jax.platform import files, step_log
from bhsd_jax.volume import Plan

ROOT = Path(__file__).parents[1]
COLUMNS = {  # of the table: what the log calls it
    "steps/s": "speed/steps_s",
    "patches/s": "speed/patches_s",
    "TFLOP/s": "speed/tflops",
    "of peak": "speed/share_of_peak",
    "input wait": "speed/input_wait",
    "host GB": "memory/host_peak_gb",
    "device GB": "memory/device_peak_gb",
}


def main() -> None:
    """Trains each experiment and prints a row for it."""
    args = parse(sys.argv[1:])
    print(processor())
    print(f"{'':<14}" + "".join(f"{name:>12}" for name in (*COLUMNS, "compile s")), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        shards.mkdir()
        make_shards(shards, args.cases)
        plan_for(shards, args.patch)
        for name in args.configs.split(","):
            row = train(name, shards, Path(folder) / name, args)
            values = (row.get(column) for column in (*COLUMNS, "compile s"))
            text = "".join(f"{'-':>12}" if v is None else f"{v:>12.4g}" for v in values)
            print(f"{name:<14}{text}   {row['device']}", flush=True)


def parse(words: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default="supervised,cps", help="files of configs/")
    parser.add_argument("--patch", default=",".join(map(str, PATCH)), help="D,H,W")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("more", nargs="*", help="flags of the verb, after --")
    return parser.parse_args(words)


def plan_for(shards: Path, patch: str) -> None:
    """Plans nnU-Net's network for the patch, as `preprocess` would."""
    plan = Plan.load(shards)
    size = tuple(map(int, patch.split(",")))
    network = planner.topology(plan.spacing_mm, size, batch=2, batch_dice=False)
    files.write_json(shards / "plan.json", dataclasses.replace(plan, network=network).to_json())


def train(name: str, shards: Path, workdir: Path, args: argparse.Namespace) -> dict:
    """Columns of the table, of the second half of the steps."""
    every = max(args.steps // 6, 1)
    command = [
        *(sys.executable, "-m", "bhsd_jax.main", "train", f"--workdir={workdir}"),
        f"--config=configs/{name}.py:data=bhsd,labels={args.cases // 2}",
        f"--config.preprocess.shards={shards}",
        "--config.split.fold=-1",
        f"--config.train.steps={args.steps}",
        f"--config.train.log_every={every}",
        f"--config.train.save_every={10 * args.steps}",
        f"--config.train.validate_every={10 * args.steps}",
        *args.more,
    ]
    # What an earlier run has compiled is not taken: how long it takes is told.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: train ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = step_log.read(workdir / "metrics.jsonl")
    lines = [line for line in lines if "speed/steps_s" in line and line["step"] > args.steps // 2]
    cost = json.loads((workdir / "cost.json").read_text())
    row = {"device": f"{cost['devices']} x {cost['device']}", "compile s": cost["compile_s"]}
    for column, key in COLUMNS.items():
        known = [line[key] for line in lines if line.get(key) is not None]
        if known:
            row[column] = statistics.median(known)
    return row


if __name__ == "__main__":
    main()
