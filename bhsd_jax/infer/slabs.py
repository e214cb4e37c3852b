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
    """With tiles `first` up to `last` added, which begin at row 0 and at `starts` in H and W."""

    def put(total: Array, part: Array, start: tuple) -> Array:
        old = lax.dynamic_slice(total, start, part.shape)
        return lax.dynamic_update_slice(total, old + part, start)

    def body(i: Array, sums: Sums) -> Sums:
        h, w = starts[i]
        total = put(sums.total, votes[i] * weights, (0, 0, h, w))
        return Sums(total, put(sums.weight, weights, (0, h, w)))

    return lax.fori_loop(first, last, body, sums)


@partial(jax.jit, static_argnames="rows")
def mean(sums: Sums, rows: int) -> tuple[Float[Array, "K rows H W"], Int[Array, ""]]:
    """Logits of the first rows, 0 where no tile lies; and how many of them are not finite."""
    total, weight = sums.total[:, :rows], sums.weight[:rows]
    logits = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
    return logits, jnp.sum(~jnp.isfinite(logits))


@partial(jax.jit, static_argnames="rows", donate_argnums=0)
def advance(sums: Sums, rows: int) -> Sums:
    """The sums of the tiles that begin so many rows further down."""

    def move(value: Array, axis: int) -> Array:
        pads = [(0, rows if i == axis else 0) for i in range(value.ndim)]
        return jnp.pad(lax.slice_in_dim(value, rows, None, axis=axis), pads)

    return Sums(move(sums.total, 1), move(sums.weight, 0))
