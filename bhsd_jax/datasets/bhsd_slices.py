"""Slice labels for BHSD's scans, which ship none, from the RSNA challenge they were taken from."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bhsd_jax.ct import geometry, nifti
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.datasets import label_tables, rsna
from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import SOME, Case

FILE = label_tables.SLICES  # in BHSD's folder, where it is read from
_LEAST = 0.99  # correlation of a slice with its original


@dataclass(frozen=True)
class Matches:
    """Rows per case in the order of its file's slices, and why other cases have none."""

    rows: dict[str, tuple[rsna.SliceRow, ...]]
    refused: dict[str, str]


def match(
    bhsd: BHSD,
    groups: Sequence[Group],
    labels: Mapping[str, rsna.SliceRow],
    *,
    compare: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Matches:
    """Finds each scan's study by patient and study, and takes its slices' labels by position.

    A study counts only if it has as many slices as the scan and, with `compare`, each slice
    correlates with its original. Of several series of a study the one that fits is taken.
    """
    by_name = defaultdict(list)
    for group in groups:
        by_name[f"{group.first.patient}_{group.first.study}"].append(group)
    matches = Matches({}, {})
    cases = list(bhsd.cases())
    for done, case in enumerate(cases, start=1):
        try:
            matches.rows[case.id] = _rows(case, by_name.get(case.id, []), labels, compare)
        except (UserError, OSError) as error:
            matches.refused[case.id] = str(error)
        progress(done, len(cases))
    return matches


def write(path: Path, rows: Mapping[str, Sequence[rsna.SliceRow]], classes: Sequence[str]) -> None:
    """Writes the table whole or not at all; slices of which nothing is known are left out."""
    table = []
    for case in sorted(rows):
        for index, row in enumerate(rows[case]):
            if row != rsna.UNKNOWN:
                union = rsna.any_bleeding([row])
                cells = ("" if value == SOME else value for value in row)
                table.append((case, index, "" if union is None else int(union), *cells))
    csv_files.write_csv(path, ("case", "slice", "any", *classes), table, line_end="\n")


def _rows(
    case: Case, groups: Sequence[Group], labels: Mapping[str, rsna.SliceRow], compare: bool
) -> tuple[rsna.SliceRow, ...]:
    if not groups:
        raise UserError("its study is not among the slices")
    assert isinstance(case.image, Path)  # of BHSD
    scan = nifti.read(case.image)
    order, flip = geometry.canonical(scan.affine)
    if order != (0, 1, 2):
        raise UserError("its axes are not in the order of BHSD's files")
    # A series' rows run to the back and its columns to the left, as canonical ones do.
    planes = geometry.turn(scan.voxels, order, flip)
    reasons = []
    for group in groups:
        series = group.as_series(case.id, uneven="resample", unshear=False)
        slices = dicom_series.order(group.slices, series).slices  # up along the normal
        if len(slices) != len(planes):
            reasons.append(f"{len(planes)} slices, but its series has {len(slices)}")
            continue
        worst = 1.0
        if compare:
            pairs = zip(planes, slices, strict=True)
            worst = min(_correlation(plane, item.file) for plane, item in pairs)
        if worst < _LEAST:
            reasons.append(f"a slice correlates with its original by {worst:.3f} only")
            continue
        rows = [labels.get(rsna.instance(item), rsna.UNKNOWN) for item in slices]
        if all(row == rsna.UNKNOWN for row in rows):
            reasons.append("the table does not have its slices")
            continue
        return tuple(reversed(rows) if flip[0] else rows)
    raise UserError("; ".join(reasons))


def _correlation(plane: np.ndarray, original: Path) -> float:
    """Of soft tissue and bone, both being clipped to -100..300 HU; 1 where both are flat."""
    voxels = slice_file.pixels(original).voxels
    if plane.shape != voxels.shape:
        return -1.0
    one, other = (np.clip(array, -100, 300).astype(np.float64).ravel() for array in (plane, voxels))
    if not one.std() or not other.std():
        return float(one.std() == other.std())
    return float(np.corrcoef(one, other)[0, 1])
