"""`predict`: a run and scans of any geometry to label maps on the scans' own voxels."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import calibrated, cascade, devices, ensemble, manifest, origins, trust
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import formats, nifti, scan
from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.metrics import postprocessing
from bhsd_jax.platform import faults, files
from bhsd_jax.platform.csv_files import write_records
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.page import notice
from bhsd_jax.settings import Config, Predict, Settings
from bhsd_jax.train import barrier, processes
from bhsd_jax.verbs import parts, review, scan_report
from bhsd_jax.verbs.chosen_scans import (
    find_scans,
    label_maps,
    output_names,
    part,
    series_digests,
)
from bhsd_jax.verbs.predict_scans import Found, Scans, predict_all, write_tables
from bhsd_jax.volume import Case, Series

logger = logging.getLogger(__name__)


def run(config: Config, workdir: Path) -> None:
    """Predicts every scan, then writes `volumes.csv`, `volumes.json` and `predictions.json`.

    A broken scan goes to `skipped.csv` and the others are still predicted. Where nothing can be
    written any more, the tables tell of what there is. Of several processes each predicts scans of
    its own, and the first writes the tables. Of more jobs than scans the last ones write tables of
    no scan.

    Raises:
        FileNotFoundError: If there is no plan, checkpoint or scan where the config says.
        ValueError: If config and checkpoint do not fit, scans had to be skipped, or the disk is
            full.
        faults.WriteError: If nothing can be written from the start.
    """
    config = Settings.of(config)
    settings = config.predict
    parts.join(config)
    every = find_scans(config, workdir)
    out = label_maps(settings, workdir)
    _require_folder(out)
    cases = _of_this_job(every, settings)
    names, series = parts.first_alone(lambda: _names(every, workdir, settings))
    if not cases:
        _say_no_scan(out, settings, len(every))
        return
    _require_possible(settings, cases)
    run = Run.of(config, workdir)
    logger.warning("%s", notice(run.labels.names))
    _require_classes(run)
    seen = _seen(run, every)
    cases, first = cascade.first_of(run, cases)
    rules = ensemble.rules(run)
    _require_apart(out, cases, names)
    files.open_folder(out)
    files.sweep(out)
    devices.share_cores(run)
    processes.say_devices()
    predict, members, record = _open(run, first, rules, out, series)
    tables = _begin_tables(out, settings, cases, names)
    mine = parts.own(cases)
    _log_estimate(predict, len(mine))
    scans = Scans(predict, mine, names, out, tables, settings.overwrite, record)
    record.begin(scans.there, overwrite=settings.overwrite)
    facts = _facts(run, members, seen) | postprocessing.to_json(rules, run.labels.names)
    _say_facts(out, facts, settings)
    predicted = predict_all(scans)
    found = _gather(tables, predicted, names)
    if found is not None:
        try:
            _conclude(out, tables, found, facts, len(cases))
        finally:
            if settings.report and not found.fault:
                scan_report.write(run, out, {names[case.id]: case for case in cases})


def _names(
    every: Sequence[Case], workdir: Path, settings: Predict
) -> tuple[dict[str, str], dict[str, str]]:
    """Of scans in the outputs, and digests of series; both draw the run's salt if it has none.

    Of all scans, so that several jobs give no two of them one name.
    """
    names = output_names(every, workdir, settings)
    return names, series_digests(every, names, workdir, label_maps(settings, workdir))


def _open(
    run: Run,
    first: Path | None,
    rules: Sequence[postprocessing.Rule],
    out: Path,
    series: Mapping[str, str],
) -> tuple[Predictor, Sequence[Member], origins.Origins]:
    """All networks with what is done to their answers, and the record of what they make."""
    settings = run.config.predict
    predict, members = ensemble.open_runs(run, settings.runs, apart=True)
    _require_alike(predict, settings)
    predict = replace(predict, rules=tuple(run.labels.values_of(rule) for rule in rules))
    predict = _judged(predict, run, members)
    told: dict[str, Any] = postprocessing.to_json(rules, run.labels.names)
    if settings.calibrated:
        told["calibrated"] = predict.temperature  # called as the setting, for messages
    made_with = origins.facts_of(run, members, **told)
    if first is not None:
        stage = cascade.open_first(run, first, out, series)
        predict = replace(predict, first=stage)
        made_with["previous_stage"] = stage.origins.facts
    return predict, members, origins.Origins(out, made_with, series)


def _seen(run: Run, every: Sequence[Case]) -> dict[str, int]:
    """How many of a split's scans the runs beside the first were trained on, which is said."""
    settings = run.config.predict
    if settings.images:
        return {}
    found = ensemble.seen(run, settings.runs, [case.id for case in every])
    for folder, count in found.items():
        logger.warning(
            "%s was, or may have been, trained on %d of these %d scans of split %s: the scores of "
            "all runs together are too good",
            *(folder, count, len(every), settings.split),
        )
    return found


