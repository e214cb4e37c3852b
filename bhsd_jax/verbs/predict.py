"""`predict`: a run and scans of any geometry to label maps on the scans' own voxels."""

import csv
import hashlib
import io
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.special import softmax

from bhsd_jax.ct import geometry, hu, nifti
from bhsd_jax.ct.prepare import prepare_case
from bhsd_jax.datasets.bhsd import scans as nifti_files
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.report.page import NOTICE
from bhsd_jax.train.checkpoint import load_networks
from bhsd_jax.train.log import heartbeat
from bhsd_jax.train.mesh import make_mesh
from bhsd_jax.types import Params
from bhsd_jax.verbs import setup
from bhsd_jax.volume import Case, Plan

logger = logging.getLogger(__name__)

_BROKEN = (ValueError, OSError, EOFError, MemoryError)  # of one scan: recorded, others go on
_SAY_EVERY_S = 30.0  # how far a long scan is; a sign of life comes more often


@dataclass(frozen=True)
class Row:
    """One line of `volumes.csv`."""

    case: str
    tilt_deg: float  # gantry; 0 for MR
    seconds: float | None  # None: the label map was there already
    ml: Mapping[str, float]  # by foreground class, tilt-corrected

    def flat(self) -> dict[str, Any]:
        """One value per column."""
        volumes = {f"{name}_ml": f"{value:.4f}" for name, value in self.ml.items()}
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        total = f"{sum(self.ml.values()):.4f}"
        tilt = f"{self.tilt_deg:.2f}"
        return {"case": self.case, **volumes, "all_ml": total, "tilt_deg": tilt, "seconds": seconds}


@dataclass(frozen=True)
class Predictor:
    """Networks, and everything between a file and its label map."""

    window: SlidingWindow
    networks: Sequence[Params]
    fill: float  # raw image value outside the scan
    plan: Plan
    classes: tuple[str, ...]
    probabilities: bool  # also write them

    def __call__(self, case: Case, target: Path, name: str) -> Row:
        """Writes `target`, and its probabilities if asked for.

        Raises:
            ValueError: If the scan is broken, or the network's output is not finite.
            FileNotFoundError: If there is no such scan.
        """
        begun = time.monotonic()
        # The function of `preprocess`: what the network sees cannot differ from training.
        prepared = prepare_case(case, self.plan, source_sha256="not needed")
        image = prepared.image[..., None].astype(np.float32)
        logits = self.window.logits(
            self.networks, image, fill=self.fill, progress=_Teller(name).tiles
        )
        if self.probabilities:
            chances = geometry.probabilities_from_grid(softmax(logits, axis=0), prepared.grid)
            _write_npz(_probabilities(target), probabilities=chances.astype(np.float16))
        label = geometry.argmax_from_grid(logits, prepared.grid)
        nifti.write(target, label, like=case.image)
        affine = np.asarray(prepared.grid.native_affine)
        return self._row(name, label, affine, time.monotonic() - begun)

    def finished(self, case: Case, target: Path, name: str) -> Row | None:
        """The row of a scan whose files are all there, else None."""
        wanted = [target, _probabilities(target)] if self.probabilities else [target]
        if not all(path.is_file() for path in wanted):
            return None
        scan = nifti.read(case.image)
        label, _ = nifti.read_label(target, scan, num_classes=len(self.classes))
        return self._row(name, label.voxels, scan.affine, None)

    def _row(self, name: str, label: np.ndarray, affine: np.ndarray, seconds: float | None) -> Row:
        counts = np.bincount(label.ravel(), minlength=len(self.classes))
        each = hu.voxel_ml(affine, self.plan.modality)
        tilt = hu.tilt_deg(affine) if self.plan.modality == "ct" else 0.0
        volumes = zip(self.classes[1:], counts[1:], strict=True)
        return Row(name, float(tilt), seconds, {c: float(n * each) for c, n in volumes})


def run(config: ConfigDict, workdir: Path) -> None:
    """Predicts every scan, then writes `volumes.csv`, `volumes.json` and `predictions.json`.

    A broken scan goes to `skipped.csv` and the others are still predicted.

    Raises:
        FileNotFoundError: If there is no plan, checkpoint or scan where the config says.
        ValueError: If config and checkpoint do not fit, or scans had to be skipped.
    """
    logger.warning("%s", NOTICE)
    cases = find_scans(config, workdir)
    plan = setup.load_plan(config, workdir)
    step, networks = _networks(config, workdir)
    predictor = make_predictor(config, plan, list(networks.values()))
    out = Path(config.predict.out or workdir / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    _log_estimate(predictor, len(cases), plan)
    names = _names([case.id for case in cases], workdir, config.predict.show_ids)
    rows, skipped = _predict_all(predictor, cases, names, out, config.predict.overwrite)
    setup.write_json(out / "predictions.json", _facts(config, plan, step, tuple(networks)))
    _write_csv(out / "skipped.csv", [{"case": c, "reason": r} for c, r in skipped.items()])
    if skipped:
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{len(skipped)} of {len(cases)} scans skipped, see {out / 'skipped.csv'}; "
            f"{name}: {reason}"
        )
    logger.info("%d label maps in %s", len(rows), out)


