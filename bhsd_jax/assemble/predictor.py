"""The networks of a run, and everything between a scan's file and its label map."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from bhsd_jax.assemble import measured, wiring
from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.run import Run
from bhsd_jax.assemble.trust import Trust
from bhsd_jax.ct import geometry, hu, own_slices, probabilities, saved_logits, scan, shear, upright
from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.ct.prepare import doubts_of, hu_doubts, prepare_case
from bhsd_jax.ct.prepared import Prepared
from bhsd_jax.ct.probabilities import Probabilities
from bhsd_jax.infer import ensemble
from bhsd_jax.infer.sliding import SlidingWindow, bytes_per_tile
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import postprocessing
from bhsd_jax.nnunet import saved_probabilities
from bhsd_jax.platform import allocator, budget, machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train import processes
from bhsd_jax.types import Params
from bhsd_jax.volume import Case, Plan, Series, Volume

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 30.0  # how far a long scan is; a sign of life comes more often


@dataclass(frozen=True)
class Predictor:
    """Networks, and everything between a file and its label map."""

    window: SlidingWindow
    networks: Sequence[Params]  # variables, all collections
    fill: float | tuple[float, ...]  # raw image value outside the scan, or one per channel
    plan: Plan
    classes: tuple[str, ...]  # by value in label maps, background first
    probabilities: bool  # also write them
    others: tuple["Predictor", ...] = ()  # of further runs, averaged with this one's networks
    apart: tuple["Predictor", ...] = ()  # of runs whose scans are prepared in another way
    present_ml: float = 0.0  # from how much on a scan is said to have a bleed
    seg: str = ""  # also write a DICOM SEG of this kind, of series
    maker: segmentation.Maker = segmentation.Maker("bhsd_jax")  # noqa: RUF009 - it is frozen
    rules: tuple[postprocessing.Rule, ...] = ()  # applied to every label map
    temperature: float = 1.0  # of the probabilities
    trust: Trust | None = None  # says how far to trust a label map; None: nothing is said
    meaning: Labels | None = None  # of outputs and values; None: plain classes
    nnunet_probabilities: bool = False  # also write them as nnU-Net does
    keeps_logits: bool = False  # also write them, on the network's own voxels
    # Of a cascade: (case, its name) -> the case with the label map that its first network predicts.
    first: Callable[[Case, str], Case] | None = None

    @property
    def labels(self) -> Labels:
        """What the network's outputs and the values of label maps mean."""
        return self.meaning or Labels(self.classes)

    def __call__(self, case: Case, target: Path, name: str) -> ScanVolumes:
        """Writes `target`, its probabilities if asked for, and what `upright` says where needed.

        Raises:
            ValueError: If the scan is broken, or the network's output is not finite.
            FileNotFoundError: If there is no such scan.
            faults.WriteError: If the system says no, such as on a full disk.
        """
        begun = time.monotonic()
        case = case if self.first is None else self.first(case, name)
        # The function of `preprocess`: what the network sees cannot differ from training.
        every, found = scan.read_channels(case.image)
        prepared = prepare_case(case, self.plan, source_sha256="not needed", seen=(every, found))
        for text in prepared.warnings:
            level = logging.WARNING if text in prepared.doubts else logging.INFO
            logger.log(level, "%s: %s", name, text)
        affine = np.asarray(prepared.grid.native_affine)
        own = own_slices.of(case.image, prepared.grid.native_shape, affine)
        label = self._answer(case, own, prepared, target, name, every[0])
        scan.write(target, label, like=scan.native(case.image))
        seconds = time.monotonic() - begun
        row = self._row(case, name, own, label, every[0], seconds, prepared.doubts)
        measures = self.trust.of(prepared.channels_last, prepared.grid) if self.trust else None
        return dataclasses.replace(row, **vars(measures)) if measures else row

    def _answer(
        self,
        case: Case,
        own: OwnSlices,
        prepared: Prepared,
        target: Path,
        name: str,
        seen: Volume,
    ) -> UInt8[np.ndarray, "N H W"]:
        """The label map; what belongs beside it is written."""
        grid, finish = prepared.grid, partial(postprocessing.apply, rules=self.rules)
        series = case.image if isinstance(case.image, Series) else None
        fractional = series is not None and self.seg == "fractional"
        asked = self.probabilities or fractional or self.nnunet_probabilities
        needed = asked or self.others or self.keeps_logits or upright.is_needed(own)
        chances = None
        if self.apart:
            chances = self._mean_chances(case, own, prepared, name)
            label = finish(self.labels.of_chances(chances))
        elif needed or not own.is_on(grid):
            logits = self.logits(prepared.channels_last, name)
            label = finish(own.label(logits, grid, self.labels))
            if asked:
                chances = own.probabilities(self.tempered(logits), grid, self.labels)
            if self.keeps_logits:
                saved_logits.save(saved_logits.beside(target), logits, grid)
            if upright.is_needed(own):
                means = self.labels, finish
                upright.write(target, case.image, own, label, logits, grid, *means, seen)
        else:  # voxel by voxel the network's own, so that no logits need be kept
            likeliest = self._likeliest(prepared.channels_last, name)
            label = finish(geometry.label_from_grid(likeliest, grid))
        if chances is not None:
            self._save(chances, own, grid, case, target)
        if series is not None and self.seg:
            how = {"kind": self.seg, "maker": self.maker, "probabilities": chances}
            segmentation.write(segmentation.place(target), series, label, self.classes, **how)
        return label

    def _save(
        self,
        chances: Float32[np.ndarray, "K N H W"],
        own: OwnSlices,
        grid: geometry.Grid,
        case: Case,
        target: Path,
    ) -> None:
        """Writes probabilities beside the label map, in the formats that are asked for."""
        if self.probabilities:
            self.chances(chances, own.affine).save(probabilities.beside(target))
        if self.nnunet_probabilities:
            saved_probabilities.write(target, case.image, grid, chances)

    def _mean_chances(
        self, case: Case, own: OwnSlices, prepared: Prepared, name: str
    ) -> Float32[np.ndarray, "K N H W"]:
        """Mean probabilities on the scan's own voxels, of groups of runs that are prepared alike.

        Source: nnU-Net v2.8.1, `ensemble_folders`: every configuration counts once.

        Raises:
            ValueError: If the scan needs an upright pair, which is made of logits on one grid.
        """
        if upright.is_needed(own):
            raise UserError(
                f"{name}: its slices are tilted or uneven, which needs runs whose scans are "
                "prepared alike; leave the others out of config.predict.runs"
            )
        logits = self.logits(prepared.channels_last, name)
        mean = own.probabilities(logits, prepared.grid, self.labels)
        for one in self.apart:
            again = prepare_case(case, one.plan, source_sha256="not needed")
            logits = one.logits(again.channels_last, name)
            mean += own.probabilities(logits, again.grid, self.labels)
        return mean / np.float32(1 + len(self.apart))

    def logits(self, image: np.ndarray, name: str) -> Float[np.ndarray, "K D H W"]:
        """Logits of a prepared scan [D H W C], of all networks together.

        Raises:
            ValueError: If there is not enough memory, or the output is not finite.
        """
        self._require_memory(image, len(image) * (2 if self.others else 1))
        tell = Teller(name).tiles
        mean = ensemble.mean_for(self.window.combine, regions=bool(self.labels.regions))
        return mean(
            (
                one.window.logits(one.networks, image, fill=one.fill, progress=tell),
                len(one.networks),
            )
            for one in (self, *self.others)
        )

    def tempered(self, logits: Float[np.ndarray, "K D H W"]) -> Float[np.ndarray, "K D H W"]:
        """Logits of which the softmax, or of regions the sigmoid, is calibrated."""
        return logits if self.temperature == 1 else logits / np.float32(self.temperature)

    def chances(self, values: Float[np.ndarray, "K D H W"], affine: np.ndarray) -> Probabilities:
        """Class probabilities on a scan's own voxels, as files of them have the axes."""
        named = self.labels.output_names
        return Probabilities(values.transpose(0, 3, 2, 1), named, affine[:, [2, 1, 0, 3]])

    def _likeliest(self, image: np.ndarray, name: str) -> UInt8[np.ndarray, "D H W"]:
        self._require_memory(image, 2 * self.window.tile[0])
        tell = Teller(name).tiles
        return self.window.labels(self.networks, image, fill=self.fill, progress=tell)

    def _require_memory(self, image: np.ndarray, rows: int) -> None:
        """Refuses a scan for the logits of which there is no room, before it is begun."""
        budget.require_memory(
            4 * self.labels.outputs * rows * math.prod(image.shape[1:3]),
            f"a scan of {' x '.join(map(str, image.shape[:3]))} voxels at "
            f"{' x '.join(f'{mm:.3g}' for mm in self.plan.spacing_mm)} mm",
            "use a machine that has more, or crop the scan",
        )

    def finished(self, case: Case, target: Path, name: str) -> ScanVolumes | None:
        """The row of a scan whose files are all there and whole, else None.

        A file that is damaged, or of another scan, is said to be so.

        Raises:
            ValueError: If the scan is broken.
            FileNotFoundError: If there is no such scan.
        """
        wanted = [target]
        wanted += [probabilities.beside(target)] if self.probabilities else []
        wanted += [saved_logits.beside(target)] if self.keeps_logits else []
        if not all(path.is_file() for path in wanted):
            return None
        place = scan.native(case.image)
        seen, read = scan.read(case.image)
        d, h, w = seen.voxels.shape
        own = own_slices.of(case.image, (d, h, w), seen.affine)
        try:
            label, notes = scan.read_label(
                target, place, own.blank(seen.case), num_classes=len(self.classes)
            )
            if notes:
                raise UserError(f"{target}: {notes[0]}")
            self._check_beside(target, label)
        except UserError as error:
            reason = str(error).replace(str(case.image), name).replace(case.id, name)
            logger.warning("%s: predicted again, for %s", name, reason)
            return None
        shape = self.labels.outputs, *label.voxels.shape
        if self.nnunet_probabilities and not saved_probabilities.is_whole(target, shape):
            return None
        seg = segmentation.place(target)
        if self.seg and isinstance(case.image, Series) and not segmentation.is_whole(seg, self.seg):
            return None
        if upright.is_needed(own) and not all(path.is_file() for path in upright.pair(target)):
            return None
        doubts = *doubts_of(read), *hu_doubts(seen.voxels, self.plan)
        return self._row(case, name, own, label.voxels, seen, None, doubts)

    def _check_beside(self, target: Path, label: Volume) -> None:
        """Refuses damaged logits, and probabilities that are damaged or of another scan or run."""
        if self.keeps_logits:
            saved_logits.load(saved_logits.beside(target))
        if not self.probabilities:
            return
        path = probabilities.beside(target)
        found = probabilities.load(path)
        named = self.labels.output_names
        shape = len(named), *label.voxels.shape[::-1]
        if found.values.shape != shape or found.classes != named:
            raise UserError(
                f"{path}: holds {', '.join(found.classes)} {found.values.shape}, not "
                f"{', '.join(named)} {shape}"
            )

    def _row(
        self,
        case: Case,
        name: str,
        own: OwnSlices,
        label: np.ndarray,
        seen: Volume,
        seconds: float | None,
        doubts: Sequence[str],
    ) -> ScanVolumes:
        ct = self.plan.modality == "ct"
        feed = case.table_feed and ct
        tilt = shear.gantry_deg(seen.affine) if ct else 0.0
        corrected = hu.tilt_corrected(seen.affine, table_feed=feed)
        volumes = own.volumes_ml(label, len(self.classes), table_feed=feed)
        ml = {name: sum(volumes[v] for v in values) for name, values in self.labels.targets}
        meant = self.plan, self.labels
        found = [asdict(one) for one in measured.lesions(case, own, label, *meant, seen)]
        told = "; ".join(doubts)
        facts: dict[str, Any] = {"lesions": found, "present_ml": self.present_ml}
        if self.labels.regions:
            facts["all_ml"] = sum(volumes[1:])
        return ScanVolumes(name, float(tilt), seconds, ml, corrected, told, **facts)


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
    config, model, network_input = run.config, wiring.model(run), run.network_input

    def forward(variables: Params, raw: jax.Array) -> Any:
        return model.apply(variables, network_input(raw), train=False)

    margin = getattr(model, "margin", (0, 0, 0))  # what it takes around the voxels it answers for
    seen = (n + 2 * m for n, m in zip(run.patch, margin, strict=True))
    sample = jax.ShapeDtypeStruct((1, *seen, network_input.channels), jnp.float32)
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
        law=config.infer.law,
        margin=margin,
        unit=model.stride if any(margin) else None,
        combine=config.predict.combine,
        # Of several processes each predicts scans of its own.
        mesh=meshes.make_mesh(devices=jax.local_devices()) if several else None,
        regions=run.labels.region_order,
    )
    return Predictor(
        window=window,
        networks=networks,
        fill=network_input.pad_value(config.input.pad),
        plan=run.plan,
        classes=run.classes,
        probabilities=config.predict.probabilities,
        present_ml=config.predict.present_ml,
        seg=config.predict.dicom.seg,
        maker=segmentation.Maker(f"{config.objective['name']} on {run.plan.dataset}"),
        meaning=run.labels,
        nnunet_probabilities=config.predict.nnunet_probabilities,
        keeps_logits=config.predict.logits,
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
