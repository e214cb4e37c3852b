"""The log of a training, `metrics.jsonl`: one object a line, with the step that it tells of."""

from pathlib import Path
from typing import Any

from bhsd_jax.platform import files

_MEASURED = ("train/", "val/")  # a step has one value of each of these


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in the order of their steps; none without a file.

    Damaged lines and a last one that a crash has cut off are left out, and so is what has no step.
    A run that went on from an earlier step says some steps again: its later lines count, and the
    earlier lines of these steps are left out.
    """
    records: list[dict[str, Any]] = []
    for record in files.read_json_lines(path):
        if not isinstance(record.get("step"), int):
            continue
        same_step = []
        while records and records[-1]["step"] >= record["step"]:
            last = records.pop()
            if last["step"] == record["step"] and not _measures_again(record, last):
                same_step.insert(0, last)
        records += [*same_step, record]
    return records


def _measures_again(record: dict[str, Any], earlier: dict[str, Any]) -> bool:
    return any(name.startswith(_MEASURED) for name in record.keys() & earlier.keys())
