"""Devices, and how arrays lie on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bhsd_jax.types import Batch, Params

AXES = ("data", "model", "space")


def make_mesh(data: int = -1, model: int = 1, space: int = 1) -> Mesh:
    """Arranges the devices; `data` -1 takes all that `model` and `space` leave.

    Raises:
        ValueError: If the sizes do not multiply to the number of devices, or both `model` and
            `space` are used: with jax 0.10 that combination trains to other numbers.
    """
    devices = jax.devices()
    if model > 1 and space > 1:
        raise ValueError(f"mesh: model {model} and space {space}; use one of them, leave one at 1")
    if data == -1:
        data = len(devices) // (model * space)
    if data * model * space != len(devices):
        raise ValueError(
            f"mesh: data {data} x model {model} x space {space} is not the {len(devices)} devices "
            "there are; set mesh.data to -1 or choose sizes that multiply to it"
        )
    # Auto: the compiler places what lies between the annotated inputs and outputs of the step.
    return jax.make_mesh((data, model, space), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Patches over `data`, their rows (H) over `space`."""
    return NamedSharding(mesh, PartitionSpec("data", None, "space"))


def batch_shardings(mesh: Mesh, batch: Batch) -> Any:
    """Where the leaves of a batch lie: patches as in `batch_sharding`, slice labels over `data`."""
    slices = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda leaf: batch_sharding(mesh) if leaf.ndim > 3 else slices, batch)


def state_shardings(mesh: Mesh, state: Params) -> Params:
    """Every leaf split over `model` along its largest axis that divides; else replicated."""
    size = mesh.shape["model"]

    def leaf(value) -> NamedSharding:
        shape = getattr(value, "shape", ())
        fits = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not fits or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        chosen = max(fits, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*([None] * chosen), "model"))

    return jax.tree.map(leaf, state)


def local_rows(mesh: Mesh, count: int) -> list[int]:
    """Which of `count` rows of a global batch the devices of this process need, ascending."""
    places = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((count,))
    parts = [index[0] for index in places.values() if index is not None]
    return sorted({row for part in parts for row in range(*part.indices(count))})


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch from this process' own rows (NumPy leaves), those of `local_rows`."""
    own = len(local_rows(mesh, mesh.shape["data"]))  # parts of the batch that this process has

    def spread(rows: Any, place: NamedSharding) -> jax.Array:
        rows = np.asarray(rows)
        count = len(rows) * mesh.shape["data"] // own
        at = {row: index for index, row in enumerate(local_rows(mesh, count))}

        def part(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(count)
            return rows[(slice(at[first], at[first] + stop - first), *index[1:])]

        return jax.make_array_from_callback((count, *rows.shape[1:]), place, part)

    return jax.tree.map(spread, batch, batch_shardings(mesh, batch))


def require_divisible(mesh: Mesh, labeled: int, unlabeled: int, rows: int) -> None:
    """Refuses batches that do not spread evenly.

    Raises:
        ValueError: Names the field and the nearest accepted number.
    """
    share = mesh.shape["data"]
    for field, count in (("input.labeled", labeled), ("input.unlabeled", unlabeled)):
        if count % share:
            raise ValueError(
                f"{field} is {count} patches a step over {share} devices; "
                f"choose a multiple of {share}, such as {max(1, round(count / share)) * share}"
            )
    if rows % mesh.shape["space"]:
        raise ValueError(
            f"mesh.space {mesh.shape['space']} does not divide the {rows} rows of a source patch"
        )
