"""A report of scans that were predicted and have no references."""

import csv
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax import __version__
from bhsd_jax.assemble import data
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import formats, geometry, plausibility, scan
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.report import figures, niivue
from bhsd_jax.report.page import Page, Picture, Section, notice, save
from bhsd_jax.report.result_tables import Table, milliliters
from bhsd_jax.verbs import pages, review, shown
from bhsd_jax.verbs.shown import Entry
from bhsd_jax.volume import Case

logger = logging.getLogger(__name__)

_PICTURES = 12  # of the largest bleeds
_AGAIN = "run the verb `predict` again"


@dataclass(frozen=True)
class _Predicted:
    """What `predict` has left in a folder."""

    rows: tuple[dict[str, Any], ...]  # of volumes.json, largest first
    facts: dict[str, Any]  # predictions.json
    skipped: tuple[dict[str, str], ...]


def write(run: Run, out: Path, cases: Mapping[str, Case], *, strict: bool = False) -> None:
    """Writes `report.html`, `report.md` and `viewer.html` beside the label maps.

    Without the extra `viewer` there is no viewer, which a line says; `strict` takes its absence
    for an error where the config asks for one.

    Args:
        run: That has predicted.
        out: Folder of its label maps and tables.
        cases: Scans by their names in the outputs.
        strict: The page was asked for by the verb `report`.

    Raises:
        FileNotFoundError: If nothing was predicted there.
        ValueError: If a file is damaged; names it.
    """
    found = _read(out)
    entries = [_entry(run, out, row, cases) for row in found.rows if row["case"] in cases]
    if not entries and not found.skipped:
        raise UserError(f"{out}: none of these scans was predicted there; {_AGAIN}")
    names = _names(run, out, cases)
    entries = [dataclasses.replace(entry, name=names[entry.name]) for entry in entries]
    pages.write_names(out, {one.name: one.label_map.name for one in entries})
    wanted = bool(entries) and (run.config.report.viewer if strict else niivue.available())
    if not entries:
        files.unlink(out / pages.VIEWER)  # of a call before
    title = f"New scans, read by {run.config.name}"
    subtitle = _subtitle(run, found, len(entries))
    page = Page(
        title=title,
        subtitle=subtitle,
        headline=_headline(entries),
        sections=tuple(_sections(run, found, entries, names, wanted)),
        footer=(
            f"Written by bhsd_jax {__version__}. License of the training data: "
            f"{run.plan.license or 'not stated'}."
        ),
        banners=_banners(run, found, len(cases)),
        notice=notice(run.labels.names),
    )
    logger.info("report: %s", save(page, out))
    if wanted:
        pages.write_page(run, out, title, subtitle, entries)
    elif entries and not strict:
        logger.info("no %s, which needs NiiVue; %s", pages.VIEWER, explain_extra("viewer"))


def _read(out: Path) -> _Predicted:
    for name in ("volumes.json", "predictions.json"):
        if not (out / name).is_file():
            raise FileNotFoundError(f"{out / name}: not there; {_first(out)}")
    listed = files.read_json(out / "volumes.json", keys=("scans",), remedy=_AGAIN)["scans"]
    facts = files.read_json(out / "predictions.json", keys=("step",), remedy=_AGAIN)
    skipped: list[dict[str, str]] = []
    if (out / "skipped.csv").is_file():
        with (out / "skipped.csv").open(newline="") as file:
            skipped = list(csv.DictReader(file))
    rows = sorted(listed, key=lambda row: -row.get("all_ml", sum(row["ml"].values())))
    return _Predicted(tuple(rows), facts, tuple(skipped))


def _first(out: Path) -> str:
    """What to do where there are no tables of all scans."""
    if not any(out.glob("part_*_of_*")):
        return "run the verb `predict` first"
    return (
        "several jobs have predicted these scans, each with tables of its own; run `predict` once "
        "more without num_parts, with config.predict.overwrite=False: it predicts nothing anew and "
        "writes the tables of all"
    )


def _entry(run: Run, out: Path, row: Mapping[str, Any], cases: Mapping[str, Case]) -> Entry:
    case = dataclasses.replace(cases[row["case"]], label=None)
    flags = (row["warning"],) if row.get("warning") else ()
    if abs(row.get("tilt_deg") or 0) > geometry.LEAST_TILT_DEG:
        flags = (*flags, f"gantry tilted by {abs(row['tilt_deg']):.1f} degrees")
    if row.get("unlike"):
        flags = (*flags, f"unlike the training data: {row['unlike']}")
    ml = {name: float(row["ml"].get(name, 0.0)) for name in run.labels.names[1:]}
    apart, together = row.get("disagreement"), row.get("all_ml")
    score = review.score(apart, row.get("unlike") or "")
    place = out / f"{row['case']}{scan.ending(case.image)}"
    return Entry(
        *(case, place, row["case"], ml),
        all_ml=together,
        disagreement=apart,
        review=score,
        flags=flags,
    )