def find_scans(config: ConfigDict, workdir: Path) -> list[Case]:
    """The scans to predict, sorted: a file, a folder's, or a split of the data set.

    nnU-Net's channel suffix `_0000` is not part of a case's name.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no scan in it.
        ValueError: If the split is unknown, empty, or names scans the data set does not have.
    """
    if not config.predict.images:
        return _split_scans(config, workdir)
    path = Path(config.predict.images)
    if path.is_dir():
        files = nifti_files(path)
    elif path.is_file():
        files = {nifti.case_name(path): path}
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; look at config.predict.images")
    if not files:
        raise FileNotFoundError(f"{path}: no NIfTI file in it; look at config.predict.images")
    short = {name.removesuffix("_0000"): file for name, file in files.items()}
    chosen = short if len(short) == len(files) else files
    return [Case(name, name, file, None, "test") for name, file in sorted(chosen.items())]


def _split_scans(config: ConfigDict, workdir: Path) -> list[Case]:
    split = config.predict.split
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


def make_predictor(config: ConfigDict, plan: Plan, networks: Sequence[Params]) -> Predictor:
    """As the config says, on all devices.

    Raises:
        ValueError: If the networks are not the config's model.
    """
    model, normalization = setup.model(config, plan), setup.normalization(config, plan)
    tile = setup.patch(config, plan)

    def forward(params: Params, raw: jax.Array) -> Any:
        return model.apply({"params": params}, normalization(raw), train=False)

    sample = jax.ShapeDtypeStruct((1, *tile, normalization.channels), jnp.float32)
    expected = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), sample)
    for params in networks:
        _require_fit(params, expected["params"])
    window = SlidingWindow(
        forward,
        tile,
        step=config.infer.step,
        mirror=config.infer.mirror,
        tiles_per_call=config.infer.tiles,
        mesh=make_mesh() if jax.device_count() > 1 else None,
    )
    return Predictor(
        window=window,
        networks=networks,
        fill=normalization.pad_value(config.input.pad),
        plan=plan,
        classes=setup.classes(config, plan),
        probabilities=config.predict.probabilities,
    )


def _networks(config: ConfigDict, workdir: Path) -> tuple[int, dict[str, Params]]:
    """The checkpoint's step and the networks to average, by name."""
    which = config.predict.checkpoint
    which = int(which) if str(which).isdigit() else which
    step, params, ema = load_networks(workdir / "checkpoints", which)
    found = setup.objective(config).deployable(params, ema)
    wanted = tuple(config.predict.networks) or tuple(found)[:1]
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(
            f"config.predict.networks: no {', '.join(map(repr, unknown))}; "
            f"this objective has {', '.join(found)}"
        )
    logger.info("checkpoint of step %d, network %s", step, " + ".join(wanted))
    return step, {name: found[name] for name in wanted}


def _require_fit(params: Params, expected: Params) -> None:
    """Refuses parameters of another network, naming the first that differs."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, expected))
    )
    odd = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if odd:
        raise ValueError(
            f"the checkpoint is not of the config's network: {odd[0]} has shape "
            f"{found.get(odd[0])}, the config asks for {wanted.get(odd[0])}; use "
            "--config=configs/from_run.py:<run folder>"
        )


def _log_estimate(predictor: Predictor, scans: int, plan: Plan) -> None:
    tiles = predictor.window.count(plan.median_shape) * len(predictor.networks)
    logger.info(
        "%d scans, about %d tiles each (mirrored ones counted), %d in all; "
        "infer.mirror=False makes it 8 times fewer",
        scans,
        tiles,
        scans * tiles,
    )


def _predict_all(
    predictor: Predictor,
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
            row = None if overwrite else predictor.finished(case, target, name)
            if row is None:
                with heartbeat(f"scan {index} of {len(cases)}, {name}"):
                    row = predictor(case, target, name)
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
    setup.write_json(out / "volumes.json", {"notice": NOTICE, "unit": "mL", "scans": listed})


def _facts(config: ConfigDict, plan: Plan, step: int, networks: tuple[str, ...]) -> dict[str, Any]:
    """What a reader of the label maps has to know."""
    return {
        "notice": NOTICE,
        "step": step,
        "networks": networks,
        "classes": setup.classes(config, plan),
        "split": None if config.predict.images else config.predict.split,
        "mirror": config.infer.mirror,
        "tile": setup.patch(config, plan),
        "tile_step": config.infer.step,
        "trained_on": plan.dataset,
        "license": plan.license,
    }


def _names(cases: Sequence[str], workdir: Path, show_ids: bool) -> dict[str, str]:
    """Names to show: the ids, or short hashes under the run's salt, as in its report."""
    if show_ids:
        return {case: case for case in cases}
    path = workdir / ".salt"
    if not path.is_file():
        path.write_text(secrets.token_hex(16))
    salt = path.read_text()
    return {case: hashlib.sha256((salt + case).encode()).hexdigest()[:8] for case in cases}


class _Teller:
    """Says from time to time how many tiles of a scan are done."""

    def __init__(self, name: str):
        self.name, self.said = name, time.monotonic()

    def tiles(self, done: int, total: int) -> None:
        if time.monotonic() - self.said > _SAY_EVERY_S:
            self.said = time.monotonic()
            logger.info("%s: tile %d of %d", self.name, done, total)


def _probabilities(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(".nii.gz") + "_probabilities.npz")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all; no rows, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, text.getvalue().encode())


def _write_npz(path: Path, **arrays: np.ndarray) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    _replace(path, data.getvalue())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
