"""What is wrong with the scans of a data set, grouped by kind and by what was done about it.

Readers and repairs have said of what kind each finding is; what only the measures of a scan show,
or several scans together, is found here.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bhsd_jax.ct.prepared import Facts
from bhsd_jax.defects import Finding, Kind, Outcome

_HEAD_MM = ((80.0, 300.0), (120.0, 400.0), (120.0, 400.0))  # of head CT: D, H, W; BHSD: 91..350


@dataclass(frozen=True)
class Group:
    """All findings of one kind with one outcome."""

    kind: Kind
    done: Outcome
    findings: tuple[Finding, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """Ids, each once, sorted; none if the data set as a whole has the defect."""
        return tuple(sorted({finding.case for finding in self.findings if finding.case}))


def of_facts(facts: Iterable[Facts], modality: str) -> list[Finding]:
    """What the first pass met in scans that it could read."""
    found = []
    for fact in facts:
        found += [*fact.findings, *(_doubtful(fact) if modality == "ct" else ())]
    return found


def of_copies(facts: Sequence[Facts]) -> list[Finding]:
    """Scans that hold the same voxels under several names.

    Of a copy of a test scan nothing may be trained on: "repaired" and "refused" ones are to be
    left out.
    """
    found = []
    for first, *others in _alike(facts):
        for fact in others:
            text = f"the same voxels as {first.case} ({first.split})"
            if first.split not in ("test", "val") or fact.split == first.split:
                text += "; it counts twice, as another scan of that patient"
                found.append(_copy("kept", fact, text))
            elif fact.split == "unlabeled":
                found.append(_copy("repaired", fact, f"{text}; left out of the pool"))
            else:
                found.append(_copy("refused", fact, f"{text}; delete one of them"))
    return found


def patients(facts: Sequence[Facts]) -> dict[str, str]:
    """Patient by case, where who has copies of one scan is one patient under several names.

    Else one copy could validate what another was trained on.
    """
    called: dict[str, str] = {}

    def found(patient: str) -> str:
        while (other := called.get(patient, patient)) != patient:
            patient = other
        return patient

    for first, *others in _alike(facts):
        for fact in others:
            called[found(fact.patient)] = found(first.patient)
    return {fact.case: found(fact.patient) for fact in facts}


def of_values(facts: Iterable[Facts], classes: Sequence[str], binary_flag: str) -> list[Finding]:
    """Masks of 0 and 1 alone, where nobody has said that 1 is the first of several classes.

    Most masks of one kind are such. `binary_flag` is what to set for them; "": it was said.
    """
    marked = [fact.voxels[1:] for fact in facts if any(fact.voxels[1:])]
    if not binary_flag or not marked or any(any(rest) for _, *rest in marked):
        return []
    text = f"1 is taken for {classes[1]}; if it means any bleeding, set {binary_flag}"
    return [Finding(Kind.MASK_ONE_VALUE, "kept", text)]


def group(findings: Iterable[Finding]) -> list[Group]:
    """By kind and outcome: what was refused first, then what is doubtful, then repairs."""
    groups: dict[tuple[Kind, Outcome], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind, finding.done].append(finding)
    order = ("refused", "kept", "repaired")
    made = [Group(kind, done, tuple(found)) for (kind, done), found in groups.items()]
    return sorted(made, key=lambda g: (order.index(g.done), -len(g.cases), g.kind))


def _alike(facts: Sequence[Facts]) -> list[list[Facts]]:
    """Scans of the same voxels together, those first that are to be tested on."""
    same: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        same[fact.voxels_sha256 or fact.case].append(fact)
    rank = {"test": 0, "val": 1, "train": 2, "unlabeled": 3}
    return [
        sorted(alike, key=lambda fact: (rank[fact.split], fact.case)) for alike in same.values()
    ]


def _copy(done: Outcome, fact: Facts, text: str) -> Finding:
    return Finding(Kind.COPY, done, text, fact.case)


def _doubtful(fact: Facts) -> list[Finding]:
    """Heads of a size that no head has: most likely the header's spacing is wrong."""
    found = []
    for name, size, (low, high) in zip(
        ("height", "rows", "columns"), fact.field_mm, _HEAD_MM, strict=True
    ):
        if size and not low <= size <= high:
            text = (
                f"{name} of {size:.0f} mm in all, expected {low:.0f} to {high:.0f}: "
                "a wrong spacing in the header makes volumes in mL wrong"
            )
            found.append(Finding(Kind.FIELD_OF_VIEW, "kept", text, fact.case))
    return found
