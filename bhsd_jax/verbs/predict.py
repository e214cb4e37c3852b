"""`predict`: a run and scans of any geometry to label maps on the scans' own voxels."""

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax import files
from bhsd_jax.ct import dicom
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.datasets.bhsd import scans as nifti_files
from bhsd_jax.report.page import NOTICE
from bhsd_jax.train.log import heartbeat
from bhsd_jax.verbs import predictor, setup
from bhsd_jax.verbs.predictor import Predictor, Row
from bhsd_jax.verbs.setup import Config
from bhsd_jax.volume import Case, Plan, Series

logger = logging.getLogger(__name__)

_BROKEN = (ValueError, OSError, EOFError, MemoryError)  # of one scan: recorded, others go on


def run(config: Config, workdir: Path) -> None:
    """Predicts every scan, then writes `volumes.csv`, `volumes.json` and `predictions.json`.

    A broken scan goes to `skipped.csv` and the others are still predicted.

    Raises:
        FileNotFoundError: If there is no plan, checkpoint or scan where the config says.
        ValueError: If config and checkpoint do not fit, or scans had to be skipped.
    """
    settings: Any = config.predict
    logger.warning("%s", NOTICE)
    cases = find_scans(config, workdir)
    if settings.probabilities and any(
        isinstance(c.image, Series) and c.image.unshear for c in cases
    ):
        raise ValueError(
            "config.predict.probabilities: those of unsheared series would not lie on the series' "
            "own voxels; set unshear=False, or leave them out"
        )
    plan = setup.load_plan(config, workdir)
    predictor.share_cores(config, plan)
    step, networks = predictor.load(config, workdir)
    predict = predictor.make_predictor(config, plan, list(networks.values()))
    out = Path(settings.out or workdir / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    _log_estimate(predict, len(cases), plan)
    names = _names(cases, workdir, settings)
    rows, skipped = _predict_all(predict, cases, names, out, settings.overwrite)
    files.write_json(out / "predictions.json", _facts(config, plan, step, tuple(networks)))
    _write_csv(out / "skipped.csv", [{"case": c, "reason": r} for c, r in skipped.items()])
    if skipped:
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} of {len(cases)} scans skipped, see {out / 'skipped.csv'}; "
            f"{name}: {reason}"
        )
    logger.info("%d label maps in %s", len(rows), out)


def find_scans(config: Config, workdir: Path) -> list[Case]:
    """The scans to predict, sorted: a file, a folder's, or a split of the data set.

    NIfTI files of a folder itself, and every DICOM CT series anywhere below it. nnU-Net's channel
    suffix `_0000` is not part of a case's name.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no scan in it.
        ValueError: If the split is unknown, empty, or names scans the data set does not have.
    """
    settings: Any = config.predict
    if not settings.images:
        return _split_scans(config, workdir, settings.split)
    path = Path(settings.images)
    series: list[Case] = []
    if path.is_dir():
        files = {n: f for n, f in nifti_files(path).items() if not dicom.is_dicom(f)}
        series = dicom_cases.scans(path, **settings.dicom)
    elif path.is_file() and dicom.is_dicom(path):
        raise ValueError(f"{path}: one DICOM file is one slice; name the folder of the series")
    elif path.is_file():
        files = {path.name.removesuffix(".gz").removesuffix(".nii"): path}
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; look at config.predict.images")
    if not files and not series:
        raise FileNotFoundError(
            f"{path}: no NIfTI file and no DICOM CT series in it; look at config.predict.images"
        )
    short = {name.removesuffix("_0000"): file for name, file in files.items()}
    chosen = short if len(short) == len(files) else files
    found = [Case(name, name, file, None, "test") for name, file in sorted(chosen.items())]
    if {case.id for case in found} & {case.id for case in series}:
        raise ValueError(
            f"{path}: a NIfTI file and a DICOM folder have one name; rename or move one of them"
        )
    return found + series


