"""The networks of a run, and everything between a scan's file and its label map."""

import dataclasses
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from bhsd_jax.assemble import measured
from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.trust import Trust
from bhsd_jax.assemble.underway import Answer, Ready, Stopwatch
from bhsd_jax.ct import geometry, hu, own_slices, probabilities, saved_logits, scan, shear, upright
from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.ct.prepare import doubts_of, hu_doubts, prepare_case
from bhsd_jax.ct.probabilities import Probabilities
from bhsd_jax.infer import ensemble
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import postprocessing
from bhsd_jax.nnunet import saved_probabilities
from bhsd_jax.platform import budget
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Params
from bhsd_jax.volume import Case, Plan, Series, Volume

logger = logging.getLogger(__name__)

# One scan at a time is in the networks of this process: memory is counted for one.
IN_THE_NETWORKS = threading.RLock()
_SAY_EVERY_S = 30.0  # how far a long scan is; a sign of life comes more often


@dataclass(frozen=True)
class Predictor:
    """Networks, and everything between a file and its label map: `prepare`, `infer`, `write`."""

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
    # The first network of a cascade: (case, its name) -> the case with the label map that it
    # predicts, and the seconds that took.
    first: Callable[[Case, str], tuple[Case, float]] | None = None

    @property
    def labels(self) -> Labels:
        """What the network's outputs and the values of label maps mean."""
        return self.meaning or Labels(self.classes)

    def __call__(self, case: Case, target: Path, name: str) -> ScanVolumes:
        """Writes `target` and what belongs beside it: all three steps, one after the other.

        Raises:
            ValueError: If the scan is broken, or the network's output is not finite.
            FileNotFoundError: If there is no such scan.
            faults.WriteError: If the system says no, such as on a full disk.
        """
        return self.write(self.infer(self.prepare(case, name)), target)

    def prepare(
        self, case: Case, name: str, claim: Callable[[int], object] = lambda needed: None
    ) -> Ready:
        """The first step: reads a scan and prepares it; of a cascade the first network does all.

        Args:
            case: The scan.
            name: What tables and log call it.
            claim: Called with the bytes that it is going to take, before it takes them.

        Raises:
            ValueError: If the scan is broken, or runs that are prepared in another way are
                averaged and it needs an upright pair, which is made of logits on one grid.
            FileNotFoundError: If there is no such scan.
            faults.WriteError: If the first network's label map cannot be written.
        """
        watch = Stopwatch()
        # Prepared by the function of `preprocess`, so that the network sees what it was trained on.
        every, found = scan.read_channels(case.image)
        with watch.stopped():
            claim(self._bytes(every, case))
        if self.first is not None:
            with watch.stopped():
                case, seconds = self.first(case, name)
            watch.add(seconds)
        prepared, *others = (
            prepare_case(case, plan, source_sha256="not needed", seen=(every, found))
            for plan in (self.plan, *(one.plan for one in self.apart))
        )
        grid, raw = prepared.grid, every[0].voxels
        affine = np.asarray(grid.native_affine)
        own = own_slices.of(case.image, grid.native_shape, affine)
        if others and upright.is_needed(own):
            raise UserError(
                f"{name}: its slices are tilted or uneven, which needs runs whose scans are "
                "prepared alike; leave the others out of config.predict.runs"
            )
        return Ready(
            case=case,
            name=name,
            seen=every[0],
            own=own,
            images=tuple(one.channels_last for one in (prepared, *others)),
            grids=tuple(one.grid for one in (prepared, *others)),
            warnings=prepared.warnings,
            doubts=prepared.doubts,
            unlike=self.trust.unlike(prepared.channels_last, grid, raw) if self.trust else "",
            seconds=watch.seconds,
        )

    def infer(self, ready: Ready, check: Callable[[], None] = lambda: None) -> Answer:
        """The second step: the networks' answer. One scan of a process is in them at a time.

        Args:
            ready: The prepared scan.
            check: Called after every call of the network.

        Raises:
            ValueError: If there is not enough memory, or the output is not finite.
        """
        with IN_THE_NETWORKS:
            watch, name = Stopwatch(), ready.name
            for text in ready.warnings:
                level = logging.WARNING if text in ready.doubts else logging.INFO
                logger.log(level, "%s: %s", name, text)
            logits, likeliest, disagreement = (), None, None
            if self._needs_logits(ready):
                groups = zip((self, *self.apart), ready.images, strict=True)
                logits = tuple(one.logits(image, name, check) for one, image in groups)
            else:  # voxel by voxel the network's own, so that no logits need be kept
                likeliest = self._likeliest(ready.images[0], name, check)
            if self.trust:
                disagreement = self.trust.disagreement(ready.images[0], ready.grids[0])
            done = dataclasses.replace(ready, images=(), seconds=ready.seconds + watch.seconds)
        return Answer(done, logits, likeliest, disagreement)

    def write(self, answer: Answer, target: Path) -> ScanVolumes:
        """The third step: writes the label map on the scan's own voxels, and measures it.

        Beside it go its probabilities if asked for, and what `upright` says where needed.

        Raises:
            ValueError: If the scan has become unreadable.
            faults.WriteError: If the system says no, such as on a full disk.
        """
        watch, ready = Stopwatch(), answer.scan
        case, own, grid = ready.case, ready.own, ready.grids[0]
        finish = partial(postprocessing.apply, rules=self.rules)
        prob = None
        if answer.likeliest is not None:
            label = geometry.label_from_grid(answer.likeliest, grid)
        elif self.apart:
            prob = self._mean_probabilities(answer)
            label = self.labels.of_probabilities(prob)
        else:
            label = own.label(answer.logits[0], grid, self.labels)
        label = finish(label)
        if prob is None and self._needs_probabilities(case):
            prob = own.probabilities(self.tempered(answer.logits[0]), grid, self.labels)
        if self.keeps_logits:
            saved_logits.save(saved_logits.beside(target), answer.logits[0], grid)
        if upright.is_needed(own):
            logits, means = answer.logits[0], (self.labels, finish)
            upright.write(target, case.image, own, label, logits, grid, *means, ready.seen)
        if prob is not None:
            self._save(prob, own, grid, case, target)
        if isinstance(case.image, Series) and self.seg:
            how = {"kind": self.seg, "maker": self.maker, "probabilities": prob}
            segmentation.write(segmentation.place(target), case.image, label, self.classes, **how)
        scan.write(target, label, like=scan.native(case.image))
        seconds = ready.seconds + watch.seconds
        row = self._row(case, ready.name, own, label, ready.seen, seconds, ready.doubts)
        return dataclasses.replace(row, unlike=ready.unlike, disagreement=answer.disagreement)

    def _bytes(self, every: Sequence[Volume], case: Case) -> int:
        """About what a scan takes until it is written, by its own voxels and those prepared."""
        native, outputs = every[0].voxels.size, self.labels.outputs
        held = sum(one.voxels.nbytes for one in every)
        for one in (self, *self.apart):
            plan = one.plan
            ratio = np.divide(sorted(every[0].spacing_mm), sorted(plan.spacing_mm))
            prepared = native if plan.planar else native * math.prod(ratio)
            held += int(4 * prepared * (2 * plan.raw_channels + outputs))
        prob = outputs if self.apart or self._needs_probabilities(case) else 0
        return held + 4 * native * (prob + 3)  # a margin, the best so far, the label

    def _needs_probabilities(self, case: Case) -> bool:
        fractional = isinstance(case.image, Series) and self.seg == "fractional"
        return self.probabilities or fractional or self.nnunet_probabilities

    def _needs_logits(self, ready: Ready) -> bool:
        asked = self._needs_probabilities(ready.case) or self.keeps_logits
        several = self.apart or self.others or upright.is_needed(ready.own)
        return bool(asked or several) or not ready.own.is_on(ready.grids[0])

    def _mean_probabilities(self, answer: Answer) -> Float32[np.ndarray, "K N H W"]:
        """Mean probabilities on the scan's own voxels, of groups of runs that are prepared alike.

        Source: nnU-Net v2.8.1, `ensemble_folders`: every configuration counts once.
        """
        own, grids = answer.scan.own, answer.scan.grids
        answers = zip(answer.logits, grids, strict=True)
        prob = (own.probabilities(*each, self.labels) for each in answers)
        mean = next(prob)
        for one in prob:
            mean += one
        return mean / np.float32(1 + len(self.apart))

    def _save(
        self,
        prob: Float32[np.ndarray, "K N H W"],
        own: OwnSlices,
        grid: geometry.Grid,
        case: Case,
        target: Path,
    ) -> None:
        """Writes probabilities beside the label map, in the formats that are asked for."""
        if self.probabilities:
            self.with_names(prob, own.affine).save(probabilities.beside(target))
        if self.nnunet_probabilities:
            saved_probabilities.write(target, case.image, grid, prob)

    def compile(self) -> None:
        """Compiles the networks, which may go on while the first scan is read."""
        for group in (self, *self.apart):
            for one in (group, *group.others):
                one.window.compile(one.networks[0], one.plan.raw_channels)

    def logits(
        self, image: np.ndarray, name: str, check: Callable[[], None] = lambda: None
    ) -> Float[np.ndarray, "K D H W"]:
        """Logits of a prepared scan [D H W C], of all networks together; one scan at a time.

        Raises:
            ValueError: If there is not enough memory, or the output is not finite.
        """
        self._require_memory(image, len(image) * (3 if self.others else 1))
        tell = Teller(name, check).tiles
        mean = ensemble.mean_for(self.window.combine, regions=bool(self.labels.regions))
        with IN_THE_NETWORKS:
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

    def with_names(self, prob: Float[np.ndarray, "K D H W"], affine: np.ndarray) -> Probabilities:
        """Class probabilities on a scan's own voxels, as files of them have the axes."""
        named = self.labels.output_names
        return Probabilities(prob.transpose(0, 3, 2, 1), named, affine[:, [2, 1, 0, 3]])

    def _likeliest(
        self, image: np.ndarray, name: str, check: Callable[[], None]
    ) -> UInt8[np.ndarray, "D H W"]:
        self._require_memory(image, 2 * self.window.tile[0])
        tell = Teller(name, check).tiles
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
        every, read = scan.read_channels(case.image)
        seen = every[0]
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
            logger.warning("%s: predicted again, for %s", name, said_of(error, case, name))
            return None
        shape = self.labels.outputs, *label.voxels.shape
        if self.nnunet_probabilities and not saved_probabilities.is_whole(target, shape):
            return None
        seg = segmentation.place(target)
        if self.seg and isinstance(case.image, Series) and not segmentation.is_whole(seg, self.seg):
            return None
        if upright.is_needed(own) and not all(path.is_file() for path in upright.pair(target)):
            return None
        doubts = *doubts_of(read), *hu_doubts(every, self.plan)
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


class Teller:
    """Logs how many tiles of one scan are done, at most every 30 seconds."""

    def __init__(self, name: str, check: Callable[[], None] = lambda: None):
        self.name, self.check, self.said = name, check, time.monotonic()

    def tiles(self, done: int, total: int) -> None:
        self.check()
        if time.monotonic() - self.said > _SAY_EVERY_S:
            self.said = time.monotonic()
            logger.info("%s: tile %d of %d", self.name, done, total)


def said_of(error: Exception, case: Case, name: str) -> str:
    """What an error says of a scan, which is called by its name in the outputs.

    Those of a series say "series 3", and its folder may be called 1: nothing is to be replaced.
    """
    text = str(error).replace(str(case.image), name)
    if isinstance(case.image, Series):
        return text
    return re.sub(rf"(?<!\w){re.escape(case.id)}(?!\w)", lambda _: name, text)
