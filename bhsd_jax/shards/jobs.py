"""Which shards a data set becomes, which of them are written, and the files that say so.

Everything here is a function of the sorted case list, the facts and the plan, so that any number of
jobs that share only a file system agree on it. Each shard that was written has a record, a small
file of its own; whoever finds all records merges them into `manifest.json` and `index.json`.

A record holds the SHA-256 of its shard, and a seal, the SHA-256 of itself. What does not agree with
them was damaged on disk, and is written anew by the job whose shard it is.
"""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bhsd_jax.ct.prepared import Facts
from bhsd_jax.defects import Kind
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.shards import store
from bhsd_jax.volume import Case, Plan

logger = logging.getLogger(__name__)

_KEYS = ("key", "bytes", "entries")  # of every record; those of older versions have no more
_SHIFTED = (Kind.OFFSET, Kind.UNSIGNED, Kind.TURNED)
_SEALED = (*_KEYS, "sha256")  # what the seal is of


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: a function of the sorted case list and the plan alone."""

    path: Path
    record: Path  # the file that says it is written
    cases: tuple[Case, ...]
    digests: tuple[str, ...]  # of each case's files
    plan: Plan
    shifted: tuple[str, ...] = ()  # cases that older versions took as they lay

    @property
    def key(self) -> str:
        """Changes when a byte of the shard would. Planned network and statistics do not matter."""
        plan = self.plan.to_json()
        used = [plan[k] for k in ("version", "classes", "modality", "spacing_mm", "transpose")]
        used += [plan[k] for k in ("crop_hu", "axes", "normalize_first")] + [store.SCHEMA]
        # Added only where they matter, so that shards of older versions keep their keys.
        used += ["masked"] if self.plan.use_mask_for_norm else []
        used += [["shifted", *self.shifted]] if self.shifted else []
        used += [["normalized", *self.plan.foreground]] if self.plan.repaired else []
        more = ("channels", "regions", "ignore", "planar", "previous_stage")
        rare = {k: plan[k] for k in more if k in plan}
        used += [rare] if rare else []
        used += ["0 outside the mask"] if self.plan.masked else []
        cases = [(c.id, c.patient, c.split, c.bleeding, c.slice_labels) for c in self.cases]
        used += [absent] if any(absent := [case.absent for case in self.cases]) else []
        if plan["modality"] == "ct" and not all(case.table_feed for case in self.cases):
            used.append("mL of these cases as their affines have them")
        return hashlib.sha256(json.dumps([used, cases, self.digests]).encode()).hexdigest()


@dataclass(frozen=True)
class Share:
    """What one of several jobs does: every `number`-th shard, beginning with shard `index`.

    Raises:
        ValueError: If there is no such job.
    """

    index: int = 0
    number: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.number:
            raise UserError(
                f"config.preprocess.shard_index is 0..{self.number - 1} for num_shards "
                f"{self.number}; got {self.index}"
            )

    def jobs(self, jobs: Sequence[ShardJob]) -> list[ShardJob]:
        """The shards this one writes."""
        return [job for job in jobs if _position(job.path) % self.number == self.index]

    def order(self, cases: Sequence[Case], size: int) -> list[Case]:
        """All cases, its own first; the others in an order no other job has.

        What another has looked at by then is only read, so that jobs that are done help those that
        are not, and one that is started alone waits for nobody.
        """
        own = [c for n, c in enumerate(cases) if n // size % self.number == self.index]
        rest = [c for n, c in enumerate(cases) if n // size % self.number != self.index]
        return own + random.Random(self.index).sample(rest, len(rest))


def divide(
    folder: Path,
    records: Path,
    cases: Sequence[Case],
    facts: Sequence[Facts],
    plan: Plan,
    size: int,
) -> list[ShardJob]:
    """Shards by position among all cases, so that one refused case moves no other."""
    digests = {fact.case: fact.source_sha256 for fact in facts}
    shifted = {f.case for f in facts if any(one.kind in _SHIFTED for one in f.findings)}
    count = -(-len(cases) // size)
    jobs = []
    for index in range(count):
        part = tuple(c for c in cases[index * size : (index + 1) * size] if c.id in digests)
        name = f"shard-{index:05d}-of-{count:05d}"
        path, record = folder / f"{name}.arrayrecord", records / f"{name}.json"
        sums = tuple(digests[case.id] for case in part)
        moved = tuple(case.id for case in part if case.id in shifted)
        jobs.append(ShardJob(path, record, part, sums, plan, moved))
    return [job for job in jobs if job.cases]


def manifest(folder: Path) -> dict[str, Any]:
    """Records by shard, as the last run that was complete merged them.

    One that is damaged is left out, which a line says.
    """
    path = folder / "manifest.json"
    rows = files.recall_json(path) or {}
    records = {}
    for name, row in rows.items():
        try:
            records[name] = _checked(row)
        except files.MALFORMED as error:
            logger.warning("%s: damaged (%s: %s); it is made anew", path, name, error)
    if len(records) < len(rows):
        files.write_json(path, records)
    return records


def written(job: ShardJob, noted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a shard that is there as the job would write it; None if it is not.

    A row of the manifest, `known`, does as well: the records may lie in a run folder that is gone.
    Of the shard itself only the size is looked at; `verify` reads it.
    """
    for record in (files.recall_json(job.record, _checked), noted.get(job.path.name)):
        if record and record["key"] == job.key and _size(job.path) == record["bytes"]:
            return record
    return None


