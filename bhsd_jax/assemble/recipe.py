"""From a config to the parts of a train step, and every check that comes before compiling it."""

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.augment.slices import follow, mark
from bhsd_jax.build import build, find
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.input.pipeline import Cut
from bhsd_jax.input.slices import Slices
from bhsd_jax.labels import Labels
from bhsd_jax.losses import DiceBCE, DiceCE
from bhsd_jax.models.cost import count_parameters
from bhsd_jax.objectives.common import Ramp, Ramped
from bhsd_jax.objectives.slice_loss import SliceTerms, WithSliceLoss
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train import optimizer as optimizers
from bhsd_jax.train import processes
from bhsd_jax.train.step import Parts, init_state
from bhsd_jax.types import Batch, TrainState
from bhsd_jax.volume import Plan
from bhsd_jax.windows import CascadeInput

logger = logging.getLogger(__name__)

_LEAST_TURNS = 10.0  # time constants 1 / (1 - decay) of a moving average in a training


@dataclass(frozen=True)
class Recipe:
    """All of a training that does not change from step to step."""

    parts: Parts
    # (steps of the training) -> learning rate by step, and the optimizer that follows it
    rates: Callable[[Any], tuple[Any, Any]]
    cut: Cut
    raw_type: Any  # of the images in the shards: int16 HU, or float32
    raw_channels: int  # of the images in the shards
    channels: int  # of the network's input
    labeled: int  # patches per step, all devices together
    unlabeled: int
    slices: Slices | None  # of unlabeled patches, if anything uses their slice labels

    def abstract_batch(self) -> Batch:
        """Shapes and types of a batch as the input pipeline delivers it."""

        def rows(count: int, kind: Any, *channel: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *self.cut.source, *channel), kind)

        return Batch(
            image=rows(self.labeled, self.raw_type, self.raw_channels),
            label=rows(self.labeled, self.cut.label_type),
            unlabeled=rows(self.unlabeled, self.raw_type, self.raw_channels)
            if self.unlabeled
            else None,
            slice_labels=self._slice_labels() if self.unlabeled and self.slices else None,
            inside=rows(self.unlabeled, jnp.int8) if self.unlabeled and self.cut.masked else None,
        )

    def _slice_labels(self) -> jax.ShapeDtypeStruct:
        assert self.slices is not None
        return jax.ShapeDtypeStruct(
            (self.unlabeled, self.cut.source[0], self.slices.columns), jnp.int8
        )

    def parts_over(self, steps: jax.Array) -> Parts:
        """The parts of a training of so many steps, a traced number inside a jitted step."""
        schedule, optimizer = self.rates(steps)
        return dataclasses.replace(self.parts, steps=steps, schedule=schedule, optimizer=optimizer)

    def init(self, key: jax.Array) -> TrainState:
        """State at step 0; to be jitted."""
        return init_state(self.parts, jnp.zeros((1, *self.cut.patch, self.channels)), key)


