"""A series of runs: each from training to report in its own folder, resumed where it stopped.

What is finished is not run again; a run that fails is named and the others go on. Every verb is a
process of its own, so that none takes the series down with it. Where a machine has several GPUs, as
many runs go on side by side, each on its own.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from bhsd_jax import fields, overrides
from bhsd_jax.experiments.children import Call, Stopped, running
from bhsd_jax.experiments.places import Place
from bhsd_jax.platform import cluster, files, locks
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings, as_saved_today
from bhsd_jax.train import checkpoint_files

logger = logging.getLogger(__name__)

VERBS = ("train", "predict", "evaluate", "report")
LOG, FAILED = "log.txt", "failed.json"  # in a run's folder; jobs of Slurm leave the second as well
# Fields a run may be resumed with other values of: where things lie and how fast they go, ...
_FREE = (
    *("data.root", "data.processes", "preprocess.shards", "preprocess.processes", "mesh", "report"),
    *("input.threads", "input.buffer", "input.cache_mb", "train.log_every", "train.remat"),
    *("predict.overwrite", "predict.show_ids"),
)
_AFTER = ("infer", "predict", "evaluate")  # ... and what is done with a trained network


@dataclass(frozen=True)
class Trial:
    """One training, with the prediction, evaluation and report that follow."""

    row: str
    seed: int
    workdir: Path
    arguments: tuple[str, ...]  # of the command line: --config and its overrides
    config: Settings = field(repr=False, compare=False)  # what they resolve to

    @property
    def name(self) -> str:
        """Row and seed, for messages and tables."""
        return f"{self.row}, seed {self.seed}"

    def command(self, verb: str, workdir: Path | None = None) -> list[str]:
        """The command line of one verb, as a list of words."""
        where = f"--workdir={workdir or self.workdir}"
        return [sys.executable, "-m", "bhsd_jax.main", verb, *self.arguments, where]


@dataclass(frozen=True)
class Failure:
    """A trial that did not finish, and why."""

    run: Trial
    reason: str  # one line, for the terminal: it may name patients and folders of this machine
    verb: str = ""  # that failed; empty: the trial was refused before one began
    log: str = LOG  # that says why, in the run's folder; empty: it lies elsewhere

    def on_page(self, out: Path) -> str:
        """The same for a page in the folder `out`: which verb, and which file says why."""
        if not self.verb:
            return "refused before it began; the terminal said why"
        where = os.path.relpath(self.run.workdir / self.log, out) if self.log else "the job's log"
        return f"{self.verb} failed; {where} says why"


def resolve(arguments: Sequence[str]) -> Settings:
    """The config that `--config=FILE:WORDS --config.field=value ...` stand for.

    Raises:
        ValueError: If the file, a word, a field or a value is not accepted.
    """
    values = flags.FlagValues()
    overrides.define_config(values, ["", *arguments])
    try:
        values(["", *arguments])
        config = Settings.of(values["config"].value)  # a file that cannot be read shows here
    except flags.Error as error:  # holds the traceback of a config file that refused
        reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{type(error).__name__}: {' '.join(map(str, error.args))}"
    else:
        return config
    raise UserError(f"{shlex.join(arguments)}: {reason}")


def plain(config: Settings) -> dict:
    """The config as JSON values, which is how `train` writes it into a run folder."""
    return json.loads(json.dumps(config.to_dict()))


def _saved(path: Path) -> dict:
    """The config of a run folder.

    Raises:
        ValueError: If it is damaged.
    """
    remedy = "copy the one in its last checkpoint back, or delete the folder"
    return files.read_json(path, as_saved_today, remedy=remedy)


def is_finished(run: Trial) -> bool:
    """Whether the folder holds the results of this very config, trained to the last step.

    Raises:
        ValueError: If it holds a training of another config; names the fields. If it is damaged.
    """
    saved = run.workdir / "config.json"
    if not saved.is_file():
        return False
    changed = list(fields.differences(_saved(saved), plain(run.config)))
    changed = [text for text in changed if not _under(text, _FREE)]
    other = [text for text in changed if not _under(text, _AFTER)]
    if other:
        raise UserError(
            f"{run.workdir} holds a run of another config: {', '.join(other[:4])}"
            f"{' ...' if len(other) > 4 else ''}; choose another --out, or delete the folder"
        )
    summary = run.workdir / "summary.json"
    if changed or not is_trained(run) or not summary.is_file():
        return False
    return summary.stat().st_mtime_ns >= saved.stat().st_mtime_ns


def finished(runs: Sequence[Trial]) -> list[Trial]:
    """Those that are finished; a folder that holds another config is as good as none here."""
    found = []
    for run in runs:
        with contextlib.suppress(UserError):
            if is_finished(run):
                found.append(run)
    return found


def is_running(run: Trial) -> bool:
    """Whether somebody is at work on it: this call, another one, or who trains it otherwise."""
    return any(locks.is_held(run.workdir / name) for name in (locks.SERIES, locks.TRAINING))


def is_trained(run: Trial) -> bool:
    """Whether the checkpoint of the last step is on disk."""
    return checkpoint_files.is_saved(run.workdir / "checkpoints", run.config.train.steps)


def perform(
    runs: Sequence[Trial],
    after: Callable[[Sequence[Failure]], object] = lambda _: None,
    places: Sequence[Place] = (Place(),),
) -> list[Failure]:
    """Runs the unfinished trials, one after the other in each place; returns the failures.

    Trials that are running, in another call or a job, are left to that.

    `after` is called with the failures so far whenever a run has ended.

    Raises:
        Stopped: On SIGTERM, or if a training was asked to stop; all runs have saved.
    """
    failures: list[Failure] = []
    free = list(places)
    waiting = list(enumerate(runs, start=1))
    working: dict[Future[Failure | None], tuple[Trial, Place, str]] = {}
    with running() as children, ThreadPoolExecutor(len(places)) as pool:
        try:
            while waiting or working:
                while free and waiting:
                    index, run = waiting.pop(0)
                    place, what = free.pop(0), f"run {index} of {len(runs)}, {run.name}"
                    call = children.call(place, f"{run.row} s{run.seed}: " if places[1:] else "")
                    working[pool.submit(_settle, run, what, place, call)] = run, place, what
                done, _ = wait(working, return_when=FIRST_COMPLETED)
                for future in done:
                    _, place, what = working.pop(future)
                    free.append(place)
                    failure = future.result()
                    if failure:
                        failures.append(failure)
                        logger.error("%s failed: %s", what, failure.reason)
                    after(failures)
        except BaseException:
            children.stop()  # the pool waits for them
            raise
    return failures


def known_failures(runs: Sequence[Trial], fresh: Sequence[Failure] = ()) -> list[Failure]:
    """These failures and, of other trials that are not finished, those noted in their folders."""
    told = {failure.run for failure in fresh}
    found = list(fresh)
    for run in runs:
        noted = files.recall_json(run.workdir / FAILED, keys=("verb", "log"), remove=False)
        if noted is None or run in told or noted["verb"] not in VERBS:
            continue
        with contextlib.suppress(UserError):  # what lies there is another config's
            if not is_finished(run):
                log = Path(str(noted["log"])).name
                found.append(Failure(run, f"{noted['verb']}: failed earlier", noted["verb"], log))
    return found


def _settle(run: Trial, what: str, place: Place, call: Call) -> Failure | None:
    """Runs what is not finished of a run; its failure, if it fails."""
    try:
        finished = is_finished(run)
    except UserError as error:
        return Failure(run, str(error))
    if finished:
        logger.info("%s is finished", what)
        return None
    run.workdir.mkdir(parents=True, exist_ok=True)
    with locks.held(run.workdir / locks.SERIES) as ours:
        if not ours or locks.is_held(run.workdir / locks.TRAINING):
            logger.warning("%s is running in another call or job, which is left to it", what)
            return None
        where = f" on {place.text}" if place.environment or place.prefix else ""
        logger.info("%s begins%s", what, where)
        return _one(run, call)


def is_prepared(run: Trial, folder: Path) -> bool:
    """Whether the shards are complete; those without refused scans only where that is allowed.

    Args:
        run: Whose shards they are.
        folder: Where `preprocess` lists the scans that it refused.
    """
    refused = (folder / "skipped.csv").is_file() and not run.config.preprocess.allow_skipped
    return (Path(run.config.preprocess.shards) / "index.json").is_file() and not refused


def prepare(run: Trial, folder: Path) -> None:
    """Preprocesses the data of a trial, unless its shards are complete.

    Raises:
        ValueError: If that fails; says why.
        Stopped: On SIGTERM.
    """
    if is_prepared(run, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    waiting = f"{folder}: another call makes the shards; waiting for it"
    with locks.held(folder / locks.SERIES, waiting=waiting):
        if is_prepared(run, folder):
            return
        with running() as children:
            code, last = children.call()(run.command("preprocess", folder), folder / LOG)
    if code:
        raise UserError(f"preprocess failed, no run was started: {last}")


def train(run: Trial) -> None:
    """Trains a network that others begin with, unless it is trained.

    Raises:
        ValueError: If that fails; says why.
        Stopped: On SIGTERM; it has saved.
    """
    if is_trained(run):
        return
    run.workdir.mkdir(parents=True, exist_ok=True)
    waiting = f"{run.workdir}: another call trains this network; waiting for it"
    with locks.held(run.workdir / locks.SERIES, waiting=waiting):
        if is_trained(run):
            return
        with running() as children:
            failure = _verbs(run, VERBS[:1], children.call())
    if failure:
        raise UserError(f"{run.name} failed, no run was started: {failure.reason}")


def _one(run: Trial, call: Call) -> Failure | None:
    """Verb after verb; its failure, if one fails."""
    saved = run.workdir / "config.json"
    same = saved.is_file() and _saved(saved) == plain(run.config)
    return _verbs(run, VERBS[1:] if same and is_trained(run) else VERBS, call)


def _verbs(run: Trial, verbs: Sequence[str], call: Call) -> Failure | None:
    """These verbs in turn; the failure, if one fails, which is noted in the run's folder."""
    (run.workdir / FAILED).unlink(missing_ok=True)
    for verb in verbs:
        begun = time.monotonic()
        code, last = call(run.command(verb), run.workdir / LOG)
        _add_time(run.workdir / "wall.json", verb, time.monotonic() - begun)
        if call.cpu_s is not None:
            _add_time(run.workdir / "cpu.json", verb, call.cpu_s)
        if code == cluster.TRY_AGAIN:
            raise Stopped(f"{run.name} was asked to stop and has saved")
        if code:
            died = f"{verb}: ended by {signal.Signals(-code).name}" if code < 0 else ""
            reason = died or (last if last.startswith(f"{verb}: ") else f"{verb}: {last}")
            with contextlib.suppress(OSError):  # a full disk may be why it failed
                files.write_json(run.workdir / FAILED, {"verb": verb, "log": LOG})
            return Failure(run, reason, verb)
    return None


def _add_time(path: Path, verb: str, seconds: float) -> None:
    """Adds up what all attempts at a verb took."""
    times = files.recall_json(path, remove=False) or {}
    files.write_json(path, times | {verb: round(times.get(verb, 0.0) + seconds, 1)})


def share_programs(folder: Path) -> None:
    """Sets a common compilation cache for all trials, unless the user has set one."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.absolute()))


def _under(text: str, names: Sequence[str]) -> bool:
    """Whether a difference `field (old -> new)` lies in one of the named parts."""
    path = text.partition(" ")[0]
    return any(path == name or path.startswith(f"{name}.") for name in names)
