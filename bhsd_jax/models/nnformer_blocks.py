"""Parts of nnFormer: attention in windows, and the convolutions that change resolution.

Source: Zhou et al. 2021, arXiv:2109.03201; nnFormer d48aaeb.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from bhsd_jax.models.attention import at_once, from_windows, regions_of, to_windows
from bhsd_jax.models.blocks import gelu
from bhsd_jax.models.conv import Triple, conv3d, conv_transpose
from bhsd_jax.models.dense import Dense
from bhsd_jax.models.initializers import (
    torch_bias,
    torch_uniform,
    torch_uniform_transpose,
    trunc_normal,
)
from bhsd_jax.models.norms import LayerNorm
from bhsd_jax.models.sums import add_bias
from bhsd_jax.platform.errors import UserError


@dataclass(frozen=True)
class Options:
    """What all blocks are told; the fields are those of `nnformer.NNFormer`."""

    mask_shifted: bool
    reference_index: bool
    train: bool
    dtype: DTypeLike


class Block(nn.Module):
    """Attention inside windows, then two linear layers; each added to what went in.

    With a second argument, the skip, it is the decoder's cross-attention: the up-sampled map asks
    (it is its own query, without a projection), the skip answers, and their sum goes in; one norm
    serves both.
    """

    options: Options
    heads: int
    window: Triple  # voxels
    shift: Triple  # by which the windows are moved against the grid; voxels
    drop_path: float  # share of samples that skip a part in training; key "dropout"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B D H W C"], skip: Float[Array, "B D H W C"] | None = None
    ) -> Float[Array, "B D H W C"]:
        channels, options = x.shape[-1], self.options
        drop = functools.partial(
            nn.Dropout,
            self.drop_path,
            broadcast_dims=(1, 2, 3, 4),
            deterministic=not options.train,
        )
        norm = LayerNorm(dtype=options.dtype, name="norm1")
        if skip is None:
            parts = {"qkv": norm(x)}
        else:
            parts = {"q": norm(x), "kv": norm(skip)}
            x = x + skip
        x = x + drop()(self._attend(parts))
        hidden = Dense(4 * channels, dtype=options.dtype, name="fc1")(
            LayerNorm(dtype=options.dtype, name="norm2")(x)
        )
        hidden = gelu(hidden)
        return x + drop()(Dense(channels, dtype=options.dtype, name="fc2")(hidden))

    def _attend(self, parts: dict[str, Array]) -> Array:
        """`parts`: normalized maps by what becomes of them: query, key, value."""
        options = self.options
        _, *grid, channels = next(iter(parts.values())).shape
        # Padding comes after the norm: the key of a padded voxel is the bias alone. As in the
        # reference, attention does not mask such voxels.
        padded = tuple(math.ceil(n / w) * w for n, w in zip(grid, self.window, strict=True))
        margins = [(0, 0), *((0, p - n) for n, p in zip(grid, padded, strict=True)), (0, 0)]
        minus = [-s for s in self.shift]
        projected = []
        for name, part in parts.items():
            part = jnp.roll(jnp.pad(part, margins), minus, (1, 2, 3))
            part = to_windows(part, self.window)  # [B windows voxels C]
            if name != "q":
                features = len(name) * channels
                part = Dense(features, dtype=options.dtype, name=name)(part)
            # Channels are (query, key, value), head, channel of the head.
            projected += jnp.split(part, len(name), axis=-1)
        heads = (*projected[0].shape[:-1], self.heads, channels // self.heads)
        query, key, value = (part.reshape(heads) for part in projected)
        query = query * (channels // self.heads) ** -0.5
        masked = options.mask_shifted and any(self.shift)
        regions = regions_of(padded, self.window, self.shift) if masked else None
        out = at_once(query, key, value, self._position_bias(), regions)
        out = Dense(channels, dtype=options.dtype, name="proj")(out.reshape(*heads[:-2], channels))
        out = jnp.roll(from_windows(out, self.window, padded), self.shift, (1, 2, 3))
        return out[:, : grid[0], : grid[1], : grid[2]]

    def _position_bias(self) -> Float[Array, "heads voxels voxels"]:
        rows = math.prod(2 * n - 1 for n in self.window)
        table = self.param("table", trunc_normal, (rows, self.heads))
        return table[position_rows(self.window, self.options.reference_index)].transpose(2, 0, 1)


class Conv(nn.Module):
    """Convolution with a bias, both initialized as PyTorch does."""

    features: int
    kernel: Triple
    strides: Triple
    padding: Triple  # on both sides of D, H, W
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.kernel, image.shape[-1], self.features)
        kernel = self.param("kernel", torch_uniform, shape).astype(self.dtype)
        bias = self.param("bias", torch_bias(math.prod(shape[:-1])), (self.features,))
        d, h, w = ((p, p) for p in self.padding)
        out = conv3d(image.astype(self.dtype), kernel, self.strides, (d, h, w))
        return add_bias(out, bias.astype(self.dtype))


class Expand(nn.Module):
    """Transposed convolution whose kernel is its stride.

    `extra_slice` adds one at the end of D that no input reaches: it is the bias alone.
    """

    transposed: ClassVar[bool] = True  # see `types.Backbone`
    features: int
    stride: Triple
    dtype: DTypeLike
    extra_slice: bool = False

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.stride, image.shape[-1], self.features)
        kernel = self.param("kernel", torch_uniform_transpose, shape).astype(self.dtype)
        fan_in = math.prod(self.stride) * self.features
        bias = self.param("bias", torch_bias(fan_in), (self.features,))
        out = conv_transpose(image.astype(self.dtype), kernel)
        out = jnp.pad(out, ((0, 0), (0, int(self.extra_slice)), (0, 0), (0, 0), (0, 0)))
        return add_bias(out, bias.astype(self.dtype))


class Project(nn.Module):
    """Two convolutions, the first strided; activation, then norm, after each but the very last."""

    features: int
    strides: Triple
    last: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        conv = functools.partial(
            Conv, self.features, (3, 3, 3), padding=(1, 1, 1), dtype=self.dtype
        )
        x = conv(strides=self.strides, name="conv1")(image)
        x = LayerNorm(dtype=self.dtype, name="norm1")(gelu(x))
        x = conv(strides=(1, 1, 1), name="conv2")(x)
        if self.last:
            return x
        return LayerNorm(dtype=self.dtype, name="norm2")(gelu(x))


def fit_window(window: int | Triple, grid: tuple[int, ...]) -> tuple[Triple, Triple]:
    """The window that blocks of a stage use, and the shift of every second one; voxels.

    A cube (an int) shrinks to the shortest axis of the grid, and is then never shifted. A window
    per axis never shrinks: the grid is padded. It is not shifted if it is the grid, or if half of
    any of its axes rounds to 0.
    """
    if isinstance(window, int):
        side = min(window, *grid)
        used, fills = (side, side, side), side == min(grid)
    else:
        used, fills = window, tuple(window) == tuple(grid)
    d, h, w = (n // 2 for n in used)
    return used, (0, 0, 0) if fills or 0 in (d, h, w) else (d, h, w)


def position_rows(window: Triple, reference: bool) -> Int[np.ndarray, "voxels voxels"]:
    """Which row of the position table belongs to each pair of voxels of a window.

    Raises:
        ValueError: If the table has no such row: with the reference's numbering, thin windows.
    """
    _, h, w = window
    if reference:
        # Bug of the reference: wrong multipliers, so that several offsets share a row and most
        # rows serve none.
        per_slice, per_row = 3 * h - 1, 2 * h - 1
    else:
        per_slice, per_row = (2 * h - 1) * (2 * w - 1), 2 * w - 1
    d_h_w = np.indices(window).reshape(3, -1)
    place = d_h_w[0] * per_slice + d_h_w[1] * per_row + d_h_w[2]
    last, rows = 2 * place[-1], math.prod(2 * n - 1 for n in window)
    if last >= rows:
        raise UserError(
            f"NNFormer: window {window} needs row {last} of a table of {rows} by the reference's"
            " index; choose another one, or reference_index=False"
        )
    return place[:, None] - place + place[-1]
