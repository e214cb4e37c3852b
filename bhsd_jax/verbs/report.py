"""`report`: one page from the files of a run, for a reader who has never seen the code."""

import csv
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax import __version__
from bhsd_jax.assemble import data
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import geometry, plausibility, scan
from bhsd_jax.metrics import scores
from bhsd_jax.platform import files, step_log
from bhsd_jax.report import figures
from bhsd_jax.report.page import Page, Picture, Section, notice, save
from bhsd_jax.report.result_tables import (
    CONVENTIONS,
    Table,
    cases_table,
    dice_table,
    metrics_table,
    milliliters,
    number,
)
from bhsd_jax.settings import Config, Settings
from bhsd_jax.verbs import pages, parts, scan_report
from bhsd_jax.verbs.chosen_scans import find_scans, label_maps, output_names
from bhsd_jax.verbs.pages import Origin
from bhsd_jax.volume import Case

logger = logging.getLogger(__name__)

_SUMMARY = ("binary", "bootstrap", "classes", "conventions", "metrics", "n_cases", "nsd_mm")
_MEASURES = {
    "hd95_mm_median": "HD95, median (mm)",
    "hd95_n": "of scans",
    "hd95_missed": "in one mask only",
    "nsd_mean": "surface Dice",
    "abs_volume_error_ml_mean": "volume error (mL)",
    "lesion_sensitivity": "lesions found",
    "lesion_precision": "of those drawn, real",
}


def run(config: Config, workdir: Path) -> None:
    """Writes report.html and report.md into the run folder.

    Raises:
        FileNotFoundError: If the run has not been evaluated.
        ValueError: If a file of the run is damaged; names it.
    """
    config = Settings.of(config)
    if parts.place(config).index:
        logger.info("the first process writes the report")
        return
    if config.report.images:
        _of_images(config, workdir)
        return
    summary = _read_summary(workdir)
    rows = _read_rows(workdir / "cases.csv")
    run = Run.of(config, workdir)
    plan = run.plan
    ids = sorted({row["case"] for row in rows})
    names = data.short_names(ids, workdir, config.report.show_ids)
    origin = Origin.of(run, summary)
    pictures = config.report.overlays and figures.available()
    seen = pages.scans(run, origin, ids) if pictures or config.report.viewer else {}
    sections = [
        Section("Before you read on", (config.report.note,)) if config.report.note else None,
        _results(summary),
        _overlays(run, origin, rows, names, seen) if pictures else None,
        _agreement(rows),
        pages.calibration(run, origin),
        _training(workdir),
        _comparison(config.report.compare, summary, workdir),
        _every_scan(run, origin, rows, names, seen),
        _methods(run, summary),
    ]
    page = Page(
        title=config.report.title or f"{plan.dataset}: {config.name}",
        subtitle=_subtitle(config, origin, summary),
        headline=_headline(summary, origin),
        sections=tuple(section for section in sections if section is not None),
        footer=f"Written by bhsd_jax {__version__}. Data license: {plan.license or 'not stated'}.",
        banners=pages.unfinished(run),
        notice=notice(run.labels.names),
    )
    logger.info("report: %s", save(page, workdir))


def _of_images(config: Settings, workdir: Path) -> None:
    """The report of what `predict` has made of `config.report.images`.

    Raises:
        FileNotFoundError: If there are no such scans, or they were not predicted.
        ValueError: If a file is damaged; names it.
    """
    where = config.report.predictions or config.predict.out
    settings = replace(config.predict, images=config.report.images, out=where)
    config = replace(config, predict=settings)
    cases = find_scans(config, workdir)
    names = output_names(cases, workdir, settings)
    out = label_maps(settings, workdir)
    named = {names[case.id]: case for case in cases}
    scan_report.write(Run.of(config, workdir), out, named, strict=True)


def _every_scan(
    run: Run,
    origin: Origin,
    rows: Sequence[Mapping[str, str]],
    names: Mapping[str, str],
    cases: Mapping[str, Case],
) -> Section:
    """The table of scans, the way from their names to files, and the page to scroll through them.

    Names that hide something must not link to it: `names.csv` stays where the files are.
    """
    paths = {names[row["case"]]: origin.label_map(row["case"]) for row in rows}
    shown = {name: pages.beside(path, run.folder) for name, path in paths.items()}
    pages.write_names(run.folder, shown)
    links = shown if run.config.report.show_ids else {}
    words = [f"{pages.NAMES} in the run folder leads from these names to the label maps."]
    if run.config.report.viewer:
        pages.write_viewer(run, rows, names, cases, origin)
        words.append("{Scroll through the scans|viewer.html}, worst first.")
    table = replace(cases_table(rows, names), links=links)
    return Section("Every scan", (" ".join(words), table))


