"""What the programs in `launch/` share: options, shards, running or submitting, the report."""

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bhsd_jax import command_line
from bhsd_jax.experiments import places, queue, slurm, study
from bhsd_jax.experiments.places import Place
from bhsd_jax.experiments.queue import Failure, Stopped, Trial
from bhsd_jax.experiments.study import Study
from bhsd_jax.platform import cluster, faults
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings

logger = logging.getLogger(__name__)

_HOME = Path(__file__).parents[2]  # the repository's root, where `configs/` lies
_PLACES = ("root", "processes", "shards", "allow_skipped")  # do not change what a shard holds
_SEEDS: Mapping[str, str] = {"seed": "--seeds"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command-line options that all launch scripts have."""
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report")
    parser.add_argument(
        *("--override", "-o"),
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of every run's config; may be given often",
    )
    parser.add_argument("--shards", help="folder of shards made before; default: made here, once")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their state")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs side by side; default one per GPU of this machine, on CPUs 1",
    )
    parser.add_argument(
        "--slurm",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help='submit the runs; OPTIONS go to every sbatch, as in --slurm="--partition=gpu"',
    )


def seeds(text: str, option: str = "--seeds") -> list[int]:
    """Reads seeds, or other whole numbers, separated by commas.

    Raises:
        ValueError: If they are not.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option}: needs whole numbers like 0,1,2; got {text!r}")
    return sorted({int(part) for part in parts})


def overrides(fields: Sequence[str], decided: Mapping[str, str] = {}) -> tuple[str, ...]:
    """Turns `field=value` words into flags of a verb.

    Args:
        fields: The words.
        decided: Fields that the program sets for each run, and what says to what, beside the seed.
            Of two values one would be dropped unsaid: all runs of a row might have one seed.

    Raises:
        ValueError: If one has no value, or is of a field that the program sets.
    """
    options = {**_SEEDS, **decided}
    for text in fields:
        if "=" not in text.strip("="):
            raise UserError(f"--override: needs FIELD=VALUE, like train.steps=1000; got {text!r}")
        name = text.partition("=")[0].removeprefix("config.")
        if name in options:
            raise UserError(
                f"{text}: {name} is set for each run by {options[name]}; say it there, and leave "
                "this out"
            )
    return tuple(f"--config.{text.removeprefix('config.')}" for text in fields)


def make_run(row: str, seed: int, arguments: Sequence[str], out: Path, shards: str | None) -> Trial:
    """One trial, with its own run folder and the shards it shares with others.

    Where validation scans are tested it is the last checkpoint, unless the arguments name one: the
    best was chosen by these very scans, and its score is too good.

    Raises:
        ValueError: If the arguments do not resolve.
    """
    where = [f"--config.preprocess.shards={shards}"] if shards else []
    config = queue.resolve([*arguments, *where])
    named = any(word.startswith("--config.predict.checkpoint=") for word in arguments)
    if config.predict.split == "val" and config.predict.checkpoint == "best" and not named:
        arguments = (*arguments, "--config.predict.checkpoint=last")
    if not config.preprocess.shards:
        where = [f"--config.preprocess.shards={data_folder(config, out) / 'shards'}"]
    if not config.data.get("root"):
        where.append(f"--config.data.root={data_folder(config, out) / 'synthetic'}")
    arguments = (*arguments, *where)
    return Trial(row, seed, out / row / f"seed{seed}", arguments, queue.resolve(arguments))


def data_folder(config: Settings, out: Path) -> Path:
    """Folder of the shards of a config; trials that need equal shards share one."""
    plain = queue.plain(config)
    used = [
        {k: v for k, v in plain[part].items() if k not in _PLACES}
        for part in ("data", "preprocess")
    ]
    root = "" if config.data["name"].startswith("synthetic.") else config.data["root"]
    digest = hashlib.sha256(json.dumps([root, used], sort_keys=True).encode()).hexdigest()
    return out / f"data-{digest[:8]}"


def report(what: Study, failures: Sequence[Failure]) -> int:
    """Writes the comparison of a study so far; returns how many of its runs have finished."""
    return sum(len(line.seeds) for line in study.write(what, failures).lines)


