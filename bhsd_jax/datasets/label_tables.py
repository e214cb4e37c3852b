"""Tables of what is known of slices and of whole scans, as people and programs write them.

`slice_labels.csv` has a line per slice, `scan_labels.csv` a line per scan; both lie in the root of
a data set, and speak of scans with and without masks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bhsd_jax.datasets.bhsd_files import WORDS, base_name
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, SOME, Case

SLICES, SCANS = "slice_labels.csv", "scan_labels.csv"
_MOST_SLICES = 10_000
_UNKNOWN = -1
_ANY = "any"
_SAME = {"scan": "case"}  # other names of columns

Row = tuple[int, ...]  # per foreground class, as `Case.slice_labels`


@dataclass(frozen=True)
class Tables:
    """Both tables of a folder; what is not there is empty."""

    root: Path
    slices: Mapping[str, tuple[Row, ...]]  # by case
    scans: Mapping[str, Row]

    @classmethod
    def of(cls, root: Path, classes: Sequence[str]) -> "Tables":
        """Reads them, for foreground classes of these names.

        Raises:
            ValueError: As by `read_slices` and `read_scans`.
        """
        return cls(root, read_slices(root / SLICES, classes), read_scans(root / SCANS, classes))

    def known(self, cases: Sequence[Case]) -> tuple[list[Case], list[Finding]]:
        """The cases with what the tables say of them, and what is wrong with the tables.

        A scan that is known to bleed, or not to, and of which `scan_labels.csv` says otherwise, is
        refused.
        """
        found, findings = [], self._alone({case.id for case in cases})
        for case in cases:
            row = self.scans.get(case.id)
            bleeding = None if row is None else _bleeding(row)
            if None not in (bleeding, case.bleeding) and bleeding != case.bleeding:
                text = (
                    f"{case.image}: is known {'' if case.bleeding else 'not '}to bleed, as by the "
                    f"folder it lies in, and {SCANS} says otherwise; correct one of them"
                )
                findings.append(Finding(Kind.BLEEDS_AND_NOT, "refused", text, case.id))
            else:
                found.append(labeled(replace(case, slice_labels=self.slices.get(case.id)), row))
        return found, findings

    def _alone(self, ids: Collection[str]) -> list[Finding]:
        """Says of which rows there is no scan."""
        tables = ((SLICES, self.slices), (SCANS, self.scans))
        return [
            Finding(
                Kind.SLICE_LABELS_ALONE,
                "kept",
                f"{self.root / name}: rows of {len(unknown)} scans that are not used, such as "
                f"{unknown[0]}",
            )
            for name, rows in tables
            if (unknown := sorted(set(rows) - set(ids)))
        ]


def labeled(case: Case, row: Row | None) -> Case:
    """The case with what a row of `scan_labels.csv` says of it."""
    if row is None:
        return case
    bleeding = _bleeding(row)
    absent = tuple(index for index, value in enumerate(row, start=1) if value == 0)
    return replace(case, bleeding=case.bleeding if bleeding is None else bleeding, absent=absent)


def _bleeding(row: Row) -> bool | None:
    """Whether anything is shown; None: not known."""
    return True if max(row) > 0 else False if set(row) == {0} else None


def read_slices(path: Path, classes: Sequence[str]) -> dict[str, tuple[Row, ...]]:
    """Rows per case from columns case, slice, any, and one per class, as `Case.slice_labels`.

    Columns may be in any order and in capitals or not, and classes be called as in the RSNA
    challenge. What no line speaks of is not known. `any` 0 says 0 of every class; 1 says that one
    of those shows of which nothing is said, unless one is said to show. Where the only class is any
    bleeding, columns of its kinds say what they say of it.

    Raises:
        ValueError: If a column is missing, a cell makes no sense, or `any` contradicts the classes;
            names the line.
    """
    rows: dict[str, dict[int, Row]] = {}
    for place, cells, values in _lines(path, ("case", "slice"), classes):
        try:
            index = csv_files.whole(cells["slice"])
        except ValueError:
            index = -1
        if not 0 <= index < _MOST_SLICES:
            raise UserError(
                f"{place}: expected the number of a slice, from 0, below {_MOST_SLICES}; got "
                f"{cells['slice']!r}"
            )
        _put(rows.setdefault(base_name(cells["case"]), {}), index, values, place, "slice")
    unknown = (_UNKNOWN,) * len(classes)
    return {
        case: tuple(by_slice.get(k, unknown) for k in range(max(by_slice) + 1))
        for case, by_slice in rows.items()
    }


def read_scans(
    path: Path, classes: Sequence[str], named: Callable[[str], str] = base_name
) -> dict[str, Row]:
    """A row per case from columns case (or scan), any, and one per class.

    It says 1 where some slice shows the class, 0 where none does; all else is as in `read_slices`.

    Raises:
        ValueError: Likewise.
    """
    rows: dict[str, Row] = {}
    for place, cells, values in _lines(path, ("case",), classes):
        _put(rows, named(cells["case"]), values, place, "scan")
    return rows


def read_instances(path: Path, classes: Sequence[str]) -> dict[str, Row]:
    """A row per slice by its SOPInstanceUID, the column slice; all else is as in `read_slices`.

    Raises:
        ValueError: Likewise.
    """
    rows: dict[str, Row] = {}
    for place, cells, values in _lines(path, ("slice",), classes):
        _put(rows, cells["slice"], values, place, "slice")
    return rows


def _put(rows: dict[Any, Row], key: int | str, values: Row, place: str, what: str) -> None:
    if rows.setdefault(key, values) != values:
        raise UserError(
            f"{place}: contradicts an earlier line of that {what}; keep one and delete the other"
        )


def _lines(
    path: Path, names: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, str], Row]]:
    """Place, cells by column, and row of each line; nothing if there is no such file."""
    if not path.is_file():
        return
    kinds = HEMORRHAGE[1:] if tuple(classes) == (_ANY,) else tuple(classes)
    lines = csv_files.read_records(path)
    columns = _columns(path, next(lines, (0, {}))[1], names, kinds)
    for number, line in lines:
        place = f"{path}, line {number}"
        cells = {column: line[name] for column, name in columns.items()}
        row = _row(place, cells, kinds)
        yield place, cells, row if kinds == tuple(classes) else (_union(row),)


def _columns(
    path: Path, there: Collection[str], names: Sequence[str], kinds: Sequence[str]
) -> dict[str, str]:
    """Name in the table of each column that is used.

    Raises:
        ValueError: If one is missing, or no column says what is shown.
    """
    known = {name.casefold(): name for name in (*names, _ANY, *kinds)}
    own = {name.casefold(): name for name in kinds}
    for word, index in WORDS.items():
        if (name := own.get(HEMORRHAGE[int(index)].casefold())) is not None:
            known.setdefault(word, name)
    found: dict[str, str] = {}
    for name in there:
        word = name.casefold()
        column = known.get(word) or known.get(_SAME.get(word, ""))
        if column and found.setdefault(column, name) != name:
            raise UserError(f"{path}: columns {found[column]} and {name} are one; delete one")
    expected = (
        f"expected {', '.join((*names, _ANY, *kinds))}; got {', '.join(there)}; a table of "
        f"something else must not be called {path.name} there"
    )
    if lacking := set(names) - found.keys():
        raise UserError(f"{path}: no column {', '.join(sorted(lacking))}; {expected}")
    if not found.keys() & {_ANY, *kinds}:
        raise UserError(f"{path}: no column says what a {names[-1]} shows; {expected}")
    return found


def _row(place: str, cells: Mapping[str, str], kinds: Sequence[str]) -> Row:
    """What is known of each class."""
    said = {kind: cells[kind] for kind in (_ANY, *kinds) if kind in cells}
    try:
        values = {kind: csv_files.known(cell, _UNKNOWN) for kind, cell in said.items()}
    except ValueError:
        values = {}
    if not values or not set(values.values()) <= {_UNKNOWN, 0, 1}:
        raise UserError(
            f"{place}: expected 0, 1 or -1 per class, empty where it is not known; got "
            f"{', '.join(f'{kind} {cell!r}' for kind, cell in said.items())}"
        )
    union, row = values.get(_ANY, _UNKNOWN), tuple(values.get(kind, _UNKNOWN) for kind in kinds)
    if (union == 0 and 1 in row) or (union == 1 and set(row) == {0}):
        raise UserError(
            f"{place}: any is {union}, and of the classes {', '.join(kinds)} "
            f"{'one is 1' if union == 0 else 'none is'}; correct one of them"
        )
    if union == 0:
        return (0,) * len(row)
    if union == 1 and 1 not in row:
        return tuple(SOME if value == _UNKNOWN else value for value in row)
    return row


def _union(row: Row) -> int:
    """The row as the one of any bleeding."""
    bleeding = _bleeding(row)
    return _UNKNOWN if bleeding is None else int(bleeding)
