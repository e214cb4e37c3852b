"""Sums over voxels and over channels that XLA:CPU adds where it computes what is added.

More than 32 numbers it adds as a tree, for which it writes all partial sums of neighbors to memory
in a pass of its own. Here the numbers fall into groups of at most 32: each is added up where it is
computed, and what is left is small. Elsewhere a sum is XLA's.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bhsd_jax.models.conv_bfloat16 import divisor

_MOST = 32  # numbers that XLA adds without a tree
_LANES = 8  # float32 numbers that a core adds at once


def mean_of_voxels(values: Float[Array, "B D H W C"]) -> Float[Array, "B 1 1 1 C"]:
    """Mean over D, H, W, which keep length 1; on CPUs a product, see `sum_of_all_tokens`."""

    def on_cpu(values: Array) -> Array:
        near = _near_tokens(values)
        ones = jnp.ones(near.shape[:-1], near.dtype)
        voxels = tuple(range(1, near.ndim - 1))
        sums = lax.dot_general(ones, near, ((voxels, voxels), ((0,), (0,))))
        return sums[:, None, None, None] / values[0, ..., 0].size

    def elsewhere(values: Array) -> Array:
        return values.mean((1, 2, 3), keepdims=True)

    return lax.platform_dependent(values, cpu=on_cpu, default=elsewhere)


def sum_of_all_tokens(values: Float[Array, "*n C"]) -> Float[Array, " C"]:
    """Sum over all axes but the last.

    Two sums behind each other may be compiled as one, which walks through everything for each
    channel. A matrix product cannot.
    """

    def on_cpu(values: Array) -> Array:
        near = _near_tokens(values)
        return jnp.tensordot(jnp.ones(near.shape[:-1], near.dtype), near, near.ndim - 1)

    def elsewhere(values: Array) -> Array:
        return values.sum(tuple(range(values.ndim - 1)))

    return lax.platform_dependent(values, cpu=on_cpu, default=elsewhere)


@jax.custom_vjp
def add_bias(x: Float[Array, "*n C"], bias: Float[Array, " C"]) -> Float[Array, "*n C"]:
    """The sum of both, whose gradient to the bias is `sum_of_all_tokens`."""
    return x + bias


def _add_bias(x: Array, bias: Array):
    return x + bias, bias


def _add_bias_grad(bias: Array, grad: Array):
    return grad, sum_of_all_tokens(grad.astype(jnp.float32)).astype(bias.dtype)


add_bias.defvjp(_add_bias, _add_bias_grad)


def _near_tokens(values: Float[Array, "*n t C"]) -> Float[Array, "*n u C"]:
    *before, tokens, channels = values.shape
    near = divisor(tokens, _MOST)
    return values.reshape(*before, tokens // near, near, channels).sum(-2)


def sum_of_channels(values: Float[Array, "*n C"]) -> Float[Array, "*n 1"]:
    """Sum over the last axis, which keeps length 1."""
    return _over_channels(values, jnp.sum)


def max_of_channels(values: Float[Array, "*n C"]) -> Float[Array, "*n 1"]:
    """Maximum over the last axis, which keeps length 1."""
    return _over_channels(values, jnp.max)


def _over_channels(values: Array, fold) -> Array:
    def on_cpu(values: Array) -> Array:
        *before, channels = values.shape
        rows = divisor(channels, min(_MOST, channels // _LANES))
        # Neighbors are never added to each other first, but to what lies `channels // rows` on, so
        # that a core adds several sums at once.
        parts = fold(values.reshape(*before, rows, channels // rows), axis=-2)
        return fold(lax.optimization_barrier(parts), axis=-1, keepdims=True)

    def elsewhere(values: Array) -> Array:
        return fold(values, axis=-1, keepdims=True)

    return lax.platform_dependent(values, cpu=on_cpu, default=elsewhere)