def launch(
    what: Study,
    options: argparse.Namespace,
    again: Sequence[str],
    write: Callable[[Study, Sequence[Failure]], int] = report,
    check: Callable[[Study], None] = lambda what: None,
) -> int:
    """Lists, submits or runs all trials and writes the report; returns the exit code.

    While another call or job runs some of them, it is the code for calling again.

    Args:
        what: The series.
        options: Of `add_options`.
        again: The command that was given, for the report's own job.
        write: Writes it, also between the runs, and says how many have finished.
        check: Refuses, once there are shards, what the series cannot be run on.
    """
    _say()
    if options.dry_run:
        return _list(what)
    if options.slurm is not None and not options.report_only:  # the report's own job has both
        if options.jobs is not None:
            raise UserError("--jobs: Slurm decides how many of its jobs run side by side")
        return _submit(what, options.slurm, again)
    failures: list[Failure] = []
    code = 0
    if not options.report_only:
        queue.share_programs(what.out / ".programs")
        try:
            where = _places(what.runs, options.jobs)
            _prepare(what.runs, what.out)
            check(what)
            failures = queue.perform(what.runs, partial(_so_far, what, write), where)
        except Stopped as reason:
            logger.warning("%s; the same command goes on from here", reason)
            code = cluster.TRY_AGAIN
    known = queue.known_failures(what.runs, failures)
    finished = write(what, known)
    elsewhere = [] if options.report_only else list(filter(queue.is_running, what.runs))
    for run in elsewhere:
        logger.warning("running in another call or job: %s (%s)", run.name, run.workdir)
    for failure in known:
        logger.error("failed: %s: %s (%s)", failure.run.name, failure.reason, failure.run.workdir)
    logger.info("%d of %d runs finished: %s", finished, len(what.runs), what.out / "report.html")
    return code or (1 if failures else cluster.TRY_AGAIN if elsewhere else 0)


def main(program: Callable[[Sequence[str]], int]) -> None:
    """Runs a program of the command line; what a user can mend is one line, not a traceback."""
    try:
        sys.exit(program([command_line.at_home(word) for word in sys.argv[1:]]))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it
    except (UserError, OSError) as error:
        if not (told := _in_words(error)):
            raise
        sys.exit(f"{Path(sys.argv[0]).stem}: {told}")


def _in_words(error: UserError | OSError) -> str | None:
    """One line of an error, as the verbs say it; None where only a traceback tells."""
    if isinstance(error, OSError) and error.errno is not None:
        return faults.explain(error)
    return str(error) if isinstance(error, UserError | FileNotFoundError) else None


def find_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the file of every `--config` named as it is found from `enter_home` on.

    A config is given as a verb takes it, `FILE:WORDS` or `EXPERIMENT:WORDS`, also after `NAME=`.

    Raises:
        ValueError: If there is no such config; lists the experiments.
    """
    found = list(arguments)
    for index, word in enumerate(arguments):
        flag, equals, given = word.partition("=")
        if flag == "--config" and equals:
            found[index] = f"--config={_find_config(given)}"
        elif index and arguments[index - 1] == "--config":
            found[index] = _find_config(word)
    return found


def _find_config(given: str) -> str:
    name, equals, config = given.partition("=")
    if not (equals and name.isidentifier()):
        name, equals, config = "", "", given
    try:
        file, colon, words = command_line.find_config(config).partition(":")
    except command_line.UsageError as error:
        raise UserError(str(error)) from error
    if Path(file).name == "from_run.py" and words:
        words = _from_home(words)  # the folder of a run
    return f"{name}{equals}{_from_home(file)}{colon}{words}"


def _from_home(path: str) -> str:
    """A path of the present folder, relative to the root of the repository where it lies there."""
    whole = Path(path).absolute()
    inside = (_HOME / "configs").is_dir() and whole.is_relative_to(_HOME)
    return str(whole.relative_to(_HOME) if inside else whole)


def enter_home(options: argparse.Namespace, *paths: str) -> list[str]:
    """Changes to the repository's root, so that relative paths of configs are found.

    Options of these names are paths; relative ones keep their meaning. Returns their flags as they
    are to be given at the root.
    """
    here = Path.cwd()
    given = [(name, value) for name in paths if (value := getattr(options, name))]
    if here != _HOME and (_HOME / "configs").is_dir():
        given = [(name, type(value)(here / value)) for name, value in given]
        for name, value in given:
            setattr(options, name, value)
        os.chdir(_HOME)
    return [f"--{name}={value}" for name, value in given]


def _say() -> None:
    """Progress to standard error, as the verbs do."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("bhsd_jax")
    root.handlers = [handler]
    root.setLevel(logging.INFO)


