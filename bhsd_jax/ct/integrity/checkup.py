"""What `preprocess` tells of a data set before it uses it: the integrity table and the defects."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.ct.integrity import doctor, listing, words
from bhsd_jax.ct.prepared import Facts
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform import csv_files, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Dataset, Survey

logger = logging.getLogger(__name__)

_NO_CT = (Kind.NOT_HU, Kind.NO_HU, Kind.OFFSET)


def survey(dataset: Dataset) -> Survey:
    """The usable cases, sorted by id, and what a reader that looks for defects has found.

    Raises:
        FileNotFoundError: If the data set is not where the config says.
        ValueError: If it has no cases.
    """
    look: Any = getattr(dataset, "survey", None)
    found = look() if look else Survey(tuple(dataset.cases()), ())
    if not found.cases:
        raise UserError(f"{dataset.name}: has no cases; look at config.data")
    logger.info(
        "%s: %d cases; license: %s", dataset.name, len(found.cases), dataset.license or "unknown"
    )
    return Survey(tuple(sorted(found.cases, key=lambda case: case.id)), found.findings)


def conclude(
    workdir: Path,
    dataset: Dataset,
    found: Survey,
    facts: Sequence[Facts],
    skipped: Mapping[str, Finding],
) -> tuple[list[Facts], dict[str, str]]:
    """Says and writes what is wrong; gives the facts to go on with, and why others are refused.

    `skipped` has by case why it was refused when it was read.

    Writes `integrity.csv` (a row per case), `integrity.json` (sums and defects) and, if there are
    any, `defects.csv` (a row per finding).
    """
    copies = doctor.of_copies(facts)
    left_out = {finding.case for finding in copies if finding.done != "kept"}
    used = [fact for fact in facts if fact.case not in left_out]
    findings = [*found.findings, *copies, *(skipped[case] for case in sorted(skipped))]
    findings += doctor.of_facts(used, dataset.modality)
    findings += doctor.of_values(used, dataset.classes, getattr(dataset, "binary_flag", ""))
    defects = doctor.group(findings)
    totals = listing.summary(used, dataset.classes, defects)
    _write(workdir, listing.rows(used, dataset.classes), totals, defects)
    page = words.page(dataset.name, dataset.modality, totals, dataset.classes, defects)
    logger.info("integrity, also in %s:\n\n%s\n", workdir, page)
    unread = [f for f in (*found.findings, *copies) if f.done == "refused"]
    return used, {f.case: f.text for f in (*unread, *skipped.values())}


def with_patients(
    cases: Sequence[Case], facts: Sequence[Facts]
) -> tuple[tuple[Case, ...], list[Facts]]:
    """Both, with one patient for whoever has copies of one scan."""
    patients = doctor.patients(facts)
    facts = [dataclasses.replace(fact, patient=patients[fact.case]) for fact in facts]
    named = [(case, patients.get(case.id, case.patient)) for case in cases]
    return tuple(dataclasses.replace(case, patient=patient) for case, patient in named), facts


def require_ct(name: str, cases: int, skipped: Mapping[str, Finding]) -> None:
    """Refuses a data set of CT most of whose scans are none, or not in HU, such as one of MR.

    Raises:
        ValueError: If half of its cases or more were refused as such; says why of the first.
    """
    odd = [found for _, found in sorted(skipped.items()) if found.kind in _NO_CT]
    if odd and 2 * len(odd) >= cases:
        raise UserError(
            f"{name}: {len(odd)} of {cases} scans are no CT in HU, so that nothing is "
            f"planned from the rest; {odd[0].case}: {odd[0].text}"
        )


def _write(
    workdir: Path,
    table: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Any],
    defects: Sequence[doctor.Group],
) -> None:
    """Files of this look; what it has nothing for goes, so that none contradicts another."""
    files.write_json(workdir / "integrity.json", totals)
    csv_files.write_records(workdir / "integrity.csv", table)
    csv_files.write_records(workdir / "defects.csv", listing.defect_rows(defects))
