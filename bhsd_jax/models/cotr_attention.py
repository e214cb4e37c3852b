"""CoTr's transformer: self-attention that looks only at a few learned places of each level.

Source: Xie et al. 2021, arXiv:2103.03024; CoTr 521b4cc. The idea is from Zhu et al. 2020,
arXiv:2010.04159.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bhsd_jax.models.blocks import rematerialized
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.initializers import torch_bias
from bhsd_jax.platform.errors import UserError

_ORDERS = {  # which entry of a reference point or offset moves along D, H, and W
    "reference": (2, 1, 0),
    "fixed": (0, 2, 1),
}
_xavier = nn.initializers.xavier_uniform()


@dataclass(frozen=True)
class Options:
    """What every layer of the transformer is told; the fields are those of `cotr.CoTr`."""

    heads: int
    points: int
    ffn: int
    dropout: float
    axes: str
    train: bool
    dtype: DTypeLike


class DeformableEncoder(nn.Module):
    """Refines feature maps of several levels together; token order is level, then D, H, W.

    Queries carry a position code, values do not. The reference has no norm after the last layer.

    Raises:
        ValueError: If the channels do not divide into heads or into sines per axis.
    """

    options: Options
    layers: int
    remat: str  # "blocks": recompute each layer in the backward pass

    @nn.compact
    def __call__(self, maps: tuple[Float[Array, "B _ _ _ C"], ...]) -> tuple[Array, ...]:
        batch, *_, channels = maps[0].shape
        shapes = tuple((d, h, w) for _, d, h, w, _ in (m.shape for m in maps))
        heads, dtype = self.options.heads, self.options.dtype
        if channels % heads:
            raise UserError(f"CoTr: {channels} channels must divide into heads ({heads})")
        level_embed = self.param("level_embed", nn.initializers.normal(1.0), (len(maps), channels))
        position = jnp.concatenate(
            [sine_code(s, channels) + e for s, e in zip(shapes, level_embed, strict=True)]
        ).astype(dtype)
        tokens = jnp.concatenate([m.reshape(batch, -1, channels) for m in maps], axis=1)
        layer = rematerialized(_Layer, self.remat)
        for i in range(self.layers):
            tokens = layer(self.options, shapes, name=f"layer_{i}")(tokens.astype(dtype), position)
        ends = np.cumsum([math.prod(s) for s in shapes])[:-1].tolist()
        parts = jnp.split(tokens, ends, axis=1)
        return tuple(p.reshape(m.shape) for p, m in zip(parts, maps, strict=True))


class _Layer(nn.Module):
    """Attention, then a feed-forward part; each is added to its input and normalized after."""

    options: Options
    shapes: tuple[Triple, ...]

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N C"], position: Float[Array, "N C"]
    ) -> Float[Array, "B N C"]:
        options = self.options
        drop = functools.partial(nn.Dropout, options.dropout, deterministic=not options.train)
        # Flax's own layers: with those of `norms` and `dense` a step takes a third longer on CPUs.
        norm = functools.partial(
            nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=options.dtype
        )
        attended = DeformableAttention(options, self.shapes, name="attention")(
            tokens + position, tokens
        )
        tokens = norm(name="norm1")(tokens + drop()(attended))
        linear = functools.partial(nn.Dense, dtype=options.dtype, kernel_init=_xavier)
        channels, hidden = tokens.shape[-1], options.ffn
        inner = linear(hidden, bias_init=torch_bias(channels), name="linear1")(tokens)
        inner = drop()(jax.nn.gelu(inner, approximate=False))
        inner = linear(channels, bias_init=torch_bias(hidden), name="linear2")(inner)
        return norm(name="norm2")(tokens + drop()(inner))


class DeformableAttention(nn.Module):
    """Every query reads `points` places per level and head, by trilinear interpolation.

    Work and memory grow linearly with the tokens: N queries of all heads read
    8 * levels * points * N rows of C values (full attention would read N * N), and no row is kept
    for the backward pass (see `weighted_rows`). On the head CT patch that is N = 14,400 and, per
    layer and patch, 64 * 14,400 * 384 = 354 M values gathered (1.4 GB in float32) for as many
    multiply-adds: bound by bandwidth, and 0.2 % of the network's 937 G multiply-adds in six layers.
    The backward pass gathers them again and scatters as many.
    """

    options: Options
    shapes: tuple[Triple, ...]

    @nn.compact
    def __call__(
        self, query: Float[Array, "B N C"], tokens: Float[Array, "B N C"]
    ) -> Float[Array, "B N C"]:
        options, levels = self.options, len(self.shapes)
        batch, count, channels = tokens.shape
        heads, points = options.heads, options.points
        zeros = nn.initializers.zeros
        # Offsets are float32: in bfloat16 the places were off by up to 1/8 voxel near row 40.
        small = functools.partial(nn.Dense, dtype=jnp.float32, kernel_init=zeros)
        offsets = small(heads * levels * points * 3, bias_init=self._rays, name="offsets")(query)
        logits = small(heads * levels * points, name="weights")(query)
        weights = nn.softmax(logits.reshape(batch, count, heads, levels * points))
        linear = functools.partial(
            nn.Dense, channels, dtype=options.dtype, kernel_init=_xavier, bias_init=zeros
        )
        values = linear(name="value")(tokens).reshape(batch, count * heads, channels // heads)
        rows, shares = self._places(offsets.reshape(batch, count, heads, levels, points, 3))
        shares *= weights.reshape(batch, count, heads, levels, points, 1)
        attended = weighted_rows(values, _steps(rows), _steps(shares))
        return linear(name="output")(attended.reshape(batch, count, channels))

    def _places(
        self, offsets: Float[Array, "B N heads levels points 3"]
    ) -> tuple[Int[Array, "B N heads levels points 8"], Float[Array, "B N heads levels points 8"]]:
        """The rows of `values` around each place, and the share of each in the interpolation."""
        heads = self.options.heads
        order = _ORDERS[self.options.axes]
        head = np.arange(heads)[:, None, None]
        centers = jnp.concatenate([_centers(shape) for shape in self.shapes])  # [N 3]: d, w, h
        all_rows, all_shares, start = [], [], 0
        for level, (d, h, w) in enumerate(self.shapes):
            # Bug of the reference: points are (d, w, h), but its sampler reads (w, h, d), so the
            # place of a query is mirrored in space unless D = W. "fixed" sends each to its axis.
            normal = centers[:, None, None] + offsets[:, :, :, level] / np.array(
                [d, w, h], np.float32
            )
            size = jnp.array([d, h, w], jnp.float32)
            place = normal[..., order] * size - 0.5
            corner = jnp.floor(place)
            along = place - corner
            # Clipped, so that the integers do not overflow; all places out there read zeros anyway.
            corner = jnp.clip(corner, -2, size).astype(jnp.int32)
            token, share = _eight(corner, along, (d, h, w))
            all_rows.append((start + token) * heads + head)
            all_shares.append(share)
            start += d * h * w
        return jnp.stack(all_rows, 3), jnp.stack(all_shares, 3)

    def _rays(self, key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Head i starts looking in direction i, point p at distance p, on each level alike."""
        del key
        options = self.options
        turn = np.arange(options.heads) * (2 * math.pi / options.heads)
        ray = np.stack([np.cos(turn), np.sin(turn) * np.cos(turn), np.sin(turn) ** 2], -1)
        ray /= abs(ray).max(-1, keepdims=True)
        steps = np.arange(1, options.points + 1)[:, None]
        bias = ray[:, None, None] * np.broadcast_to(steps, (len(self.shapes), *steps.shape))
        return jnp.asarray(bias.reshape(shape), dtype)


