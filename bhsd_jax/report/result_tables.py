"""Tables of a run, once as rows and then as HTML or Markdown."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

CONVENTIONS = {  # key in summary.json -> column title, what it means
    "nnunet": ("Dice, nnU-Net rule", "empty in both: left out; only in the reference empty: 0"),
    "present": ("where present", "only scans whose reference has the class"),
    "pooled": ("pooled", "one count over all scans; large lesions dominate"),
    "both-empty=1": ("both empty = 1", "a scan correctly left empty counts as 1"),
}
WORDS = ("to note", "why", "reason")  # titles of columns that hold sentences


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text; the first column is a name, the others are numbers.

    Columns whose title is in `WORDS` hold sentences and begin on the left.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    links: Mapping[str, str] = field(default_factory=dict)  # names to files beside the page

    def to_html(self) -> str:
        """A `<table>`; every text is escaped."""
        kinds = [' class="words"' if title in WORDS else "" for title in self.columns]
        heads = zip(self.columns, kinds, strict=True)
        head = "".join(f"<th{kind}>{html.escape(title)}</th>" for title, kind in heads)
        body = "".join(
            f"<tr><td>{self._name(row[0])}</td>"
            + "".join(
                f"<td{kind}>{html.escape(cell)}</td>"
                for cell, kind in zip(row[1:], kinds[1:], strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_markdown(self) -> str:
        """A pipe table."""
        sides = ("---" if title in WORDS else "---:" for title in self.columns[1:])
        lines = [self.columns, ("---", *sides)]
        lines += [(self._named(row[0]), *row[1:]) for row in self.rows]
        return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)

    def _name(self, text: str) -> str:
        target = self.links.get(text)
        shown = html.escape(text)
        return f'<a href="{html.escape(quote(target))}">{shown}</a>' if target else shown

    def _named(self, text: str) -> str:
        target = self.links.get(text)
        return f"[{text}]({quote(target)})" if target else text


def number(value: Any, digits: int = 3) -> str:
    """Fixed digits; what is not defined says so in words, never as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    if isinstance(value, float) and math.isinf(value):
        return "missed"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def milliliters(value: float) -> str:
    """Volume as text with one digit; a small volume reads "< 0.1" and never "0.0"."""
    return "< 0.1" if 0 < value < 0.05 else f"{value:.1f}"


def dice_table(summary: Mapping[str, Any]) -> Table:
    """Dice by class under every convention, with counts and the 95 % interval of the headline.

    The mean over classes has no counts: those of the classes do not add up to one of scans.
    """
    conventions = summary["conventions"]
    rows = []
    several = len(summary["classes"]) > 1
    for name in [*summary["classes"], *(["mean"] if several else [])]:
        scores = {key: conventions[key].get(name, {}) for key in CONVENTIONS if key in conventions}
        head = scores.get("nnunet", {})
        counts = [number(head.get(key)) for key in ("n_present", "n_false_positive")]
        rows.append(
            (
                "mean of classes" if name == "mean" else name,
                number(head.get("dice")),
                _interval(head),
                *(number(scores[key].get("dice")) for key in scores if key != "nnunet"),
                *(["", ""] if name == "mean" else counts),
            )
        )
    titles = tuple(CONVENTIONS[k][0] for k in CONVENTIONS if k in conventions and k != "nnunet")
    columns = ("class", CONVENTIONS["nnunet"][0], "95 % interval", *titles, "scans with it")
    return Table((*columns, "falsely found in"), tuple(rows))


def metrics_table(summary: Mapping[str, Any], columns: Mapping[str, str]) -> Table:
    """Further measures by class; `columns` maps a key of `summary["metrics"]` to its title."""
    rows = tuple(
        (name, *(number(values.get(key)) for key in columns))
        for name, values in summary["metrics"].items()
    )
    return Table(("class", *columns.values()), rows)


def cases_table(rows: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> Table:
    """Every scan and class that is in the reference or was predicted."""
    shown = [row for row in rows if float(row["voxels_ref"]) or float(row["voxels_pred"])]
    keys = ("dice", "hd95_mm", "nsd", "volume_ref_ml", "volume_pred_ml")
    body = tuple(
        (
            names[row["case"]],
            row["class"],
            *(_measured(row, key) for key in keys),
        )
        for row in sorted(shown, key=lambda row: (row["class"], -_sortable(row["dice"])))
    )
    titles = ("Dice", "HD95 (mm)", "surface Dice", "reference (mL)", "predicted (mL)")
    return Table(("scan", "class", *titles), body)


def _measured(row: Mapping[str, str], key: str) -> str:
    value = float(row[key])
    if math.isinf(value) and not float(row["voxels_ref"]):
        return "made up"
    if key.endswith("_ml"):
        return milliliters(value)
    return number(value, 1 if key.endswith("_mm") else 3)


def _interval(values: Mapping[str, Any]) -> str:
    low, high = values.get("low"), values.get("high")
    if low is None or high is None or math.isnan(low):
        return "n/a"
    return f"{low:.3f} to {high:.3f}"


def _sortable(text: str) -> float:
    value = float(text)
    return -1.0 if math.isnan(value) else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
