"""Cross-validation of one config or several, and what it says is best: what `launch/folds` runs."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.experiments import cross_validation, launch, queue
from bhsd_jax.experiments.cross_validation import Candidate
from bhsd_jax.experiments.queue import Failure, Trial
from bhsd_jax.experiments.study import Heading, Study
from bhsd_jax.metrics import postprocessing, summary
from bhsd_jax.metrics.postprocessing import Tally
from bhsd_jax.platform import files, machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.platform.workers import Workers
from bhsd_jax.report.page import Page, Section, notice
from bhsd_jax.report.points import points
from bhsd_jax.report.result_tables import Table
from bhsd_jax.shards.store import Shards

logger = logging.getLogger(__name__)

# Fields that are set for each run, and what says to what.
_DECIDED = {
    "split.fold": "--folds",
    "predict.split": "launch/folds, to the validation cases of its fold",
    "evaluate.split": "launch/folds, to the validation cases of its fold",
}


def cli(arguments: Sequence[str]) -> int:
    """Trains and scores the unfinished folds, then chooses; returns the exit code.

    Raises:
        ValueError: If an option is not accepted.
    """
    arguments = launch.find_configs(arguments)
    options = _parser().parse_args(arguments)
    paths = launch.enter_home(options, "out", "shards")
    again = [sys.executable, "-m", "bhsd_jax.experiments.folds", *arguments, *paths]
    what = make_study(options)
    write = partial(conclude, ensembles=options.ensembles)
    return launch.launch(what, options, again, write, require_folds)


def make_study(options: argparse.Namespace) -> Study:
    """The folds of every config, fold by fold, so that all configs soon have a first one.

    As in nnU-Net, it is the last checkpoint that predicts them, unless an override names another.

    Raises:
        ValueError: If two configs have one name, or there is more than one seed.
    """
    seeds = launch.seeds(options.seeds)
    names = [_name(config) for config in options.config]
    twice = {name for name in names if names.count(name) > 1}
    if twice or len(seeds) > 1:
        raise UserError(
            f"--config: two are called {twice.pop()}; put NAME= before each"
            if twice
            else f"--seeds: cross-validation takes one; got {options.seeds}"
        )
    options.out = options.out or Path("runs") / "folds"
    fields = launch.overrides(options.override, _DECIDED)
    several = len(names) > 1 and options.ensembles
    runs = []
    for fold in launch.seeds(options.folds, "--folds"):
        for name, given in zip(names, options.config, strict=True):
            arguments = (f"--config={given.removeprefix(f'{name}=')}", *fields)
            arguments += (f"--config.seed={seeds[0]}", f"--config.split.fold={fold}")
            arguments += ("--config.predict.split=val", "--config.evaluate.split=val")
            arguments += ("--config.predict.probabilities=True",) * several
            row = f"{name}/fold{fold}"
            runs.append(launch.make_run(row, seeds[0], arguments, options.out, options.shards))
    title = f"Cross-validation of {', '.join(names)}"
    return Study(title, options.out, {run.row: Heading(run.row) for run in runs}, runs)


def require_folds(what: Study) -> None:
    """Refuses several folds of a data set that says itself which cases validate.

    Raises:
        UserError: Before anything is trained: all folds would be one and the same training.
    """
    folds = {run.config.split.fold for run in what.runs if run.config.split.fold >= 0}
    if len(folds) < 2:
        return
    for folder in sorted({run.config.preprocess.shards for run in what.runs}):
        if not (Path(folder) / "index.json").is_file():
            continue  # all that was trained on them has finished, and they were removed
        marked = [entry for entry in Shards(folder).entries if entry.split == "val"]
        if marked:
            raise UserError(
                f"{folder}: the data set says which {len(marked)} cases validate, so that folds "
                f"{', '.join(map(str, sorted(folds)))} would be one training; give --folds=0, or "
                "prepare the data set without its validation part"
            )


def conclude(what: Study, failures: Sequence[Failure] = (), *, ensembles: bool = True) -> int:
    """Writes report.html, report.md and best.json; returns how many runs have finished.

    A config counts once all its folds are there. The best has the highest mean Dice over the
    classes, of all validation cases together; of equals the first, and a single config before two.
    Classes in no mask are left out of the mean. What is not defined is null in best.json.

    Source: nnU-Net v2.8.1, `find_best_configuration`.
    """
    finished = queue.finished(what.runs)
    single = []
    for name, folds in _by_config(what.runs).items():
        if all(run in finished for run in folds):
            single.append(cross_validation.candidate(name, folds))
    checkpoint = what.runs[0].config.predict.checkpoint
    found: dict[str, Any] = {"scores": {}, "best": None, "checkpoint": checkpoint}
    if single:
        found |= _choose([*single, *(cross_validation.pairs(single) if ensembles else [])])
        files.write_json(what.out / "best.json", summary.without_nan(found))
        files.write_json(what.out / "postprocessing.json", found["postprocessing"])
    shown = _page(what, found, finished, failures)
    for name, text in (("report.html", shown.to_html()), ("report.md", shown.to_markdown())):
        files.write_text(what.out / name, text)
    return len(finished)


def _choose(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Scores of all, and of the best the runs and the postprocessing that helps."""
    with Workers(machine.cores()) as workers:
        counts = [cross_validation.tally(one, workers, ()) for one in candidates]
        left_out = _left_out(candidates, counts)
        scores = {
            one.name: cross_validation.mean_dice(count, one.classes, left_out)
            for one, count in zip(candidates, counts, strict=True)
        }
        # A mean is not defined where no mask has any class.
        best = max(candidates, key=lambda one: np.nan_to_num(scores[one.name]["mean"], nan=-1.0))
        trials = postprocessing.decide(
            partial(cross_validation.tally, best, workers), len(best.classes)
        )
        taken = [trial.rule for trial in trials if trial.taken]
        after = cross_validation.tally(best, workers, tuple(taken))
    # A cascade's second stage predicts first: only the first run is given label maps.
    cascade = {run.workdir for run in best.runs if run.config.preprocess.previous}
    runs = sorted((run.workdir for run in best.runs), key=lambda folder: folder not in cascade)
    return {
        "scores": scores,
        "in_no_mask": left_out,
        "best": best.name,
        "cases": len(best.cases),
        "runs": [str(folder) for folder in runs],
        "cascade": bool(cascade),
        "postprocessing": postprocessing.to_json(taken, best.classes),
        "tried": [
            {
                "keep_largest": [best.classes[index] for index in trial.rule],
                "before": trial.before,
                "after": trial.after,
                "taken": trial.taken,
            }
            for trial in trials
        ],
        "after_postprocessing": cross_validation.mean_dice(after, best.classes, left_out),
    }


