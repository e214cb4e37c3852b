"""Scores as other papers and challenges define them, beside the headline's; on request.

A column is named for the code whose number it is: `medpy_hd95_mm` is another quantity than
`monai_hd95_mm` and than the headline's `hd95_mm`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.metrics import brats, lesion, panoptic, raters, surface
from bhsd_jax.metrics.scores import Label
from bhsd_jax.platform import csv_files
from bhsd_jax.volume import Millimeters

ALL = "all"  # every class at once, in the rows of `raters` of a label map with several


@dataclass(frozen=True)
class Also:
    """The further scores that are asked for, and their settings."""

    names: tuple[str, ...] = ()  # of `settings.Evaluate.also`
    brats_dilation: int = 3
    brats_least_mm3: float = 50.0


@dataclass(frozen=True)
class AlsoScore:
    """One case and class; `values` by column, NaN where not defined."""

    case: str
    patient: str
    name: str  # of the class
    values: Mapping[str, float] = field(default_factory=dict)


def of_masks(
    reference: lesion.Mask, predicted: lesion.Mask, spacing_mm: Millimeters, wanted: Also
) -> dict[str, float]:
    """Columns of one pair of masks."""
    found: dict[str, float] = {}
    if "monai" in wanted.names:
        edges = surface.edge_distances(reference, predicted, spacing_mm)
        found["monai_hd95_mm"] = surface.edge_hausdorff(edges, 95)
    if "medpy" in wanted.names:
        found |= medpy(reference, predicted, spacing_mm)
    if "brats" in wanted.names:
        lesions = brats.lesion_wise(
            reference,
            predicted,
            spacing_mm,
            dilation=wanted.brats_dilation,
            least_mm3=wanted.brats_least_mm3,
        )
        found |= _columns("brats_lesion", lesions)
    if "panoptica" in wanted.names:
        found |= _columns("panoptica", panoptic.panoptic_quality(reference, predicted))
    return found


def medpy(
    reference: lesion.Mask, predicted: lesion.Mask, spacing_mm: Millimeters
) -> dict[str, float]:
    """HD95, ASD and ASSD in mm, over edge voxels that count the same; NaN if a mask is empty.

    HD95 pools the distances of both directions before it takes their percentile, and ASSD before it
    takes their mean; up to medpy 0.4 that was the mean of both directions' means, `assd_0_4`. ASD
    goes from the prediction to the reference. medpy itself refuses empty masks; SSL4MIS counts them
    as 0.

    Source: medpy 0.5.2 (and 0.4.0), `metric.binary.hd95`, `asd(result, reference)`, `assd`.
    """
    edges = surface.edge_distances(reference, predicted, spacing_mm, single=False)
    if any(edges.empty):
        names = ("hd95", "asd", "assd", "assd_0_4")
        return {f"medpy_{name}_mm": math.nan for name in names}
    pooled = np.concatenate([edges.to_predicted_mm, edges.to_reference_mm])
    return {
        "medpy_hd95_mm": float(np.percentile(pooled, 95)),
        "medpy_asd_mm": surface.average_distance(edges)[1],
        "medpy_assd_mm": surface.average_symmetric_distance(edges),
        "medpy_assd_0_4_mm": sum(surface.average_distance(edges)) / 2,
    }


def of_raters(
    references: Sequence[Label], answers: Sequence[Label], *, multiclass: bool = False
) -> dict[str, float]:
    """Columns of several raters' label maps and one or more answers."""
    found = raters.agreement(references, answers, multiclass=multiclass)
    plain = dataclasses.asdict(found)
    each = plain.pop("dice_each")
    return {f"mbhseg_{name}": value for name, value in plain.items()} | {
        "mbhseg_dice_each_mean": float(np.mean(each))
    }


def write_csv(path: Path, rows: Sequence[AlsoScore]) -> None:
    """A line per case and class, a column per score."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = (
        [row.case, row.patient, row.name, *(row.values.get(name, math.nan) for name in names)]
        for row in rows
    )
    csv_files.write_csv(path, ["case", "patient", "class", *names], lines)


def summarize(rows: Iterable[AlsoScore]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean by class and column over the cases where it is defined, and how many those are."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for column, value in row.values.items():
            values.setdefault(row.name, {}).setdefault(column, []).append(value)
    return {
        name: {column: _mean(numbers) for column, numbers in columns.items()}
        for name, columns in values.items()
    }


def lines(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The summary as text: a line per class and score."""
    return [
        f"{name:<14}{column:<24}"
        + (f"{part['mean']:>10.3f}  (n={part['n']})" if part["n"] else "   not defined (n=0)")
        for name, columns in found.items()
        for column, part in columns.items()
    ]


def _mean(numbers: Sequence[float]) -> dict[str, Any]:
    defined = [number for number in numbers if math.isfinite(number)]
    return {"mean": float(np.mean(defined)) if defined else math.nan, "n": len(defined)}


def _columns(prefix: str, found: Any) -> dict[str, float]:
    return {f"{prefix}_{name}": float(value) for name, value in dataclasses.asdict(found).items()}
