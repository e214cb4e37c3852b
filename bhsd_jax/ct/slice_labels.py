"""What is known of each slice of a prepared scan, class by class."""

import math
from pathlib import Path

import numpy as np

from bhsd_jax.ct.resample import nearest_index, separate_axis
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.volume import Case, Grid

_CLEARLY = 4  # slices


def of_case(
    case: Case, grid: Grid, label: np.ndarray | None, num_classes: int
) -> tuple[tuple[int, ...], ...] | None:
    """Rows per prepared slice: the case's own; else what its prepared mask shows.

    Without either, a scan known not to bleed shows nothing in any slice; of one known to bleed no
    slice is known. What the scan is known to lack, no slice shows.
    """
    given = align(case, grid, num_classes)
    if given is None and label is not None:
        shown = [(label == index).any(axis=(1, 2)) for index in range(1, num_classes)]
        return tuple(zip(*(column.astype(int).tolist() for column in shown), strict=True))
    if given is None and case.bleeding is False:
        return ((0,) * (num_classes - 1),) * grid.shape[0]
    if not case.absent:
        return given
    rows = given or ((-1,) * (num_classes - 1),) * grid.shape[0]
    return tuple(
        tuple(0 if k in case.absent and value != 1 else value for k, value in enumerate(row, 1))
        for row in rows
    )


def bleeding(case: Case, label: np.ndarray | None, modality: str, depth: int) -> bool | None:
    """Whether a scan of so many slices bleeds, by its mask, what is known of it, or of its slices.

    A mask of MR tells nothing.

    Raises:
        Refusal: If the mask contradicts what is known of the scan.
    """
    if label is not None and case.bleeding not in (None, bool(label.any())):
        if case.bleeding:
            kind, said, known = Kind.MASK_EMPTY_BLEEDS, "mask is empty, but", "bleed"
        else:
            kind, said, known = Kind.MASK_OF_NO_BLEED, "mask outlines bleeding, but", "not bleed"
        # The mask of a series may be called as its patient.
        in_files = isinstance(case.image, Path) and isinstance(case.label, Path)
        place = case.label if in_files else case.id
        raise Refusal(
            kind,
            f"{place}: the {said} the scan is known to {known}; some mirrors ship other masks "
            "than the data set's first source: fetch it there, or correct the table of scans",
        )
    if label is not None and modality != "mr":
        return bool(label.any())
    rows = case.slice_labels
    if case.bleeding is not None or rows is None:
        return case.bleeding
    if any(max(row) > 0 for row in rows):
        return True
    return False if len(rows) == depth and all(set(row) == {0} for row in rows) else None


def doubts(case: Case, grid: Grid, label: np.ndarray | None) -> list[Finding]:
    """What is odd about a case's own slice labels; `label` is its mask [D H W], as in the file.

    Readers disagree about single slices, so that labels are doubted only where their order turned
    around agrees with the mask in several slices more.
    """
    if case.slice_labels is None:
        return []
    if grid.order[0] != 0:
        text = (
            "its slice labels are not used: they are of axial slices, which are not the slices of "
            "the file; store it slice by slice"
        )
        return [Finding(Kind.SLICE_LABELS_UNUSED, "kept", text)]
    if label is None:
        return []
    rows = [*case.slice_labels, *[(-1,)] * (len(label) - len(case.slice_labels))]
    bleeds = np.array([1 if max(row) > 0 else 0 if set(row) == {0} else -1 for row in rows])
    shown = label.any((1, 2)).astype(int)
    agreed, turned = (int((some == shown).sum()) for some in (bleeds, bleeds[::-1]))
    if turned - agreed < _CLEARLY:
        return []
    text = (
        f"its slice labels agree with its mask in {agreed} of {len(label)} slices, and turned "
        f"around in {turned}: does the table count from the other end? Slice 0 is the first of the "
        "file"
    )
    return [Finding(Kind.SLICE_LABELS_TURNED, "kept", text)]


def require_agreeing(case: Case, depth: int) -> None:
    """Refuses slice labels that contradict what is known of a scan without a mask.

    Raises:
        Refusal: Says which of them say what.
    """
    rows = case.slice_labels
    if rows is None or case.label is not None:
        return
    shown = [k for k, row in enumerate(rows) if max(row) > 0]
    lacking = [k for k, row in enumerate(rows) if any(row[c - 1] == 1 for c in case.absent)]
    # A slice of a series that bleeds may be damaged and left out.
    whole = isinstance(case.image, Path) and len(rows) == depth
    if case.bleeding is False and shown:
        known, said = "not to bleed", f"slice {shown[0]} of it bleeds"
    elif case.bleeding and whole and all(set(row) == {0} for row in rows):
        known, said = "to bleed", "none of its slices does"
    elif lacking:
        known, said = "to lack a class", f"slice {lacking[0]} of it shows that class"
    else:
        return
    raise Refusal(
        Kind.BLEEDS_AND_NOT,
        f"{case.id}: is known {known}, as by the folder it lies in or a table of scans, and by its "
        f"slice labels {said}; correct one of them",
    )


def align(case: Case, grid: Grid, num_classes: int) -> tuple[tuple[int, ...], ...] | None:
    """One row per prepared slice, from the native slices that it comes from.

    Thick slices are taken as they are, each from the nearest, and so are their rows. Where slices
    are interpolated, one lacks a class if all it comes from do, and shows one if the nearest does;
    else nothing is known. None where the prepared slices do not run along the file's.

    Raises:
        Refusal: If there are more rows than slices, or a row is not one value per class.
    """
    if case.slice_labels is None or grid.order[0] != 0:
        return None
    rows, depth = list(case.slice_labels), grid.native_shape[0]
    if len(rows) > depth or any(len(row) != num_classes - 1 for row in rows):
        raise Refusal(
            Kind.SLICE_LABELS,
            f"{case.id}: slice labels do not fit: {len(rows)} rows for {depth} slices, "
            f"{len(rows[0])} columns for {num_classes - 1} foreground classes; slices are counted "
            "from 0, the first of the file",
        )
    rows += [(-1,) * (num_classes - 1)] * (depth - len(rows))
    if grid.flip[0]:
        rows.reverse()
    table = np.asarray(rows[grid.crop_start[0] : grid.crop_stop[0]])
    nearest = table[nearest_index(len(table), grid.shape[0])]
    if separate_axis(grid.native_spacing_mm, grid.spacing_mm) == 0:
        return tuple(tuple(row) for row in nearest.tolist())
    step = len(table) / grid.shape[0]  # native slices per prepared one
    found = []
    for i in range(grid.shape[0]):
        center = (i + 0.5) * step - 0.5  # in native slices
        reach = max(1.0, step / 2)
        low = max(0, math.floor(center - reach + 1e-6) + 1)
        high = min(len(table), math.ceil(center + reach - 1e-6))
        none = (table[low:high] == 0).all(0)
        row = np.where(nearest[i] > 0, nearest[i], np.where(none, 0, -1))
        found.append(tuple(map(int, row)))
    return tuple(found)
