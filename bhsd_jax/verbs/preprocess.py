"""Raw scans to shards: look at every case, plan, then write what is not yet there.

A killed run is started again with the same command: shards that are complete, made from the same
files under the same plan, stay. Needs no JAX.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bhsd_jax.ct import integrity, shards
from bhsd_jax.ct.prepare import Facts, fingerprint_case, make_plan, prepare_case
from bhsd_jax.verbs import checkup, setup
from bhsd_jax.verbs.setup import Config
from bhsd_jax.verbs.workers import Progress, Workers
from bhsd_jax.volume import Case, Dataset, Plan

logger = logging.getLogger(__name__)

_BYTES_PER_PROCESS = 2**25  # a process takes seconds to start, and reads this much in that time
_BROKEN = (ValueError, OSError, EOFError, MemoryError)  # of one case: recorded, others go on


@dataclass(frozen=True)
class _Job:
    """One shard to write: a function of the sorted case list and the plan alone."""

    path: Path
    cases: tuple[Case, ...]
    digests: tuple[str, ...]  # of each case's files
    plan: Plan

    @property
    def key(self) -> str:
        """Changes when a byte of the shard would. Planned network and statistics do not matter."""
        plan = self.plan.to_json()
        used = [plan[k] for k in ("version", "classes", "modality", "spacing_mm", "transpose")]
        used += [plan["crop_hu"], shards.SCHEMA]
        known = [(c.id, c.patient, c.split, c.bleeding, c.slice_labels) for c in self.cases]
        return hashlib.sha256(json.dumps([used, known, self.digests]).encode()).hexdigest()


def run(config: Config, workdir: Path) -> None:
    """Checks, plans and writes; with `preprocess.verify_only` it only checks.

    Writes `integrity.csv`, `integrity.json`, `defects.csv` if there are any and, if cases were
    refused, `skipped.csv` to `workdir`; `plan.json`, shards, `manifest.json` and, last,
    `index.json` to the shards' folder.

    Raises:
        FileNotFoundError: If the data set is not where the config says.
        ValueError: If nothing can be planned, or cases were refused and
            `preprocess.allow_skipped` is False (all others are written by then).
    """
    settings: Any = config.preprocess
    workdir.mkdir(parents=True, exist_ok=True)
    dataset: Any = setup.dataset(config, workdir)
    if hasattr(dataset, "prepare"):
        dataset.prepare()
    found = checkup.survey(dataset)
    cases = found.cases
    ledger = workdir / "skipped.csv"
    with Workers(settings.processes or _processes(cases)) as workers:
        facts, skipped = _look(cases, dataset, _crop_hu(dataset, settings), workers)
        facts, skipped = checkup.conclude(workdir, dataset, found, facts, skipped)
        _write_ledger(ledger, skipped)
        if facts and not settings.verify_only:
            plan = _plan(dataset, facts, settings, skipped)
            folder = Path(settings.shards or workdir / "shards")
            jobs = _jobs(folder, cases, facts, plan, settings.cases_per_shard)
            skipped |= _write_all(folder, jobs, plan, workers)
            _write_ledger(ledger, skipped)
    if skipped:
        case = min(skipped)
        message = (
            f"{len(skipped)} of {len({case.id for case in cases} | set(skipped))} cases skipped, "
            f"see {ledger}; {case}: {skipped[case]}"
        )
        if not settings.allow_skipped:
            raise ValueError(
                f"{message}; repair them, or set --config.preprocess.allow_skipped=True"
            )
        logger.warning("%s", message)


def _processes(cases: Sequence[Case]) -> int:
    """One per core this process may use; fewer where starting them would take longest."""
    affinity = getattr(os, "sched_getaffinity", None)  # a batch system may have given only some
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    files = [path for case in cases for path in (case.image, case.label) if path and path.is_file()]
    return min(cores, 1 + sum(path.stat().st_size for path in files) // _BYTES_PER_PROCESS)


def _crop_hu(dataset: Dataset, settings: Any) -> float | None:
    return settings.crop_hu if dataset.modality == "ct" else None


def _plan(
    dataset: Dataset, facts: Sequence[Facts], settings: Any, skipped: Mapping[str, str]
) -> Plan:
    training = [fact for fact in facts if fact.voxels and fact.split in ("train", "val")]
    if skipped and not training:
        case = min(skipped)
        raise ValueError(
            f"{dataset.name}: no training case with a mask is left of {len(skipped)} refused; "
            f"{case}: {skipped[case]}"
        )
    plan = make_plan(
        training,
        dataset=dataset.name,
        classes=tuple(dataset.classes),
        modality=dataset.modality,
        license=dataset.license,
        source_sha256=_source_sha256(facts),
        planner=settings.planner,
        spacing_mm=tuple(settings.spacing_mm) if settings.spacing_mm else None,
        crop_hu=_crop_hu(dataset, settings),
    )
    for note in plan.notes:
        logger.warning("%s", note)
    return plan


def _look(
    cases: Sequence[Case], dataset: Dataset, crop_hu: float | None, workers: Workers
) -> tuple[list[Facts], dict[str, str]]:
    """First pass: facts in the order of the cases, and why the others were refused."""
    look = functools.partial(
        _fingerprint,
        num_classes=len(dataset.classes),
        modality=dataset.modality,
        crop_hu=crop_hu,
    )
    found: dict[str, Facts] = {}
    skipped: dict[str, str] = {}
    with Progress("check", len(cases)) as progress:
        for case, result in workers.each(look, cases):
            if isinstance(result, Facts):
                found[case.id] = result
            else:
                skipped[case.id] = result
                logger.warning("skipped %s: %s", case.id, result)
            progress.advance(1)
    return [found[case.id] for case in cases if case.id in found], skipped


def _fingerprint(case: Case, **settings: Any) -> Facts | str:
    try:
        return fingerprint_case(case, **settings)
    except _BROKEN as error:
        return _reason(error)


def _jobs(
    folder: Path, cases: Sequence[Case], facts: Sequence[Facts], plan: Plan, size: int
) -> list[_Job]:
    """Shards by position among all cases, so that one refused case moves no other."""
    digests = {fact.case: fact.source_sha256 for fact in facts}
    count = -(-len(cases) // size)
    jobs = []
    for index in range(count):
        part = [c for c in cases[index * size : (index + 1) * size] if c.id in digests]
        path = folder / f"shard-{index:05d}-of-{count:05d}.arrayrecord"
        jobs.append(_Job(path, tuple(part), tuple(digests[case.id] for case in part), plan))
    return [job for job in jobs if job.cases]


def _write_all(folder: Path, jobs: Sequence[_Job], plan: Plan, workers: Workers) -> dict[str, str]:
    """Second pass: writes what is missing, then the index. Returns why cases were refused."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder)
    done = {job.path.name: manifest[job.path.name] for job in jobs if _is_done(job, manifest)}
    todo = [job for job in jobs if job.path.name not in done]
    logger.info("%d of %d shards are there already", len(done), len(jobs))
    if todo:
        (folder / "index.json").unlink(missing_ok=True)  # it would speak of shards being replaced
    shards.write_json(folder / "plan.json", plan.to_json())
    skipped: dict[str, str] = {}
    rows = [row for name in done for row in done[name]["entries"]]
    with Progress("prepare", sum(len(job.cases) for job in todo)) as progress:
        for job, (entries, refused) in workers.each(_write, todo):
            skipped |= refused
            new = [asdict(entry) for entry in entries]
            rows += new
            if not refused:
                size = job.path.stat().st_size
                done[job.path.name] = {"key": job.key, "bytes": size, "entries": new}
                shards.write_json(folder / "manifest.json", done)
            progress.advance(len(job.cases))
    shards.write_json(folder / "manifest.json", dict(sorted(done.items())))
    shards.write_index(folder, [shards.entry_from_json(row) for row in rows])
    for path in folder.glob("shard-*.arrayrecord"):
        if path.name not in {row["shard"] for row in rows}:
            path.unlink()  # of an earlier division into shards
    return skipped


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _is_done(job: _Job, manifest: Mapping[str, Any]) -> bool:
    known = manifest.get(job.path.name)
    if known is None or known["key"] != job.key or not job.path.is_file():
        return False
    return job.path.stat().st_size == known["bytes"]


def _write(job: _Job) -> tuple[list[shards.Entry], dict[str, str]]:
    refused: dict[str, str] = {}

    def prepared() -> Iterator[shards.Prepared]:
        for case, digest in zip(job.cases, job.digests, strict=True):
            try:
                made = prepare_case(case, job.plan, source_sha256=digest)
            except _BROKEN as error:
                refused[case.id] = _reason(error)
            else:
                yield made

    return shards.write_shard(job.path, prepared()), refused


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _source_sha256(facts: Sequence[Facts]) -> str:
    text = "".join(f"{fact.case} {fact.source_sha256}\n" for fact in facts)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_ledger(path: Path, skipped: Mapping[str, str]) -> None:
    """Why cases were refused; no file if none was."""
    if skipped:
        table = [{"case": case, "reason": skipped[case]} for case in sorted(skipped)]
        integrity.write_csv(path, table, ("case", "reason"))
    else:
        path.unlink(missing_ok=True)
