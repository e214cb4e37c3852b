"""Raw scans to shards: look at every case, plan, then write what is not yet there.

A killed run is started again with the same command: cases whose files have not changed are not
looked at again, and shards that are complete, made from the same files under the same plan, stay.
They are read again and compared with their SHA-256: what was damaged on disk is written anew.
Needs no JAX.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import data
from bhsd_jax.ct import scan
from bhsd_jax.ct.integrity import checkup, facts_file
from bhsd_jax.ct.prepare import fingerprint_case, prepare_case
from bhsd_jax.ct.prepared import Facts
from bhsd_jax.datasets import previous, splits_file
from bhsd_jax.defects import Finding, in_line, refused
from bhsd_jax.nnunet import adoption, plans_json
from bhsd_jax.nnunet.dataset_plan import CASCADE, FULL, PLANAR, make_plan
from bhsd_jax.platform import budget, csv_files, files, machine
from bhsd_jax.platform.errors import BROKEN, UserError
from bhsd_jax.platform.workers import Pool, Progress, Workers
from bhsd_jax.settings import Config, Settings
from bhsd_jax.shards import jobs as shard_jobs
from bhsd_jax.shards import store
from bhsd_jax.shards.jobs import ShardJob, Share
from bhsd_jax.training_settings import Preprocess
from bhsd_jax.verbs import parts
from bhsd_jax.volume import Case, Dataset, Plan, Survey, labels_of

logger = logging.getLogger(__name__)

_BEST_COMPRESSION = 20  # of shards; real head CT comes to about 3
_BYTES_PER_PROCESS = 2**25  # a process takes seconds to start, and reads this much in that time


def run(config: Config, workdir: Path, workers: Pool | None = None) -> None:
    """Checks, plans and writes; with `preprocess.verify_only` it only checks.

    Writes `integrity.csv`, `integrity.json`, `defects.csv` if there are any and, if cases were
    refused, `skipped.csv` to `workdir`; `plan.json`, shards, `manifest.json` and, last,
    `index.json` to the shards' folder.
    With `preprocess.num_shards` above 1, or in a cluster's process among others, this is one of so
    many jobs, which share `workdir` and the shards' folder and may run at once, in any order, and
    again.

    Args:
        config: The experiment's.
        workdir: The run folder.
        workers: What the passes run on; None: processes of this machine.

    Raises:
        FileNotFoundError: If the data set is not where the config says.
        ValueError: If nothing can be planned, or cases were refused and
            `preprocess.allow_skipped` is False (all others are written by then).
        faults.WriteError: If the system says no, such as on a full disk; the same command goes on.
    """
    config = Settings.of(config)
    settings = config.preprocess
    share = _share(config)
    theirs = _nnunet(settings)
    maps = _of_first_stage(settings, theirs)
    for folder in (workdir, workdir / "looked"):
        files.sweep(folder)
    files.open_folder(workdir)
    dataset: Any = data.data_set(config, workdir)
    if hasattr(dataset, "prepare"):
        dataset.prepare()
    found = _cascaded(checkup.survey(dataset), maps)
    cases = found.cases
    folds = splits_file.beside(dataset, cases, settings.plan or "")
    ledger = workdir / "skipped.csv"
    # Who checks a data set wants its files read, not what was known of them.
    known_facts = None if settings.verify_only and share.number == 1 else workdir / "looked"
    with workers or Workers(settings.processes or _processes(cases)) as workers:
        order = share.order(cases, settings.cases_per_shard)
        facts, unread = _look(order, dataset, _crop_hu(dataset, settings), workers, known_facts)
        facts.sort(key=lambda fact: fact.case)
        cases, facts = checkup.with_patients(cases, facts)
        facts, skipped = checkup.conclude(workdir, dataset, found, facts, unread)
        _write_ledger(ledger, skipped)
        checkup.require_ct(dataset.name, len(cases), unread)
        if facts and not settings.verify_only:
            plan = _plan(dataset, facts, settings, skipped, theirs)
            folder, records = data.shards_folder(config, workdir), workdir / "written"
            size = settings.cases_per_shard
            jobs = shard_jobs.divide(folder, records, cases, facts, plan, size)
            splits_file.keep(folder, folds)
            trained_on = {f.case: f.patient for f in facts if f.split == "train" and f.voxels}
            splits_file.offer(workdir, dataset, folds, trained_on)
            skipped |= _write_all(folder, jobs, share, workers, facts)
            _write_ledger(ledger, skipped)
    if skipped:
        case = min(skipped)
        message = (
            f"{len(skipped)} of {len({case.id for case in cases} | set(skipped))} cases skipped, "
            f"see {ledger}; {case}: {skipped[case]}"
        )
        if not settings.allow_skipped:
            raise UserError(
                f"{message}; repair them, or set --config.preprocess.allow_skipped=True"
            )
        logger.warning("%s", message)


def _share(config: Settings) -> Share:
    """What the config says; else, of several processes of a cluster, each is one of the jobs."""
    settings = config.preprocess
    place = parts.place(config)
    if settings.num_shards == 1 and place.several:
        return Share(place.index or 0, place.count or 1)
    return Share(settings.shard_index, settings.num_shards)


def _processes(cases: Sequence[Case]) -> int:
    """One per core this process may use; fewer where starting them would take longest."""
    places = (place for case in cases for place in (case.image, case.label) if place)
    cores, size = machine.cores(), 0
    for path in (path for place in places for path in scan.files(place)):
        with contextlib.suppress(OSError):  # whoever reads it says so
            size += path.stat().st_size
        if size >= (cores - 1) * _BYTES_PER_PROCESS:
            return cores  # of a million files only the first few are asked for their size
    return 1 + size // _BYTES_PER_PROCESS


def _crop_hu(dataset: Dataset, settings: Preprocess) -> float | None:
    return settings.crop_hu if dataset.modality == "ct" else None


def _nnunet(settings: Preprocess) -> dict[str, Any] | None:
    """NnU-Net's plan if one is named, refused here if it cannot be used with any data."""
    if not settings.plan:
        return None
    plans = adoption.read(settings.plan)
    adoption.require_usable(plans, settings.configuration)
    return plans