def remember(job: ShardJob, entries: Sequence[store.Entry], refused: Mapping[str, str]) -> None:
    """Writes the record of a shard, and why cases are missing from it."""
    record = {
        "key": job.key,
        "bytes": _size(job.path),
        "sha256": _sha256(job.path),
        "entries": [asdict(entry) for entry in entries],
    }
    files.write_json(job.record, record | {"seal": _seal(record), "refused": dict(refused)})


def verify(written: tuple[ShardJob, Mapping[str, Any]]) -> str:
    """What is wrong with a shard, given its record; "" if it is byte for byte what was written.

    A record of an older version has no SHA-256: then every array is compared with the digest beside
    it in the shard, and the record is written anew.
    """
    job, record = written
    if "sha256" in record:
        return (
            "" if _sha256(job.path) == record["sha256"] else "its SHA-256 is not what was written"
        )
    try:
        entries = store.check_shard(job.path)
    except ValueError as error:
        return str(error.__cause__ or error)
    remember(job, entries, record.get("refused", {}))
    return ""


def finish(folder: Path, jobs: Sequence[ShardJob], plan: Plan) -> tuple[int, dict[str, str]]:
    """Writes manifest and index if all shards are there.

    Returns:
        How many are not, and why cases are missing from those that are, whoever wrote them.
    """
    noted = manifest(folder)
    by_file = {job.path.name: written(job, noted) for job in jobs}
    records = {name: dict(record) for name, record in sorted(by_file.items()) if record}
    refused = {case: why for r in records.values() for case, why in r.get("refused", {}).items()}
    if missing := len(by_file) - len(records):
        return missing, refused
    rows = [store.entry_from_json(row) for record in records.values() for row in record["entries"]]
    whole = {name: r for name, r in records.items() if not r.pop("refused", None)}
    files.write_json(folder / "plan.json", plan.to_json())
    files.write_json(folder / "manifest.json", whole)
    store.write_index(folder, rows)
    _sweep(folder, {row.shard for row in rows})
    return 0, refused


def _sweep(folder: Path, used: set[str]) -> None:
    """Removes the shards of an earlier division, and what killed jobs left."""
    for path in folder.glob("shard-*.arrayrecord"):
        if path.name not in used:
            path.unlink(missing_ok=True)
    files.sweep(folder)


def _position(path: Path) -> int:
    return int(path.name.split("-")[1])


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str | None:
    """SHA-256 of a shard; None if none of its cases could be prepared, so that there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps([record[name] for name in _SEALED])
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(record: Any) -> dict[str, Any]:
    """The record, if it can be one.

    Raises:
        ValueError: If it is not what was written.
        KeyError: If it lacks a part.
        TypeError: If a part is of another type.
    """
    for row in record["entries"]:
        store.entry_from_json(row)
    missing = [name for name in _KEYS if name not in record]
    if missing:
        raise KeyError(missing[0])
    if "sha256" in record and _seal(record) != record.get("seal"):
        raise UserError("its seal is another")
    return dict(record)