def _judged(predict: Predictor, run: Run, members: Sequence[Member]) -> Predictor:
    """With the temperature of its probabilities, and what says how far to trust a label map."""
    settings = run.config.predict
    if settings.calibrated:
        predict = replace(predict, temperature=calibrated.temperature(run, members))
    parts_of = [(p.window, p.networks, p.fill) for p in (predict, *predict.others)]
    return replace(predict, trust=trust.make(run, parts_of if settings.confidence else ()))


def _require_possible(settings: Predict, cases: Sequence[Case]) -> None:
    """Refuses what would only fail after the network has run."""
    if settings.dicom.seg:
        segmentation.require()
    if settings.report and settings.num_parts > 1:
        raise UserError(
            "config.predict.report: a job of several knows only its own scans; set report=False"
        )
    if not any(isinstance(case.image, Series) and case.image.unshear for case in cases):
        return
    for asked, flag in (
        (settings.probabilities, "probabilities"),
        (settings.nnunet_probabilities, "nnunet_probabilities"),
        (settings.dicom.seg == "fractional", "dicom.seg=fractional"),
    ):
        if asked:
            raise UserError(
                f"config.predict.{flag}: probabilities of unsheared series would not lie on the "
                "series' own voxels; set unshear=False, or leave them out"
            )


def _require_folder(out: Path) -> None:
    """Refuses the name of a file, after which a folder would be called."""
    if not out.is_dir() and (formats.ending(out) or nifti.case_name(out) != out.name):
        raise UserError(
            f"config.predict.out: {out} is the name of a file; name the folder that label maps go "
            f"to, such as {out.parent / 'label_maps'}: each is called as its scan is"
        )


def _require_apart(out: Path, cases: Sequence[Case], names: Mapping[str, str]) -> None:
    """Refuses to write a label map in place of a scan."""
    scans = {file.resolve() for case in cases for file in scan.files(case.image)}
    for case in cases:
        target = out / f"{names[case.id]}{scan.ending(case.image)}"
        if target.resolve() in scans:
            raise UserError(
                f"{target}: a scan, which its label map would replace; name another folder with "
                "config.predict.out"
            )


def _require_classes(run: Run) -> None:
    """Refuses what is not defined for regions, and what nnU-Net's reader would misplace."""
    settings = run.config.predict
    if settings.nnunet_probabilities and run.plan.axes not in ("file", "SPL"):
        raise UserError(
            f"config.predict.nnunet_probabilities: the plan's axes are {run.plan.axes}, those of a "
            "reader that turns scans, which is not supported; leave them out"
        )
    if not run.labels.regions:
        return
    for asked, flag in (
        (settings.calibrated, "calibrated: the temperature"),
        (settings.dicom.seg == "fractional", "dicom.seg=fractional: a fractional SEG"),
    ):
        if asked:
            raise UserError(
                f"config.predict.{flag} is of classes that exclude each other, but this network "
                "answers with regions; leave it out"
            )


def _require_alike(predict: Predictor, settings: Predict) -> None:
    """Refuses what needs the logits of all runs on one grid, or two stages of a run in passing."""
    for flag in ("calibrated", "confidence", "logits"):
        if getattr(settings, flag) and predict.apart:
            raise UserError(
                f"config.predict.{flag} is of runs whose scans are prepared alike, but those of "
                "config.predict.runs are not; leave it out"
            )
    if not predict.plan.previous_stage and any(one.plan.previous_stage for one in predict.apart):
        raise UserError(
            "config.predict.runs has the second network of a cascade; predict with that run, and "
            "name the others in config.predict.runs"
        )


def _gather(tables: Path, found: Found, names: Mapping[str, str]) -> Found | None:
    """What all processes of this job have found, in the order of the scans; None but in the first.

    They meet where its tables go: processes of other jobs may work on the same label maps' folder.

    Raises:
        UserError: If another process calls scans otherwise than the first: none may be lost.
    """
    together = parts.gather(tables, "predict", asdict(found))
    if together is None:
        return None
    every = [
        Found([ScanVolumes(**row) for row in one["rows"]], one["skipped"], one["fault"])
        for one in together
    ]
    rows = {row.case: row for one in every for row in one.rows}
    skipped = {name: reason for one in every for name, reason in one.skipped.items()}
    if foreign := sorted({*rows, *skipped} - set(names.values())):
        raise UserError(
            f"{tables}: other processes have {len(foreign)} scans that the first does not know by "
            f"their names ({', '.join(foreign[:4])}); see that all have the same scans and the "
            "same .salt in the run folder, then run the same command with "
            "--config.predict.overwrite=False"
        )
    return Found(
        [rows[name] for name in names.values() if name in rows],
        {name: skipped[name] for name in names.values() if name in skipped},
        next((one.fault for one in every if one.fault), ""),
    )


