"""A trained run from Python: scans in memory to label maps, as the verb `predict` draws them.

from bhsd_jax.api import Predictor

predictor = Predictor.from_run("runs/cps")
labels = predictor(voxels, affine)
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from bhsd_jax.assemble import calibrated, devices, ensemble, predictor
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.ct import geometry, nifti_header, plausibility, scan
from bhsd_jax.ct.prepare import prepare_volume
from bhsd_jax.ct.probabilities import Probabilities
from bhsd_jax.metrics import postprocessing
from bhsd_jax.platform import startup
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report import notebook, viewer
from bhsd_jax.report.viewer import Viewer
from bhsd_jax.verbs.shown import Entry, of_arrays
from bhsd_jax.volume import Case, Grid, Plan, Volume

logger = logging.getLogger(__name__)

Voxels = Any  # an array, or nibabel's image, which holds one

startup.settle_compiler()


class Predictor:
    """Networks of one or several runs, applied to scans in memory.

    Arrays are [i, j, k] with an affine from (i, j, k, 1) to mm in RAS+, as nibabel has them, in
    whatever direction the axes run; of several input channels [i, j, k, channel]. CT is in HU. Any
    number of threads may use one predictor; after `warm_up` none of them waits for the network to
    be compiled. One scan at a time is in the networks of a process, for which memory is counted.
    """

    def __init__(self, networks: predictor.Predictor, members: tuple[Member, ...]):
        self._networks, self.members = networks, members

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *more: str | Path,
        checkpoint: str | int | None = None,
        networks: str | Sequence[str] = (),
        mirror: bool | None = None,
    ) -> "Predictor":
        """Reads a run; of several, folds say, probabilities are averaged.

        What the run's config says of `predict` counts as it does on the command line: its
        postprocessing, temperature (`calibrated`) and further runs (`runs`, unless `more` are
        given), too.

        Args:
            run: Folder of a run that was trained or imported.
            more: Folders of further runs whose scans are prepared alike.
            checkpoint: "best", "last" or a step; of further runs the best instead of a step. None:
                as the first run's config says.
            networks: Names from the first run's objective; (): as its config says, which of an
                imported run are all that were imported together.
            mirror: Average over mirrored versions; None: each run as its own config says.

        Raises:
            FileNotFoundError: If a folder is not one of a run, or has no such checkpoint.
            ValueError: If a run is damaged, or runs are not prepared alike, or a temperature is of
                other networks, or JAX was started before this module was imported, in a version
                that then adds up wrongly on CPUs.
        """
        chosen: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
        networks = (networks,) if isinstance(networks, str) else tuple(networks)
        chosen |= {"networks": networks} if networks else {}
        first = ensemble.run_of(run, **chosen)
        if mirror is not None:
            infer = dataclasses.replace(first.config.infer, mirror=mirror)
            config = dataclasses.replace(first.config, infer=infer)
            first = dataclasses.replace(first, config=config)
        rules = tuple(map(first.labels.values_of, ensemble.rules(first)))
        devices.share_cores(first)
        devices.require_right_sums()
        more = more or first.config.predict.runs
        made, members = ensemble.open_runs(first, more, mirror=mirror)
        if first.config.predict.calibrated:
            made = dataclasses.replace(made, temperature=calibrated.temperature(first, members))
        return cls(dataclasses.replace(made, rules=rules), members)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by value in a label map, background first."""
        return self._networks.classes

    def warm_up(self) -> None:
        """Compiles the networks, by applying them to a scan of one tile, in its turn."""
        with predictor.IN_THE_NETWORKS:
            for one in (self._networks, *self._networks.others):
                blank = np.full((*one.window.tile, one.plan.raw_channels), one.fill, np.float32)
                one.window.logits(one.networks, blank, fill=one.fill)

    def __call__(
        self, voxels: Voxels, affine: np.ndarray, previous: np.ndarray | None = None
    ) -> UInt8[np.ndarray, "I J K"]:
        """The label map of a scan, on its own voxels.

        Args:
            voxels: The scan, or nibabel's image of it; further axes of size 1 are dropped.
            affine: From its indices to mm.
            previous: Of a cascade's second network, the label map [i, j, k] of the first.

        Raises:
            ValueError: If array or affine are none of a scan of the kind the run was trained on,
                or the network's output is not finite.
        """
        return self.predict(voxels, affine, previous).labels

    def predict(
        self, voxels: Voxels, affine: np.ndarray, previous: np.ndarray | None = None
    ) -> "Prediction":
        """The networks' answer, of which label map and probabilities can be had; as a call is."""
        plan = self._networks.plan
        volume, *further = _channels(voxels, affine, len(plan.channels))
        label = _of_first(previous, volume, plan)
        image, grid, findings = prepare_volume(volume, plan, further, label)
        logits = self._networks.logits(image, volume.case)
        return Prediction(self._networks, logits, grid, tuple(one.text for one in findings))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the networks say of one scan."""

    _networks: predictor.Predictor
    _logits: Float[np.ndarray, "K D H W"]
    _grid: Grid
    findings: tuple[str, ...]  # what was repaired of the scan, and what is odd about it

    @cached_property
    def labels(self) -> UInt8[np.ndarray, "I J K"]:
        """The likeliest class of every voxel, or the regions it is in; postprocessed as asked."""
        label = geometry.label_of_logits(self._logits, self._grid, self._networks.labels)
        label = postprocessing.apply(label, self._networks.rules)
        return np.ascontiguousarray(label.transpose(2, 1, 0))

    @cached_property
    def probabilities(self) -> Probabilities:
        """Probabilities of all classes or regions, with names and affine; `save` writes a file."""
        tempered, meaning = self._networks.tempered(self._logits), self._networks.labels
        values = geometry.probabilities_of_logits(tempered, self._grid, meaning)
        return self._networks.with_names(values, np.asarray(self._grid.native_affine))


def read_scan(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a scan in one file, as `predict` reads it: known defects are put right.

    NIfTI, and with the extra `formats` the others that `predict` takes, such as .mha and .nrrd.

    What was put right of the affine, or taken though the header contradicts it, is logged as a
    warning: nobody who is given the arrays alone can find it.

    Raises:
        ValueError: If the file is broken; names it.
        FileNotFoundError: If there is no such file.
    """
    volume, findings = scan.read(Path(path))
    for finding in findings:
        logger.warning("%s: %s", path, finding)
    return volume.voxels.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]]


