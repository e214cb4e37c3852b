"""Means over rows per case and class, under named conventions, with intervals.

The conventions differ in what a case counts whose reference has no voxel of the class:

| name | both empty | only the reference empty |
|---|---|---|
| `nnunet` | left out | 0 |
| `present` | left out | left out |
| `both-empty=1` | 1 | 0 |
| `pooled` | one Dice from the voxels of all cases together |||

For a rare class they differ by tens of points, so no number goes without its convention's name.
Case Dice is averaged over cases, then over the classes where it is defined.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bhsd_jax.metrics.overlap import rate
from bhsd_jax.metrics.scores import ClassScore

CONVENTIONS = ("nnunet", "present", "pooled", "both-empty=1")
_LEVEL = (2.5, 97.5)  # percentiles: a 95 % interval
_Table = Float[np.ndarray, "cases classes"]
_Draws = Int[np.ndarray, "resamples patients"]


@dataclass(frozen=True)
class Mean:
    """A mean Dice, its 95 % interval, and what it stands on. NaN where nothing is defined."""

    dice: float
    low: float
    high: float
    n: int  # cases that count; for the mean over classes: classes
    # In the mean over classes these two are sums over the classes: they count pairs (case, class).
    n_present: int  # cases with the class in the reference
    n_false_positive: int  # cases without it where it was predicted


@dataclass(frozen=True)
class _Voxels:
    """Counts of all cases and classes, and which patient each case is of."""

    tp: _Table
    predicted: _Table
    reference: _Table
    patient: Int[np.ndarray, " cases"]


def summarize(
    rows: Sequence[ClassScore], classes: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict[str, Mean]]:
    """Mean per convention and foreground class, and over classes under the key "mean".

    A class without any case is NaN with n = 0. Intervals are percentiles over resamples of
    patients, all cases of a patient together, the same draws for all classes and conventions; of
    what counts in a single patient there is none (NaN). The mean over classes leaves out, in every
    resample, the classes that are not defined in it.

    Args:
        rows: In any order; a pair of case and class that is missing counts as empty in both.
        classes: Foreground only, in the order of the result.
        resamples: 0 gives NaN for the limits.
        seed: Of the resamples.

    Raises:
        ValueError: If a row is of another class, or comes twice.
    """
    voxels = _tabulate(rows, classes)
    draws = _draw(voxels.patient, resamples, seed)
    return {name: _summarize(name, voxels, classes, draws) for name in CONVENTIONS}


def resampled(
    rows: Sequence[ClassScore], classes: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict[str, Float[np.ndarray, " draws"]]]:
    """Mean Dice by convention and class (and "mean") of the sample, then of every resample.

    Two predictions of the same scans meet the same resamples of patients, so that their
    difference in each of them is that of a paired comparison. Resamples of what counts in a single
    patient are NaN.

    Raises:
        ValueError: If a row is of another class, or comes twice.
    """
    voxels = _tabulate(rows, classes)
    draws = _draw(voxels.patient, resamples, seed)
    return {name: _values(name, voxels, classes, draws)[0] for name in CONVENTIONS}


def measures(rows: Sequence[ClassScore], classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per foreground class what is not Dice: distances, volumes, lesions.

    HD95 is over the cases where both masks have voxels, `hd95_missed` counts those where only one
    has. Volume errors are over all cases, lesions pooled over all cases. Sensitivity is a share of
    the reference's lesions and precision of the predicted ones; F1 is of found, missed and made-up
    lesions, as challenges count.
    """
    return {name: _measures([row for row in rows if row.name == name]) for name in classes}


def _tabulate(rows: Sequence[ClassScore], classes: Sequence[str]) -> _Voxels:
    patient_of = {row.case: row.patient for row in rows}
    line = {case: index for index, case in enumerate(sorted(patient_of))}
    column = {name: index for index, name in enumerate(classes)}
    tables = {key: np.zeros((len(line), len(column))) for key in ("tp", "predicted", "reference")}
    seen = set()
    for row in rows:
        if row.name not in column or (row.case, row.name) in seen:
            problem = "comes twice" if row.name in column else f"is not one of {tuple(classes)}"
            raise ValueError(f"summary: case {row.case}, class {row.name!r}: {problem}")
        seen.add((row.case, row.name))
        at = line[row.case], column[row.name]
        tables["tp"][at] = row.tp
        tables["predicted"][at] = row.voxels_pred
        tables["reference"][at] = row.voxels_ref
    patients = [patient_of[case] for case in line]
    _, numbers = np.unique(np.array(patients, dtype=str), return_inverse=True)
    return _Voxels(**tables, patient=numbers.astype(np.int64))


def _draw(patient: Int[np.ndarray, " cases"], resamples: int, seed: int) -> _Draws:
    """How often each patient is in each resample; the first line is the sample itself."""
    patients = int(patient.max()) + 1 if patient.size else 0
    draws = np.ones((1 + resamples, patients), np.int64)
    if patients:
        share = np.full(patients, 1 / patients)
        draws[1:] = np.random.default_rng(seed).multinomial(patients, share, size=resamples)
    return draws


