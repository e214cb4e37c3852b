"""Hands a series to Slurm: one job per run, after the shards and before the report."""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bhsd_jax.experiments.queue import VERBS, Trial
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

SCRIPT = Path("launch/slurm.sh")
_SINGLE = ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1")


def submit(
    name: str,
    runs: Sequence[Trial],
    prepare: Mapping[Trial, Sequence[str]],
    report: Sequence[str],
    options: str,
    out: Path,
) -> list[str]:
    """Submits the trials that are not queued yet; returns their job ids.

    Args:
        name: Of the series; jobs are named after it and, as others may be called alike, its folder.
        runs: Those that are not finished.
        prepare: The command that makes a run's shards, for runs whose shards are not there.
        report: The command that writes the report, whatever became of the runs.
        options: For `sbatch`, of every job: account, partition, ... The jobs of shards and report
            stay on one node, with the GPUs that the options ask for, as some partitions demand.
        out: Folder of the series, for logs.

    Raises:
        ValueError: If Slurm is not there or refuses; says its words.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: no `sbatch` on the PATH; run on a login node, or without it")
    given = shlex.split(options)
    name = f"{name}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:6]}"
    listed = _call("squeue", "--me", "--noheader", "--format=%j").splitlines()
    queued = {title.strip() for title in listed}
    shards: dict[tuple[str, ...], str] = {}
    jobs = []
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        title = f"{name}-{run.row}-s{run.seed}"
        if title in queued:
            logger.info("%s is queued already", title)
            continue
        after = []
        if run in prepare:
            command = tuple(prepare[run])
            if command not in shards:
                single = ["--cpus-per-task=8", *given, *_SINGLE, _log(out, "shards")]
                shards[command] = _job(f"{name}-shards", single, f"--wrap={_line(command)}")
                logger.info("%s-shards is job %s", name, shards[command])
            # Without its shards a run would wait for ever.
            after = [f"--dependency=afterok:{shards[command]}", "--kill-on-invalid-dep=yes"]
        run.workdir.mkdir(parents=True, exist_ok=True)
        # Of variables a job has those that the user's options leave it.
        verbs = f"--after={' '.join(VERBS[1:])}"
        words = (str(SCRIPT), verbs, *run.arguments, f"--workdir={run.workdir}")
        job = _job(title, [*given, *after, _log(run.workdir, "")], *words)
        jobs.append(job)
        logger.info("%s is job %s", title, job)
    if jobs:
        single = [*given, *_SINGLE, _log(out, "report"), f"--dependency=afterany:{':'.join(jobs)}"]
        made = _job(f"{name}-report", single, f"--wrap={_line(report)}")
        logger.info("the report is job %s", made)
    return jobs


def _log(folder: Path, title: str) -> str:
    """Where a job's words go; `%` is Slurm's own sign there."""
    path = str(folder).replace("%", "%%")
    return f"--output={path}/slurm-{f'{title}-' if title else ''}%j.log"


def _job(title: str, options: Sequence[str], *command: str) -> str:
    said = _call("sbatch", "--parsable", f"--job-name={title}", *options, *command)
    return said.strip().partition(";")[0]  # a cluster's name may follow


def _line(command: Sequence[str]) -> str:
    """As a shell line for `--wrap`, in the environment we run in."""
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"


def _call(*command: str) -> str:
    # In a job of its own right: what Slurm told the one we may be called from is not for it.
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in kept
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
