"""`slice_labels.csv`: what is known of slices, a line each, as people and programs write it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bhsd_jax.datasets.bhsd_files import WORDS, base_name
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import SOME

_MOST_SLICES = 10_000
_UNKNOWN = -1
_ANY = "any"


def read(path: Path, classes: Sequence[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Rows per case from columns case, slice, any, and one per class, as `Case.slice_labels`.

    Columns may be in any order and in capitals or not, and classes be called as in the RSNA
    challenge. What no line speaks of is not known. `any` 0 says 0 of every class; 1 says that one
    of those shows of which nothing is said, unless one is said to show.

    Raises:
        ValueError: If a column is missing, a cell makes no sense, or `any` contradicts the classes;
            names the line.
    """
    if not path.is_file():
        return {}
    rows: dict[str, dict[int, tuple[int, ...]]] = {}
    lines = csv_files.read_records(path)
    columns = _columns(path, next(lines, (0, {}))[1], classes)
    for number, line in lines:
        place = f"{path}, line {number}"
        cells = {column: line[name] for column, name in columns.items()}
        index, values = _row(place, cells, classes)
        by_slice = rows.setdefault(base_name(cells["case"]), {})
        if by_slice.setdefault(index, values) != values:
            raise UserError(
                f"{place}: contradicts an earlier line of that slice; keep one and delete the other"
            )
    unknown = (_UNKNOWN,) * len(classes)
    return {
        case: tuple(by_slice.get(k, unknown) for k in range(max(by_slice) + 1))
        for case, by_slice in rows.items()
    }


def _columns(path: Path, names: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
    """Name in the table of each column that is used.

    Raises:
        ValueError: If one is missing, or no column says anything of a slice.
    """
    known = {name.casefold(): name for name in ("case", "slice", _ANY, *classes)}
    known |= {word: classes[int(k) - 1] for word, k in WORDS.items() if int(k) <= len(classes)}
    found: dict[str, str] = {}
    for name in names:
        column = known.get(name.casefold())
        if column and found.setdefault(column, name) != name:
            raise UserError(f"{path}: columns {found[column]} and {name} are one; delete one")
    expected = f"expected case, slice, any, {', '.join(classes)}; got {', '.join(names)}"
    if lacking := {"case", "slice"} - found.keys():
        raise UserError(f"{path}: no column {', '.join(sorted(lacking))}; {expected}")
    if not found.keys() & {_ANY, *classes}:
        raise UserError(f"{path}: no column says what a slice shows; {expected}")
    return found


def _row(
    place: str, cells: Mapping[str, str], classes: Sequence[str]
) -> tuple[int, tuple[int, ...]]:
    """The slice, and what is known of each class."""
    try:
        index = csv_files.whole(cells["slice"])
        said = {c: csv_files.known(cells.get(c, ""), _UNKNOWN) for c in (_ANY, *classes)}
    except ValueError:
        index, said = -1, {}
    if not said or not set(said.values()) <= {_UNKNOWN, 0, 1} or not 0 <= index < _MOST_SLICES:
        raise UserError(
            f"{place}: expected 0, 1 or -1 per class, empty where it is not known, and a slice "
            f"below {_MOST_SLICES}; got {', '.join(f'{k} {v!r}' for k, v in cells.items())}"
        )
    union, values = said.pop(_ANY), tuple(said.values())
    if (union == 0 and 1 in values) or (union == 1 and set(values) == {0}):
        raise UserError(
            f"{place}: any is {union}, and of the classes {', '.join(classes)} "
            f"{'one is 1' if union == 0 else 'none is'}; correct one of them"
        )
    if union == 0:
        return index, (0,) * len(values)
    if union == 1 and 1 not in values:
        return index, tuple(SOME if value == _UNKNOWN else value for value in values)
    return index, values
