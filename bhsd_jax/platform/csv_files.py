"""Tables as CSV files, whole or not at all."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.platform import files

# What Excel, LibreOffice and Sheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


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