def _of_first_stage(
    settings: Preprocess, theirs: Mapping[str, Any] | None
) -> dict[str, Path] | None:
    """Label maps by case that the first networks of a cascade have predicted; None: no cascade."""
    name = settings.configuration
    plans = theirs and plans_json.resolve(theirs, name)
    cascade = bool(plans_json.previous_stage(plans)) if plans else name == CASCADE
    if not cascade and settings.previous:
        raise UserError(
            f"config.preprocess.previous is for a second stage, such as {CASCADE}; "
            f"preprocess.configuration is {name}"
        )
    if cascade and not settings.previous:
        raise UserError(
            f"config.preprocess.configuration: {name} is the second stage of a 3D cascade; name "
            "folders or runs with the first stage's label maps of the training cases in "
            "preprocess.previous"
        )
    if not cascade:
        return None
    maps = previous.predicted(settings.previous, "preprocess.previous", logits=True)
    for folder in sorted({path.parent for path in maps.values()}):
        facts = files.recall_json(folder / "predictions.json", dict, remove=False)
        if facts and facts.get("split") != "val":
            logger.warning(
                "%s: not predicted of the validation cases of its run; of scans that the first "
                "stage was trained on it knows too much, and the second learns to trust it blindly",
                folder,
            )
    return maps


def _cascaded(found: Survey, maps: dict[str, Path] | None) -> Survey:
    """Cases with what a first network has predicted of them; those without masks may lack it."""
    if maps is None:
        return found
    cases, missing = previous.attach(found.cases, maps)
    masked = {case.id for case in found.cases if case.label is not None}
    lost = [case for case in missing if case in masked]
    if lost:
        raise UserError(
            f"config.preprocess.previous: no label map of {len(lost)} of {len(masked)} cases with "
            f"masks: {', '.join(lost[:4])}; predict them with networks of the first stage that "
            f"were not trained on them{previous.about_salt(found.cases)}"
        )
    if missing:
        logger.info("%d cases without masks are left out: no label map of them", len(missing))
    return dataclasses.replace(found, cases=tuple(cases))


def _plan(
    dataset: Dataset,
    facts: Sequence[Facts],
    settings: Preprocess,
    skipped: Mapping[str, str],
    theirs: dict[str, Any] | None,
) -> Plan:
    training = [fact for fact in facts if fact.voxels and fact.split in ("train", "val")]
    if skipped and not training:
        case = min(skipped)
        raise UserError(
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
        memory_gb=settings.memory_gb,
        spacing_mm=settings.spacing_mm,
        crop_hu=_crop_hu(dataset, settings),
        labels=labels_of(dataset),
        channels=getattr(dataset, "channels", ()),
        configuration=_configuration(settings, theirs),
    )
    if theirs:
        plan = adoption.adopt(plan, training, theirs, settings.configuration)
    if settings.first == "normalize" and plan.modality == "ct":
        plan = dataclasses.replace(plan, normalize_first=True, repaired=True)
    for note in plan.notes:
        logger.warning("%s", note)
    return plan


def _configuration(settings: Preprocess, theirs: Mapping[str, Any] | None) -> str:
    """What is planned of our own, before a file's plan takes its place."""
    if theirs is None:
        return settings.configuration
    return (
        PLANAR if plans_json.is_planar(plans_json.resolve(theirs, settings.configuration)) else FULL
    )


