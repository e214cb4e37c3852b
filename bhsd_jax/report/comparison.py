"""The report of many runs: the paper's figures, ours over seeds, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bhsd_jax.metrics.seeds import OverSeeds
from bhsd_jax.report import figures
from bhsd_jax.report.page import Page, Picture, Section, notice
from bhsd_jax.report.points import (
    NONE,
    duration,
    interval,
    points,
    printed,
    scaled,
    signed,
    with_sd,
)
from bhsd_jax.report.result_tables import CONVENTIONS, Table

_HEADLINE = "nnunet"  # convention


@dataclass(frozen=True)
class Line:
    """One row: what the paper printed and what our runs of it gave."""

    title: str
    paper: Mapping[str, float]  # Dice in percent by class, "mean" or "any"
    spread: float | None  # behind the paper's plus-minus
    found: Mapping[str, Mapping[str, OverSeeds]]  # by convention and class; {} if no run finished
    against: OverSeeds | None  # paired difference from the baseline's row
    false: Mapping[str, float]  # scans without the class in which it was found, mean over seeds
    seeds: tuple[int, ...]  # that finished
    failures: tuple[str, ...]
    cost: Mapping[str, Any]
    words: str  # the arguments of its first seed
    gaps: tuple[float, ...] = ()  # from the baseline's row, seed by seed
    curve: tuple[tuple[int, float], ...] = ()  # step, validation Dice, mean over seeds
    running: bool = False  # some of its runs, at the time of the report

    @property
    def state(self) -> str:
        """Why there are no figures, in a word or two."""
        return "running" if self.running else "failed" if self.failures else "not run"


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs: title, rows, and the row that others are compared with."""

    title: str
    subtitle: str
    lines: Sequence[Line]
    key: str  # of the figure that stands for a row: "mean" of the classes, or a class
    classes: tuple[str, ...]  # foreground
    present: Mapping[str, int]  # scans that have the class
    scans: int
    wanted: int  # runs
    resamples: int
    baseline: str  # title of the row the others are compared with; "" for none
    comparable: bool  # whether our figures may be held against the paper's
    banners: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    footer: str = ""
    facts: tuple[tuple[str, str], ...] = field(default=())  # what all rows have in common
    split: str = "test"  # of the data set, whose scans were scored; "": another's


def scans_of(split: str) -> str:
    """A split's scans, in words."""
    names = {"test": "test scans", "val": "validation scans", "train": "training scans"}
    return names.get(split, "scans")


def page(comparison: Comparison) -> Page:
    """The report; figures are Dice in percent."""
    several = len(comparison.classes) > 1
    sections = [
        _results(comparison),
        _by_class(comparison) if several else None,
        _against(comparison) if comparison.baseline else None,
        _conventions(comparison),
        _false(comparison),
        _curves(comparison),
        _cost(comparison),
        _failures(comparison),
        _notes(comparison),
        _repeat(comparison),
    ]
    return Page(
        title=comparison.title,
        subtitle=comparison.subtitle,
        headline=_headline(comparison),
        sections=tuple(section for section in sections if section is not None),
        footer=comparison.footer,
        banners=comparison.banners,
        notice=notice(comparison.classes),
    )


