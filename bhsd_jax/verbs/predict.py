"""`predict`: a run and scans of any geometry to label maps on the scans' own voxels."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import data, predictor
from bhsd_jax.assemble.predictor import Predictor, ScanVolumes
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import formats, scan
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.datasets import image_files
from bhsd_jax.platform import faults, files
from bhsd_jax.platform.csv_files import write_records
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.page import NOTICE
from bhsd_jax.settings import Config, DicomSeries, Settings
from bhsd_jax.train import barrier, processes
from bhsd_jax.train.log import heartbeat
from bhsd_jax.verbs import parts
from bhsd_jax.volume import Case, Plan, Series

logger = logging.getLogger(__name__)

_BROKEN = (UserError, OSError, EOFError, MemoryError)  # of one scan: recorded, others go on


@dataclass
class Found:
    """Which scans were predicted and which were not, by their names in the outputs."""

    rows: list[ScanVolumes] = field(default_factory=list)  # of those predicted
    skipped: dict[str, str] = field(default_factory=dict)  # why others were not
    fault: str = ""  # why none was predicted after some scan: the machine said no


def run(config: Config, workdir: Path) -> None:
    """Predicts every scan, then writes `volumes.csv`, `volumes.json` and `predictions.json`.

    A broken scan goes to `skipped.csv` and the others are still predicted. Where nothing can be
    written any more, the tables tell of what there is. Of several processes each predicts scans of
    its own, and the first writes the tables.

    Raises:
        FileNotFoundError: If there is no plan, checkpoint or scan where the config says.
        ValueError: If config and checkpoint do not fit, scans had to be skipped, or the disk is
            full.
        faults.WriteError: If nothing can be written from the start.
    """
    config = Settings.of(config)
    settings = config.predict
    parts.join(config)
    logger.warning("%s", NOTICE)
    cases = _part(find_scans(config, workdir), settings)
    if settings.probabilities and any(
        isinstance(c.image, Series) and c.image.unshear for c in cases
    ):
        raise UserError(
            "config.predict.probabilities: those of unsheared series would not lie on the series' "
            "own voxels; set unshear=False, or leave them out"
        )
    run = Run.of(config, workdir)
    out = Path(settings.out or workdir / "predictions")
    files.open_folder(out)
    files.sweep(out)
    predictor.share_cores(run)
    processes.say_devices()
    step, networks = predictor.load(run)
    predict = predictor.make_predictor(run, list(networks.values()))
    names = _names(cases, workdir, settings)
    mine = parts.own(cases)
    tables = _tables(out, settings)
    _log_estimate(predict, len(mine))
    predicted = _predict_all(predict, mine, names, out, tables, settings.overwrite)
    found = _gather(out, predicted, names)
    if found is not None:
        facts = _facts(run, step, tuple(networks))
        _conclude(tables, found, facts, len(cases))


def _gather(out: Path, found: Found, names: Mapping[str, str]) -> Found | None:
    """What all processes have found, in the order of the scans; None but in the first process."""
    together = parts.gather(out, "predict", asdict(found))
    if together is None:
        return None
    every = [
        Found([ScanVolumes(**row) for row in part["rows"]], part["skipped"], part["fault"])
        for part in together
    ]
    rows = {row.case: row for one in every for row in one.rows}
    skipped = {name: reason for one in every for name, reason in one.skipped.items()}
    return Found(
        [rows[name] for name in names.values() if name in rows],
        {name: skipped[name] for name in names.values() if name in skipped},
        next((one.fault for one in every if one.fault), ""),
    )


def _conclude(out: Path, found: Found, facts: Mapping[str, Any], scans: int) -> None:
    """Writes the tables, and raises if a scan was skipped or the machine said no."""
    skipped = [{"case": name, "reason": reason} for name, reason in found.skipped.items()]
    unwritten = ""
    try:
        write_records(out / "skipped.csv", skipped, line_end="\n")
        _write_tables(out, found.rows)
        doubtful = {row.case: row.warning for row in found.rows if row.warning}
        files.write_json(out / "predictions.json", {**facts, "doubtful": doubtful})
    except faults.WriteError as error:
        unwritten = faults.explain(error) or str(error)
    if found.fault or unwritten:
        tables = "their tables are not complete" if unwritten else "the tables tell of them"
        raise UserError(
            f"{found.fault or unwritten}. {len(found.rows)} of {scans} label maps are in {out}, "
            f"{tables}; with --config.predict.overwrite=False the same command goes on from there"
        )
    if found.skipped:
        name, reason = next(iter(found.skipped.items()))
        raise UserError(
            f"{len(found.skipped)} of {scans} scans skipped, see {out / 'skipped.csv'}; "
            f"{name}: {reason}"
        )
    logger.info("%d label maps in %s", len(found.rows), out)


def _part(cases: list[Case], settings: Any) -> list[Case]:
    """The scans of this job, of several that share the work.

    Raises:
        ValueError: If there is no such job, or it has no scan.
    """
    part, parts_in_all = settings.part_id, settings.num_parts
    if part >= parts_in_all:
        raise UserError(f"config.predict.part_id is 0..{parts_in_all - 1}; got {part}")
    chosen = cases[part::parts_in_all]
    if not chosen:
        raise UserError(
            f"config.predict.num_parts is {parts_in_all}, of {len(cases)} scans; part {part} has "
            "none: ask for fewer parts"
        )
    return chosen


def _tables(out: Path, settings: Any) -> Path:
    """Where the tables go: each of several jobs writes its own."""
    if settings.num_parts == 1:
        return out
    folder = out / f"part_{settings.part_id}_of_{settings.num_parts}"
    files.open_folder(folder)
    return folder


def find_scans(config: Settings, workdir: Path) -> list[Case]:
    """The scans to predict, sorted: a file, a folder's, or a split of the data set.

    NIfTI files of a folder itself, and every DICOM CT series anywhere below it. nnU-Net's channel
    suffix `_0000` is not part of a case's name.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no scan in it.
        ValueError: If the split is unknown, empty, or names scans the data set does not have.
    """
    settings = config.predict
    if not settings.images:
        return _split_scans(config, workdir, settings.split)
    path = Path(settings.images)
    series: list[Case] = []
    if path.is_dir():
        listed = image_files.scans(path)
        files = {n: f for n, f in listed.items() if not slice_file.is_dicom(f)}
        series = _series(path, files, settings.dicom)
    elif path.is_file() and slice_file.is_dicom(path):
        raise UserError(
            f"{path}: one DICOM file is one slice or one part; name the folder of the series"
        )
    elif path.is_file():
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        files = {formats.case_name(name): path}
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; look at config.predict.images")
    if not files and not series:
        raise FileNotFoundError(
            f"{path}: no NIfTI file and no DICOM CT series in it; look at config.predict.images"
        )
    chosen = image_files.group(files, _channels(workdir))
    found = [Case(name, name, file, None, "test") for name, file in sorted(chosen.items())]
    if {case.id for case in found} & {case.id for case in series}:
        raise UserError(
            f"{path}: a NIfTI file and a DICOM folder have one name; rename or move one of them"
        )
    return found + series


def _channels(workdir: Path) -> int:
    """Files or colors that make one scan for the run's network; 1 where there is no run yet."""
    if not (workdir / "plan.json").is_file():
        return 1
    return max(len(Plan.load(workdir).channels), 1)


