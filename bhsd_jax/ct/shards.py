"""Folders of ArrayRecord shards: one record per prepared case, `plan.json`, `index.json`.

`plan.json` says what was done, `index.json` has one `Entry` per case, sorted by id.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from bhsd_jax import files
from bhsd_jax.ct.record import SCHEMA, Prepared, Reader, damaged, pack, unpack
from bhsd_jax.volume import Plan, Shape

_OPTIONS = "group_size:1,uncompressed"  # one record is one read; blosc2 has compressed it already


@dataclass(frozen=True)
class Entry:
    """One row of `index.json`: what can be known of a case without reading its record."""

    id: str
    patient: str
    split: str
    has_label: bool
    bleeding: bool | None
    shape: Shape
    voxels: tuple[int, ...]  # per class, background first; of the prepared label; () without one
    volume_ml: tuple[float, ...]  # per class, background first; native grid, tilt-corrected
    shard: str  # file name in the folder
    record: int  # position in the shard


class Shards:
    """A folder of prepared cases. Safe to share between threads, cheap to send to a process."""

    def __init__(self, folder: str | Path):
        """Reads plan and index; records stay where they are.

        Raises:
            FileNotFoundError: If the folder has no plan or index.
            ValueError: If the index has another schema.
        """
        self.folder = Path(folder)
        self.plan = Plan.load(self.folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; run the verb `preprocess` to its end")
        index = json.loads(path.read_text())
        if index["schema"] != SCHEMA:
            raise ValueError(
                f"{path}: schema {index['schema']}, this version reads {SCHEMA}; "
                "remove the folder and run the verb `preprocess` again"
            )
        self.entries = tuple(entry_from_json(row) for row in index["entries"])
        self._by_id = {entry.id: entry for entry in self.entries}

    def open(self, case: str) -> Reader:
        """Reads the record of one case; its arrays stay compressed.

        Raises:
            ValueError: If the folder has no such case, or the shard is damaged; names shard and
                record.
        """
        entry = self._by_id.get(case)
        if entry is None:
            raise ValueError(f"{self.folder}: no case {case!r} among {len(self.entries)}")
        place = f"{self.folder / entry.shard}, record {entry.record}"
        return Reader(_read(self.folder / entry.shard, entry.record, place), place)

    def load(self, case: str) -> Prepared:
        """Reads one case in full and compares it with its digests.

        Raises:
            ValueError: If the folder has no such case, or the shard is damaged; names shard and
                record.
        """
        return unpack(self.open(case))


def write_shard(path: str | Path, prepared: Iterable[Prepared]) -> list[Entry]:
    """Writes cases in the order given, holding one at a time; the file appears when complete.

    The same cases give the same bytes. Without any case no file is written.
    """
    entries: list[Entry] = []
    with files.replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
        try:
            for case in prepared:
                header, record = pack(case)
                writer.write(record)
                entries.append(_describe(header, shard=Path(path).name, record=len(entries)))
        finally:
            writer.close()
        if not entries:
            temporary.unlink()
    return entries


def write_index(folder: str | Path, entries: Iterable[Entry]) -> None:
    """Writes `index.json`, sorted by id; the last file of a complete folder."""
    rows = [dataclasses.asdict(e) for e in sorted(entries, key=lambda e: e.id)]
    files.write_json(Path(folder) / "index.json", {"schema": SCHEMA, "entries": rows})


def entry_from_json(row: Mapping[str, Any]) -> Entry:
    """Undoes `dataclasses.asdict`, also after a trip through a JSON file."""
    values: dict[str, Any] = dict(row)
    for name in ("shape", "voxels", "volume_ml"):
        values[name] = tuple(values[name])
    return Entry(**values)


def _read(shard: Path, record: int, place: str) -> bytes:
    if not shard.is_file():
        raise damaged(place, "the file is not there")
    try:
        # Opened anew each time (0.1 ms): nothing to lock, and no limit on the number of shards.
        reader = array_record_module.ArrayRecordReader(str(shard), "readahead_buffer_size:0")
        try:
            return reader.read([record])[0]
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise damaged(place, str(error)) from error


def _describe(header: Mapping[str, Any], *, shard: str, record: int) -> Entry:
    names = ("patient", "split", "has_label", "bleeding", "shape", "voxels", "volume_ml")
    row = {name: header[name] for name in names}
    return entry_from_json(row | {"id": header["case"], "shard": shard, "record": record})
