"""Few masks with and without unlabeled scans: what `launch/study_hippocampus` runs."""

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bhsd_jax.experiments import launch, queue, study
from bhsd_jax.experiments.queue import Stopped, Trial
from bhsd_jax.experiments.study import Heading, Study
from bhsd_jax.experiments.turned import write_coronal
from bhsd_jax.platform import cluster, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.comparison import Line
from bhsd_jax.report.page import Page, Section
from bhsd_jax.report.points import NONE, duration, interval, signed, with_sd
from bhsd_jax.report.result_tables import Table

logger = logging.getLogger(__name__)

_TURNED = (16, 12, 12)  # the patch of the table, where slices are coronal planes


def cli(arguments: Sequence[str]) -> int:
    """Runs the unfinished trials for every number of masks, then writes one table of all.

    Raises:
        ValueError: If an option, a row or a number of masks is not accepted.
    """
    options = _parser().parse_args(arguments)
    if options.slurm is not None:
        raise UserError("study_hippocampus: runs on this machine; --slurm is for the tables")
    paths = launch.enter_home(options, "out", "shards", "data")
    table = importlib.import_module("bhsd_jax.configs.hippocampus").TABLE
    if options.plane == "coronal":
        options.out = options.out / "coronal"
        options.data = write_coronal(Path(options.data), options.out / "scans")
    again = [sys.executable, "-m", "bhsd_jax.experiments.hippocampus", *arguments, *paths]
    numbers = launch.seeds(options.masks, "--masks")
    studies = {masks: make_study(table, options, masks) for masks in numbers}
    code = 0
    with _time_limit(options.minutes):
        try:
            if not (options.dry_run or options.report_only):
                _pretrain(table, options)
            for what in studies.values():
                code = launch.launch(what, options, again) or code
                if code == cluster.TRY_AGAIN:
                    break
        except Stopped as reason:
            logger.warning("%s; the same command goes on from here", reason)
            code = cluster.TRY_AGAIN
    if not options.dry_run:
        write(studies, options.out)
    return code


def make_study(table: Any, options: argparse.Namespace, masks: int) -> Study:
    """The trials with so many masks, seed by seed, so that every row soon has a first result.

    Raises:
        ValueError: If a row is not one of the table's; lists them.
    """
    tested = [row for row in table.rows if row != table.pretraining]
    rows = options.rows.split(",") if options.rows else tested
    if unknown := [row for row in rows if row not in tested]:
        raise UserError(f"--rows: no {', '.join(unknown)}; there are {', '.join(tested)}")
    out = options.out / f"{masks}-masks"
    trials = [
        _trial(table, row, seed, options, out, masks)
        for seed in launch.seeds(options.seeds)
        for row in tested
        if row in rows
    ]
    return Study(
        title=f"{table.title}, {masks} of them",
        out=out,
        rows={row: Heading(table.rows[row].title) for row in tested if row in rows},
        runs=trials,
        baseline=table.baseline if table.baseline in rows else "",
        notes=table.notes,
        smoke=options.smoke,
    )


def _trial(
    table: Any, row: str, seed: int, options: argparse.Namespace, out: Path, masks: int | None
) -> Trial:
    words = [row, f"seed={seed}", *(["smoke"] if options.smoke else [])]
    given = [f"--config=configs/hippocampus.py:{','.join(words)}"]
    given += [] if masks is None else [f"--config.split.labeled={masks}"]
    given += [f"--config.data.root={options.data}"]
    if row in table.pretrained:
        given.append(f"--config.train.init_from={_pretraining(options, seed)}")
        given.append("--config.train.init_leave=('head',)")
    given += [f"--config.input.patch={_TURNED}"] if options.plane == "coronal" else []
    given += launch.overrides(options.override, {"split.labeled": "--masks"})
    shards = options.shards or str(options.out / "shards")
    return launch.make_run(row, seed, given, out, shards)


def _pretraining(options: argparse.Namespace, seed: int) -> Path:
    return options.out / "pretraining" / f"seed{seed}"


def _pretrain(table: Any, options: argparse.Namespace) -> None:
    """Trains what some of the wanted rows begin with; once for any number of masks."""
    rows = options.rows.split(",") if options.rows else list(table.rows)
    if not set(rows) & set(table.pretrained):
        return
    queue.share_programs(options.out / ".programs")
    for seed in launch.seeds(options.seeds):
        out = _pretraining(options, seed).parent
        trial = _trial(table, table.pretraining, seed, options, out, None)
        trial = Trial(trial.row, seed, out / f"seed{seed}", trial.arguments, trial.config)
        queue.prepare(trial, options.out)
        queue.train(trial)


def write(studies: dict[int, Study], out: Path) -> None:
    """Writes report.md and report.html: all rows beside all numbers of masks."""
    rows: dict[str, list[tuple[int, Line]]] = {}
    for masks, what in studies.items():
        for line in study.compare(what, queue.known_failures(what.runs)).lines:
            rows.setdefault(line.title, []).append((masks, line))
    cells = [(title, *_cells(lines, masks)) for title, lines in rows.items() for masks in studies]
    columns = ("", "masks", "Dice", "against masks alone", "95 % interval, paired", "seeds")
    words = (
        "Dice in percent, mean of the classes; mean and standard deviation over seeds. The "
        "difference is that of equal seeds, its interval over patients. Curves, classes and "
        "commands are in the report of each number of masks."
    )
    table = Table((*columns, "above in", "CPU time of a run"), tuple(cells))
    title = next(iter(studies.values())).title.partition(",")[0]
    page = Page(title, "", (), (Section("All numbers of masks", (words, table)),))
    for name, text in (("report.md", page.to_markdown()), ("report.html", page.to_html())):
        files.write_text(out / name, text)
    logger.info("%s", out / "report.html")


def _cells(lines: Sequence[tuple[int, Line]], masks: int) -> tuple[str, ...]:
    line = next((line for count, line in lines if count == masks), None)
    if line is None or not line.found:
        return (str(masks), line.state if line else "not run", *[NONE] * 5)
    dice = with_sd(line.found["nnunet"]["mean"])
    seeds, cpu = str(len(line.seeds)), duration(line.cost.get("cpu_s"))
    if line.against is None:
        return str(masks), dice, NONE, NONE, seeds, NONE, cpu
    above = f"{sum(gap > 0 for gap in line.gaps)} of {len(line.gaps)}"
    ours = line.against
    return str(masks), dice, signed(ours.mean), interval(ours, sign=True), seeds, above, cpu


@contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
    """Stops the series after so long, as SIGTERM would: trainings save, reports are written."""

    def stop(*_: object) -> None:
        raise Stopped(f"{minutes:g} minutes are over")

    if minutes is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/study_hippocampus", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("data", help="folder of MSD Task04, with dataset.json")
    parser.add_argument("--masks", default="8", help="numbers of masks, such as 4,8,16; default 8")
    parser.add_argument("--rows", help="separated by commas; default all")
    parser.add_argument(
        "--plane",
        choices=("axial", "coronal"),
        default="axial",
        help="which planes are slices, of which slice labels tell; coronal ones from a turned copy",
    )
    parser.add_argument("--smoke", action="store_true", help="four steps a run")
    parser.add_argument("--minutes", type=float, help="stop after so long; resumable")
    launch.add_options(parser)
    parser.set_defaults(out=Path("runs/hippocampus"))
    return parser


if __name__ == "__main__":
    launch.main(cli)
