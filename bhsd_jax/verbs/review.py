"""Which scans of a prediction to look at first, or to outline next: `review.csv`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.platform import files
from bhsd_jax.platform.csv_files import write_records

NAME = "review.csv"
_MEASURES = ("unlike", "disagreement")  # known only while the networks have the scan


def score(disagreement: float | None, unlike: str) -> float | None:
    """Higher comes first: 0.99 at most of the disagreement, and 1 more where a scan is unlike.

    None where nothing is known: disagreement was not asked for, and the scan is not unlike.
    """
    if disagreement is None and not unlike:
        return None
    return bool(unlike) + min(disagreement or 0.0, 0.99)


def write(out: Path, rows: Sequence[ScanVolumes]) -> None:
    """Writes the list, the first to look at on top; none where nothing was measured.

    Raises:
        faults.WriteError: If the system says no.
    """
    scored = [(score(row.disagreement, row.unlike), row) for row in rows]
    known = [(value, row) for value, row in scored if value is not None]
    listed = [
        {
            "case": row.case,
            "score": f"{value:.4f}",
            "disagreement": "" if row.disagreement is None else f"{row.disagreement:.4f}",
            "unlike": row.unlike,
        }
        for value, row in sorted(known, key=lambda pair: (-pair[0], pair[1].case))
    ]
    write_records(out / NAME, listed, line_end="\n", harmless=True)


def earlier(out: Path) -> dict[str, Mapping[str, Any]]:
    """Rows of the `volumes.json` that an earlier call has left, by scan."""
    found = files.recall_json(out / "volumes.json", keys=("scans",), remove=False)
    return {row["case"]: row for row in found["scans"]} if found else {}


def measured(row: ScanVolumes) -> dict[str, Any]:
    """What is to be remembered of a label map, as plain values; see `recall`."""
    return {name: getattr(row, name) for name in _MEASURES}


def recall(row: ScanVolumes, old: Mapping[str, Any]) -> ScanVolumes:
    """The row of a label map that was there, with what was measured when it was made."""
    return dataclasses.replace(row, **{name: old[name] for name in _MEASURES if name in old})