def _left_out(candidates: Sequence[Candidate], counts: Sequence[Tally]) -> list[str]:
    """Classes over which no mean is taken, the same for all candidates; said if there are any."""
    pairs = zip(candidates, counts, strict=True)
    found = set().union(*(cross_validation.in_no_mask(count, one.classes) for one, count in pairs))
    if found:
        logger.warning("no mask has %s: left out of the mean Dice", ", ".join(sorted(found)))
    return sorted(found)


def _page(
    what: Study,
    found: Mapping[str, Any],
    finished: Sequence[Trial],
    failures: Sequence[Failure],
) -> Page:
    sections = []
    headline = [(f"{len(finished)} of {len(what.runs)}", "folds finished")]
    if found["best"]:
        best = found["scores"][found["best"]]["mean"]
        headline.append((points(best), f"Dice in percent of the best, {found['best']}"))
        sections = [_scores(found), _removal(found), _usage(what.out, found)]
    if failures:
        rows = tuple((failure.run.name, failure.on_page(what.out)) for failure in failures)
        sections.append(Section("What failed", (Table(("fold", "why"), rows),)))
    return Page(
        title=what.title,
        subtitle=_subtitle(
            found["checkpoint"], sorted({run.config.split.fold for run in what.runs})
        ),
        headline=tuple(headline),
        sections=tuple(sections),
        notice=notice(found["scores"].get(found["best"], ())),
    )