def _say_facts(out: Path, facts: Mapping[str, Any], settings: Predict) -> None:
    """Writes `predictions.json` before the first label map, as a call may be stopped.

    Whoever reads it then would else read of the call before, whose `volumes.json` goes, too. Jobs
    of several write it beside the label maps that are all of theirs.

    Raises:
        faults.WriteError: If the system says no.
    """
    path = out / "predictions.json"
    if barrier.place()[0]:
        return
    if settings.overwrite:
        files.unlink(out / "volumes.json")
    if settings.overwrite or not path.is_file():
        files.write_json(path, facts)


def _conclude(out: Path, tables: Path, found: Found, facts: Mapping[str, Any], scans: int) -> None:
    """Writes the tables, and raises if a scan was skipped or the machine said no."""
    skipped = [{"case": name, "reason": reason} for name, reason in found.skipped.items()]
    unwritten = ""
    try:
        write_records(tables / "skipped.csv", skipped, line_end="\n", harmless=True)
        write_tables(tables, found.rows)
        review.write(tables, found.rows)
        doubtful = {row.case: row.warning for row in found.rows if row.warning}
        files.write_json(tables / "predictions.json", {**facts, "doubtful": doubtful})
    except faults.WriteError as error:
        unwritten = faults.explain(error) or str(error)
    if found.fault or unwritten:
        state = "their tables are not complete" if unwritten else "the tables tell of them"
        raise UserError(
            f"{found.fault or unwritten}. {len(found.rows)} of {scans} label maps are in {out}, "
            f"{state}; with --config.predict.overwrite=False the same command goes on from there"
        )
    if found.skipped:
        name, reason = next(iter(found.skipped.items()))
        raise UserError(
            f"{len(found.skipped)} of {scans} scans skipped, see {tables / 'skipped.csv'}; "
            f"{name}: {reason}"
        )
    logger.info("%d label maps in %s", len(found.rows), out)


def _tables(out: Path, settings: Predict) -> Path:
    """Where the tables go: each of several jobs writes its own."""
    if settings.num_parts == 1:
        return out
    folder = out / f"part_{settings.part_id}_of_{settings.num_parts}"
    files.open_folder(folder)
    return folder


def _begin_tables(
    out: Path, settings: Predict, cases: Sequence[Case], names: Mapping[str, str]
) -> Path:
    """The same, with the table of the DICOM series that its label maps are of."""
    tables = _tables(out, settings)
    if barrier.place()[0] == 0:
        dicom_cases.write_series(tables, cases, names)
    return tables


def _of_this_job(every: list[Case], settings: Predict) -> list[Case]:
    """The scans of this job, which all processes of its run share."""
    cases = part(every, settings)
    parts.require_same([case.id for case in cases])
    return cases


def _say_no_scan(out: Path, settings: Predict, scans: int) -> None:
    """Leaves the tables of a job without a scan: an array may have more jobs than there are scans.

    Whoever gathers the tables of all jobs finds as many as there are.
    """
    logger.info(
        "job %d of %d: of %d scans none is left for it",
        *(settings.part_id, settings.num_parts, scans),
    )
    if barrier.place()[0] == 0:
        write_tables(_tables(out, settings), [])


def _log_estimate(predict: Predictor, scans: int) -> None:
    """So that nobody waits for days unknowing: on a CPU a large tile takes most of a minute."""
    shape = predict.plan.median_shape
    groups = [each for one in (predict, *predict.apart) for each in (one, *one.others)]
    tiles = sum(p.window.count(shape) * len(p.networks) for p in groups)
    axes = predict.window.mirror_axes if predict.window.mirror else ()
    hint = ""
    if axes:
        named = ", ".join("DHW"[axis] for axis in axes)
        hint = f"; mirrored along {named}, infer.mirror=False needs one in {2 ** len(axes)}"
    logger.info("%d scans, about %d tiles each, %d in all%s", scans, tiles, scans * tiles, hint)


def _facts(run: Run, members: Sequence[Member], seen: Mapping[str, int]) -> dict[str, Any]:
    """What a reader of the label maps has to know."""
    config, (own, *others) = run.config, members
    listed = [
        {"run": m.folder.name, "step": m.step, "networks": m.networks, "mirror": m.mirror}
        for m in others
    ]
    most = max(seen.values(), default=0)
    return {
        "notice": notice(run.labels.names),
        "step": own.step,
        "networks": own.networks,
        **({"averaged_with": listed, "seen_in_training": most} if others else {}),
        "combine": config.predict.combine if others or len(own.networks) > 1 else None,
        "classes": run.labels.names,
        "split": None if config.predict.images else config.predict.split,
        "mirror": own.mirror,
        "tile": run.patch,
        "tile_step": config.infer.step,
        "trained_on": run.plan.dataset,
        "license": run.plan.license,
        **manifest.of_prediction(run, members),
    }
