"""From the folders of many runs to one comparison: figures over seeds, costs, what is missing."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax import __version__
from bhsd_jax.assemble.run import Run
from bhsd_jax.experiments import queue
from bhsd_jax.experiments.queue import Failure, Trial
from bhsd_jax.metrics import scores, summary
from bhsd_jax.metrics.seeds import OverSeeds, over_seeds, paired
from bhsd_jax.platform import files, step_log
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.comparison import Comparison, Line, page, scans_of
from bhsd_jax.report.page import save
from bhsd_jax.verbs.scoring import ANY
from bhsd_jax.volume import Plan

# The folders of an absolute path, where a value or a part of one begins.
_FOLDERS = re.compile(r"""(?<![^=,'"(\[ ])~?/(?:[^/\s,:'")\]][^/,:'")\]]*/)+""")
_PAPERS = "bhsd.BHSD"  # the data set whose test part the paper's figures are of
_SEED = 0  # of the bootstrap: every run meets the same draws of patients
_Values = dict[str, dict[str, np.ndarray]]  # by convention and class: the mean Dice of every draw

SYNTHETIC = (
    "All scans are computer-generated. No figure here can be compared with the paper's; those "
    "stand beside ours to show where they will be on real scans."
)
ELSEWHERE = (
    "Not all of these scans are the test part of BHSD, which the paper's figures are of. Those "
    "stand beside ours, and no difference between them is shown."
)
SHORT = (
    "Smoke size: tiny networks, a few steps. The figures show that every part runs, and nothing "
    "about any method."
)


@dataclass(frozen=True)
class Heading:
    """A row of a report before its trials have run: name, words, printed figures."""

    title: str
    paper: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None


@dataclass(frozen=True)
class Study:
    """The rows of a report, and the trials that fill them."""

    title: str
    out: Path
    rows: Mapping[str, Heading]
    runs: Sequence[Trial]
    baseline: str = ""  # a row
    notes: tuple[str, ...] = ()
    smoke: bool = False


@dataclass(frozen=True)
class _Scored:
    """One finished run."""

    run: Trial
    summary: Mapping[str, Any]
    patients: tuple[str, ...]
    values: _Values


@dataclass(frozen=True)
class _Against:
    """A row's difference from the baseline's, and that of every seed."""

    paired: OverSeeds | None = None
    gaps: tuple[float, ...] = ()


def write(study: Study, failures: Sequence[Failure] = ()) -> Comparison:
    """Writes report.html, report.md and figures.json from the finished trials.

    Raises:
        ValueError: If runs were evaluated on different scans.
    """
    made = compare(study, failures)
    save(page(made), study.out)
    lines = {key: asdict(line) for key, line in zip(study.rows, made.lines, strict=True)}
    plain = json.loads(json.dumps(lines))
    files.write_json(study.out / "figures.json", summary.without_nan(plain))
    return made


def compare(study: Study, failures: Sequence[Failure] = ()) -> Comparison:
    """The content of the report: every row beside the baseline.

    Raises:
        ValueError: If runs were evaluated on different scans.
    """
    finished = queue.finished(study.runs)
    scored = {row: [_score(run) for run in finished if run.row == row] for row in study.rows}
    runs = [one for row in scored.values() for one in row]
    _require_same_scans(runs)
    first = runs[0].summary if runs else {}
    classes = tuple(first.get("classes", ()))
    key = "mean" if len(classes) > 1 else classes[0] if classes else ANY
    base = scored.get(study.baseline, [])
    lines = []
    for row, heading in study.rows.items():
        against = _against(scored[row], base, key) if row != study.baseline else _Against()
        lines.append(_line(study, row, heading, scored[row], against, failures))
    names = {run.config.data["name"] for run in study.runs}
    synthetic = any(name.startswith("synthetic.") for name in names)
    splits = {*map(_asked_split, study.runs), *map(_split, runs)}
    elsewhere = names != {_PAPERS} or splits != {"test"}
    printed = any(heading.paper for heading in study.rows.values())
    head = first.get("conventions", {}).get("nnunet", {})
    return Comparison(
        title=_FOLDERS.sub("", study.title),
        subtitle=_subtitle(study),
        lines=lines,
        key=key,
        classes=classes,
        present={name: head[name]["n_present"] for name in classes},
        scans=first.get("n_cases", 0),
        wanted=len(study.runs),
        resamples=study.runs[0].config.evaluate.bootstrap,
        baseline=study.rows[study.baseline].title if study.baseline in study.rows else "",
        comparable=not (elsewhere or study.smoke),
        banners=(
            *((SYNTHETIC,) if synthetic else ()),
            *((ELSEWHERE,) if elsewhere and printed and not synthetic else ()),
            *((SHORT,) if study.smoke else ()),
        ),
        notes=study.notes,
        footer=_footer(runs),
        facts=_facts(runs),
        split=_split(runs[0]) if runs else _asked_split(study.runs[0]),
    )


def _score(run: Trial) -> _Scored:
    remedy = "run the verb `evaluate` again"
    found = files.read_json(run.workdir / "summary.json", keys=("classes",), remedy=remedy)
    rows = scores.read_csv(run.workdir / "cases.csv")
    draws = {"resamples": run.config.evaluate.bootstrap, "seed": _SEED}
    values = summary.resampled(rows, found["classes"], **draws)
    if ANY not in found["classes"]:
        merged = scores.read_csv(run.workdir / "cases_binary.csv")
        both = summary.resampled(merged, (ANY,), **draws)
        values = {key: of | {ANY: both[key][ANY]} for key, of in values.items()}
    return _Scored(run, found, tuple(sorted(row.case for row in rows)), values)


def _asked_split(run: Trial) -> str:
    return run.config.evaluate.split or run.config.predict.split


def _split(one: _Scored) -> str:
    """Of the data set, whose scans were scored; "" where they are of a folder."""
    noted = one.summary.get("scored")
    return _asked_split(one.run) if noted is None else noted["split"] or ""


def _require_same_scans(runs: Sequence[_Scored]) -> None:
    for one in runs[1:]:
        if one.patients != runs[0].patients:
            raise UserError(
                f"{one.run.workdir} and {runs[0].run.workdir} were evaluated on different scans or "
                "classes; their figures cannot stand in one table"
            )


def _against(ours: Sequence[_Scored], base: Sequence[_Scored], key: str) -> _Against:
    """Paired by seed and patient; over the seeds both have."""
    by_seed = {one.run.seed: one.values["nnunet"][key] for one in base}
    pairs = [
        (one.values["nnunet"][key], by_seed[one.run.seed])
        for one in ours
        if one.run.seed in by_seed
    ]
    if not pairs:
        return _Against()
    gaps = tuple(float(a[0] - b[0]) for a, b in pairs)
    return _Against(paired([a for a, _ in pairs], [b for _, b in pairs]), gaps)


def _line(
    study: Study,
    row: str,
    heading: Heading,
    done: Sequence[_Scored],
    against: _Against,
    failures: Sequence[Failure],
) -> Line:
    first = next(run for run in study.runs if run.row == row)
    found = {}
    false = {}
    if done:
        conventions = done[0].values
        found = {
            key: {name: over_seeds([one.values[key][name] for one in done]) for name in of}
            for key, of in conventions.items()
        }
        heads = [one.summary["conventions"]["nnunet"] for one in done]
        false = {
            name: float(np.mean([head[name]["n_false_positive"] for head in heads]))
            for name in done[0].summary["classes"]
        }
    return Line(
        title=heading.title,
        paper=heading.paper,
        spread=heading.spread,
        found=found,
        against=against.paired,
        gaps=against.gaps,
        false=false,
        seeds=tuple(one.run.seed for one in done),
        failures=tuple(
            f"{f.run.name}: {f.on_page(study.out)}" for f in failures if f.run.row == row
        ),
        cost=_cost([one.run for one in done]),
        words=_words(first),
        curve=_curve([one.run for one in done]),
        running=any(queue.is_running(run) for run in study.runs if run.row == row),
    )


def _words(run: Trial) -> str:
    """The run's arguments for a reader, without the places of this machine."""
    places = ("--config.preprocess.shards=", "--config.data.root=", "--config.train.init_from=")
    kept = (word for word in run.arguments if not word.startswith(places))
    return shlex.join(_FOLDERS.sub("", word) for word in kept)