def _subtitle(checkpoint: str | int, folds: Sequence[int]) -> str:
    """Of which folds, which network was scored, and whether the cases themselves have chosen it.

    Of a data set's folds, which may be others than five, these need not be all.
    """
    which = f"{checkpoint} checkpoint"
    if checkpoint not in ("best", "last"):
        which = f"checkpoint of step {checkpoint}"
    listed = ", ".join(map(str, folds))
    words = (
        f"Of fold{'s' * (len(folds) > 1)} {listed}, every validation case was predicted by the "
        f"{which} of the fold not trained on it."
    )
    chosen = " These very cases chose it: the figures are too good." * (checkpoint == "best")
    return words + chosen


def _scores(found: Mapping[str, Any]) -> Section:
    classes = list(found["scores"][found["best"]])
    rows = [(name, *map(points, dice.values())) for name, dice in found["scores"].items()]
    words = f"Mean Dice in percent over {found['cases']} cases, by nnU-Net's convention."
    if found["in_no_mask"]:
        words += f" Left out of the mean, as no mask has them: {', '.join(found['in_no_mask'])}."
    return Section("Scores", (words, Table(("", *classes), tuple(rows))))


def _removal(found: Mapping[str, Any]) -> Section:
    rows = [
        (", ".join(one["keep_largest"]), points(one["before"]), points(one["after"]), taken)
        for one in found["tried"]
        for taken in ("taken" if one["taken"] else "left",)
    ]
    after = points(found["after_postprocessing"]["mean"])
    words = (
        "Keeping the largest component: of all classes together the mean Dice must rise and none "
        f"fall, of one class its own must rise. With what was taken the mean is {after}."
    )
    return Section(
        "Postprocessing", (words, Table(("classes", "before", "after", ""), tuple(rows)))
    )


def _usage(out: Path, found: Mapping[str, Any]) -> Section:
    # From the page's folder: no place of this machine is on it.
    first, *others = (os.path.relpath(run, out) for run in found["runs"])
    command = ["bhsd", "predict", first, "--images=FOLDER", "--out=LABELS"]
    if others:
        command.append(f"--predict.runs={','.join(others)}")
    if " + " not in found["best"]:
        command.append("--predict.combine=logits")  # as nnU-Net does with the folds of one config
    if found["postprocessing"]["keep_largest"]:
        command.append("--predict.postprocessing=postprocessing.json")
    words = (
        "All runs of the best together, where memory does for their networks one by one; called "
        "in the folder of this page."
    )
    if found["cascade"]:
        command.append("--predict.previous=PREVIOUS")
        words += (
            " PREVIOUS is a run of the first stage, or a folder of the label maps that all its "
            "folds together have predicted of the scans."
        )
    return Section("How to use it", (words, shlex.join(command)))


def _by_config(runs: Sequence[Trial]) -> Mapping[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for run in runs:
        found.setdefault(run.row.rpartition("/")[0], []).append(run)
    return found


def _name(config: str) -> str:
    """`NAME=` before the config, or that of its file."""
    name, equals, _ = config.partition("=")
    if equals and name.isidentifier():
        return name
    return Path(config.partition(":")[0]).stem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/folds", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="[NAME=]FILE:WORDS",
        help="as a verb takes it; may be given often",
    )
    parser.add_argument("--folds", default="0,1,2,3,4", help="default 0,1,2,3,4")
    parser.add_argument(
        "--no-ensembles",
        dest="ensembles",
        action="store_false",
        help="do not try the mean of every two configs",
    )
    launch.add_options(parser)
    parser.set_defaults(seeds="0")
    return parser


if __name__ == "__main__":
    launch.main(cli)