def _names(cases: Sequence[Case], workdir: Path, settings: Any) -> dict[str, str]:
    """What outputs are called; by default DICOM's own names are hidden, NIfTI's are not."""
    hide = settings.show_ids is False, settings.show_ids is not True and bool(settings.images)
    hidden = {c.id for c in cases if hide[isinstance(c.image, Series)]}
    short = setup.short_names(sorted(hidden), workdir, show_ids=False) if hidden else {}
    return {case.id: short.get(case.id, case.id) for case in cases}


def _split_scans(config: Config, workdir: Path, split: str) -> list[Case]:
    if split not in ("val", "test"):
        raise ValueError(f"config.predict.split is val or test; got {split!r}")
    roles, _ = setup.roles(config, workdir)
    known = {case.id: case for case in setup.dataset(config, workdir).cases()}
    wanted = getattr(roles, split)
    missing = [case for case in wanted if case not in known]
    if missing or not wanted:
        raise ValueError(
            f"split {split}: {len(missing)} of its {len(wanted)} scans are not in the data set; "
            "set config.predict.split, or name files with config.predict.images"
        )
    return [Case(case, case, known[case].image, None, split) for case in wanted]


def _log_estimate(predict: Predictor, scans: int, plan: Plan) -> None:
    """So that nobody waits for days unknowing: on a CPU a large tile takes most of a minute."""
    tiles = predict.window.count(plan.median_shape) * len(predict.networks)
    share = 2 ** len(predict.window.mirror_axes)
    hint = f"; infer.mirror=False needs one in {share}" if predict.window.mirror else ""
    logger.info("%d scans, about %d tiles each, %d in all%s", scans, tiles, scans * tiles, hint)


def _predict_all(
    predict: Predictor,
    cases: Sequence[Case],
    names: Mapping[str, str],
    out: Path,
    overwrite: bool,
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the predicted scans, and why the others could not be; tables grow as it goes."""
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    begun = time.monotonic()
    for index, case in enumerate(cases, start=1):
        name = names[case.id]
        target = out / f"{name}.nii.gz"
        try:
            row = None if overwrite else predict.finished(case, target, name)
            if row is None:
                with heartbeat(f"scan {index} of {len(cases)}, {name}"):
                    row = predict(case, target, name)
        except _BROKEN as error:
            skipped[name] = str(error).replace(str(case.image), name).replace(case.id, name)
            logger.error("scan %d of %d, %s: skipped: %s", index, len(cases), name, skipped[name])
            continue
        rows.append(row)
        _write_tables(out, rows)
        left = (time.monotonic() - begun) / index * (len(cases) - index)
        took = "there already" if row.seconds is None else f"{row.seconds:.1f} s"
        volume = sum(row.ml.values())
        logger.info(
            "scan %d of %d, %s: %.1f mL, %s, %.0f s left",
            *(index, len(cases), name, volume, took, left),
        )
    return rows, skipped


def _write_tables(out: Path, rows: Sequence[Row]) -> None:
    _write_csv(out / "volumes.csv", [row.flat() for row in rows])
    listed = [vars(row) | {"ml": dict(row.ml)} for row in rows]
    files.write_json(out / "volumes.json", {"notice": NOTICE, "unit": "mL", "scans": listed})


def _facts(config: Config, plan: Plan, step: int, networks: tuple[str, ...]) -> dict[str, Any]:
    """What a reader of the label maps has to know."""
    settings: Any = config
    return {
        "notice": NOTICE,
        "step": step,
        "networks": networks,
        "classes": setup.classes(config, plan),
        "split": None if settings.predict.images else settings.predict.split,
        "mirror": settings.infer.mirror_axes if settings.infer.mirror else (),
        "tile": setup.patch(config, plan),
        "tile_step": settings.infer.step,
        "trained_on": plan.dataset,
        "license": plan.license,
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all; no rows, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())
