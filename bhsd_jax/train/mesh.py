"""Devices, and how batches and states lie on them."""

import itertools
import logging
import math
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Batch, Params

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
        ValueError: If the processes do not have equally many devices, the sizes do not multiply to
            the devices, a group neither divides nor multiplies those of a process, or the batches
            do not spread over the processes.
    """
    devices = jax.devices() if devices is None else devices
    _require_equal_shares(devices)
    group = _group(model, space, twins)
    text = f"mesh: data {data} x model {model} x space {space} x twins {twins}"
    if len(devices) % group or (data != -1 and len(devices) != data * group):
        raise UserError(
            f"{text} is not the {len(devices)} devices there are; set mesh.data to -1 and the "
            "others to sizes that multiply to a divisor of it"
        )
    if data == -1:
        used, data = _fill(devices, group, batches, accumulate)
        if len(used) < len(devices):
            _say_idle(devices, used, batches, len(devices) // group)
        devices = used
    # `Auto`: the compiler places all arrays between the annotated inputs and outputs of the step.
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(_arranged(devices, (data, model, space, twins)), AXES, axis_types=kinds)


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of a mesh, those of a group close to each other.

    JAX knows an order for the grid of a whole TPU slice, of which an axis of the mesh may take any
    part. It knows none for a part of a slice, nor for several; and every machine with GPUs that is
    not wired to the others is a slice of its own. Those stay in the order of their processes.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1 and len(devices) == jax.device_count():
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    ordered = sorted(devices, key=operator.attrgetter("process_index"))
    return np.asarray(ordered).reshape(shape)


def _require_equal_shares(devices: Sequence[Any]) -> None:
    """What JAX sends from process to process takes for granted that each has as many devices."""
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"process {index} has {counts[index]}" for index in sorted(counts))
        raise UserError(
            f"mesh: the processes of a run must have equally many devices, but {told}; start one "
            f"process for each device, or leave each process {min(counts.values())} of its own "
            "(CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS says which). A machine that lacks one "
            "may have lost it: look at nvidia-smi there"
        )


def _group(model: int, space: int, twins: int) -> int:
    """Devices that work on the same patches."""
    for name, size in (("model", model), ("space", space), ("twins", twins)):
        if size < 1:
            raise UserError(f"mesh.{name} counts devices, 1 or more; got {size}")
    return math.prod((model, space, twins))


def _fill(
    devices: Sequence[Any], group: int, batches: Sequence[int], accumulate: int
) -> tuple[list[Any], int]:
    """The devices that the batches fill, as many of every process, and how many groups they are."""
    ordered = sorted(devices, key=operator.attrgetter("process_index"))
    owned = [list(o) for _, o in itertools.groupby(ordered, operator.attrgetter("process_index"))]
    each = len(owned[0])
    if max(each, group) % min(each, group):
        raise UserError(
            f"mesh: model x space x twins is {group}, which neither divides nor multiplies the "
            f"{each} devices of a process"
        )
    readers = len(owned) * min(each, group) // group  # processes, or teams of them, that read
    for count in batches:
        if count % readers:
            whole = len(owned) * each // math.gcd(len(owned), *batches)  # devices of a larger team
            raise UserError(
                f"{_sum(batches)} patches a step (input.labeled, input.unlabeled) do not spread "
                f"over {len(owned)} processes; choose multiples of {readers}, start fewer, or set "
                f"mesh.space, mesh.model and mesh.twins so that their product is {whole}"
            )
    parts = [count // accumulate for count in batches]
    most = max(each // group, 1)
    fits = [n for n in range(1, most + 1) if not any(count % (n * readers) for count in parts)]
    share = max(fits, default=1)
    used = [device for own in owned for device in own[: share * min(each, group)]]
    return used, share * readers


def _sum(batches: Sequence[int]) -> str:
    return " + ".join(str(count) for count in batches if count)


def _say_idle(
    devices: Sequence[Any], used: Sequence[Any], batches: Sequence[int], groups: int
) -> None:
    kept = set(used)
    logger.warning(
        "only %d of %d devices train, because %s patches a step do not spread over more; idle: %s. "
        "To use them, make input.labeled and input.unlabeled multiples of %d (times "
        "train.accumulate), or split patches or networks with mesh.space, mesh.model or "
        "mesh.twins, or train other runs beside this one, each on devices of its own",
        len(used),
        len(devices),
        _sum(batches),
        ", ".join(str(device) for device in devices if device not in kept),
        groups,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Patches over `data`, their rows (H) over `space`, and over `model` where both are used.

    Rows must not lie over one axis of the mesh and be the same over another: XLA's partitioner
    (jaxlib 0.10 to 0.12) would add up the gradient of a convolution's kernel over the copies too
    and give a multiple of it (`findings/xla_conv_gradient_of_copies.sh`). Spread over both, there
    are no copies, and no device computes what another does.
    """
    return NamedSharding(mesh, PartitionSpec("data", None, rows_over(mesh)))


