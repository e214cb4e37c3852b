"""The integrity table: what lies in a data set, case by case and in sum."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bhsd_jax.ct.geometry import LEAST_TILT_DEG
from bhsd_jax.ct.integrity.doctor import Group
from bhsd_jax.ct.prepared import Facts

_ORDER = ("train", "val", "test", "unlabeled")
_MEASURES = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


def rows(facts: Iterable[Facts], classes: Sequence[str]) -> list[dict[str, Any]]:
    """One flat row per case; cells of a class are empty where there is no mask."""
    return [_row(fact, classes) for fact in facts]


def summary(
    facts: Sequence[Facts], classes: Sequence[str], defects: Sequence[Group]
) -> dict[str, Any]:
    """Counts, volumes, geometry and defects, per split where that matters."""
    splits = sorted({fact.split for fact in facts}, key=_ORDER.index)
    tilts = [abs(fact.tilt_deg) for fact in facts]
    tilted = [angle for angle in tilts if angle > LEAST_TILT_DEG]
    refused = {case for found in defects if found.done == "refused" for case in found.cases}
    return {
        "cases": len(facts),
        "skipped": len(refused),
        "splits": {s: _split([f for f in facts if f.split == s], classes) for s in splits},
        "spacing_mm": _quantiles([fact.spacing_mm for fact in facts]),
        "shape": _quantiles([fact.shape for fact in facts]),  # of the crop
        "field_mm": _quantiles([fact.field_mm for fact in facts]),
        "intensity": _quantiles([fact.intensity for fact in facts]),  # minimum, median, maximum
        "tilted": len(tilted),
        "tilt_deg": _quantiles(tilted),
        "tilt_corrected": sum(fact.tilt_corrected for fact in facts),
        "defects": [_defect(found) for found in defects],
    }


def defect_rows(defects: Sequence[Group]) -> list[dict[str, Any]]:
    """One flat row per finding."""
    return [
        {"defect": finding.kind, "done": finding.done, "case": finding.case, "text": finding.text}
        for found in defects
        for finding in found.findings
    ]


def _row(fact: Facts, classes: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": fact.case,
        "patient": fact.patient,
        "split": fact.split,
        "bleeding": "" if fact.bleeding is None else int(fact.bleeding),
        "shape": "x".join(map(str, fact.shape)),
        "spacing_mm": "x".join(f"{value:.5g}" for value in fact.spacing_mm),
        "field_mm": "x".join(f"{value:.5g}" for value in fact.field_mm),
        "tilt_deg": round(fact.tilt_deg, 3),
        "tilt_corrected": int(fact.tilt_corrected),
    }
    row |= dict(zip(("minimum", "median", "maximum"), fact.intensity, strict=True))
    for index, name in enumerate(classes[1:], start=1):
        row[f"voxels_{name}"] = fact.voxels[index] if fact.voxels else ""
        row[f"ml_{name}"] = round(fact.volume_ml[index], 4) if fact.voxels else ""
    return row | {"warnings": "; ".join(fact.warnings)}


def _split(facts: Sequence[Facts], classes: Sequence[str]) -> dict[str, Any]:
    labeled = [fact for fact in facts if fact.voxels]
    found = {}
    for index, name in enumerate(classes[1:], start=1):
        present = [fact for fact in labeled if fact.voxels[index]]
        volumes = [fact.volume_ml[index] for fact in present]
        found[name] = {
            "cases": len(present),
            "voxels": sum(fact.voxels[index] for fact in present),
            "ml": float(sum(volumes)),
            "median_ml": float(np.median(volumes)) if volumes else 0.0,
        }
    return {
        "cases": len(facts),
        "patients": len({fact.patient for fact in facts}),
        "labeled": len(labeled),
        "bleeding": sum(fact.bleeding is True for fact in facts),
        "nonbleeding": sum(fact.bleeding is False for fact in facts),
        "classes": found if labeled else {},
    }


def _defect(found: Group) -> dict[str, Any]:
    return {
        "defect": found.kind,
        "done": found.done,
        "cases": list(found.cases),
        "findings": [finding.text for finding in found.findings],
    }


def _quantiles(values: Sequence[Any]) -> dict[str, Any]:
    if not values:
        return {}
    table = np.asarray(values, np.float64)
    return {n: np.round(np.percentile(table, q, axis=0), 5).tolist() for n, q in _MEASURES.items()}
