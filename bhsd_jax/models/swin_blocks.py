"""Swin transformer in three dimensions: windows, shifts, relative positions, merging.

Source: Liu et al. 2021, arXiv:2103.14030; MONAI 1.6.1 `swin_unetr`, whose numbers these reproduce.
"""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.attention import attend, from_windows, regions_of, to_windows
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.dense import Dense
from bhsd_jax.models.initializers import trunc_normal
from bhsd_jax.models.norms import LayerNorm
from bhsd_jax.models.unetr_blocks import ConvBlock, Mlp, heads_of
from bhsd_jax.platform.errors import UserError

# Which voxel of each 2 x 2 x 2 block (D, H, W) gives which block of channels to a merging layer.
_CORNERS = {
    "fixed": "000 100 010 001 110 101 011 111",
    # A bug of MONAI 0.9 to 1.4: two corners come twice and two never. Every Swin UNETR published
    # before 2025 was trained with it, and loses its meaning in any other order.
    "legacy": "000 100 010 001 101 010 001 111",
    "v2": "000 001 010 011 100 101 110 111",
}


class SwinStage(nn.Module):
    """Transformer blocks, unshifted and shifted in turn, on one resolution.

    `convolve` puts a residual block in front (Swin UNETR V2). Its norm is always an instance norm
    without weights, whatever the rest of the network uses.
    """

    block: functools.partial  # of SwinBlock
    path_dropout: tuple[float, ...]  # one per block
    convolve: bool
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        if self.convolve:
            front = ConvBlock(x.shape[-1], "instance", self.train, True, self.dtype, name="conv")
            x = front(x)
        for i, rate in enumerate(self.path_dropout):
            block = self.block(
                shift=i % 2 == 1,
                path_dropout=rate,
                train=self.train,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            x = block(x)
        return x


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP, each around a shortcut."""

    heads: int
    window: Triple
    clamped_bias: str
    mlp_ratio: float
    qkv_bias: bool
    dropout: float
    attention_dropout: float
    path_dropout: float  # of a whole branch, per sample
    shift: bool
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        drop = functools.partial(nn.Dropout, deterministic=not self.train)
        attention = WindowAttention(
            self.heads,
            self.window,
            self.shift,
            self.clamped_bias,
            self.qkv_bias,
            drop(self.attention_dropout) if self.train and self.attention_dropout else None,
            self.dtype,
            name="attention",
        )
        width = int(x.shape[-1] * self.mlp_ratio)
        mlp = Mlp(width, self.dropout, self.train, self.dtype, name="mlp")
        branch = drop(self.path_dropout, broadcast_dims=(1, 2, 3, 4))
        x = x + branch(drop(self.dropout)(attention(norm(name="norm1")(x))))
        return x + branch(mlp(norm(name="norm2")(x)))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for every relative position.

    What the reference does and a reader might not expect: a volume no larger than the window along
    an axis clamps the window there and is not shifted along it; the volume is padded behind with
    zeros to whole windows, and these are attended to like voxels.

    `clamped_bias="corner"` repeats its bug that a clamped window takes the biases of the first
    tokens of a full one, which have other relative positions; "geometry" looks up its own.
    """

    heads: int
    window: Triple  # tokens, D H W; sets the table of biases
    shift: bool
    clamped_bias: str
    qkv_bias: bool
    drop: Callable[[Array], Array] | None  # on the attention weights
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        size, channels = x.shape[1:4], x.shape[-1]
        window = tuple(map(min, size, self.window))
        shift = tuple(
            w // 2 if self.shift and n > w else 0 for n, w in zip(size, self.window, strict=True)
        )
        behind = [(0, -n % w) for n, w in zip(size, window, strict=True)]
        x = jnp.pad(x, [(0, 0), *behind, (0, 0)])
        padded = x.shape[1:4]
        if any(shift):
            x = jnp.roll(x, [-s for s in shift], (1, 2, 3))
        tokens = to_windows(x, window)  # [B windows n C]
        qkv = Dense(3 * channels, self.qkv_bias, self.dtype, name="qkv")(tokens)
        regions = regions_of(padded, window, shift) if any(shift) else None
        bias = self._position_bias(window)
        mixed = attend(*heads_of(qkv, self.heads), bias, regions, self.drop)
        out = Dense(channels, dtype=self.dtype, name="out")(mixed)
        x = from_windows(out, window, padded)
        if any(shift):
            x = jnp.roll(x, shift, (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    def _position_bias(self, window: tuple[int, ...]) -> Float[Array, "heads n n"]:
        entries = int(np.prod([2 * w - 1 for w in self.window]))
        table = self.param("position_bias", trunc_normal, (entries, self.heads))
        index = position_index(self.window, window, self.clamped_bias)
        return jnp.moveaxis(table[index], -1, 0)


def position_index(window: Triple, clamped: tuple[int, ...], clamped_bias: str) -> np.ndarray:
    """Row of the bias table for every pair of tokens of a clamped window, int[n n].

    Raises:
        ValueError: If `clamped_bias` is neither "corner" nor "geometry".
    """
    if clamped_bias not in ("corner", "geometry"):
        raise UserError(f"clamped_bias is {clamped_bias!r}; choose 'corner' or 'geometry'")
    grid = window if clamped_bias == "corner" else clamped
    coordinates = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1)
    coordinates = coordinates[: np.prod(clamped)]
    distance = coordinates[:, None] - coordinates[None] + np.array(window) - 1  # [n n 3], from 0
    d, h, w = np.moveaxis(distance, -1, 0)
    return (d * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w


class PatchMerging(nn.Module):
    """Gathers each block of voxels into one, then norm and linear map to twice the channels.

    Raises:
        ValueError: If the strides do not go with the order of `merging`.
    """

    strides: Triple
    merging: str  # "fixed", "legacy" (see `_CORNERS`), or "v2"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        parts = []
        for d, h, w in merging_order(self.merging, self.strides):
            sd, sh, sw = self.strides
            parts.append(x[:, d::sd, h::sh, w::sw])
        merged = LayerNorm(dtype=self.dtype, name="norm")(jnp.concatenate(parts, axis=-1))
        return Dense(2 * x.shape[-1], False, self.dtype, name="reduction")(merged)


def merging_order(merging: str, strides: Triple) -> list[Triple]:
    """Offsets D, H, W of the voxels of a block, in the order of their channels.

    Where an axis is not halved its second voxel drops out of the order.

    Raises:
        ValueError: If the order is not known or strides are not its own.
    """
    if merging not in _CORNERS:
        raise UserError(f"merging is {merging!r}; choose from {', '.join(_CORNERS)}")
    allowed = {(2, 2, 2)} if merging == "legacy" else set(itertools.product((1, 2), repeat=3))
    if tuple(strides) not in allowed:
        raise UserError(
            f"merging {merging!r} cannot have strides {tuple(strides)};"
            f" it takes {'2' if merging == 'legacy' else '1 or 2'} along every axis"
        )
    corners = [tuple(map(int, corner)) for corner in _CORNERS[merging].split()]
    return [
        (d, h, w) for d, h, w in corners if d < strides[0] and h < strides[1] and w < strides[2]
    ]
