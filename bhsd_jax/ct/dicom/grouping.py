"""Slices to groups that may be a volume each; what is none is counted by its reason."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bhsd_jax.ct.dicom import passes
from bhsd_jax.ct.dicom import stack as dicom_stack
from bhsd_jax.ct.dicom.image_kind import Flaw
from bhsd_jax.ct.dicom.slice_file import Slice
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.volume import Series

_SAME_COSINE = 2e-3  # of each other: rounding to three decimals differs by one of the last
_SAME_SPACING = 5e-3  # of each other: rounding, or a reconstruction slice by slice
_OTHER_VIEW = 0.7  # cosine between normals below which one is a reformat of the other
Left = Counter[tuple[str, Flaw]]
"""How many images of a study were left out, by reason."""


@dataclass(frozen=True)
class Group:
    """Slices of one series that share orientation, matrix and pixel size; not yet ordered."""

    slices: tuple[Slice, ...]  # by file name
    findings: tuple[Finding, ...]  # what was left out of the study
    part: int = 0  # which of the groups of its files, where these hold several
    beside: tuple[Path, ...] = ()  # further files of an image that was cut into several

    @property
    def files(self) -> tuple[Path, ...]:
        """Each once; in the order of the slices."""
        return tuple(dict.fromkeys([*(item.file for item in self.slices), *self.beside]))

    @property
    def folder(self) -> Path:
        """The deepest folder that holds all its files."""
        return Path(os.path.commonpath([item.file.parent for item in self.slices]))

    @property
    def first(self) -> Slice:
        """Any of them, for what all share: patient, study, series."""
        return self.slices[0]

    def as_series(
        self,
        name: str,
        *,
        uneven: str,
        unshear: bool,
        settings: str = "config.data",
        own_slices: bool = False,
    ) -> Series:
        """What a case holds of it; `settings` is where `uneven` and `unshear` were set."""
        how = (uneven, unshear, self.findings, self.part, settings, own_slices)
        return Series(self.files, name, *how, uid=self.first.series)


def study(item: Slice) -> str:
    """What tells studies apart: the UID, or the folder where that is missing."""
    return item.study or str(item.file.parent)


def split(slices: Sequence[Slice], left: Left) -> list[Group]:
    """Groups in the order of their first slices; what is in none is added to `left`."""
    groups = []
    for group in _grouped(slices):
        flaw = group[0].flaw or _flaw_together(group)
        if flaw is None:
            groups += map(_with_remarks, _passes(group, left))
        elif flaw is Flaw.MULTI_FRAME:  # it is refused when it is read
            groups.append(Group(tuple(group), ()))
        elif flaw is not Flaw.DIRECTORY:
            left[study(group[0]), flaw] += len(group)
    return _numbered(_with_parts(groups), slices)


def _grouped(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices that may be one volume: a series, split where matrix, pixels or orientation differ.

    And where patients do: some tools give the same UIDs to all that they made anonymous.
    """
    groups: dict[tuple, list[list[Slice]]] = {}
    for item in slices:
        alone = str(item.file) if item.flaw is Flaw.MULTI_FRAME else item.container
        # Files that name no series are of one only if they lie in one folder.
        series = item.series or str(item.file.parent)
        key = (study(item), series, item.flaw, item.shape, alone, item.phase)
        for group in groups.setdefault(key, []):
            if item.flaw or _alike(item, group[0]):
                group.append(item)
                break
        else:
            groups[key].append([item])
    return [group for some in groups.values() for group in some]


def _numbered(groups: Sequence[Group], slices: Sequence[Slice]) -> list[Group]:
    """Groups of the same files told apart by their order, in which reading finds them again."""
    cut: dict[str, dict[Path, None]] = {}
    for item in slices:
        if item.part != (0, 0):
            cut.setdefault(item.container, {})[item.file] = None
    seen = Counter[frozenset[Path]]()
    out = []
    for group in groups:
        whole = replace(group, beside=tuple(cut.get(group.first.container, ())))
        files = frozenset(whole.files)
        out.append(replace(whole, part=seen[files]))
        seen[files] += 1
    return out


def _flaw_together(group: Sequence[Slice]) -> Flaw | None:
    """Why slices, each of them good, are no volume."""
    if len(group) < 2:
        return Flaw.ALONE
    places = dicom_stack.along_normal(group)
    # A timing bolus, for one, or the same localizer with several lines drawn into it.
    return Flaw.PLACE if np.ptp(places) < dicom_stack.SAME_MM else None


def _passes(slices: Sequence[Slice], left: Left) -> list[Group]:
    """One group; or one per pass, where several went over the same stretch."""
    parts = []
    for part in passes.tell_apart(slices):
        if flaw := _flaw_together(part):
            left[study(part[0]), flaw] += len(part)
        else:
            parts.append(part)
    if len(parts) < 2:
        return [Group(tuple(part), ()) for part in parts]
    text = f"{len(parts)} acquisitions or reconstructions of one series: a volume each"
    found = (Finding(Kind.ACQUISITIONS, "kept", text),)
    return [Group(tuple(part), found) for part in parts]


def _with_remarks(group: Group) -> Group:
    if not all(item.derived for item in group.slices):
        return group
    text = "images derived from others: a reformat, perhaps, whose original lies beside it"
    return replace(group, findings=(*group.findings, Finding(Kind.DERIVED, "kept", text)))


def _with_parts(groups: Sequence[Group]) -> list[Group]:
    """Says of a series that was cut in pieces: each has a part of the head, and of its bleeds."""
    parts: dict[tuple[str, ...], list[Slice]] = {}
    for group in groups:
        parts.setdefault(_scanned(group.first), []).append(group.first)
    out = []
    for group in groups:
        pieces = parts[_scanned(group.first)]
        if group.first.series and any(not _are_no_pieces(pieces[0], piece) for piece in pieces):
            text = (
                f"one of {len(pieces)} volumes of its series, which differ in orientation, matrix "
                "or pixel size: each may have a part of the head, so look at all of them"
            )
            found = Finding(Kind.SERIES_PARTS, "kept", text)
            group = replace(group, findings=(*group.findings, found))
        out.append(group)
    return out


def _scanned(item: Slice) -> tuple[str, ...]:
    return study(item), item.series, item.patient


def _are_no_pieces(one: Slice, other: Slice) -> bool:
    """Whether two slices are no pieces of one scan: on one grid, or seen from another side."""
    if one.flaw or other.flaw:
        return True
    across, beside = (np.cross(item.along_row, item.along_column) for item in (one, other))
    turned = abs(float(across @ beside)) < _OTHER_VIEW
    return turned or (one.shape == other.shape and _alike(one, other))


def _alike(one: Slice, other: Slice) -> bool:
    turned = np.subtract(one.along_row + one.along_column, other.along_row + other.along_column)
    wider = np.divide(one.spacing_mm, other.spacing_mm) - 1
    if len({one.patient, other.patient} - {""}) > 1:
        return False
    return bool(np.abs(turned).max() < _SAME_COSINE and np.abs(wider).max() < _SAME_SPACING)
