"""What the pages about a run have in common: its label maps, and the page to scroll through."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.assemble import calibrated
from bhsd_jax.assemble.run import Run
from bhsd_jax.datasets import image_files
from bhsd_jax.metrics import scores
from bhsd_jax.platform import files, step_log
from bhsd_jax.platform.csv_files import write_records
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report import figures, viewer
from bhsd_jax.report.page import Picture, Section, notice
from bhsd_jax.report.result_tables import Table
from bhsd_jax.verbs import shown
from bhsd_jax.verbs.shown import Entry
from bhsd_jax.volume import Case, outlined_of

logger = logging.getLogger(__name__)

NAMES, VIEWER = "names.csv", "viewer.html"
_LISTED = 5  # names in a line
_AGAIN = "run the verb `predict` again"


@dataclass(frozen=True)
class Origin:
    """What the scores of a run are of, as `evaluate` has noted it in `summary.json`."""

    label_maps: Path  # their folder
    references: Path | None = None  # a folder of masks; None: the data set's own
    split: str = ""  # of the data set; empty: masks of a folder, or nobody has noted it
    own: bool = True  # whether the label maps are those of <run>/predictions

    @classmethod
    def of(cls, run: Run, summary: Mapping[str, Any]) -> "Origin":
        """Of a summary of today, or of an older one, which says nothing of it."""
        noted = summary.get("scored")
        if noted is None:
            given = run.config.evaluate.predictions
            return cls(Path(given or run.folder / "predictions"), own=not given)
        references = noted.get("references")
        return cls(
            run.folder / noted.get("predictions", "predictions"),
            run.folder / references if references else None,
            noted.get("split") or "",
            noted.get("predictions", "predictions") == "predictions",
        )

    @cached_property
    def made(self) -> Mapping[str, Any]:
        """What `predict` has noted beside the label maps; empty where it has not made them.

        Raises:
            ValueError: If the file is damaged; names it.
        """
        path = self.label_maps / "predictions.json"
        return files.read_json(path, remedy=_AGAIN) if path.is_file() else {}

    def label_map(self, case: str) -> Path:
        """Of one scan, in whatever format `evaluate` has read; else where NIfTI would be.

        Raises:
            ValueError: If two files of the folder are of one scan.
        """
        return self._files.get(case, self.label_maps / f"{case}.nii.gz")

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        return image_files.scans(self.label_maps) if self.label_maps.is_dir() else {}


def scans(run: Run, origin: Origin, ids: Sequence[str]) -> dict[str, Case]:
    """The scans of these cases, with the references that were scored, as far as they are at hand.

    A line says how many are not, as those of a folder of masks need not be of the data set.

    Raises:
        ValueError: If cases of the data set were scored, and it cannot be read.
        FileNotFoundError: If it is not there.
    """
    try:
        # Masks of a folder may be of scans that have none in the data set.
        every = run.data_set.cases() if origin.references else outlined_of(run.data_set)
        cases = {case.id: case for case in every}
        if origin.references is not None:
            masks = image_files.scans(origin.references)
            own = cases.keys() & masks.keys()
            cases = {case: replace(cases[case], label=masks[case]) for case in own}
    except (UserError, FileNotFoundError):
        if origin.references is None:
            raise
        cases = {}
    found = {case: cases[case] for case in ids if case in cases}
    if len(found) < len(ids):
        missing = sorted(set(ids) - found.keys())
        logger.warning(
            "no pictures of %d of the %d scans that were scored, which are not in the data set: "
            "%s%s",
            *(len(missing), len(ids), ", ".join(missing[:_LISTED])),
            " ..." if missing[_LISTED:] else "",
        )
    return found


def beside(path: Path, folder: Path) -> str:
    """A path as it is reached from a folder."""
    return os.path.relpath(path, folder).replace(os.sep, "/")


def window(image: np.ndarray, *, hu: bool) -> tuple[float, float]:
    """What is black and white in pictures: of HU the brain's window, else 2 % to 99.5 %."""
    if hu:
        level, width = viewer.CT_WINDOWS[0][1:]
        return level - width / 2, level + width / 2
    low, high = np.percentile(image, (2, 99.5))
    return float(low), float(high)