def _headline(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    done = sum(len(line.seeds) for line in comparison.lines)
    shown = [(f"{done} of {comparison.wanted}", "runs finished")]
    scored = [(_main(line, comparison), line.title) for line in comparison.lines if line.found]
    if scored:
        best, title = max(scored, key=lambda pair: _rank(pair[0].mean))
        shown.append((points(best.mean), f"Dice in percent of the best row, {title}"))
        shown.append((str(comparison.scans), f"{scans_of(comparison.split)} in every figure"))
    return tuple(shown)


def _rank(dice: float) -> float:
    """What is not defined comes last: NaN is neither more nor less than anything."""
    return -math.inf if math.isnan(dice) else dice


def _main(line: Line, comparison: Comparison) -> OverSeeds:
    return line.found[_HEADLINE][comparison.key]


def _gap(ours: OverSeeds, paper: float | None) -> str:
    """Ours less the paper's, which is in percent."""
    return NONE if paper is None else signed(ours.mean - paper / 100)


def _results(comparison: Comparison) -> Section:
    rows = []
    for line in comparison.lines:
        paper = line.paper.get(comparison.key)
        cells = [line.title, *([printed(paper, line.spread)] if _has_paper(comparison) else [])]
        if line.found:
            ours = _main(line, comparison)
            cells += [points(ours.mean), points(ours.sd), interval(ours)]
            if _compares(comparison):
                cells.append(_gap(ours, paper))
        else:
            cells += [line.state, NONE, NONE]
            cells += [NONE] * _compares(comparison)
        rows.append((*cells, str(len(line.seeds))))
    columns = ["", *(["paper"] if _has_paper(comparison) else []), "ours", "SD over seeds"]
    columns += ["95 % interval", *(["ours - paper"] if _compares(comparison) else []), "seeds"]
    what = "mean of the classes" if comparison.key == "mean" else "bleeding against background"
    if comparison.key not in ("mean", "any"):
        what = comparison.key
    words = (
        f"Dice in percent, {what}, by the convention '{_HEADLINE}': a class absent in reference "
        "and prediction is left out of the mean, one predicted although absent counts 0. The "
        "standard deviation is over trainings with other seeds on the same scans; the interval is "
        f"over patients ({comparison.resamples} bootstrap resamples of the mean over seeds)."
    )
    picture = _forest(comparison)
    table = Table(tuple(columns), tuple(rows))
    return Section("Results", (words, table, *([picture] if picture else [])))


def _forest(comparison: Comparison) -> Picture | None:
    scored = [line for line in comparison.lines if line.found]
    if not scored or not figures.available():
        return None
    marks = []
    for line in scored:
        ours = _main(line, comparison)
        paper = line.paper.get(comparison.key) if comparison.comparable else None
        marks.append((line.title, 100 * ours.mean, 100 * ours.low, 100 * ours.high, paper))
    caption = "Filled: ours with its 95 % interval by patient."
    caption += " Open: the paper's." * _compares(comparison)
    return Picture(figures.forest_png(marks, "Dice (%)"), caption)


def _by_class(comparison: Comparison) -> Section:
    names = (*comparison.classes, "mean")
    rows = []
    for line in comparison.lines:
        if line.paper:
            rows.append((line.title, "paper", *(printed(line.paper.get(n)) for n in names)))
        if not line.found:
            continue
        ours = {name: line.found[_HEADLINE][name] for name in names}
        title = "" if line.paper else line.title
        rows.append((title, "ours", *(with_sd(ours[name]) for name in names)))
        if line.paper and comparison.comparable:
            rows.append(("", "difference", *(_gap(ours[n], line.paper.get(n)) for n in names)))
    titles = (f"{name} (n = {comparison.present.get(name, 0)})" for name in comparison.classes)
    words = (
        f"n counts the {scans_of(comparison.split)} that have the class. Ours is the mean over "
        "seeds, with the standard deviation over seeds."
    )
    return Section("By class", (words, Table(("", "", *titles, "mean"), tuple(rows))))


def _against(comparison: Comparison) -> Section | None:
    base = next((line for line in comparison.lines if line.title == comparison.baseline), None)
    others = [line for line in comparison.lines if line.against is not None]
    if base is None or not others:
        return None
    rows = []
    for line in others:
        assert line.against is not None  # as chosen above
        first, own = base.paper.get(comparison.key), line.paper.get(comparison.key)
        gap = NONE if first is None or own is None else signed((own - first) / 100)
        paper = [gap] if _has_paper(comparison) else []
        ours = line.against
        rows.append(
            (line.title, *paper, signed(ours.mean), points(ours.sd), interval(ours, sign=True))
        )
    columns = ("", *(["paper"] if _has_paper(comparison) else []), "ours", "SD over seeds")
    words = (
        f"Difference of Dice in points from {comparison.baseline}, same seed and same scans on "
        "both sides. Where the interval by patient leaves out 0, other patients would hardly turn "
        "the order; the standard deviation says whether other seeds would."
    )
    table = Table((*columns, "95 % interval, paired"), tuple(rows))
    return Section(f"Against {comparison.baseline}", (words, table))


def _conventions(comparison: Comparison) -> Section | None:
    scored = [line for line in comparison.lines if line.found]
    if not scored:
        return None
    merged = len(comparison.classes) > 1
    rows = tuple(
        (
            line.title,
            *(points(line.found[key][comparison.key].mean) for key in CONVENTIONS),
            *([points(line.found[_HEADLINE]["any"].mean)] if merged else []),
        )
        for line in scored
    )
    titles = tuple(title for title, _ in CONVENTIONS.values())
    columns = ("", *titles, *(["all classes merged, nnU-Net rule"] if merged else []))
    meaning = "; ".join(f"{title}: {what}" for title, what in CONVENTIONS.values())
    words = f"The same predictions under other conventions. {meaning}."
    return Section("Under other conventions", (words, Table(columns, rows)))


def _false(comparison: Comparison) -> Section | None:
    scored = [line for line in comparison.lines if line.found]
    if not any(comparison.scans - comparison.present[name] for name in comparison.classes):
        return None
    absent = [f"{n} (of {comparison.scans - comparison.present[n]})" for n in comparison.classes]
    rows = tuple(
        (line.title, *(f"{line.false[name]:.1f}" for name in comparison.classes)) for line in scored
    )
    words = (
        "Scans without a class in which some voxel of it was predicted, mean over seeds; each "
        "counts 0 by nnU-Net's rule. In brackets, how many scans are without it."
    )
    return Section("False alarms", (words, Table(("", *absent), rows)))


def _curves(comparison: Comparison) -> Section | None:
    """Validation Dice while training; nothing where none was validated more than once."""
    lines = [line for line in comparison.lines if len(line.curve) > 1]
    if not lines:
        return None
    steps = sorted({step for line in lines for step, _ in line.curve})
    rows = []
    for line in lines:
        values = dict(line.curve)
        cells = (points(values.get(step, float("nan")), 1) for step in steps)
        rows.append((line.title, *cells))
    words = (
        "Dice in percent on the prepared grid of the validation scans, mean over seeds, by step."
    )
    parts: list[str | Table | Picture] = [words, Table(("", *map(str, steps)), tuple(rows))]
    if figures.available():
        series = [(line.title, line.curve) for line in lines]
        parts.append(Picture(figures.curves_png(series, "validation Dice (%)"), "By step."))
    return Section("Learning curves", tuple(parts))


def _cost(comparison: Comparison) -> Section | None:
    lines = [line for line in comparison.lines if line.cost]
    if not lines:
        return None
    counted = any("cpu_s" in line.cost for line in lines)
    rows = tuple(
        (
            line.title,
            scaled(line.cost.get("parameters"), 1e6),
            scaled(line.cost.get("flops"), 1e9),
            str(line.cost.get("steps", NONE)),
            str(line.cost.get("patch", NONE)),
            str(line.cost.get("patches", NONE)),
            duration(line.cost.get("train_s")),
            duration(line.cost.get("wall_s")),
            *([duration(line.cost.get("cpu_s"))] if counted else []),
        )
        for line in lines
    )
    columns = ("", "parameters (M)", "GFLOP a step", "steps", "patch", "labeled + unlabeled")
    devices = sorted({line.cost["device"] for line in lines if "device" in line.cost})
    words = (
        "A step is forward and backward pass and update, counted by XLA over all devices "
        f"({', '.join(devices) or 'not recorded'}). Training is the time in steps; the run has "
        "compilation, prediction and evaluation too. Both are means over the seeds that finished."
    )
    columns += ("training", "whole run", *(["CPU time"] if counted else []))
    return Section("Cost", (words, Table(columns, rows)))


def _failures(comparison: Comparison) -> Section | None:
    failures = [text for line in comparison.lines for text in line.failures]
    return Section("Runs that failed", tuple(failures)) if failures else None


def _notes(comparison: Comparison) -> Section | None:
    numbered = (f"[{i}] {note}" for i, note in enumerate(comparison.notes, start=1))
    return Section("Notes", tuple(numbered)) if comparison.notes else None


def _repeat(comparison: Comparison) -> Section:
    rows = tuple((line.title, line.words) for line in comparison.lines)
    words = "What every verb was given for the first seed of a row."
    facts = (Table(("", ""), comparison.facts),) if comparison.facts else ()
    return Section("How it was made", (*facts, words, Table(("", "arguments"), rows)))


def _has_paper(comparison: Comparison) -> bool:
    return any(line.paper for line in comparison.lines)


def _compares(comparison: Comparison) -> bool:
    return comparison.comparable and _has_paper(comparison)
