"""Devices, and how arrays lie on them."""

import itertools
import logging
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bhsd_jax.types import Batch, Params, in_turn

logger = logging.getLogger(__name__)

AXES = ("data", "model", "space", "twins")
_SPLIT = (("model", "twins"), ("model",), ("twins",))  # of the state's leaves, best first


def make_mesh(
    data: int = -1,
    model: int = 1,
    space: int = 1,
    twins: int = 1,
    *,
    batches: Sequence[int] = (),
    accumulate: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges devices; `data` -1 takes all that the other axes leave and the batches fill.

    Where the batches do not spread over all devices, every process keeps as many of its own as
    they do spread over, and a warning says which idle and what would use them.

    Args:
        data: Groups of devices, each with patches of its own.
        model: Devices over which the parameters and what the optimizer keeps of them are split.
        space: Devices over which the rows of patches are split.
        twins: 2 gives each of two networks devices of its own.
        batches: Patches of a step, all devices together; 0 is no batch.
        accumulate: Parts in which they go through the network, one after another.
        devices: What to arrange; None: all devices of all processes.

    Raises:
        ValueError: If the sizes do not multiply to the devices or to those of a process, or the
            batches do not spread over the processes.
    """
    devices = jax.devices() if devices is None else devices
    group = _group(model, space, twins)
    count = max(data, 1) * group
    text = f"mesh: data {data} x model {model} x space {space} x twins {twins}"
    if len(devices) % count or (data != -1 and len(devices) != count):
        raise ValueError(
            f"{text} is not the {len(devices)} devices there are; set mesh.data to -1 and the "
            "others to sizes that multiply to a divisor of it"
        )
    owned = _by_process(devices)
    each = min(map(len, owned))
    if each % group:
        raise ValueError(
            f"{text}: a process reads whole patches, so all but data must multiply to a divisor of "
            f"the {each} devices of one"
        )
    if data == -1:
        share = _share(each // group, len(owned), batches, accumulate)
        used = [device for own in owned for device in own[: share * group]]
        if len(used) < len(devices):
            _say_idle(devices, used, batches)
        devices, data = used, share * len(owned)
    shape = (data, model, space, twins)
    # Auto: the compiler places what lies between the annotated inputs and outputs of the step.
    kinds = (AxisType.Auto,) * len(AXES)
    if len(devices) == jax.device_count():
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    # A part of an accelerator's grid need not be one that JAX knows an order for.
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=kinds)


def _group(model: int, space: int, twins: int) -> int:
    """Devices that work on the same patches."""
    for name, size in (("model", model), ("space", space), ("twins", twins)):
        if size < 1:
            raise ValueError(f"mesh.{name} counts devices, 1 or more; got {size}")
    return math.prod((model, space, twins))


def _by_process(devices: Sequence[Any]) -> list[list[Any]]:
    ordered = sorted(devices, key=lambda device: device.process_index)
    return [list(own) for _, own in itertools.groupby(ordered, lambda d: d.process_index)]


def _share(most: int, processes: int, batches: Sequence[int], accumulate: int) -> int:
    """Groups of devices of one process that the batches fill."""
    for count in batches:
        if count % processes:
            raise ValueError(
                f"{' + '.join(map(str, batches))} patches a step (input.labeled, input.unlabeled) "
                f"do not spread over {processes} processes, of which each reads its own; choose "
                f"multiples of {processes}, or start fewer processes"
            )
    parts = [count // accumulate for count in batches]
    fill = [n for n in range(1, most + 1) if not any(count % (n * processes) for count in parts)]
    return max(fill, default=1)


def _say_idle(devices: Sequence[Any], used: Sequence[Any], batches: Sequence[int]) -> None:
    kept = set(used)
    logger.warning(
        "only %d of %d devices train, because %s patches a step do not spread over more; idle: %s. "
        "To use them, make input.labeled and input.unlabeled multiples of %d (times "
        "train.accumulate), or split patches or networks with mesh.space, mesh.model or "
        "mesh.twins, or train other runs beside this one, each on devices of its own",
        len(used),
        len(devices),
        " + ".join(map(str, filter(None, batches))),
        ", ".join(str(device) for device in devices if device not in kept),
        len(devices),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Patches over `data`, their rows (H) over `space`, and over `model` where both are used.

    Rows must not lie over one axis of the mesh and be the same over another: XLA's partitioner
    (jaxlib 0.10.2) would add up the gradient of a convolution's kernel over the copies too and give
    a multiple of it (`findings/xla_conv_gradient_of_copies.sh`). Spread over both, there are no
    copies, and no device computes what another does.
    """
    return NamedSharding(mesh, PartitionSpec("data", None, _rows(mesh)))


def _rows(mesh: Mesh) -> tuple[str, ...]:
    both = min(mesh.shape["model"], mesh.shape["space"]) > 1
    return ("model", "space") if both else ("space",)


def batch_shardings(mesh: Mesh, batch: Batch) -> Any:
    """Where the leaves of a batch lie: patches as in `batch_sharding`, slice labels over `data`."""
    slices = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda leaf: batch_sharding(mesh) if leaf.ndim > 3 else slices, batch)


