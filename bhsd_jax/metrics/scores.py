"""Every measure of one case and class as a row, and rows as a CSV file."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from bhsd_jax.labels import Labels
from bhsd_jax.metrics import lesion, overlap, surface
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Millimeters, cropped_alike

Label = UInt8[np.ndarray, "_ _ _"]  # shapes are compared in `overlap`

_RENAMED = {"name": "class"}  # a keyword of the language


@dataclass(frozen=True)
class ClassScore:
    """One case and class; the fields are the columns of `cases.csv`. NaN where not defined."""

    case: str
    patient: str
    name: str  # of the class; the column is `class`
    voxels_ref: int
    voxels_pred: int
    tp: int
    fp: int
    fn: int
    dice: float
    iou: float
    sensitivity: float
    precision: float
    hd95_mm: float  # inf if one mask is empty
    nsd: float
    volume_ref_ml: float
    volume_pred_ml: float
    volume_error_ml: float  # predicted minus reference
    relative_volume_error: float  # without sign, of the reference: the RVD of INSTANCE 2022
    lesions_ref: int
    lesions_pred: int
    lesions_hit: int  # of lesions_ref
    lesions_false: int  # of lesions_pred
    small_lesions_ref: int  # below 1 mL
    small_lesions_hit: int
    tilt_corrected: int = 0  # 1: mL, and with them the sizes of lesions, are the affine's times
    # the cosine of the gantry's tilt; older tables do not have the column


@dataclass(frozen=True)
class Scan:
    """What is known of the scan two label maps belong to."""

    case: str
    patient: str
    spacing_mm: Millimeters
    voxel_ml: float
    tilt_corrected: bool = False  # it is the affine's times the cosine of the gantry's tilt


def score(
    reference: Label, predicted: Label, scan: Scan, classes: Sequence[str], nsd_mm: float
) -> list[ClassScore]:
    """One row per foreground class; `classes` has the background first.

    Raises:
        ValueError: If the shapes differ, or a label is not an index of `classes`.
    """
    counts = overlap.count(reference, predicted, len(classes))
    return [
        _row(reference == index, predicted == index, counts[index], scan, name, nsd_mm)
        for index, name in enumerate(classes)
        if index
    ]


def score_targets(
    reference: Label, predicted: Label, scan: Scan, labels: Labels, nsd_mm: float
) -> list[ClassScore]:
    """One row per class or region, over the voxels that the reference annotates.

    Raises:
        ValueError: If the shapes differ.
    """
    seen = labels.annotated(reference)
    counts = overlap.count_targets(reference, predicted, labels)
    masks = zip(labels.masks(reference), labels.masks(predicted), strict=True)
    return [
        _row(truth & seen, guess & seen, each, scan, name, nsd_mm)
        for (truth, guess), each, (name, _) in zip(masks, counts, labels.targets, strict=True)
    ]


def _row(
    reference: surface.Mask,
    predicted: surface.Mask,
    counts: overlap.Counts,
    scan: Scan,
    name: str,
    nsd_mm: float,
) -> ClassScore:
    reference, predicted = cropped_alike(reference, predicted)
    distances = surface.element_distances(reference, predicted, scan.spacing_mm)
    # `voxel_ml` is of the voxel as it was, tilted gantry and all.
    reference_ml, predicted_ml = (n * scan.voxel_ml for n in (counts.reference, counts.predicted))
    error_ml = predicted_ml - reference_ml
    lesions = lesion.detect(reference, predicted, scan.voxel_ml)
    small_hit, small = lesions.recall_below(lesion.SMALL_ML)
    return ClassScore(
        case=scan.case,
        patient=scan.patient,
        name=name,
        voxels_ref=counts.reference,
        voxels_pred=counts.predicted,
        tp=counts.tp,
        fp=counts.fp,
        fn=counts.fn,
        dice=counts.dice,
        iou=counts.iou,
        sensitivity=counts.sensitivity,
        precision=counts.precision,
        hd95_mm=surface.hd95_mm(distances),
        nsd=surface.surface_dice(distances, nsd_mm),
        volume_ref_ml=reference_ml,
        volume_pred_ml=predicted_ml,
        volume_error_ml=error_ml,
        relative_volume_error=overlap.rate(abs(error_ml), reference_ml),
        lesions_ref=len(lesions.hit),
        lesions_pred=len(lesions.real),
        lesions_hit=lesions.tp,
        lesions_false=lesions.fp,
        small_lesions_ref=small,
        small_lesions_hit=small_hit,
        tilt_corrected=int(scan.tilt_corrected),
    )


def write_csv(path: Path, rows: Iterable[ClassScore]) -> None:
    """Writes one line per row; floats with all their digits, `nan` and `inf` as such."""
    names = [field.name for field in dataclasses.fields(ClassScore)]
    columns = [_RENAMED.get(name, name) for name in names]
    csv_files.write_csv(path, columns, ([getattr(row, name) for name in names] for row in rows))


def read_csv(path: Path) -> list[ClassScore]:
    """Undoes `write_csv`.

    Raises:
        ValueError: If it is no such table: a column is missing, or a value is no number.
    """
    with path.open(newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            lines, columns = list(reader), reader.fieldnames or ()
        except csv.Error as error:
            raise UserError(f"{path}: damaged ({error}); run the verb `evaluate` again") from error
    fields = [
        (f.name, _RENAMED.get(f.name, f.name), f.type) for f in dataclasses.fields(ClassScore)
    ]
    older = {name for name in ("tilt_corrected",) if name not in columns}
    fields = [field for field in fields if field[0] not in older]
    missing = [column for _, column, _ in fields if column not in columns]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; write it with `evaluate`")
    kinds = {str: str, int: int, float: float}
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append(
                ClassScore(**{name: kinds[kind](line[column]) for name, column, kind in fields})
            )  # pyright: ignore
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: damaged (line {number}: {error}); run the verb `evaluate` again"
            ) from error
    return rows
