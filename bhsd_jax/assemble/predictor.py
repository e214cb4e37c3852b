"""Networks of a run, and everything between a scan's file and its label map."""

import io
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import formats, geometry, hu, scan, shear
from bhsd_jax.ct.prepare import hu_doubts, prepare_case
from bhsd_jax.infer.sliding import SlidingWindow, bytes_per_tile
from bhsd_jax.labels import Labels
from bhsd_jax.platform import allocator, budget, files, machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train import processes
from bhsd_jax.train.checkpoint import load_networks, load_statistics
from bhsd_jax.types import Params
from bhsd_jax.volume import Case, Grid, Plan

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 30.0  # how far a long scan is; a sign of life comes more often


@dataclass(frozen=True)
class ScanVolumes:
    """One line of `volumes.csv`."""

    case: str
    tilt_deg: float  # gantry; 0 for MR
    seconds: float | None  # None: the label map was there already
    ml: Mapping[str, float]  # by foreground class
    tilt_corrected: bool = False  # they are the affine's times the cosine of the tilt
    warning: str = ""  # why the scan may not be in HU, or what was undone so that it is
    all_ml: float | None = None  # of regions, which overlap: of all together

    @property
    def total_ml(self) -> float:
        """Of all classes, or of all regions together."""
        return sum(self.ml.values()) if self.all_ml is None else self.all_ml

    def flat(self) -> dict[str, Any]:
        """One value per column."""
        volumes = {f"{name}_ml": f"{value:.4f}" for name, value in self.ml.items()}
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        total = f"{self.total_ml:.4f}"
        tilt = {"tilt_deg": f"{self.tilt_deg:.2f}", "tilt_corrected": int(self.tilt_corrected)}
        last = {"seconds": seconds, "warning": self.warning}
        return {"case": self.case, **volumes, "all_ml": total, **tilt, **last}


@dataclass(frozen=True)
class Predictor:
    """Networks, and everything between a file and its label map."""

    window: SlidingWindow
    networks: Sequence[Params]  # variables, all collections
    fill: float  # raw image value outside the scan
    plan: Plan
    labels: Labels
    probabilities: bool  # also write them

    def __call__(self, case: Case, target: Path, name: str) -> ScanVolumes:
        """Writes `target`, and its probabilities if asked for.

        Raises:
            ValueError: If the scan is broken, or the network's output is not finite.
            FileNotFoundError: If there is no such scan.
            faults.WriteError: If the system says no, such as on a full disk.
        """
        begun = time.monotonic()
        # The function of `preprocess`: what the network sees cannot differ from training.
        prepared = prepare_case(case, self.plan, source_sha256="not needed")
        for text in prepared.warnings:
            level = logging.WARNING if text in prepared.doubts else logging.INFO
            logger.log(level, "%s: %s", name, text)
        # Sums of logits, and their copy for the resampling to the scan's own voxels.
        budget.require_memory(
            2 * 4 * self.labels.outputs * math.prod(prepared.grid.shape),
            f"a scan of {' x '.join(map(str, prepared.grid.shape))} voxels at "
            f"{' x '.join(f'{mm:.3g}' for mm in self.plan.spacing_mm)} mm",
            "use a machine that has more, or crop the scan",
        )
        image = prepared.channels_last.astype(np.float32)
        logits = self.window.logits(
            self.networks, image, fill=self.fill, progress=Teller(name).tiles
        )
        if self.probabilities:
            chances = self._chances(logits, prepared.grid)
            _write_npz(_probabilities(target), chances.astype(np.float16))
        if self.labels.regions:
            label = geometry.regions_from_grid(logits, prepared.grid, self.labels)
        else:
            label = geometry.argmax_from_grid(logits, prepared.grid)
        scan.write(target, label, like=case.image)
        affine = np.asarray(prepared.grid.native_affine)
        return self._row(case, name, label, affine, time.monotonic() - begun, prepared.doubts)

    def _chances(self, logits: np.ndarray, grid: Grid) -> np.ndarray:
        if self.labels.regions:
            return geometry.region_probabilities_from_grid(logits, grid)
        return geometry.probabilities_from_grid(logits, grid)

    def finished(self, case: Case, target: Path, name: str) -> ScanVolumes | None:
        """The row of a scan whose files are all there and whole, else None.

        A file that is damaged, or of another scan, is said to be so.

        Raises:
            ValueError: If the scan is broken.
            FileNotFoundError: If there is no such scan.
        """
        wanted = [target, _probabilities(target)] if self.probabilities else [target]
        if not all(path.is_file() for path in wanted):
            return None
        place = scan.native(case.image)
        image, _ = scan.read(place)
        try:
            values = len(self.labels.classes)
            label, notes = scan.read_label(target, place, image, num_classes=values)
            if notes:
                raise UserError(f"{target}: {notes[0]}")
            if self.probabilities:
                _check_npz(wanted[1], (self.labels.outputs, *label.voxels.shape))
        except UserError as error:
            reason = str(error).replace(str(case.image), name).replace(case.id, name)
            logger.warning("%s: predicted again, for %s", name, reason)
            return None
        seen = image if place == case.image else scan.read(case.image)[0]
        doubts = hu_doubts(seen.voxels, self.plan)
        return self._row(case, name, label.voxels, seen.affine, None, doubts)

    def _row(
        self,
        case: Case,
        name: str,
        label: np.ndarray,
        affine: np.ndarray,
        seconds: float | None,
        doubts: Sequence[str],
    ) -> ScanVolumes:
        counts = np.bincount(label.ravel(), minlength=len(self.labels.classes))
        ct = self.plan.modality == "ct"
        feed = case.table_feed and ct
        each = hu.voxel_ml(affine, table_feed=feed)
        tilt = shear.gantry_deg(affine) if ct else 0.0
        corrected = hu.tilt_corrected(affine, table_feed=feed)
        ml = {c: float(counts[list(v)].sum() * each) for c, v in self.labels.targets}
        together = float(counts[1:].sum() * each) if self.labels.regions else None
        return ScanVolumes(name, float(tilt), seconds, ml, corrected, "; ".join(doubts), together)


