"""Hands a series to Slurm: one job per run, after the shards and before the report."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bhsd_jax.verbs.series import VERBS, Run

logger = logging.getLogger(__name__)

SCRIPT = Path("launch/slurm.sh")


def submit(
    name: str,
    runs: Sequence[Run],
    prepare: Mapping[Run, Sequence[str]],
    report: Sequence[str],
    options: str,
) -> list[str]:
    """Queues what is not queued yet; returns the ids of the jobs of the runs.

    Args:
        name: Of the series; jobs are named after it.
        runs: Those that are not finished.
        prepare: The command that makes a run's shards, for runs whose shards are not there.
        report: The command that writes the report, whatever became of the runs.
        options: For `sbatch`, of the jobs that train.

    Raises:
        ValueError: If Slurm is not there or refuses; says its words.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--slurm: no `sbatch` on the PATH; run on a login node, or without it")
    queued = set(_call("squeue", "--me", "--noheader", "--format=%j").split())
    shards: dict[tuple[str, ...], str] = {}
    jobs = []
    for run in runs:
        title = f"{name}-{run.row}-s{run.seed}"
        if title in queued:
            logger.info("%s is queued already", title)
            continue
        after = []
        if run in prepare:
            command = tuple(prepare[run])
            if command not in shards:
                shards[command] = _job(f"{name}-shards", ["--nodes=1"], f"--wrap={_line(command)}")
            after = [f"--dependency=afterok:{shards[command]}"]
        run.workdir.mkdir(parents=True, exist_ok=True)
        log = f"--output={run.workdir}/slurm-%j.log"
        jobs.append(
            _job(
                title,
                [*after, log, *shlex.split(options)],
                *(str(SCRIPT), *run.arguments, f"--workdir={run.workdir}"),
                after=" ".join(VERBS[1:]),
            )
        )
        logger.info("%s is job %s", title, jobs[-1])
    if jobs:
        after = [f"--dependency=afterany:{':'.join(jobs)}", "--nodes=1"]
        logger.info(
            "the report is job %s", _job(f"{name}-report", after, f"--wrap={_line(report)}")
        )
    return jobs


def _job(title: str, options: Sequence[str], *command: str, after: str = "") -> str:
    said = _call("sbatch", "--parsable", f"--job-name={title}", *options, *command, after=after)
    return said.strip().partition(";")[0]  # a cluster's name may follow


def _line(command: Sequence[str]) -> str:
    """As a shell line for `--wrap`, in the environment we run in."""
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"


def _call(*command: str, after: str = "") -> str:
    environment = os.environ | ({"BHSD_AFTER": after} if after else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def python(module: str, *arguments: str) -> list[str]:
    """A command of this environment."""
    return [sys.executable, "-m", module, *arguments]