def keep_rows(mesh: Mesh | None, batch: Batch) -> Batch:
    """Inside a compiled function: patches as in `batch_sharding`, whatever was done to them."""
    if mesh is None or mesh.shape["space"] == 1:
        return batch
    return lax.with_sharding_constraint(batch, batch_shardings(mesh, batch))


def state_shardings(mesh: Mesh, state: Params, among: Sequence[tuple[str, ...]] = _SPLIT) -> Params:
    """Every leaf split over `model` and `twins` along its largest axis that divides.

    Where none divides by both, over one of them; else replicated. Twins too are split among all,
    rather than each put on its own half: so the layout asks nothing of the state's structure.
    """

    def leaf(value) -> NamedSharding:
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        for axes in among:
            size = math.prod(mesh.shape[axis] for axis in axes)
            fits = [axis for axis, length in enumerate(value.shape) if length % size == 0]
            if size > 1 and fits:
                chosen = max(fits, key=lambda axis: value.shape[axis])
                return NamedSharding(mesh, PartitionSpec(*([None] * chosen), axes))
        return replicated(mesh)

    return jax.tree.map(leaf, state)


def spread(mesh: Mesh | None, state: Params) -> Params:
    """Inside a compiled function: keeps arrays of the state's shapes as the state lies."""
    return (
        state if mesh is None else lax.with_sharding_constraint(state, state_shardings(mesh, state))
    )


def gathered(mesh: Mesh | None, params: Params) -> Params:
    """Inside a compiled function: parameters as networks whose patches lie over `model` need them.

    Whole, that is; but each device keeps its share of the twins. The gradients go back to where the
    state lies.
    """
    if mesh is None or "model" not in _rows(mesh):
        return params
    return lax.with_sharding_constraint(params, state_shardings(mesh, params, [("twins",)]))


def each_twin(mesh: Mesh | None) -> Callable[..., Any]:
    """How both twins are run: as `types.in_turn`, or at once where the mesh has `twins`.

    Then each half of the devices gets the parameters of its twin, runs a network of its own, not
    two as one grouped convolution, and both halves get the results of both.
    """
    if mesh is None or mesh.shape["twins"] == 1:
        return in_turn
    half = PartitionSpec("twins")

    def at_once(one: Callable[..., Any], *arguments: dict[str, Any]) -> dict[str, Any]:
        names = list(arguments[0])
        stacked = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each[name] for name in names))
            for each in arguments
        ]

        def mine(*own: Any) -> Any:
            found = one(*jax.tree.map(lambda leaf: leaf[0], own))
            return jax.tree.map(lambda leaf: leaf[None], found)

        # Every argument and result varies over `twins`, so there is nothing for the check to find;
        # it would ask for marks on the loops of `models.conv_cpu`.
        found = jax.shard_map(
            mine, mesh=mesh, axis_names={"twins"}, in_specs=half, out_specs=half, check_vma=False
        )(*stacked)
        halves = [jax.tree.map(operator.itemgetter(i), found) for i in range(len(names))]
        return dict(zip(names, halves, strict=True))

    return at_once


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch from every process' own rows (NumPy leaves)."""
    return jax.tree.map(
        lambda rows, place: jax.make_array_from_process_local_data(place, np.asarray(rows)),
        batch,
        batch_shardings(mesh, batch),
    )


def require_divisible(
    mesh: Mesh, labeled: int, unlabeled: int, rows: Sequence[int], accumulate: int = 1
) -> None:
    """Refuses batches that do not spread evenly; `rows` are those of all sizes of patches.

    Raises:
        ValueError: Names the field and the nearest accepted number.
    """
    if accumulate < 1:
        raise ValueError(f"train.accumulate counts parts of a batch, 1 or more; got {accumulate}")
    share = mesh.shape["data"] * accumulate
    parts = f" in {accumulate} parts (train.accumulate)" if accumulate > 1 else ""
    for field, count in (("input.labeled", labeled), ("input.unlabeled", unlabeled)):
        if count % share:
            raise ValueError(
                f"{field} is {count} patches a step over {mesh.shape['data']} devices{parts}; "
                f"choose a multiple of {share}, such as {max(1, round(count / share)) * share}"
            )
    bands = math.prod(mesh.shape[axis] for axis in _rows(mesh))
    for count in rows:
        if count % bands:
            names = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in _rows(mesh))
            raise ValueError(f"{names} does not divide the {count} rows of a patch")