def _look(
    cases: Sequence[Case],
    dataset: Dataset,
    crop_hu: float | None,
    workers: Pool,
    known_facts: Path | None,
) -> tuple[list[Facts], dict[str, Finding]]:
    """First pass: facts in the order of the cases, and why the others were refused."""
    look = functools.partial(
        _fingerprint,
        known_facts=known_facts,
        num_classes=labels_of(dataset).values,
        modality=dataset.modality,
        crop_hu=crop_hu,
        schemes=getattr(dataset, "channels", ()),
    )
    found: dict[str, Facts] = {}
    skipped: dict[str, Finding] = {}
    with Progress("check", len(cases)) as progress:
        for case, result in workers.each(look, cases):
            if isinstance(result, Facts):
                found[case.id] = result
            else:
                skipped[case.id] = result
                logger.warning("skipped %s: %s", case.id, result.text)
            progress.advance(1)
    return [found[case.id] for case in cases if case.id in found], skipped


def _fingerprint(case: Case, *, known_facts: Path | None, **settings: Any) -> Facts | Finding:
    """Facts, or why there are none; from the folder `known_facts` if no file has changed since."""
    key = facts_file.key(case, settings)  # before reading: a file may change meanwhile
    if known_facts and (known := facts_file.load(known_facts, case, key)):
        return known
    try:
        found = fingerprint_case(case, **settings)
    except UserError as error:
        found = refused(error, case.id)
    except BROKEN as error:
        return refused(error, case.id)  # not the file's fault, perhaps: asked again each time
    if known_facts:
        facts_file.save(known_facts, case, key, found)
    return found


def _write_all(
    folder: Path, jobs: Sequence[ShardJob], share: Share, workers: Pool, facts: Sequence[Facts]
) -> dict[str, str]:
    """Second pass: writes what is missing of this job's share. Returns why cases were refused."""
    plan = jobs[0].plan
    files.open_folder(folder)
    files.sweep(folder)
    mine = share.jobs(jobs)
    there = _intact(mine, shard_jobs.manifest(folder), workers)
    todo = [job for job in mine if job.path.name not in there]
    logger.info("%d of %d shards are there already", len(mine) - len(todo), len(mine))
    if todo:
        _require_disk(folder, {case.id for job in todo for case in job.cases}, facts, plan)
        (folder / "index.json").unlink(missing_ok=True)  # it would speak of shards being replaced
    files.write_json(folder / "plan.json", plan.to_json())
    with Progress("prepare", sum(len(job.cases) for job in todo)) as progress:
        for job, _ in workers.each(_write, todo):
            progress.advance(len(job.cases))
    missing, skipped = shard_jobs.finish(folder, jobs, plan)
    if missing:
        logger.info("%d of %d shards are left to the other jobs", missing, len(jobs))
    return skipped


def _require_disk(folder: Path, cases: Set[str], facts: Sequence[Facts], plan: Plan) -> None:
    """Refuses to begin where the shards cannot fit, however well they compress."""
    bytes_per_voxel = (4 if plan.normalized_before else 2) * plan.raw_channels + 1  # image and mask
    target = math.prod(plan.spacing_mm)
    voxels = sum(
        math.prod(fact.shape) * math.prod(fact.spacing_mm) / target
        for fact in facts
        if fact.case in cases
    )
    size = voxels * bytes_per_voxel
    budget.require_disk(folder, size, "shards", least=size / _BEST_COMPRESSION)


def _intact(mine: Sequence[ShardJob], known: Mapping[str, Any], workers: Pool) -> set[str]:
    """Names of the shards that are there and byte for byte what was written; others are removed."""
    records = [(job, _whole(job, known)) for job in mine]
    written = [(job, record) for job, record in records if record is not None]
    intact = set()
    for (job, _), wrong in workers.each(shard_jobs.verify, written):
        if wrong:
            job.record.unlink(missing_ok=True)
            files.discard(job.path, wrong)
        else:
            intact.add(job.path.name)
    return intact


def _whole(job: ShardJob, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a shard that need not be written."""
    record = shard_jobs.written(job, known)
    # What was refused is tried again.
    return None if record is None or record.get("refused") else record


def _write(job: ShardJob) -> None:
    """Writes one shard and its record, unless they are there."""
    left_out: dict[str, str] = {}
    if _whole(job, {}):
        return

    def prepared() -> Iterator[store.Prepared]:
        for case, digest in zip(job.cases, job.digests, strict=True):
            try:
                made = prepare_case(case, job.plan, source_sha256=digest, to_train=True)
            except BROKEN as error:
                left_out[case.id] = in_line(error)
            else:
                yield made

    entries = store.write_shard(job.path, prepared())
    if not entries:
        job.path.unlink(missing_ok=True)  # an older shard, none of whose cases are left
    shard_jobs.remember(job, entries, left_out)


def _source_sha256(facts: Sequence[Facts]) -> str:
    text = "".join(f"{fact.case} {fact.source_sha256}\n" for fact in facts)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_ledger(path: Path, skipped: Mapping[str, str]) -> None:
    """Why cases were refused; no file if none was."""
    csv_files.write_records(path, [{"case": c, "reason": skipped[c]} for c in sorted(skipped)])
