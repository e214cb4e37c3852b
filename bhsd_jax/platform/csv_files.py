"""Tables as CSV files: written whole or not at all, read as spreadsheets export them."""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.platform import files

# What Excel, LibreOffice and Sheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_SEPARATORS = ",;\t"  # Excel's is that of the country
_BOOLEANS = {"true": "1", "false": "0"}
_NOTHING = ("", "na", "n/a", "<na>", "nan", "none", "null")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a file begins that Excel calls Unicode text


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a table with their numbers, the one of column names first; empty ones are left out.

    What separates the cells is known by the first line. Other encodings than UTF-8 and UTF-16
    differ from those in accents alone, which stay unknown.
    """
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in _UTF16 else "utf-8-sig"
    with path.open(newline="", encoding=encoding, errors="replace") as file:
        first = file.readline()
        file.seek(0)
        separator = max(_SEPARATORS, key=first.count)
        reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
        for line in reader:
            if any(map(str.strip, line)):
                yield reader.line_num, line


def read_records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a table with their numbers, cells by name of the column; as by `read_rows`.

    The first is that of the names itself. Cells that a line lacks are "".
    """
    names: list[str] | None = None
    for number, line in read_rows(path):
        cells = [cell.strip() for cell in line]
        names = names or cells
        yield number, dict(itertools.zip_longest(names, cells[: len(names)], fillvalue=""))


def whole(cell: str) -> int:
    """A whole number, as 1, or as 1.0 or 1,0, which is what a column with gaps becomes.

    TRUE and FALSE are 1 and 0.

    Raises:
        ValueError: If it is none.
    """
    value = float(_BOOLEANS.get(cell.casefold(), cell).replace(",", "."))
    if not value.is_integer():
        raise ValueError(f"{cell!r} is no whole number")
    return int(value)


def known(cell: str, unknown: int) -> int:
    """A whole number, or `unknown` where the cell says nothing, in the words of pandas or R.

    Raises:
        ValueError: If it is none.
    """
    return unknown if cell.casefold() in _NOTHING else whole(cell)


def write_csv(
    path: str | Path,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    *,
    line_end: str = "\r\n",
    harmless: bool = False,
) -> None:
    """Writes a table with a line of column names, in UTF-8; floats with all their digits.

    With `harmless`, a text that a spreadsheet would take for a formula, such as a file name that
    begins with =, gets an apostrophe before it. Numbers stay as they are.

    Raises:
        faults.WriteError: If the system says no.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator=line_end)
    lines = ([columns], rows)
    for line in itertools.chain(*lines):
        table.writerow(map(_harmless, line) if harmless else line)
    files.write_text(path, text.getvalue())


def write_records(
    path: str | Path,
    records: Sequence[Mapping[str, Any]],
    *,
    line_end: str = "\r\n",
    harmless: bool = False,
) -> None:
    """Writes a CSV with a line per record and the columns of the first; none: no file is left.

    `harmless` as in `write_csv`.

    Raises:
        faults.WriteError: If the system says no.
    """
    if records:
        rows = (record.values() for record in records)
        write_csv(path, records[0], rows, line_end=line_end, harmless=harmless)
    else:
        Path(path).unlink(missing_ok=True)


def _harmless(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