@jax.custom_vjp
def weighted_rows(
    rows: Float[Array, "B R c"], index: Int[Array, "S B M k"], weight: Float[Array, "S B M k"]
) -> Float[Array, "B M c"]:
    """For each of M outputs, the weighted sum of S * k of the R rows.

    The S steps run one after the other, forward and backward, so that S times less memory is
    needed than for one gather; only the three arguments are kept for the gradient. Each step
    is a plain gather, and a scatter-add for the gradient of `rows`. On a GPU, XLA adds there in
    any order: the last bit may differ between runs unless `--xla_gpu_deterministic_ops` is set.
    """

    def step(total, chosen):
        index, weight = chosen
        return total + jnp.einsum("bmkc,bmk->bmc", _take(rows, index), weight), None

    start = jnp.zeros((*index.shape[1:3], rows.shape[-1]), jnp.float32)
    return jax.lax.scan(step, start, (index, weight))[0].astype(rows.dtype)


def _forward(rows: Array, index: Array, weight: Array):
    return weighted_rows(rows, index, weight), (rows, index, weight)


def _backward(residuals: tuple[Array, Array, Array], grad: Array):
    rows, index, weight = residuals
    grad = grad.astype(jnp.float32)

    def step(rows_grad, chosen):
        index, weight = chosen
        weight_grad = jnp.einsum("bmkc,bmc->bmk", _take(rows, index), grad)
        add = jax.vmap(lambda total, i, part: total.at[i].add(part, mode="promise_in_bounds"))
        return add(rows_grad, index, weight[..., None] * grad[:, :, None]), weight_grad

    start = jnp.zeros(rows.shape, jnp.float32)
    rows_grad, weight_grad = jax.lax.scan(step, start, (index, weight))
    return rows_grad.astype(rows.dtype), None, weight_grad


