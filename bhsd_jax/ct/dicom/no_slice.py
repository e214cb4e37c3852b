"""Files beside a series that are no DICOM but look as if they had been slices of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.defects import Finding, Kind

_ENDINGS = (".dcm", ".dicom", ".ima")  # nothing but DICOM has them


def with_findings(group: Group, others: Mapping[Path, Sequence[Path]]) -> Group:
    """The group, with a finding if there are such files in the folders of its slices.

    A slice that was overwritten or never arrived in full is no DICOM. In the middle of a series
    it leaves a gap, which is refused; at an end nothing else tells of it.

    Args:
        group: Of slices.
        others: Files that are no DICOM, by their folders.
    """
    named = {(path.parent, _form(path.name)) for path in group.files}
    folders = {folder for folder, _ in named}
    lost = [
        path
        for folder in folders
        for path in others.get(folder, ())
        if (folder, _form(path.name)) in named or path.suffix.lower() in _ENDINGS
    ]
    if not lost:
        return group
    first = sorted([*group.files, *lost]).index(min(lost)) + 1
    text = (
        f"{len(lost)} named like slices but no DICOM, the first is file {first} in the order of "
        "names: look at it; if it was a slice, fetch the series again, for the scan lacks it"
    )
    return replace(group, findings=(*group.findings, Finding(Kind.NO_DICOM, "kept", text)))


def _form(name: str) -> str:
    """The name without its numbers, which are what differs from slice to slice."""
    return re.sub(r"[0-9]+", "#", name)