def _series(path: Path, beside: Mapping[str, Path], how: DicomSeries) -> list[Case]:
    """DICOM series of a folder; beside NIfTI files, images of no series are but a warning."""
    try:
        return dicom_cases.scans(path, **vars(how))
    except UserError as error:
        if not beside:
            raise
        logger.warning("%s", error)
        return []


def _names(cases: Sequence[Case], workdir: Path, settings: Any) -> dict[str, str]:
    """What outputs are called; by default DICOM's own names are hidden, NIfTI's are not."""
    hide = settings.show_ids is False, settings.show_ids is not True and bool(settings.images)
    hidden = {c.id for c in cases if hide[isinstance(c.image, Series)]}
    short = data.short_names(sorted(hidden), workdir, show_ids=False) if hidden else {}
    return {case.id: short.get(case.id, case.id) for case in cases}


def _split_scans(config: Settings, workdir: Path, split: str) -> list[Case]:
    if split not in ("val", "test"):
        raise UserError(f"config.predict.split is val or test; got {split!r}")
    roles, _ = data.roles(config, workdir)
    known = {case.id: case for case in data.data_set(config, workdir).cases()}
    wanted = getattr(roles, split)
    missing = [case for case in wanted if case not in known]
    if missing or not wanted:
        raise UserError(
            f"split {split}: {len(missing)} of its {len(wanted)} scans are not in the data set; "
            "set config.predict.split, or name files with config.predict.images"
        )
    return [
        Case(case, case, known[case].image, None, split, table_feed=known[case].table_feed)
        for case in wanted
    ]