def _summarize(
    convention: str, voxels: _Voxels, classes: Sequence[str], draws: _Draws
) -> dict[str, Mean]:
    values, counted = _values(convention, voxels, classes, draws)
    present = (voxels.reference > 0).sum(0)
    false = ((voxels.reference == 0) & (voxels.predicted > 0)).sum(0)
    means = {
        name: _mean(values[name], counted[:, i].sum(), present[i], false[i])
        for i, name in enumerate(classes)
    }
    classes_defined = sum(bool(np.isfinite(values[name][0])) for name in classes)
    means["mean"] = _mean(values["mean"], np.int64(classes_defined), present.sum(), false.sum())
    return means


def _values(
    convention: str, voxels: _Voxels, classes: Sequence[str], draws: _Draws
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mean Dice of every resample by class and over classes, and which cases count."""
    above, below, counted = _terms(convention, voxels)
    values = _ratio(draws @ _per_patient(above, voxels), draws @ _per_patient(below, voxels))
    defined = np.isfinite(values)
    over_classes = _ratio(np.where(defined, values, 0).sum(1), defined.sum(1))
    # Resampling a single patient gives that patient every time: there is no interval, not one of 0.
    counting = _per_patient(counted.astype(float), voxels) > 0
    values[1:, counting.sum(0) < 2] = math.nan
    if counting.any(1).sum() < 2:
        over_classes[1:] = math.nan
    return {name: values[:, i] for i, name in enumerate(classes)} | {"mean": over_classes}, counted


def _terms(convention: str, voxels: _Voxels) -> tuple[_Table, _Table, np.ndarray]:
    """What to add up over cases above and below the line, and which cases count."""
    total = voxels.predicted + voxels.reference
    dice = _ratio(2 * voxels.tp, total)
    match convention:
        case "pooled":
            return 2 * voxels.tp, total, total > 0
        case "nnunet":
            counted = total > 0
        case "present":
            counted = voxels.reference > 0
        case _:
            counted = np.ones_like(total, bool)
            dice = np.where(total > 0, dice, 1.0)
    return np.where(counted, dice, 0.0), counted.astype(float), counted


def _per_patient(table: _Table, voxels: _Voxels) -> np.ndarray:
    patients = int(voxels.patient.max()) + 1 if voxels.patient.size else 0
    sums = np.zeros((patients, table.shape[1]))
    np.add.at(sums, voxels.patient, table)
    return sums


def _mean(values: np.ndarray, n: np.integer, n_present: np.integer, n_false: np.integer) -> Mean:
    """The first value is the sample's own, the others are of its resamples."""
    defined = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(defined, _LEVEL) if defined.size else (math.nan, math.nan)
    return Mean(float(values[0]), float(low), float(high), int(n), int(n_present), int(n_false))


def _measures(rows: Sequence[ClassScore]) -> dict[str, Any]:
    hd95 = np.array([row.hd95_mm for row in rows])
    nsd = np.array([row.nsd for row in rows])
    error = np.array([row.volume_error_ml for row in rows])
    relative = np.array([row.relative_volume_error for row in rows])
    both = hd95[np.isfinite(hd95)]
    hit, false = sum(r.lesions_hit for r in rows), sum(r.lesions_false for r in rows)
    drawn = sum(r.lesions_pred for r in rows)
    lesions, small = sum(r.lesions_ref for r in rows), sum(r.small_lesions_ref for r in rows)
    return {
        "hd95_mm_median": _or_nan(np.median, both),
        "hd95_mm_mean": _or_nan(np.mean, both),
        "hd95_n": both.size,
        "hd95_missed": int(np.isinf(hd95).sum()),
        "nsd_mean": _or_nan(np.mean, nsd[np.isfinite(nsd)]),
        "nsd_n": int(np.isfinite(nsd).sum()),
        "abs_volume_error_ml_mean": _or_nan(np.mean, np.abs(error)),
        "volume_bias_ml_mean": _or_nan(np.mean, error),
        "relative_volume_error_median": _or_nan(np.median, relative[np.isfinite(relative)]),
        "lesions_ref": lesions,
        "lesions_hit": hit,
        "lesions_false": false,
        "lesion_sensitivity": rate(hit, lesions),
        "lesion_precision": rate(drawn - false, drawn),
        "lesion_f1": rate(2 * hit, lesions + hit + false),
        "small_lesions_ref": small,
        "small_lesion_sensitivity": rate(sum(r.small_lesions_hit for r in rows), small),
    }


def _or_nan(reduce: Any, values: np.ndarray) -> float:
    return float(reduce(values)) if values.size else math.nan


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    nothing = np.full(np.broadcast_shapes(above.shape, below.shape), math.nan)
    return np.divide(above, below, out=nothing, where=below > 0)


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested mapping with None for NaN, which JSON does not have; in its lists, too."""
    return {key: _without_nan(value) for key, value in values.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_nan(value)
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