def _headline(summary: Mapping[str, Any], origin: Origin) -> tuple[tuple[str, str], ...]:
    binary, mean = summary["binary"], summary["conventions"]["nnunet"].get("mean", {})
    interval = f"95 % interval {number(binary['low'])} to {number(binary['high'])}"
    if binary["low"] is None:
        interval = f"no interval, as fewer than two {_resampled(summary)} count"
    words = f"Dice, all classes merged, mean of {binary['n']} scans ({interval})"
    found = [(number(binary["dice"]), words)]
    if len(summary["classes"]) > 1:
        found.append((number(mean.get("dice")), "Dice by class, mean of the classes"))
    baseline = summary.get("baseline")
    if baseline:
        low, high = baseline["band_hu"]
        found.append(
            (
                number(baseline["dice"]),
                f"Dice of the best plain threshold on the same scans ({low:.0f} to {high:.0f} HU)",
            )
        )
    found.append((str(summary["n_cases"]), _whose(origin)))
    return tuple(found)


def _whose(origin: Origin) -> str:
    """Whose scans were scored, in words; no more is said than is known."""
    if origin.references is not None:
        return "scans with masks of a folder; whether the network has seen them is not known"
    facts = origin.made
    # Older files do not say whether the runs beside the first were trained on the scans.
    unknown = origin.split == "val" and "averaged_with" in facts
    if origin.split and facts.get("seen_in_training", unknown):
        return f"{origin.split} scans, on which some of the averaged runs may have been trained"
    return {
        "test": "scans the network never saw",
        "val": "validation scans, which the network never saw",
        "train": "scans of the training part, which the network may have seen",
    }.get(origin.split, "scans scored")


def _subtitle(config: Settings, origin: Origin, summary: Mapping[str, Any]) -> str:
    facts = origin.made
    step = f", checkpoint of step {facts['step']}" if "step" in facts else ""
    chosen = facts.get("options", {}).get("predict", {}).get("checkpoint") == "best"
    step += ", chosen on these very scans" * (chosen and origin.split == "val")
    elsewhere = "" if origin.own else " The label maps are of another folder than the run's."
    return (
        f"Objective {config.objective['name']}, backbone {config.model['name']}, "
        f"{config.train.steps} training steps{step}; {summary['n_cases']} scans scored.{elsewhere}"
    )


def _results(summary: Mapping[str, Any]) -> Section:
    parts: list[Any] = [
        "Dice measures overlap with the reference drawing: 1 is identical, 0 is disjoint. "
        f"The interval says how far the mean may move with other {_resampled(summary)}; of a class "
        "that counts in one alone there is none.",
        dice_table(summary),
        "Columns: " + "; ".join(f"{title}: {what}" for title, what in CONVENTIONS.values()) + ".",
    ]
    columns = {
        k: v for k, v in _MEASURES.items() if any(k in m for m in summary["metrics"].values())
    }
    if columns:
        parts += [
            metrics_table(summary, columns),
            "HD95 is the distance within which 95 % of the two surfaces lie of each other. Its "
            "median is over the scans that have the class in both masks; those that have it in one "
            "mask only, missed or made up, are counted beside it. Surface Dice is the share of the "
            f"surfaces within {summary['nsd_mm']} mm. Lesions found are a share of the "
            "reference's, those that are real a share of the predicted.",
        ]
    return Section("Results", tuple(parts))


