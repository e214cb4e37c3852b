"""The integrity table as a page of text, for a reader who knows scans and not this code."""

from collections.abc import Mapping, Sequence
from typing import Any

from bhsd_jax.ct.integrity.doctor import Group

_NAMED = 4  # cases named of a defect; all of them are in the files
_TOLD = 6  # refusals told in full; likewise
_MEASURES = ("min", "p5", "median", "p95", "max")
_UNIT = {"ct": "HU", "mr": "intensity"}
_MEANING = {
    "refused": "left out, to be repaired by you",
    "kept": "used as it is, to be looked at",
    "repaired": "handled, nothing to do",
}


def page(
    name: str,
    modality: str,
    totals: Mapping[str, Any],
    classes: Sequence[str],
    defects: Sequence[Group],
) -> str:
    """Scans, bleeds, measures and defects of a data set, one block each."""
    title = f"{name}: {totals['cases']} scans can be used, {totals['skipped']} are refused"
    blocks = [[title, "=" * len(title)]]
    if totals["cases"]:
        blocks += [_scans(totals, modality), _bleeds(totals, classes), _measures(totals, modality)]
    blocks += [_defects(defects)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _scans(totals: Mapping[str, Any], modality: str) -> list[str]:
    splits = totals["splits"]
    rows = [["Scans", *splits, "all"]]
    for key, words in (
        ("cases", "usable"),
        ("patients", "patients"),
        ("labeled", "with a mask"),
        ("bleeding", "known to bleed"),
        ("nonbleeding", "known not to bleed"),
    ):
        counts = [split[key] for split in splits.values()]
        if modality == "mr" and "bleed" in words and not any(counts):
            continue  # nobody has asked whether they bleed
        together = "" if key == "patients" else sum(counts)  # a patient may be in two
        rows.append([words, *counts, together])
    return _table(rows)


def _bleeds(totals: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    masked = {name: split for name, split in totals["splits"].items() if split["classes"]}
    if not masked:
        return []
    rows = [["In the masks", *(f"{s} {what}" for s in masked for what in ("n", "mL", "median"))]]
    for label in classes[1:]:
        cells = []
        for split in masked.values():
            found = split["classes"][label]
            median = f"{found['median_ml']:.2f}" if found["cases"] else "-"
            cells += [found["cases"], f"{found['ml']:.1f}", median]
        rows.append([label, *cells])
    return [*_table(rows), "n scans have the class, with mL in all and a median of those that do"]


def _measures(totals: Mapping[str, Any], modality: str) -> list[str]:
    rows = [["Measures", "min", "5 %", "median", "95 %", "max"]]
    axes = ("slice", "row", "column")
    values = tuple(f"{what} {_UNIT[modality]}" for what in ("lowest", "median", "highest"))
    for key, digits, names in (
        ("spacing_mm", 3, [f"{axis} spacing, mm" for axis in axes]),
        ("field_mm", 1, [f"{axis} field of view, mm" for axis in axes]),
        ("intensity", 0, [f"{value}, as stored" for value in values]),
    ):
        for axis, name in enumerate(names):
            numbers = (totals[key][measure][axis] for measure in _MEASURES)
            rows.append([name, *(f"{number:.{digits}f}" for number in numbers)])
    if totals["tilted"]:
        tilts = (f"{totals['tilt_deg'][measure]:.1f}" for measure in _MEASURES)
        corrected = totals["tilt_corrected"]
        told = f", mL corrected in {corrected}" if corrected else ""
        rows.append([f"gantry tilt, degrees ({_scan_count(totals['tilted'])}{told})", *tilts])
    return _table(rows)


def _defects(defects: Sequence[Group]) -> list[str]:
    if not defects:
        return ["Defects: none found"]
    lines = ["Defects"]
    for done, meaning in _MEANING.items():
        groups = [found for found in defects if found.done == done]
        if groups:
            lines.append(f"{done}: {meaning}")
        for found in groups:
            lines.append(f"  {found.kind} ({_count(found)})")
            lines += [f"    {line}" for line in _detail(found)]
    return lines


def _detail(found: Group) -> list[str]:
    """Refusals one by one, since each asks for something; else an example and names."""
    if found.done == "refused" or not found.cases:
        texts = [_told(finding.case, finding.text) for finding in found.findings]
        more = len(texts) - _TOLD
        return texts[:_TOLD] + ([f"and {more} more, in defects.csv"] if more > 0 else [])
    names = ", ".join(found.cases[:_NAMED])
    more = len(found.cases) - _NAMED
    text = found.findings[0].text
    if len(found.cases) == 1:
        return [_told(names, text)]
    return [names + (f" and {more} more" if more > 0 else ""), f"such as: {text}"]


def _told(case: str, text: str) -> str:
    return text if not case or case in text else f"{case}: {text}"


def _count(found: Group) -> str:
    return _scan_count(len(found.cases)) if found.cases else "the data set"


def _scan_count(number: int) -> str:
    return f"{number} scan{'s' if number > 1 else ''}"


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        numbers = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
