"""Sharding constraints inside the train step, of batches, parameters and the twins of CPS."""

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bhsd_jax.train.mesh import bands, batch_shardings, rows_over, state_shardings
from bhsd_jax.types import Batch, Params, in_turn


def keep_patches(mesh: Mesh | None, batch: Batch) -> Batch:
    """Patches as `mesh.batch_sharding` says, whatever was done to them."""
    if mesh is None:
        return batch
    return lax.with_sharding_constraint(batch, batch_shardings(mesh, batch))


def keep_state(mesh: Mesh | None, state: Params) -> Params:
    """Arrays of the state's shapes as the state lies."""
    if mesh is None:
        return state
    return lax.with_sharding_constraint(state, state_shardings(mesh, state))


def gathered(mesh: Mesh | None, params: Params) -> Params:
    """Parameters whole where rows of patches lie over `model` too; else as they are.

    Of twins each device keeps its share. The gradients go back to where the state lies.
    """
    if mesh is None or "model" not in rows_over(mesh):
        return params
    return lax.with_sharding_constraint(params, state_shardings(mesh, params, [("twins",)]))


def keep_rows(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """A context for tracing a network whose maps are split by rows, or whole on each device.

    That is, [B D H W C] is split as patches are, and where the devices do not divide H, every
    device of a group has all rows. Left alone, the compiler may put few rows of a deep stage on
    some devices and copies on the others, and XLA's partitioner (jaxlib 0.10 to 0.12) adds up the
    gradient of a convolution's kernel over the copies too, which gives a multiple of it:
    `findings/xla_conv_gradient_of_copies.sh`.
    """
    if mesh is None or mesh.shape["space"] == 1:
        return contextlib.nullcontext()

    def keep(value: Any) -> Any:
        if getattr(value, "ndim", 0) != 5:
            return value
        split = value.shape[2] % bands(mesh) == 0
        spec = PartitionSpec("data", None, rows_over(mesh)) if split else PartitionSpec("data")
        # Inside the network of one twin the axis `twins` of the mesh cannot be used.
        current = jax.sharding.get_abstract_mesh()
        place = NamedSharding(mesh if current.empty else current, spec)
        return lax.with_sharding_constraint(value, place)

    def around(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        del context
        return jax.tree.map(keep, call(*jax.tree.map(keep, args), **kwargs))

    return nn.intercept_methods(around)


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
            results = one(*jax.tree.map(lambda leaf: leaf[0], own))
            return jax.tree.map(lambda leaf: leaf[None], results)

        # No check of varying axes: every argument and result varies over `twins`, and the check
        # would ask for annotations in the loops of `models.conv_cpu`.
        results = jax.shard_map(
            mine, mesh=mesh, axis_names={"twins"}, in_specs=half, out_specs=half, check_vma=False
        )(*stacked)
        halves = [jax.tree.map(operator.itemgetter(i), results) for i in range(len(names))]
        return dict(zip(names, halves, strict=True))

    return at_once