def _so_far(
    what: Study, write: Callable[[Study, Sequence[Failure]], int], failures: Sequence[Failure]
) -> None:
    """The report between runs; what is wrong with it must not stop them."""
    try:
        write(what, queue.known_failures(what.runs, failures))
    except (UserError, OSError) as error:  # a run may have lost a file, a disk may be full
        logger.warning("no report yet: %s", _in_words(error) or error)


def _state(run: Trial) -> str:
    try:
        if queue.is_finished(run):
            return "finished"
    except UserError as error:
        return f"refused: {error}"
    if queue.is_running(run):
        return "running"
    return "begun" if (run.workdir / "checkpoints").is_dir() else "new"


def _list(what: Study) -> int:
    for run in what.runs:
        command = shlex.join(["bhsd", "train", *run.arguments, f"--workdir={run.workdir}"])
        sys.stdout.write(f"# {run.name}: {_state(run)}\n{command}\n")
    return 0


def _places(runs: Sequence[Trial], jobs: int | None) -> Sequence[Place]:
    """One per GPU, unless it was said how many, but no more than there are runs."""
    todo = max(1, sum(_state(run) in ("new", "begun") for run in runs))
    wanted = max(1, len(places.gpus())) if jobs is None else jobs
    places.share(wanted, option="--jobs")  # refuses what cannot be
    count = min(todo, wanted)
    where = places.share(count, option="--jobs")
    if count > 1:
        logger.info("%d runs side by side: %s", count, ", ".join(place.text for place in where))
    for gpu in places.idle(count):
        logger.warning("GPU %s is idle: %d runs get as many GPUs each", gpu, count)
    return where


def _prepare(runs: Sequence[Trial], out: Path) -> None:
    """The shards of all runs that are not finished."""
    for shards, run in _by_shards(runs).items():
        queue.prepare(run, _shards_workdir(shards, run, out))


def _by_shards(runs: Sequence[Trial]) -> Mapping[str, Trial]:
    found: dict[str, Trial] = {}
    for run in runs:
        if _state(run) in ("new", "begun"):
            found.setdefault(run.config.preprocess.shards, run)
    return found


def _shards_workdir(shards: str, run: Trial, out: Path) -> Path:
    """Where the integrity table goes: beside the shards."""
    return Path(shards).parent if Path(shards).name == "shards" else data_folder(run.config, out)


def _submit(what: Study, options: str, again: Sequence[str]) -> int:
    states = {run: _state(run) for run in what.runs}
    todo = [run for run, state in states.items() if state in ("new", "begun")]
    refused = {run: state for run, state in states.items() if state.startswith("refused: ")}
    first = _by_shards(todo)
    prepare = {}
    for run in todo:
        shards = run.config.preprocess.shards
        folder = _shards_workdir(shards, run, what.out)
        if not queue.is_prepared(run, folder):
            prepare[run] = first[shards].command("preprocess", folder)
    for run in (run for run, state in states.items() if state == "running"):
        logger.info("%s is running already", run.name)
    logger.info("%d of %d runs are to be done", len(todo), len(what.runs))
    slurm.submit(what.out.name, todo, prepare, [*again, "--report-only"], options, what.out)
    for run, state in refused.items():
        logger.error("failed: %s: %s", run.name, state.removeprefix("refused: "))
    return 1 if refused else 0