def _names(run: Run, out: Path, cases: Mapping[str, Case]) -> dict[str, str]:
    """Names on the page by those of the outputs: salted hashes, unless it is told to show names.

    What is hidden in the outputs already, as names of DICOM series are, keeps its name.
    """
    open_ = sorted(name for name, case in cases.items() if name == case.id)
    show = run.config.report.show_ids
    short = data.short_names(open_, run.folder, show, out) if open_ else {}
    return {name: short.get(name, name) for name in cases}


def _subtitle(run: Run, found: _Predicted, scans: int) -> str:
    return (
        f"{_count(scans)} without references. Objective {run.config.objective['name']}, backbone "
        f"{run.config.model['name']}, checkpoint of step {found.facts['step']}, trained on "
        f"{run.plan.dataset}."
    )


def _count(scans: int) -> str:
    return "1 scan" if scans == 1 else f"{scans} scans"


def _headline(entries: Sequence[Entry]) -> tuple[tuple[str, str], ...]:
    totals = [entry.total_ml for entry in entries]
    bleeding = [total for total in totals if total > 0]
    return (
        (str(len(entries)), "scan" if len(entries) == 1 else "scans"),
        (str(len(bleeding)), "of them with some bleed drawn"),
        (f"{milliliters(max(totals, default=0))} mL", "in the scan with most"),
    )


def _banners(run: Run, found: _Predicted, scans: int) -> tuple[str, ...]:
    banners = list(pages.unfinished(run))
    missing = scans - len(found.rows) - len(found.skipped)
    if missing > 0:
        banners.append(f"{missing} of {scans} scans are not predicted yet; {_AGAIN}.")
    if found.skipped:
        banners.append(f"{len(found.skipped)} of {scans} scans could not be predicted, see below.")
    return tuple(banners)


def _sections(
    run: Run,
    found: _Predicted,
    entries: Sequence[Entry],
    names: Mapping[str, str],
    viewer_too: bool,
) -> list[Section]:
    classes = run.labels.names[1:]
    rows = tuple(
        (
            entry.name,
            *(milliliters(entry.ml[name]) for name in classes),
            *([milliliters(entry.total_ml)] if len(classes) > 1 else []),
            "; ".join(entry.flags),
        )
        for entry in entries
    )
    hidden = [entry.name != formats.stem(entry.label_map) for entry in entries]
    links = {} if any(hidden) else {e.name: e.label_map.name for e in entries}
    merged = ("all (mL)",) if len(classes) > 1 else ()
    columns = ("scan", *(f"{name} (mL)" for name in classes), *merged, "to note")
    words = [f"{pages.NAMES} beside this page leads from the names to the label maps."]
    if viewer_too:
        words.append("{Scroll through the scans|viewer.html}.")
    sections = [Section("By volume", (" ".join(words), Table(columns, rows, links)))]
    first = [entry for entry in entries if entry.review]
    if first:
        sections.append(_review(first))
    pictures = _pictures(run, entries) if run.config.report.overlays else []
    if pictures:
        sections.append(Section("Largest bleeds", (_LEGEND, *pictures)))
    if found.skipped:
        reasons = tuple(
            (names.get(row["case"], row["case"]), _renamed(row, names)) for row in found.skipped
        )
        sections.append(Section("Not predicted", (Table(("scan", "reason"), reasons),)))
    return sections


def _review(entries: Sequence[Entry]) -> Section:
    listed = sorted(entries, key=lambda entry: -(entry.review or 0))[:_PICTURES]
    rows = tuple(
        (
            entry.name,
            "not measured" if entry.disagreement is None else f"{entry.disagreement:.2f}",
            "; ".join(entry.flags),
        )
        for entry in listed
    )
    words = (
        "Scans unlike the training data come first, then those on which the networks, or a network "
        "and its answer to the mirrored scan, disagree most: 0 is one answer, 1 is no voxel in "
        "common. Where outlines are to be drawn, these teach the network most."
    )
    return Section("Review these first", (words, Table(("scan", "disagreement", "why"), rows)))


def _renamed(row: Mapping[str, str], names: Mapping[str, str]) -> str:
    return row["reason"].replace(row["case"], names.get(row["case"], row["case"]))


_LEGEND = (
    f"[{figures.PREDICTION}] prediction. The first picture of a row is the slice without contours. "
    "Slices are shown as in a reading room: the patient's right is on the left, and slice 1 is the "
    "lowest."
)


def _window(run: Run, image: np.ndarray) -> tuple[float, float]:
    """Black and white: of CT the brain's, also where its networks take it as it lies."""
    ct = run.plan.modality == "ct"
    return pages.window(image, hu=ct and (run.plan.in_hu or plausibility.in_hu(image) is not None))


def _pictures(run: Run, entries: Sequence[Entry]) -> list[Picture]:
    if not figures.available():
        return []
    drawn = []
    for entry in [e for e in entries if e.total_ml > 0][:_PICTURES]:
        one = shown.read(run, entry)
        mask = one.prediction > 0
        window = _window(run, one.image)
        overlay = figures.Overlay(one.image, np.zeros_like(mask), mask, one.spacing_mm, window)
        parts = [f"{name} {milliliters(ml)} mL" for name, ml in entry.ml.items() if ml > 0]
        caption = f"Scan {entry.name}: {', '.join(parts)}"
        drawn.append(Picture(figures.overlay_png(overlay), caption))
    return drawn