def _log_estimate(predict: Predictor, scans: int) -> None:
    """So that nobody waits for days unknowing: on a CPU a large tile takes most of a minute."""
    tiles = predict.window.count(predict.plan.median_shape) * len(predict.networks)
    share = 2 ** len(predict.window.mirror_axes)
    hint = f"; infer.mirror=False needs one in {share}" if predict.window.mirror else ""
    logger.info("%d scans, about %d tiles each, %d in all%s", scans, tiles, scans * tiles, hint)


def _predict_all(
    predict: Predictor,
    cases: Sequence[Case],
    names: Mapping[str, str],
    out: Path,
    tables: Path,
    overwrite: bool,
) -> Found:
    """Predicts one after the other; where there is one process, tables grow as it goes."""
    found = Found()
    begun = time.monotonic()
    alone = barrier.place() == (0, 1)
    for index, case in enumerate(cases, start=1):
        name = names[case.id]
        target = out / f"{name}{scan.ending(case.image)}"
        try:
            row = None if overwrite else predict.finished(case, target, name)
            if row is None:
                with heartbeat(f"scan {index} of {len(cases)}, {name}"):
                    row = predict(case, target, name)
            found.rows.append(row)
            if alone:
                _write_tables(tables, found.rows)
        except faults.WriteError as error:
            found.fault = faults.explain(error) or str(error)
            logger.error("scan %d of %d, %s: %s", index, len(cases), name, found.fault)
            break
        except _BROKEN as error:
            reason = str(error).replace(str(case.image), name).replace(case.id, name)
            found.skipped[name] = reason
            logger.error("scan %d of %d, %s: skipped: %s", index, len(cases), name, reason)
            continue
        left = (time.monotonic() - begun) / index * (len(cases) - index)
        took = "there already" if row.seconds is None else f"{row.seconds:.1f} s"
        volume = row.total_ml
        logger.info(
            "scan %d of %d, %s: %.1f mL, %s, %.0f s left",
            *(index, len(cases), name, volume, took, left),
        )
    told = {row.case for row in found.rows} | found.skipped.keys()
    missed = [names[case.id] for case in cases if names[case.id] not in told]
    found.skipped |= dict.fromkeys(missed, f"not predicted: {found.fault}")
    return found


def _write_tables(out: Path, rows: Sequence[ScanVolumes]) -> None:
    write_records(out / "volumes.csv", [row.flat() for row in rows], line_end="\n")
    listed = [vars(row) | {"ml": dict(row.ml)} for row in rows]
    for row in listed:
        if row["all_ml"] is None:  # of classes it is their sum
            del row["all_ml"]
    files.write_json(out / "volumes.json", {"notice": NOTICE, "unit": "mL", "scans": listed})


def _facts(run: Run, step: int, networks: tuple[str, ...]) -> dict[str, Any]:
    """What a reader of the label maps has to know."""
    config = run.config
    return {
        "notice": NOTICE,
        "step": step,
        "networks": networks,
        "classes": run.labels.names,
        "split": None if config.predict.images else config.predict.split,
        "mirror": config.infer.mirror_axes if config.infer.mirror else (),
        "tile": run.patch,
        "tile_step": config.infer.step,
        "trained_on": run.plan.dataset,
        "license": run.plan.license,
    }