def _overlays(
    run: Run,
    origin: Origin,
    rows: Sequence[Mapping[str, str]],
    names: Mapping[str, str],
    cases: Mapping[str, Case],
) -> Section | None:
    """The best, the median and the worst scan of every class, of the scans at hand."""
    words = (
        f"[{figures.REFERENCE}] reference   [{figures.PREDICTION}] prediction. The first picture "
        "of a row is the slice without contours. Slices are shown as in a reading room: the "
        "patient's right is on the left, and slice 1 is the lowest."
    )
    pictures = []
    for name, values in run.labels.targets:
        scored = [r for r in rows if r["class"] == name and float(r["voxels_ref"])]
        scored.sort(key=lambda row: float(row["dice"]))
        picks = {"worst": 0, "median": len(scored) // 2, "best": len(scored) - 1}
        shown = {scored[i]["case"]: (word, scored[i]) for word, i in picks.items() if scored}
        for word, row in reversed(shown.values()):
            case = cases.get(row["case"])
            if case is None or case.label is None:
                continue
            overlay = _overlay(case, origin.label_map(case.id), run, values)
            caption = (
                f"{name}, {word} of {len(scored)}: scan {names[row['case']]}, "
                f"Dice {number(float(row['dice']))}, reference "
                f"{milliliters(float(row['volume_ref_ml']))} mL, predicted "
                f"{milliliters(float(row['volume_pred_ml']))} mL"
            )
            pictures.append(Picture(figures.overlay_png(overlay), caption))
    return Section("What it looks like", (words, *pictures)) if pictures else None


def _overlay(case: Case, label_map: Path, run: Run, values: tuple[int, ...]) -> figures.Overlay:
    place = scan.native(case.image)
    volume, _ = scan.read(place)
    assert case.label is not None  # the caller has looked
    masks = []
    for path in (case.label, label_map):
        label, _ = scan.read_label(path, place, volume, num_classes=None)
        binary = run.config.split.binary
        masks.append(label.voxels > 0 if binary else np.isin(label.voxels, values))
    order, flip = geometry.canonical(volume.affine)
    in_hu = plausibility.in_hu(volume.voxels) if run.plan.modality == "ct" else None
    voxels = volume.voxels if in_hu is None else in_hu
    image, reference, predicted = (geometry.turn(a, order, flip) for a in (voxels, *masks))
    spacing = tuple(volume.spacing_mm[axis] for axis in order)
    window = pages.window(image, hu=in_hu is not None)
    return figures.Overlay(image, reference, predicted, spacing, window)  # pyright: ignore[reportArgumentType]


def _agreement(rows: Sequence[Mapping[str, str]]) -> Section | None:
    if not figures.available():
        return None
    volumes: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        pair = volumes.setdefault(row["class"], ([], []))
        pair[0].append(float(row["volume_ref_ml"]))
        pair[1].append(float(row["volume_pred_ml"]))
    caption = "Each dot is a scan; on the line both volumes agree."
    if any(row.get("tilt_corrected") == "1" for row in rows):
        caption += " Corrected for gantry tilt."
    return Section("Volume", (Picture(figures.agreement_png(volumes), caption),))


def _training(workdir: Path) -> Section | None:
    records = step_log.read(workdir / "metrics.jsonl")
    if not records or not figures.available():
        return None
    picture = Picture(figures.progress_png(records), "Loss, validation Dice, speed, learning rate.")
    return Section("Training", (picture,))


def _comparison(
    folders: Sequence[str], summary: Mapping[str, Any], workdir: Path
) -> Section | None:
    """This run and others, a row for each folder, by their own summaries."""
    if not folders:
        return None
    runs = {workdir.resolve(): (workdir, summary)}
    for folder in map(Path, folders):
        if folder.resolve() not in runs:
            runs[folder.resolve()] = folder, _read_summary(folder)
    names = _apart([folder for folder, _ in runs.values()])
    names[0] += " (this run)"
    several = any(len(found["classes"]) > 1 for _, found in runs.values())
    rows = tuple(
        (
            name,
            number(found["binary"]["dice"]),
            number(_over_classes(found, several)),
            str(found["n_cases"]),
        )
        for name, (_, found) in zip(names, runs.values(), strict=True)
    )
    table = Table(("run", "Dice, binary", "Dice, classes", "scans"), rows)
    return Section("Beside other runs", (table, *_unlike(list(runs.values()))))


def _over_classes(summary: Mapping[str, Any], several: bool) -> float | None:
    """The mean Dice of the classes; of one class it is the binary Dice, no match for several."""
    alone = several and len(summary["classes"]) == 1
    return None if alone else summary["conventions"]["nnunet"].get("mean", {}).get("dice")


def _unlike(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> Iterator[str]:
    """Sentences on what the scores of these runs do not have in common, as far as it is noted."""
    noted = [(folder, found["scored"]) for folder, found in runs if found.get("scored")]
    masks = {
        (one.get("split"), (folder / place).resolve() if place else None)
        for folder, one in noted
        for place in (one.get("references"),)
    }
    if len(masks) > 1 or len({found["n_cases"] for _, found in runs}) > 1:
        yield "The runs were scored on different scans or masks: no two such rows can be compared."
    if len({tuple(found["classes"]) for _, found in runs}) > 1:
        yield "The runs have different classes: no two means over others can be compared."


def _apart(folders: Sequence[Path]) -> list[str]:
    """Names of different folders: of each the last part, or as many as no other ends with."""
    every = [Path(os.path.abspath(folder)).parts[1:] for folder in folders]
    names = []
    for own in every:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in every) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names


def _methods(run: Run, summary: Mapping[str, Any]) -> Section:
    """What a reader needs to repeat it."""
    plan, config = run.plan, run.config
    d, h, w = plan.spacing_mm
    optimizer = config.optimizer
    facts = [
        ("data set", f"{plan.dataset} ({plan.modality.upper()})"),
        ("resampled to", f"{d:.3g} x {h:.3g} x {w:.3g} mm"),
        ("patch", " x ".join(map(str, run.patch))),
        (
            "labeled / unlabeled patches per step",
            f"{run.labeled} / {run.unlabeled}",
        ),
        (
            "optimizer",
            f"{optimizer['name']}, {optimizer['schedule']} from {optimizer['lr']}",
        ),
        ("intervals", f"{summary['bootstrap']} bootstrap resamples of {_resampled(summary)}"),
        ("seed", str(config.seed)),
    ]
    notes = tuple(f"Note: {note}." for note in plan.notes)
    return Section("How it was made", (Table(("", ""), tuple(facts)), *notes))


def _resampled(summary: Mapping[str, Any]) -> str:
    """What the intervals are over: patients, or scans whose patients are not known."""
    return summary.get("scored", {}).get("resampled", "patients")


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; run the verb `evaluate` first")
    return files.read_json(path, keys=_SUMMARY, remedy="run the verb `evaluate` again")


def _read_rows(path: Path) -> list[dict[str, str]]:
    scores.read_csv(path)  # refuses one that is damaged
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