weighted_rows.defvjp(_forward, _backward)


def sine_code(shape: Triple, channels: int) -> Float[Array, "N C"]:
    """Position of each voxel as sines and cosines: a part for D, then H, then W.

    D takes what is left when the channels do not divide by 3.

    Raises:
        ValueError: If a part has an odd number of channels.
    """
    part = channels // 3
    if part % 2 or channels % 3 % 2:
        raise UserError(
            f"CoTr: {channels} channels give {part + channels % 3}, {part}, {part} for D, H, W;"
            " each must be even"
        )
    codes = []
    for axis, (size, count) in enumerate(
        zip(shape, (part + channels % 3, part, part), strict=True)
    ):
        feature = np.arange(count)
        # Quirk of the reference: 3 * (k // 3), where 2 * (k // 2) would give a sine and its cosine
        # one frequency.
        frequency = 10000.0 ** (3 * (feature // 3) / count)
        angle = (np.arange(size) + 0.5)[:, None] / (size + 1e-6) * 2 * math.pi / frequency
        code = np.where(feature % 2, np.cos(angle), np.sin(angle)).astype(np.float32)
        place = [1, 1, 1, count]
        place[axis] = size
        codes.append(jnp.broadcast_to(code.reshape(place), (*shape, count)))
    return jnp.concatenate(codes, axis=-1).reshape(-1, channels)


def _eight(
    corner: Array, along: Array, shape: Triple
) -> tuple[Int[Array, "... 8"], Float[Array, "... 8"]]:
    """Indices into the flattened `shape` of the voxels around each place, and their shares."""
    tokens, shares = [], []
    for step in itertools.product((0, 1), repeat=3):
        token, share = 0, 1.0
        for axis, (up, size) in enumerate(zip(step, shape, strict=True)):
            voxel, part = corner[..., axis] + up, along[..., axis]
            inside = (voxel >= 0) & (voxel < size)
            share *= jnp.where(inside, part if up else 1 - part, 0)
            token = token * size + jnp.clip(voxel, 0, size - 1)
        tokens.append(token)
        shares.append(share)
    return jnp.stack(tokens, -1), jnp.stack(shares, -1)


def _centers(shape: Triple) -> np.ndarray:
    """Centers of the voxels [N 3], between 0 and 1, in the reference's order (d, w, h)."""
    d, h, w = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in shape)
    d, h, w = np.meshgrid(d, h, w, indexing="ij")
    return np.stack([d, w, h], -1).reshape(-1, 3)


def _steps(array: Array) -> Array:
    """[B N heads levels points 8] -> [levels * points, B, N * heads, 8]."""
    batch, count, heads, levels, points, corners = array.shape
    array = array.transpose(3, 4, 0, 1, 2, 5)
    return array.reshape(levels * points, batch, count * heads, corners)


def _take(rows: Array, index: Array) -> Array:
    # Mapped over B and not flattened, so that devices with patches of their own exchange nothing.
    return jax.vmap(lambda r, i: r.at[i].get(mode="promise_in_bounds"))(rows, index)
