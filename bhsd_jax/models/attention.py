"""Attention inside windows that never holds the weights of all windows at once, on CPUs.

The weights [heads n n] of one window of 343 tokens fill a core's cache; those of all windows are
some hundred megabytes, which XLA:CPU would write and read again for every step of the softmax and
of its gradient. So on a CPU a loop takes a few windows at a time, and the backward pass computes
their weights anew. Elsewhere all windows are one product, and the weights are kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from bhsd_jax.models.conv_bfloat16 import divisor
from bhsd_jax.models.sums import max_of_channels, sum_of_channels

_APART = -100.0  # added to the score of tokens of different regions, by every reference
_CACHED = 400_000  # weights, of all windows that are taken at once


def attend(
    query: Float[Array, "B W n h d"],
    key: Float[Array, "B W m h d"],
    value: Float[Array, "B W m h d"],
    bias: Float[Array, "h n m"] | None = None,
    regions: Int[Array, "W n"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B W n E"]:
    """Multi-head attention of every token to those of its window; E = h d.

    `bias` is added to the float32 scores. Tokens attend to their own region alone; None: to all.
    `drop` changes the weights [B W h n m], and is None where it would not.

    Source: Vaswani et al. 2017, arXiv:1706.03762; blocks and recomputation as in Dao et al. 2022,
    arXiv:2205.14135, with whole rows.
    """
    query = query * query.shape[-1] ** -0.5
    if drop is None and jax.default_backend() == "cpu":
        out = _by_block(query, key, value, bias, regions)
    else:
        out = at_once(query, key, value, bias, regions, drop)
    return out.reshape(*out.shape[:3], -1)


def at_once(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    regions: Array | None,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """`attend` with all windows in one product, for queries that are scaled; heads stay apart.

    On CPUs no slower than `attend` where windows have few tokens.
    """
    scores = jnp.einsum("bwnhd,bwmhd->bwhnm", query, key, preferred_element_type=jnp.float32)
    weights = softmax(_adjusted(scores, bias, regions))
    weights = (weights if drop is None else drop(weights)).astype(query.dtype)
    return jnp.einsum("bwhnm,bwmhd->bwnhd", weights, value)


@jax.custom_vjp
def softmax(scores: Float[Array, "*n m"]) -> Float[Array, "*n m"]:
    """Exponentials over the last axis, divided by their sum; the gradient keeps them alone."""
    return _softmax(scores)[0]


def _softmax(scores: Array):
    powers = jnp.exp(scores - max_of_channels(scores))
    weights = powers / sum_of_channels(powers)
    return weights, weights


def _softmax_grad(weights: Array, grad: Array):
    given = weights * grad
    return (given - weights * sum_of_channels(given),)


softmax.defvjp(_softmax, _softmax_grad)


def regions_of(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> Int[Array, "windows n"]:
    """Numbers that differ between tokens brought together from opposite ends by a cyclic shift."""
    regions = np.zeros((1, *size, 1), np.int32)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        place = np.arange(n)
        region = (place >= n - w).astype(np.int32) + (place >= n - s) if s else 0 * place
        regions = 3 * regions + np.expand_dims(region, [a for a in range(5) if a != axis + 1])
    # The barrier keeps XLA from computing a constant of windows * n * n numbers.
    return lax.optimization_barrier(jnp.asarray(to_windows(regions, window)[0, ..., 0]))


def to_windows(x: Any, window: tuple[int, ...]) -> Any:
    """[B D H W C] -> [B windows n C], both in order D, H, W."""
    batch, *size, channels = x.shape
    d, h, w = (n // k for n, k in zip(size, window, strict=True))
    p, q, r = window
    x = x.reshape(batch, d, p, h, q, w, r, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, d * h * w, p * q * r, channels)


def from_windows(x: Array, window: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """Inverse of `to_windows` for a volume of `size`."""
    batch, _, _, channels = x.shape
    d, h, w = (n // k for n, k in zip(size, window, strict=True))
    x = x.reshape(batch, d, h, w, *window, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, *size, channels)


def _adjusted(
    scores: Float[Array, "B w h n m"], bias: Array | None, regions: Array | None
) -> Float[Array, "B w h n m"]:
    if bias is not None:
        scores = scores + bias
    if regions is not None:
        same = regions[:, None, :, None] == regions[:, None, None, :]
        scores = scores + jnp.where(same, 0.0, _APART)
    return scores


@jax.custom_vjp
def _by_block(
    query: Array, key: Array, value: Array, bias: Array | None, regions: Array | None
) -> Array:
    return lax.platform_dependent(query, key, value, bias, regions, cpu=_blocks, default=at_once)


def _forward(query: Array, key: Array, value: Array, bias: Array | None, regions: Array | None):
    out = _by_block(query, key, value, bias, regions)
    return out, (query, key, value, bias, regions, out)


def _backward(residuals: tuple[Any, ...], grad: Array):
    def again(query, key, value, bias, regions, out, grad):
        del out
        whole = functools.partial(at_once, regions=regions)
        return jax.vjp(whole, query, key, value, bias)[1](grad)

    return *lax.platform_dependent(*residuals, grad, cpu=_block_grads, default=again), None


_by_block.defvjp(_forward, _backward)


def _blocks(
    query: Array, key: Array, value: Array, bias: Array | None, regions: Array | None
) -> Array:
    """The attention, block by block; in float32 whatever the type of the tokens."""
    size = _windows_at_once(query, key)

    def block(x):
        query, key, value, regions = x
        return jnp.einsum("bwhnm,bwhmd->bwhnd", _weights(query, key, bias, regions), value)

    parts = [_split(a, size) for a in (query, key, value)]
    return _join(lax.map(block, (*parts, _rows(regions, size)))).astype(query.dtype)


def _block_grads(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    regions: Array | None,
    out: Array,
    grad: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients to query, key, value and bias; the weights are computed again."""
    size = _windows_at_once(query, key)
    given = _split(grad, size)
    # The softmax's gradient needs the sum over each row of weight times gradient. It equals output
    # times gradient, summed over channels, which is known without the weights.
    along = (given * _split(out, size)).sum(-1, keepdims=True)

    def block(total, x):
        query, key, value, regions, given, along = x
        weights = _weights(query, key, bias, regions)
        to_value = jnp.einsum("bwhnm,bwhnd->bwhmd", weights, given)
        to_scores = weights * (jnp.einsum("bwhnd,bwhmd->bwhnm", given, value) - along)
        to_query = jnp.einsum("bwhnm,bwhmd->bwhnd", to_scores, key)
        to_key = jnp.einsum("bwhnm,bwhnd->bwhmd", to_scores, query)
        if total is not None:
            total = total + to_scores.sum(1)
        return total, (to_query, to_key, to_value)

    # Over samples it is summed at the end, so that devices that share a batch exchange it once.
    total = None if bias is None else jnp.zeros((len(query), *bias.shape), jnp.float32)
    parts = [_split(a, size) for a in (query, key, value)]
    total, grads = lax.scan(block, total, (*parts, _rows(regions, size), given, along))
    to_query, to_key, to_value = (_join(g).astype(query.dtype) for g in grads)
    return to_query, to_key, to_value, None if total is None else total.sum(0)


def _weights(query: Array, key: Array, bias: Array | None, regions: Array | None) -> Array:
    scores = jnp.einsum("bwhnd,bwhmd->bwhnm", query, key)
    return softmax(_adjusted(scores, bias, regions))


def _windows_at_once(query: Array, key: Array) -> int:
    """The largest divisor of the number of windows whose weights stay in the cache; at least 1."""
    windows, tokens, heads = query.shape[1:4]
    return divisor(windows, _CACHED // (heads * tokens * key.shape[2]))


def _split(x: Float[Array, "B W n h d"], size: int) -> Float[Array, "blocks B size h n d"]:
    batch, windows, *rest = x.shape
    return (
        x.astype(jnp.float32)
        .reshape(batch, windows // size, size, *rest)
        .transpose(1, 0, 2, 4, 3, 5)
    )


def _join(x: Float[Array, "blocks B size h n d"]) -> Float[Array, "B W n h d"]:
    blocks, batch, size, heads, tokens, depth = x.shape
    return x.transpose(1, 0, 2, 4, 3, 5).reshape(batch, blocks * size, tokens, heads, depth)


def _rows(regions: Array | None, size: int) -> Array | None:
    return None if regions is None else regions.reshape(-1, size, regions.shape[1])
