"""What is wrong with a data set, and what was done about it: from what a first pass has learned.

Readers and repairs say in words what they met; here those words become `Finding`s, alike for all
scans that have the defect.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bhsd_jax.ct.prepare import Facts
from bhsd_jax.volume import Finding

_HEAD_MM = ((80.0, 300.0), (120.0, 400.0), (120.0, 400.0))  # of head CT: D, H, W; BHSD: 91..350

_MET = (  # words of a repair or a reader, the defect, what was done
    (r"^12-bit overflow", "12-bit overflow", "repaired"),
    (r"^16-bit wrap", "16-bit wrap of metal", "repaired"),
    (r"^clipped .*: [1-9]\d* voxels below", "padding below -1024 HU", "repaired"),
    (r"^clipped .*, [1-9]\d* above", "metal beyond 3071 HU", "repaired"),
    (r"^scale factors", "HU behind scale factors", "repaired"),
    (r"^scale factor .* ignored", "scale factor that makes no sense", "kept"),
    (r"^label affine .* other way", "mask that may be mirrored", "kept"),
    (r"^label affine is", "mask that lies elsewhere than its image", "repaired"),
    (r"^label geometry", "mask without usable geometry", "repaired"),
    (r"^mask stored as", "mask not stored in 8 bits", "repaired"),
    (r"^position from the qform", "position in the qform only", "repaired"),
    (r"^no position", "no position in the header", "kept"),
    (r"^the mask is empty", "empty mask", "kept"),
    (r"^\d+ labeled voxels lie outside", "mask beyond the head", "kept"),
    (r"^no air", "no air: windowed, or no CT", "kept"),
    (r"^(height|rows|columns) of", "doubtful size", "kept"),
)
_REFUSED = (  # words of an error, the defect; the first that fits
    (r"mask is empty", "empty mask of a scan that bleeds"),
    (r"outlines bleeding", "mask of a scan that does not bleed"),
    (r"label has shape", "mask of another shape than its image"),
    (r"label values", "label values out of range"),
    (r"damaged gzip", "damaged gzip stream"),
    (r"the limit is", "header that claims too much"),
    (r"truncated", "truncated file"),
    (r"file is empty", "empty file"),
    (r"not a NIfTI|single-file NIfTI", "no NIfTI file"),
    (r"not a 3D scan|sizes must be", "not three axes"),
    (r"voxels must be", "voxels that are no numbers"),
    (r"not finite numbers", "voxels that are not finite"),
    (r"spacing must be", "impossible spacing"),
    (r"affine is", "impossible affine"),
    (r"vox_offset", "impossible start of the voxels"),
    (r"goes on for more", "bytes after the last voxel"),
    (r"intercept", "impossible scale factors"),
    (r"no HU", "values that are no HU"),
    (r"more than fit", "spacing that makes a scan too large"),
    (r"slice labels do not fit", "slice labels that do not fit"),
    (r"no such file", "file that is not there"),
)


@dataclass(frozen=True)
class Group:
    """All findings of one defect with one outcome."""

    defect: str
    done: str
    findings: tuple[Finding, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """Ids, each once, sorted; none if the data set as a whole has the defect."""
        return tuple(sorted({finding.case for finding in self.findings if finding.case}))


def of_facts(facts: Iterable[Facts], modality: str) -> list[Finding]:
    """What the first pass met in scans that it could read."""
    found = []
    for fact in facts:
        for text in (*fact.warnings, *(_doubtful(fact) if modality == "ct" else ())):
            known = [(defect, done) for words, defect, done in _MET if re.search(words, text)]
            for defect, done in known or [(re.sub(r"-?\d[\d.,]*", "#", text), "kept")]:
                found.append(Finding(defect, done, fact.case, text))
    return found


def of_refusals(refused: Mapping[str, str]) -> list[Finding]:
    """Why scans were refused, from their errors by case."""
    return [Finding(_kind(text), "refused", case, text) for case, text in sorted(refused.items())]


def of_copies(facts: Sequence[Facts]) -> list[Finding]:
    """Scans that hold the same voxels under several names.

    Of a copy of a test scan nothing may be trained on: "repaired" and "refused" ones are to be
    left out.
    """
    same: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        same[fact.voxels_sha256 or fact.case].append(fact)
    rank = {"test": 0, "val": 1, "train": 2, "unlabeled": 3}
    found = []
    for copies in same.values():
        first, *others = sorted(copies, key=lambda fact: (rank[fact.split], fact.case))
        for fact in others:
            text = f"the same voxels as {first.case} ({first.split})"
            if first.split not in ("test", "val") or fact.split == first.split:
                found.append(_copy("kept", fact, f"{text}; it counts twice"))
            elif fact.split == "unlabeled":
                found.append(_copy("repaired", fact, f"{text}; left out of the pool"))
            else:
                found.append(_copy("refused", fact, f"{text}; delete one of them"))
    return found


def group(findings: Iterable[Finding]) -> list[Group]:
    """By defect and outcome: what was refused first, then what is doubtful, then repairs."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.done, finding.defect].append(finding)
    order = ("refused", "kept", "repaired")
    made = [Group(defect, done, tuple(found)) for (done, defect), found in groups.items()]
    return sorted(made, key=lambda g: (order.index(g.done), -len(g.cases), g.defect))


def _copy(done: str, fact: Facts, text: str) -> Finding:
    return Finding("one scan under two names", done, fact.case, text)


def _kind(text: str) -> str:
    return next((defect for words, defect in _REFUSED if re.search(words, text)), "unreadable file")


def _doubtful(fact: Facts) -> list[str]:
    """Heads of a size that no head has: most likely the header's spacing is wrong."""
    said = []
    for name, size, (low, high) in zip(
        ("height", "rows", "columns"), fact.field_mm, _HEAD_MM, strict=True
    ):
        if size and not low <= size <= high:
            said.append(
                f"{name} of {size:.0f} mm in all, expected {low:.0f} to {high:.0f}: "
                "a wrong spacing in the header makes volumes in mL wrong"
            )
    return said
