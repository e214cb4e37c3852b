"""The integrity table as a page of text, for a reader who knows scans and not this code."""

from collections.abc import Mapping, Sequence
from typing import Any

from bhsd_jax.ct.doctor import Group

_NAMED = 4  # cases named of a defect; all of them are in the files
_TOLD = 6  # refusals told in full; likewise
_MEASURES = ("min", "p5", "median", "p95", "max")
_MEANING = {
    "refused": "left out, to be repaired by you",
    "kept": "used as it is, to be looked at",
    "repaired": "handled, nothing to do",
}


def page(
    title: str, totals: Mapping[str, Any], classes: Sequence[str], defects: Sequence[Group]
) -> str:
    """Scans, bleeds, measures and defects of a data set, one block each."""
    blocks = [[title, "=" * len(title)]]
    if totals["cases"]:
        blocks += [_scans(totals), _bleeds(totals, classes), _measures(totals)]
    blocks += [_defects(defects)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _scans(totals: Mapping[str, Any]) -> list[str]:
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


def _measures(totals: Mapping[str, Any]) -> list[str]:
    rows = [["Measures", "min", "5 %", "median", "95 %", "max"]]
    for key, unit in (
        ("spacing_mm", "{} spacing, mm"),
        ("field_mm", "{} field of view, mm"),
        ("intensity", "{} as stored"),
    ):
        names = ("lowest", "middle", "highest")
        if key != "intensity":
            names = ("slice", "row", "column")
        for axis, name in enumerate(names):
            values = [totals[key][measure][axis] for measure in _MEASURES]
            digits = {"spacing_mm": 3, "field_mm": 1, "intensity": 0}[key]
            rows.append([unit.format(name), *(f"{value:.{digits}f}" for value in values)])
    if totals["tilted"]:
        values = [f"{totals['tilt_deg'][measure]:.1f}" for measure in _MEASURES]
        rows.append([f"gantry tilt, degrees ({totals['tilted']} scans)", *values])
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
            lines.append(f"  {found.defect} ({_count(found)})")
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
    number = len(found.cases)
    return f"{number} scan{'s' if number > 1 else ''}" if number else "the data set"


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        numbers = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
