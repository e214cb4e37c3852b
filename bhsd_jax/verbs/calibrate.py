"""`calibrate`: one temperature for a run's probabilities, fitted on its validation scans."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.assemble import calibrated, cascade, devices, ensemble
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct.prepare import prepare_case
from bhsd_jax.metrics import calibration
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Config, Settings
from bhsd_jax.verbs import parts
from bhsd_jax.verbs.chosen_scans import find_scans
from bhsd_jax.volume import Case, outlined_of

logger = logging.getLogger(__name__)

_VOXELS = 100_000  # drawn of a scan


def run(config: Config, workdir: Path) -> None:
    """Writes `calibration.json` into the run folder.

    Raises:
        FileNotFoundError: If there is no plan or checkpoint.
        ValueError: If there are no validation scans with masks, or several processes; or if a run
            of `predict.runs` was trained on some of the scans.
    """
    config = Settings.of(config)
    if parts.place(config).several:
        raise UserError("calibrate runs in one process; leave the others out")
    settings = dataclasses.replace(config.predict, images="", split="val")
    config = dataclasses.replace(config, predict=settings)
    opened = Run.of(config, workdir)
    if opened.labels.regions:
        raise UserError(
            "calibrate: a temperature is of classes that exclude each other, but this network "
            "answers with regions"
        )
    cases = _cases(opened, workdir)
    _require_unseen(opened, cases)
    devices.share_cores(opened)
    predict, members = ensemble.open_runs(opened, settings.runs)
    drawn = [_draw(predict, case, opened) for case in cases]
    logits = np.concatenate([one for one, _ in drawn])
    labels = np.concatenate([one for _, one in drawn])
    fitted = calibration.fit_temperature(logits, labels)
    before = calibration.measure(logits, labels, 1.0)
    after = calibration.measure(logits, labels, fitted)
    made: dict[str, Any] = {
        "temperature": fitted,
        "networks": calibrated.key(members),
        "steps": [member.step for member in members],
        "made_with": calibrated.made_with(opened, members),
        "split": "val",
        "scans": len(cases),
        "voxels": len(labels),
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
    }
    files.write_json(workdir / calibrated.NAME, made)
    logger.info(
        "temperature %.3f on %d scans: Brier score %.5f to %.5f, calibration error %.5f to %.5f",
        *(fitted, len(cases), before.brier, after.brier, before.error, after.error),
    )
    if calibration.is_at_limit(fitted):
        logger.warning("temperature %.3g is the %s", fitted, _limit_in_words(fitted))


def _limit_in_words(temperature: float) -> str:
    """What a temperature at a limit of what is tried tells of the network."""
    if temperature > 1:
        return (
            "highest that is tried: the network knows next to nothing of these scans, and its "
            "probabilities come to be nearly alike for all classes; look at its scores on them"
        )
    return (
        "lowest that is tried: the network errs in hardly any of these voxels, so that they set no "
        "bound to how sure it may be; calibrate with more scans, or leave --calibrated out"
    )


def _cases(opened: Run, workdir: Path) -> list[Case]:
    masks = {case.id: case.label for case in outlined_of(opened.data_set)}
    found = [
        dataclasses.replace(case, label=masks[case.id])
        for case in find_scans(opened.config, workdir)
        if masks[case.id] is not None
    ]
    if not found:
        raise UserError("split val: none of its scans has a mask to calibrate with")
    known, first = cascade.first_of(opened, found)
    if first is not None:
        raise UserError(
            "calibrate: the second network of a cascade is calibrated with label maps of the first "
            f"that are there, not with its run, {first}; predict.previous names their folder"
        )
    return known


def _require_unseen(opened: Run, cases: Sequence[Case]) -> None:
    """Networks are surer of scans they were trained on: the temperature would be too low."""
    seen = ensemble.seen(opened, opened.config.predict.runs, [case.id for case in cases])
    if seen:
        folder, count = next(iter(seen.items()))
        raise UserError(
            f"config.predict.runs: {folder} was, or may have been, trained on {count} of the "
            f"{len(cases)} validation scans of {opened.folder}; calibrate runs that share these, "
            "such as seeds of one fold, or this run alone"
        )


def _draw(predict: Predictor, case: Case, opened: Run) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N K] and classes [N] of voxels of the prepared scan, drawn without replacement."""
    prepared = prepare_case(case, opened.plan, source_sha256="not needed")
    assert prepared.label is not None  # as chosen above
    label = prepared.label.astype(np.int64)
    if opened.config.split.binary:
        label = np.minimum(label, 1)
    logits = predict.logits(prepared.channels_last, "a validation scan")
    random = np.random.default_rng(0)
    chosen = random.permutation(label.size)
    annotated = opened.labels.annotated(prepared.label).ravel()
    chosen = chosen[annotated[chosen]][:_VOXELS]
    return logits.reshape(len(logits), -1)[:, chosen].T, label.ravel()[chosen]