def write_names(out: Path, places: Mapping[str, str]) -> None:
    """Writes `names.csv`, which leads from names on a page to label maps, seen from the folder.

    Raises:
        faults.WriteError: If the system says no.
    """
    listed = [{"name": name, "label_map": place} for name, place in places.items()]
    write_records(out / NAMES, listed, line_end="\n", harmless=True)


def unfinished(run: Run) -> tuple[str, ...]:
    """Says of a run whose training was not at its end that it was not."""
    steps = [record["step"] for record in step_log.read(run.folder / "metrics.jsonl")]
    wanted = run.config.train.steps
    if not steps or steps[-1] >= wanted:
        return ()
    return (
        f"This training is not finished: {steps[-1]} of {wanted} steps are logged. Figures of the "
        "finished run will differ; the verb `train` goes on where it stopped.",
    )


def calibration(run: Run, origin: Origin) -> Section | None:
    """Reliability curve and Brier score, where `calibrate` has measured them.

    They need not be of the networks whose label maps were scored, which is said.
    """
    found = calibrated.read(run.folder)
    if found is None:
        return None
    titles = {"before": "as trained", "after": f"temperature {found['temperature']:.2f}"}
    rows = tuple(
        (
            title,
            *(f"{found[name][key]:.5f}" for key in ("brier", "nll", "error")),
        )
        for name, title in titles.items()
    )
    columns = ("", "Brier score", "negative log-likelihood", "calibration error")
    weights = origin.made.get("weights_sha256")
    other = weights is not None and not calibrated.is_of(found, weights)
    words = (
        f"Of {calibrated.subject(found)}{', not of the label maps above' * other}. "
        f"On {found['voxels']} voxels drawn from {found['scans']} validation scans, to which the "
        "temperature was fitted. Where the curve lies below the diagonal the network is too sure. "
        "The temperature changes no label map; --calibrated=True applies it to probabilities."
    )
    parts: list[Any] = [words, Table(columns, rows)]
    if figures.available():
        curves = {
            title: [(one["mean"], one["observed"]) for one in found[name]["bins"]]
            for name, title in titles.items()
        }
        parts.append(Picture(figures.reliability_png(curves), "Reliability of the probabilities."))
    return Section("Calibration", tuple(parts))


def write_viewer(
    run: Run,
    rows: Sequence[Mapping[str, str]],
    names: Mapping[str, str],
    cases: Mapping[str, Case],
    origin: Origin,
) -> None:
    """Writes `viewer.html` into the run folder, the worst scans first.

    Args:
        run: That was evaluated.
        rows: Of its cases.csv.
        names: Of scans on the page, by case.
        cases: The scans at hand, as `scans` gives them.
        origin: Of the scores.

    Raises:
        ValueError: If the extra `viewer` is not installed, or a scan is damaged.
    """
    merged = run.folder / "cases_binary.csv"
    dice = {score.case: score.dice for score in scores.read_csv(merged)} if merged.is_file() else {}
    ml: dict[str, dict[str, float]] = {}
    for row in rows:
        ml.setdefault(row["case"], {})[row["class"]] = float(row["volume_pred_ml"])
    entries = [
        Entry(
            *(cases[case], origin.label_map(case), names[case], volumes),
            dice=None if math.isnan(dice.get(case, math.nan)) else dice[case],
        )
        for case, volumes in ml.items()
        if case in cases
    ]
    entries.sort(key=lambda entry: math.inf if entry.dice is None else entry.dice)
    title = run.config.report.title or f"{run.plan.dataset}: {run.config.name}"
    write_page(run, run.folder, title, f"{len(entries)} scans, scored", entries)


def write_page(run: Run, out: Path, title: str, subtitle: str, entries: Sequence[Entry]) -> None:
    """Writes `viewer.html` into a folder; says where not all scans fit.

    Raises:
        ValueError: As `write_viewer`.
    """
    page = shown.around(run, title, subtitle, notice(run.labels.names), len(entries))
    most = run.config.report.viewer_mb
    count = viewer.write(out / VIEWER, page, shown.scans(run, entries), most_mb=most)
    if count < len(entries):
        logger.warning(
            "%s: %d of %d scans fit into %d MB; --config.report.viewer_mb says how many may be",
            *(out / VIEWER, count, len(entries), most),
        )
    logger.info("viewer: %s", out / VIEWER)