def share_cores(run: Run) -> None:
    """Splits a CPU into as many devices as suit the training; call before JAX starts."""
    config, batches = run.config, (run.labeled, run.unlabeled)
    if config.mesh.model > 1 or config.mesh.space > 1:
        return
    at_once = (count // max(config.train.accumulate, 1) for count in batches)
    split = processes.share_cores(*at_once)
    # Tracing the network to count takes a while, and elsewhere there is nothing to decide.
    if split and jax.default_backend() == "cpu" and jax.device_count() > 1:
        networks = len(wiring.objective(config).twins) or 1
        image = (1, *run.patch, run.network_input.channels)
        parameters = networks * count_parameters(wiring.model(run), image)
        processes.unite_cores(parameters, sum(batches) * math.prod(run.patch))


def make_mesh(run: Run) -> Mesh:
    """The devices of a training, as the config arranges them and its batches fill them."""
    sizes = {axis: getattr(run.config.mesh, axis) for axis in meshes.AXES}
    accumulate = max(run.config.train.accumulate, 1)
    return meshes.make_mesh(**sizes, batches=(run.labeled, run.unlabeled), accumulate=accumulate)


def make_recipe(run: Run, mesh: Mesh | None = None) -> Recipe:
    """Model, objective, optimizer, augmentation and batch as config and plan name them."""
    config, plan = run.config, run.plan
    objective = wiring.objective(config)
    spatial, intensity = make_chains(run, mesh)
    cascade = _cascade(run, mesh)
    rates = partial(optimizers.of_spec, config.optimizer, parts=bool(objective.twins))
    schedule, optimizer = rates(config.train.steps)
    terms, slices = _slice_labels(run)
    if terms is not None:
        objective = WithSliceLoss(objective, terms)
    loss = dict(vars(config.loss))
    if loss["batch_dice"] is None:
        loss["batch_dice"] = plan.network.batch_dice
    if loss["batch_dice"]:
        _warn_of_parts(run.labeled, config.train.accumulate)
    parts = Parts(
        model=wiring.model(run),
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        segmentation=_segmentation(loss, run.labels),
        augment=make_augment(
            run.normalization,
            spatial,
            intensity,
            head_hu=_head(plan),
            masked=config.input.outside == "masked",
            cascade=cascade,
        ),
        view=intensity,
        steps=config.train.steps,
        accumulate=config.train.accumulate,
        mesh=mesh,
    )
    cut = Cut(
        patch=spatial.patch,
        source=spatial.source_patch,
        fill=run.network_input.pad_value(config.input.pad),
        foreground=config.input.foreground,
        binary=config.split.binary,
        # Padding may be as bright as a head; only `inside` tells slice labels that it is none.
        masked=config.input.outside == "masked" or slices is not None,
        uniform=config.input.crop == "uniform",
        rot_flip=config.input.rot_flip,
        annotated=run.labels.ignore is not None,
        label_type="int8" if run.labels.values <= 128 else "int16",
    )
    return Recipe(
        parts=parts,
        rates=rates,
        cut=cut,
        raw_type=jnp.float32 if plan.normalized_before else jnp.int16,
        raw_channels=plan.raw_channels,
        channels=run.network_input.channels,
        labeled=run.labeled,
        unlabeled=run.unlabeled,
        slices=slices,
    )


def _segmentation(settings: dict[str, Any], labels: Labels) -> DiceCE:
    """The supervised loss of classes, or of regions."""
    if not labels.regions:
        return DiceCE(**settings, ignore=labels.ignore)
    regions = tuple(values for _, values in labels.regions)
    return DiceBCE(**settings, ignore=labels.ignore, regions=regions)


def make_chains(run: Run, mesh: Mesh | None = None) -> tuple[SpatialChain, IntensityChain]:
    """The augmentations; on CPUs each device's patches one by one, all at once elsewhere."""
    devices = jax.device_count() if mesh is None else mesh.size
    shared = _shared(mesh)
    sequential = jax.default_backend() == "cpu" and (devices == 1 or shared is not None)
    fill = run.normalization.fill(run.config.input.pad)

    def ops(specs: Any) -> tuple[Any, ...]:
        made = []
        for spec in specs:
            accepted = inspect.signature(find("bhsd_jax.augment", spec["name"])).parameters
            extra = {"fill": fill} if "fill" in accepted and "fill" not in spec else {}
            made.append(build("bhsd_jax.augment", dict(spec), **extra))
        return tuple(made)

    return (
        SpatialChain(ops(run.config.augment.spatial), run.patch, sequential, shared),
        IntensityChain(ops(run.config.augment.intensity), sequential, shared, run.plan.masked),
    )


@dataclass(frozen=True)
class Cascade:
    """What is done with a first network's label map, once it was moved with the image."""

    maps: Callable[[Any], Any]  # [B D H W] -> [B D H W C], a channel per label
    change: IntensityChain


def _cascade(run: Run, mesh: Mesh | None) -> Cascade | None:
    """The changes of the first network's label map; None if there is no first network."""
    if not isinstance(run.network_input, CascadeInput):
        return None
    specs = run.config.augment.previous
    ops = tuple(build("bhsd_jax.augment", dict(spec)) for spec in specs)
    shared = _shared(mesh)
    # One by one on accelerators too: all at once, the rarely drawn changes are always computed.
    sequential = mesh is None or mesh.size == 1 or shared is not None
    return Cascade(run.network_input.maps, IntensityChain(ops, sequential, shared))


def _shared(mesh: Mesh | None) -> Mesh | None:
    """The mesh if its devices may take their patches one by one, which needs whole patches."""
    return mesh if mesh is not None and mesh.shape["space"] == 1 < mesh.size else None


def make_augment(
    normalize: Callable[[Any], Any],
    spatial: SpatialChain,
    intensity: IntensityChain,
    *,
    head_hu: float = -200.0,
    masked: bool = True,
    cascade: Cascade | None = None,
) -> Callable[[Any, Batch], Batch]:
    """Raw batch to patches: the labeled ones complete, the unlabeled without intensity changes.

    With a `cascade` the last raw channel is a label map, which is moved as the labels are.
    Slice labels find their slices again by the voxels of the scan above `head_hu`, and so come
    with `inside`, which is passed on only if `masked`.
    """

    def augment(key: jax.Array, batch: Batch) -> Batch:
        spatial_key, intensity_key, free_key = jax.random.split(key, 3)
        raw = batch.image if cascade is None else batch.image[..., :-1]
        image, label = spatial(spatial_key, normalize(raw), batch.label)
        image = intensity(intensity_key, image)
        if cascade is not None:
            previous = batch.image[..., -1].astype(batch.label.dtype)
            # The same draw; the image, which nothing reads, costs nothing.
            _, moved = spatial(spatial_key, normalize(raw), previous)
            maps = cascade.change(jax.random.fold_in(key, 3), cascade.maps(moved))
            image = jnp.concatenate([image, maps], axis=-1)
        if batch.unlabeled is None:
            return Batch(image, label)
        slice_labels, inside, plain = batch.slice_labels, batch.inside, normalize(batch.unlabeled)
        if slice_labels is None:
            free, _ = spatial(free_key, plain, None)
        else:
            assert inside is not None  # it comes with slice labels
            marks, whole = mark((inside > 0) & (batch.unlabeled[..., 0] > head_hu))
            free, moved = spatial(free_key, plain, marks)
            assert moved is not None  # marks came in
            reach = 0 if spatial.keeps_slices else 1
            slice_labels = follow(moved, whole, slice_labels, reach=reach)
        if not masked:
            inside = None
        if inside is not None:
            # The same draw; the image, which nothing reads, costs nothing.
            _, moved = spatial(free_key, plain, inside)
            assert moved is not None
            inside = moved > 0
        return Batch(image, label, free, slice_labels, inside)

    return augment


def _head(plan: Plan) -> float:
    """The intensity above which there is head in a scan, as it lies in the shards."""
    if plan.modality != "ct":
        return -math.inf  # MR has no HU to tell the head by: all of the scan counts as head
    floor = -200.0 if plan.crop_hu is None else plan.crop_hu
    if not plan.normalize_first:
        return floor
    low, mean, std, _ = plan.foreground
    # Nothing below `low` is left; what is just above it may be air that a spline has moved.
    return (max(floor, low) - mean) / std + 0.01


def require_matching(run: Run, recipe: Recipe, roles: Roles, mesh: Mesh) -> None:
    """Refuses what does not fit, before the first compilation.

    Raises:
        ValueError: Says which fields, what they are, and what to change.
    """
    config = run.config
    wants = recipe.parts.objective.uses_unlabeled
    if not roles.train:
        raise UserError("split: no labeled training case is left; look at split and data")
    if config.input.cases == "two_stream" and len(roles.train) < recipe.labeled:
        raise UserError(
            f"input.cases=two_stream: {len(roles.train)} labeled cases are fewer than the "
            f"{recipe.labeled} labeled patches of a step, so that no batch is ever full; lower "
            "input.labeled, or choose in_turn"
        )
    if wants and not (recipe.unlabeled and roles.unlabeled):
        raise UserError(
            f"objective {config.objective['name']} needs unlabeled patches: input.unlabeled is "
            f"{recipe.unlabeled} and {len(roles.unlabeled)} scans are unlabeled; raise the first, "
            "set split.labeled so that some masks are left out, or set split.bleeding and "
            "split.nonbleeding (the word task=), which take only scans known to bleed or not, to "
            "None"
        )
    if recipe.slices is not None and not wants:
        raise UserError(
            f"slice_loss: objective {config.objective['name']} reads no unlabeled patches, which "
            "slice labels are about; choose another, such as supervised.WeaklySupervised"
        )
    if recipe.unlabeled and not wants:
        raise UserError(
            f"objective {config.objective['name']} uses no unlabeled patches; set input.unlabeled=0"
        )
    _warn_of_slow_average(recipe.parts.objective.ema_decay, config.train.steps)
    _warn_of_long_ramp(recipe.parts.objective, config.train.steps)
    rows, accumulate = recipe.cut.patch[1], recipe.parts.accumulate
    meshes.require_divisible(mesh, recipe.labeled, recipe.unlabeled, rows, accumulate)
    _require_twins(config, recipe, mesh)
    # Both calls trace the model, which refuses a patch that it cannot take.
    wiring.require_output(recipe.parts.model, recipe.cut.patch, recipe.channels)
    jax.eval_shape(recipe.init, jax.random.key(0))


def _require_twins(config: Settings, recipe: Recipe, mesh: Mesh) -> None:
    """Refuses to put networks on devices of their own that are not there."""
    networks, places = max(len(recipe.parts.objective.twins), 1), mesh.shape["twins"]
    if places not in (1, networks):
        raise UserError(
            f"mesh.twins is {places}, but objective {config.objective['name']} trains {networks} "
            f"network{'s' if networks > 1 else ''}; set mesh.twins={networks}"
            f"{' or 1' if networks > 1 else ''}"
        )


def _warn_of_parts(labeled: int, accumulate: int) -> None:
    """Batch Dice sums over the patches that are in the network together."""
    if accumulate > 1:
        logger.warning(
            "loss.batch_dice counts over the %d patches of a part, not the %d of a step "
            "(train.accumulate %d): another training than that of the whole batch at once",
            labeled // accumulate,
            labeled,
            accumulate,
        )


def _warn_of_slow_average(decay: float | None, steps: int) -> None:
    """A moving average must forget long before the training ends, or it deploys its beginnings."""
    if decay is not None and (1 - decay) * steps < _LEAST_TURNS:
        logger.warning(
            "objective.ema_decay %g averages over %.0f steps, of %d in all; choose %.3g or less, "
            "or train longer",
            decay,
            1 / max(1 - decay, 1e-9),
            steps,
            max(0.0, 1 - _LEAST_TURNS / steps),
        )


def _warn_of_long_ramp(objective: Any, steps: int) -> None:
    """A ramp of so many steps, as SSL4MIS has it, may be longer than the training."""
    inner = getattr(objective, "inner", objective)
    if not isinstance(inner, Ramped) or not inner.weight or inner.ramp_steps <= steps:
        return
    reached = float(Ramp.of(inner).at(jnp.asarray(steps), steps))
    logger.warning(
        "objective.ramp_steps is %d, of %d steps in all: the weight of the unlabeled term ends at "
        "%.2g, and not at %g; set ramp_steps to %d or less, or train longer",
        inner.ramp_steps,
        steps,
        reached,
        inner.weight,
        steps,
    )


def _slice_labels(run: Run) -> tuple[SliceTerms | None, Slices | None]:
    """What slice labels add to the objective, and how they are read; None if nothing is on."""
    config, plan = run.config, run.plan
    spec = dict(vars(config.slice_loss))
    slices = Slices(len(plan.classes) - 1, config.split.binary, spec.pop("margin"))
    terms = SliceTerms(**spec)
    if not terms.active:
        return None, None
    return terms, slices
