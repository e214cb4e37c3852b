"""The scores of cases in the schema of nnU-Net's summary.json, for tools that read it.

Source: nnU-Net v2.8.1, `compute_metrics_on_folder`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.labels import Labels
from bhsd_jax.metrics.scores import ClassScore
from bhsd_jax.platform import files

_METRICS = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")


@dataclass(frozen=True)
class CaseFiles:
    """One case: its two label maps, how many voxels count, and its rows by class or region."""

    reference: str
    prediction: str
    voxels: int  # that the reference annotates
    rows: Mapping[str, ClassScore]


def make(cases: Sequence[CaseFiles], labels: Labels) -> dict[str, Any]:
    """Metrics per case, their means over cases where they are defined, and over all targets.

    What is not defined is NaN, as there.
    """
    keys = {name: _key(values, name in labels.listed) for name, values in labels.targets}
    per_case = [
        {
            "metrics": {key: _metrics(case.rows[name], case.voxels) for name, key in keys.items()},
            "prediction_file": case.prediction,
            "reference_file": case.reference,
        }
        for case in cases
    ]
    mean = {
        key: {m: _mean([one["metrics"][key][m] for one in per_case]) for m in _METRICS}
        for key in keys.values()
    }
    foreground = {m: float(np.mean([one[m] for one in mean.values()])) for m in _METRICS}
    return {"foreground_mean": foreground, "mean": mean, "metric_per_case": per_case}


def write(path: Path, cases: Sequence[CaseFiles], labels: Labels) -> None:
    """Writes it as nnU-Net does: sorted, with NaN for what is not defined.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    files.write_text(path, json.dumps(make(cases, labels), indent=4, sort_keys=True))


def _key(values: tuple[int, ...], listed: bool) -> str:
    """A label as Python writes what dataset.json has; `3` and `[3]` are two keys."""
    return str(values[0]) if len(values) == 1 and not listed else str(values)


def _metrics(row: ClassScore, voxels: int) -> dict[str, float]:
    return {
        "Dice": row.dice,
        "FN": row.fn,
        "FP": row.fp,
        "IoU": row.iou,
        "TN": voxels - row.tp - row.fp - row.fn,
        "TP": row.tp,
        "n_pred": row.voxels_pred,
        "n_ref": row.voxels_ref,
    }


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
