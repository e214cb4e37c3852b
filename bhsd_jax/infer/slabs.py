"""Weighted sums of overlapping tiles, kept for the rows of a volume that tiles still reach.

Tiles come in the order of their first row. Once the next ones begin further down, nothing more is
added to the rows above: these leave the device. So memory there grows with the depth of a tile and
not with that of the volume.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int


class Sums(NamedTuple):
    """Sums over tiles, in float32."""

    total: Float[Array, "K d H W"]  # of weighted logits
    weight: Float[Array, "d H W"]


def zeros(classes: int, shape: tuple[int, int, int], place: Sharding) -> Sums:
    """Sums to which nothing has been added; `shape` is d H W."""
    return Sums(jnp.zeros((classes, *shape), device=place), jnp.zeros(shape, device=place))


@partial(jax.jit, donate_argnums=0)
def add(
    sums: Sums,
    votes: Float[Array, "B K d h w"],
    weights: Float[Array, "d h w"],
    starts: Int[Array, "B 2"],
    first: Int[Array, ""],
    last: Int[Array, ""],
) -> Sums:
    """Adds tiles `first` up to `last`, which begin at row 0 and at `starts` in H and W."""

    def put(total: Array, part: Array, start: tuple) -> Array:
        old = lax.dynamic_slice(total, start, part.shape)
        return lax.dynamic_update_slice(total, old + part, start)

    def body(i: Array, sums: Sums) -> Sums:
        h, w = starts[i]
        top = jnp.zeros_like(h)  # of the same type also where JAX makes 64 bits of a plain 0
        total = put(sums.total, votes[i] * weights, (top, top, h, w))
        return Sums(total, put(sums.weight, weights, (top, h, w)))

    return lax.fori_loop(first, last, body, sums)


@jax.jit
def mean(sums: Sums, rows: Int[Array, ""] | int) -> tuple[Float[Array, "K d H W"], Int[Array, ""]]:
    """Logits of all rows, 0 where no tile lies; and how many of the first `rows` are not finite.

    Only those rows are complete. That the others come too is a little work for nothing, which
    spares a program for every number of rows, so for nearly every depth of a volume.
    """
    logits = jnp.where(sums.weight > 0, sums.total / jnp.where(sums.weight > 0, sums.weight, 1), 0)
    complete = lax.broadcasted_iota(jnp.int32, logits.shape, 1) < rows
    return logits, jnp.sum(complete & ~jnp.isfinite(logits))


@partial(jax.jit, donate_argnums=0)
def advance(sums: Sums, rows: Int[Array, ""] | int) -> Sums:
    """The sums of the tiles that begin so many rows further down, at most the depth of a tile."""

    def move(value: Array, axis: int) -> Array:
        depth = value.shape[axis]
        pads = [(0, depth if i == axis else 0) for i in range(value.ndim)]
        return lax.dynamic_slice_in_dim(jnp.pad(value, pads), rows, depth, axis)

    return Sums(move(sums.total, 1), move(sums.weight, 0))