def show(
    voxels: np.ndarray,
    affine: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
) -> Any:
    """NiiVue's widget for a notebook: the scan and its bleeds in their colors.

    CT is shown in the brain window, all else (MR) in its own range of intensities.

    Args:
        voxels: [i, j, k], as for `Predictor`.
        affine: From (i, j, k, 1) to mm, RAS+.
        labels: What `Predictor` has made of it.
        classes: `Predictor.classes`.

    Raises:
        ValueError: If the extra `viewer` is not installed, or the arrays do not fit.
    """
    volume = _volume(voxels, affine)
    shape = volume.voxels.shape[::-1]
    if np.shape(labels) != shape:
        raise UserError(f"labels have shape {np.shape(labels)}, the scan {shape}")
    settled = plausibility.in_hu(volume.voxels)
    if settled is not None:
        volume = dataclasses.replace(volume, voxels=settled)
    case = Case(volume.case, volume.case, Path(volume.case), None, "test")
    entry = Entry(case, Path(case.id), "scan", {})
    label = np.asarray(labels, np.uint8).transpose(2, 1, 0)
    windows = viewer.NO_WINDOWS if settled is None else viewer.CT_WINDOWS
    around = Viewer("", "", "", tuple(classes)[1:], windows)
    return notebook.widget(of_arrays(entry, volume, [label]), around)


def _channels(voxels: Voxels, affine: np.ndarray, count: int) -> list[Volume]:
    """The channels of a scan in memory, of which the network takes so many; 0 is one."""
    # nibabel's image refuses to be an array; its own array has the scale factors applied.
    voxels = np.asarray(getattr(voxels, "dataobj", voxels))
    if count > 1 and voxels.ndim == 5 and voxels.shape[3] == 1:
        voxels = voxels[:, :, :, 0]  # ITK's files have channels after time
    if count < 2:
        return [_volume(voxels, affine)]
    if voxels.ndim != 4 or voxels.shape[3] != count:
        raise UserError(
            f"the network takes {count} channels, [i, j, k, {count}]; got {voxels.shape}"
        )
    return [_volume(one, affine) for one in np.moveaxis(voxels, 3, 0)]


def _of_first(previous: np.ndarray | None, volume: Volume, plan: Plan) -> np.ndarray | None:
    """A first network's label map as one from a file: uint8 [D, H, W]; None without a cascade."""
    if (previous is None) == bool(plan.previous_stage):
        raise UserError(
            f"this network is the second of a cascade: give the label map of {plan.previous_stage}"
            if plan.previous_stage
            else "this network takes no label map of another"
        )
    if previous is None:
        return None
    label = np.asarray(previous).transpose(2, 1, 0)
    if label.shape != volume.voxels.shape or not np.isin(label, range(len(plan.classes))).all():
        raise UserError(
            f"previous: want a label map of the scan's shape, of 0 to {len(plan.classes) - 1}; got "
            f"{label.dtype}{np.shape(previous)}"
        )
    return label.astype(np.uint8)


def _volume(voxels: np.ndarray, affine: np.ndarray) -> Volume:
    """A scan in memory as one from a file: the same order of axes, integers or float32."""
    voxels, affine = np.asarray(voxels), np.asarray(affine, np.float64)
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]  # further axes, as many files have them
    shaped = voxels.ndim == 3 and voxels.size > 0 and affine.shape == (4, 4)
    if not shaped or voxels.dtype.kind not in "iuf":
        raise UserError(
            f"a scan is an array of numbers [i, j, k] and an affine [4, 4]; got "
            f"{voxels.dtype}{voxels.shape} and {affine.shape}"
        )
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            raise UserError("the scan has voxels that are not finite numbers; replace them by air")
    nifti_header.require_affine(affine)
    return Volume(voxels.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]], "the scan")
