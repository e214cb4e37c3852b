"""Tables as CSV files, whole or not at all."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.platform import files


def write_csv(
    path: str | Path,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    *,
    line_end: str = "\r\n",
) -> None:
    """Writes a table with a line of column names, in UTF-8; floats with all their digits.

    Raises:
        faults.WriteError: If the system says no.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator=line_end)
    table.writerow(columns)
    table.writerows(rows)
    files.write_text(path, text.getvalue())


def write_records(
    path: str | Path, records: Sequence[Mapping[str, Any]], *, line_end: str = "\r\n"
) -> None:
    """Likewise, a line per record, with the columns of the first; no records, no file.

    Raises:
        faults.WriteError: If the system says no.
    """
    if records:
        rows = (record.values() for record in records)
        write_csv(path, records[0], rows, line_end=line_end)
    else:
        Path(path).unlink(missing_ok=True)