def rows_over(mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh over which the rows of patches are split."""
    both = min(mesh.shape["model"], mesh.shape["space"]) > 1
    return ("model", "space") if both else ("space",)


def batch_shardings(mesh: Mesh, batch: Batch) -> Any:
    """Where the leaves of a batch lie: patches as in `batch_sharding`, slice labels over `data`.

    Patches whose rows do not divide, as those that are cut larger to be turned, are whole on every
    device that works on them.
    """
    whole = NamedSharding(mesh, PartitionSpec("data"))

    def place(leaf: Any) -> NamedSharding:
        split = leaf.ndim > 3 and leaf.shape[2] % bands(mesh) == 0
        return batch_sharding(mesh) if split else whole

    return jax.tree.map(place, batch)


def bands(mesh: Mesh) -> int:
    """Into how many bands of rows patches are split."""
    return math.prod(mesh.shape[axis] for axis in rows_over(mesh))


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


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Rows, of `count` of a global batch, that the devices of this process need; ascending."""
    places = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((count,))
    parts = [index[0] for index in places.values() if index is not None]
    return sorted({row for part in parts for row in range(*part.indices(count))})


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch from this process' own rows (NumPy leaves), those of `local_rows`."""
    own = len(local_rows(mesh, mesh.shape["data"]))  # parts of the batch that this process has

    def share(rows: Any, place: NamedSharding) -> jax.Array:
        rows = np.asarray(rows)
        count = len(rows) * mesh.shape["data"] // own
        at = {row: index for index, row in enumerate(local_rows(mesh, count))}

        def part(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(count)
            return rows[(slice(at[first], at[first] + stop - first), *index[1:])]

        return jax.make_array_from_callback((count, *rows.shape[1:]), place, part)

    return jax.tree.map(share, batch, batch_shardings(mesh, batch))


def require_divisible(
    mesh: Mesh, labeled: int, unlabeled: int, rows: int, accumulate: int = 1
) -> None:
    """Refuses batches, and patches of so many rows, that do not spread evenly.

    Raises:
        ValueError: Names the field and the nearest accepted number.
    """
    if accumulate < 1:
        raise UserError(f"train.accumulate counts parts of a batch, 1 or more; got {accumulate}")
    share = mesh.shape["data"] * accumulate
    parts = f" in {accumulate} parts (train.accumulate)" if accumulate > 1 else ""
    for field, count in (("input.labeled", labeled), ("input.unlabeled", unlabeled)):
        if count % share:
            raise UserError(
                f"{field} is {count} patches a step over {mesh.shape['data']} devices{parts}; "
                f"choose a multiple of {share}, such as {max(1, round(count / share)) * share}"
            )
    if rows % bands(mesh):
        names = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in rows_over(mesh))
        raise UserError(f"{names} does not divide the {rows} rows of a patch")