def load(run: Run) -> tuple[int, dict[str, Params]]:
    """The checkpoint's step and the variables of the networks to average, by name.

    "ensemble" stands for all twins.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the objective has no network of a wanted name.
    """
    settings = run.config.predict
    which = settings.checkpoint
    which = int(which) if str(which).isdigit() else which
    step, params, ema = load_networks(run.folder / "checkpoints", which)
    statistics = load_statistics(run.folder / "checkpoints", step)
    objective = wiring.objective(run.config)
    found = objective.deployable(params, ema)
    asked = tuple(settings.networks) or tuple(found)[:1]
    together = {"ensemble": objective.twins} if objective.twins else {}
    wanted = [one for name in asked for one in together.get(name, (name,))]
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise UserError(
            f"config.predict.networks: no {', '.join(map(repr, unknown))}; "
            f"this objective has {', '.join([*found, *together])}"
        )
    logger.info("checkpoint of step %d, network %s", step, " + ".join(wanted))
    return step, {name: {"params": found[name], **statistics} for name in wanted}


def share_cores(run: Run) -> None:
    """On a CPU, makes a device of every core that there is memory for a tile; before JAX starts."""
    tile = bytes_per_tile(run.patch)
    processes.share_cores(run.config.infer.tiles or 0, most=max(machine.memory() // 2 // tile, 1))
    allocator.mind_memory(jax.local_device_count() * tile)


def make_predictor(run: Run, networks: Sequence[Params]) -> Predictor:
    """The predictor of a run, on all devices of this process.

    Raises:
        ValueError: If the networks are not the config's model.
    """
    config, model, normalization = run.config, wiring.model(run), run.normalization

    def forward(variables: Params, raw: jax.Array) -> Any:
        return model.apply(variables, normalization(raw), train=False)

    sample = jax.ShapeDtypeStruct((1, *run.patch, normalization.channels), jnp.float32)
    expected = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), sample)
    for variables in networks:
        _require_fit(variables, expected)
    several = jax.local_device_count() > 1
    window = SlidingWindow(
        forward,
        run.patch,
        step=config.infer.step,
        mirror=config.infer.mirror,
        # Of a single slice the mirrored version is the slice.
        mirror_axes=tuple(axis for axis in config.infer.mirror_axes if run.patch[axis] > 1),
        tiles_per_call=config.infer.tiles,
        # Of several processes each predicts scans of its own.
        mesh=meshes.make_mesh(devices=jax.local_devices()) if several else None,
        regions=bool(run.labels.regions),
    )
    return Predictor(
        window=window,
        networks=networks,
        fill=normalization.pad_value(config.input.pad),
        plan=run.plan,
        labels=run.labels,
        probabilities=config.predict.probabilities,
    )


def _require_fit(variables: Params, expected: Params) -> None:
    """Refuses variables of another network, naming the first that differs."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (variables, expected))
    )
    odd = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if odd:
        raise UserError(
            f"the checkpoint is not of the config's network: {odd[0]} has shape "
            f"{found.get(odd[0])}, the config asks for {wanted.get(odd[0])}; use "
            "--config=configs/from_run.py:<run folder>"
        )


class Teller:
    """Logs how many tiles of one scan are done, at most every 30 seconds."""

    def __init__(self, name: str):
        self.name, self.said = name, time.monotonic()

    def tiles(self, done: int, total: int) -> None:
        if time.monotonic() - self.said > _SAY_EVERY_S:
            self.said = time.monotonic()
            logger.info("%s: tile %d of %d", self.name, done, total)


def _probabilities(target: Path) -> Path:
    stem = formats.case_name(target.name.removesuffix(".nii.gz"))
    return target.with_name(f"{stem}_probabilities.npz")


def _check_npz(path: Path, shape: tuple[int, ...]) -> None:
    """Refuses a file of probabilities that is damaged, or of another scan."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = stored["probabilities"]
    except Exception as error:  # NumPy parses a damaged header as Python, which raises anything
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if found.shape != shape or found.dtype != np.float16:
        raise UserError(f"{path}: holds {found.dtype}{found.shape}, not float16{shape}")


def _write_npz(path: Path, probabilities: np.ndarray) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, probabilities=probabilities)
    files.write_bytes(path, data.getvalue())