def _cost(runs: Sequence[Trial]) -> dict[str, Any]:
    """What a step and a run take, as far as the runs have written it down."""
    if not runs:
        return {}
    config, folder = runs[0].config, runs[0].workdir
    found: dict[str, Any] = {"steps": config.train.steps}
    run = Run.of(config, folder)
    found["patch"] = "x".join(map(str, run.patch))
    found["patches"] = f"{run.labeled} + {run.unlabeled}"
    step = _read(folder / "cost.json")
    found |= {key: step[key] for key in ("parameters", "device") if key in step}
    if step.get("flops_per_device"):
        found["flops"] = step["flops_per_device"] * step["devices"]
    trained = [_training_s(run.workdir / "metrics.jsonl") for run in runs]
    walls = [sum(_read(run.workdir / "wall.json").values()) for run in runs]
    cores = [sum(_read(run.workdir / "cpu.json").values()) for run in runs]
    for name, seconds in (("train_s", trained), ("wall_s", walls), ("cpu_s", cores)):
        if all(seconds):
            found[name] = float(np.mean(seconds))
    return found


def _curve(runs: Sequence[Trial]) -> tuple[tuple[int, float], ...]:
    """Validation Dice by step, the mean over the runs that have it at that step."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for record in step_log.read(run.workdir / "metrics.jsonl"):
            if record.get("val/dice/mean") is not None:
                found.setdefault(record["step"], []).append(record["val/dice/mean"])
    return tuple((step, float(np.mean(values))) for step, values in sorted(found.items()))


def _training_s(path: Path) -> float:
    """Seconds spent in steps, over all processes that wrote the log."""
    total, before = 0.0, 0
    for record in step_log.read(path):
        if "time/step_s" in record:
            total += record["time/step_s"] * (record["step"] - before)
            before = record["step"]
    return total


def _subtitle(study: Study) -> str:
    seeds = sorted({run.seed for run in study.runs})
    data = study.runs[0].config.data["name"].partition(".")[0]
    presets = sorted({run.config.preset for run in study.runs})
    return (
        f"Data set {data}; {len(study.rows)} rows, seeds {', '.join(map(str, seeds))}; preset "
        f"{', '.join(presets)}."
    )


def _facts(runs: Sequence[_Scored]) -> tuple[tuple[str, str], ...]:
    """What was done alike in all rows; of what was not, that it was not, as in a sweep over it."""
    each = [_facts_of(one) for one in runs]
    return tuple(
        (name, value if all(other[name] == value for other in each) else "not the same in all rows")
        for name, value in (each[0].items() if each else ())
    )


def _facts_of(one: _Scored) -> dict[str, str]:
    config, plan = one.run.config, Plan.load(one.run.workdir)
    d, h, w = plan.spacing_mm
    kept = "all" if config.split.labeled is None else str(config.split.labeled)
    return {
        "data set": f"{plan.dataset} ({plan.modality.upper()})",
        "resampled to": f"{d:.3g} x {h:.3g} x {w:.3g} mm",
        "masks used of the training part": kept,
        "validation fold": "none" if config.split.fold < 0 else str(config.split.fold),
        "scans tested": scans_of(_split(one)),
        "checkpoint tested": str(config.predict.checkpoint),
        "intervals": f"{config.evaluate.bootstrap} bootstrap resamples of patients",
    }


def _footer(runs: Sequence[_Scored]) -> str:
    rights = {Plan.load(one.run.workdir).license or "not stated" for one in runs}
    data = f" Data license: {', '.join(sorted(rights))}." if rights else ""
    return f"Written by bhsd_jax {__version__}.{data}"


def _read(path: Path) -> dict[str, Any]:
    return files.recall_json(path, remove=False) or {}
