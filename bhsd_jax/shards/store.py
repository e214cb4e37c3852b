"""Folders of ArrayRecord shards: one record per prepared case, `plan.json`, `index.json`.

`plan.json` says what was done, `index.json` has one `Entry` per case, sorted by id.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from bhsd_jax.ct.prepared import Prepared
from bhsd_jax.platform import faults, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.shards.record import SCHEMA, Reader, damaged, pack, unpack
from bhsd_jax.volume import Plan, Shape

_REMEDY = "run the verb `preprocess` again, which writes it anew"
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
    volume_ml: tuple[float, ...]  # per class, background first; of the native grid
    shard: str  # file name in the folder
    record: int  # position in the shard
    sorted_by: str = ""  # as of its case; older versions have not kept it


class Shards:
    """A folder of prepared cases. Safe to share between threads, cheap to send to a process."""

    def __init__(self, folder: str | Path):
        """Reads plan and index; records stay where they are.

        Raises:
            FileNotFoundError: If the folder has no plan or index.
            ValueError: If the index is damaged, or has another schema.
        """
        self.folder = Path(folder)
        self.plan = Plan.load(self.folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; run the verb `preprocess` to its end")
        schema, self.entries = files.read_json(path, _parse_index, remedy=_REMEDY)
        if schema != SCHEMA:
            raise UserError(
                f"{path}: schema {schema}, this version reads {SCHEMA}; "
                "remove the folder and run the verb `preprocess` again"
            )
        self._by_id = {entry.id: entry for entry in self.entries}

    def open(self, case: str) -> Reader:
        """Reads the record of one case; its arrays stay compressed.

        Raises:
            ValueError: If the folder has no such case, or the shard is damaged or of another index;
                names shard and record.
        """
        entry = self._by_id.get(case)
        if entry is None:
            raise UserError(f"{self.folder}: no case {case!r} among {len(self.entries)}")
        place = f"{self.folder / entry.shard}, record {entry.record}"
        reader = Reader(_read(self.folder / entry.shard, [entry.record], place)[0], place)
        if (reader.header.get("case"), reader.shape) != (case, entry.shape):
            raise UserError(
                f"{place}: holds another case than index.json says, or another version of it. Has "
                "`preprocess` written these shards anew meanwhile, or a copy been cut off? Run it "
                "again to its end, then start again"
            )
        return reader

    def load(self, case: str) -> Prepared:
        """Reads one case in full and compares it with its digests.

        Raises:
            ValueError: If the folder has no such case, or the shard is damaged or of another index;
                names shard and record.
        """
        return unpack(self.open(case))


def write_shard(path: str | Path, prepared: Iterable[Prepared]) -> list[Entry]:
    """Writes cases in the order given, holding one at a time; the file appears when complete.

    The same cases give the same bytes. Without any case no file is written.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    entries: list[Entry] = []
    with files.replacing(path) as temporary, _as_system_error(temporary):
        writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
        try:
            for case in prepared:
                header, record = pack(case)
                writer.write(record)
                entries.append(_describe(header, shard=Path(path).name, record=len(entries)))
        finally:
            writer.close()  # a full disk may show only here
        if not entries:
            temporary.unlink()
    return entries


def write_index(folder: str | Path, entries: Iterable[Entry]) -> None:
    """Writes `index.json`, sorted by id; the last file of a complete folder."""
    rows = [dataclasses.asdict(e) for e in sorted(entries, key=lambda e: e.id)]
    files.write_json(Path(folder) / "index.json", {"schema": SCHEMA, "entries": rows})


def entry_from_json(row: Mapping[str, Any]) -> Entry:
    """Undoes `dataclasses.asdict`, also after a trip through a JSON file.

    Raises:
        KeyError: If a field is missing.
        TypeError: If there is another, or a value is none that the field can have.
    """
    values: dict[str, Any] = dict(row)
    for name in ("shape", "voxels", "volume_ml"):
        values[name] = tuple(values[name])
    return Entry(**values)


def check_shard(path: str | Path) -> list[Entry]:
    """Reads all of a shard and compares it with the digests inside; what it holds.

    Raises:
        ValueError: If it is damaged; names shard and record.
    """
    shard = Path(path)
    entries = []
    for record, data in enumerate(_read(shard, None, str(shard))):
        reader = Reader(data, f"{shard}, record {record}")
        unpack(reader)
        entries.append(_describe(reader.header, shard=shard.name, record=record))
    return entries


def _read(shard: Path, records: Sequence[int] | None, place: str) -> list[bytes]:
    """Bytes of these records of a shard; None: of all."""
    if not shard.is_file():
        raise damaged(place, "the file is not there")
    try:
        with _as_system_error(shard):
            # Opened anew each time, in 0.1 ms: no lock is needed, and any number of shards is fine.
            reader = array_record_module.ArrayRecordReader(str(shard), "readahead_buffer_size:0")
            try:
                return reader.read_all() if records is None else reader.read(list(records))
            finally:
                reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise damaged(place, str(error)) from error


@contextlib.contextmanager
def _as_system_error(path: Path) -> Iterator[None]:
    """What the system said no to, which the library says by RuntimeError, is an OSError again."""
    try:
        yield
    except RuntimeError as error:
        system_error = faults.os_error_behind(error, path)
        if system_error is None:
            raise
        raise system_error from error


def _parse_index(index: Mapping[str, Any]) -> tuple[int, tuple[Entry, ...]]:
    if index["schema"] != SCHEMA:
        return index["schema"], ()  # what its rows are is not known
    return SCHEMA, tuple(entry_from_json(row) for row in index["entries"])


def _describe(header: Mapping[str, Any], *, shard: str, record: int) -> Entry:
    names = ("patient", "split", "has_label", "bleeding", "shape", "voxels", "volume_ml")
    row = {name: header[name] for name in names} | {"sorted_by": header.get("sorted_by", "")}
    return entry_from_json(row | {"id": header["case"], "shard": shard, "record": record})
