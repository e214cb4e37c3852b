"""Parts shared by UNETR and Swin UNETR: patches, attention, convolution blocks.

All of them start as PyTorch's layers do, weights and biases uniform within 1 / sqrt(fan-in).

Source: MONAI 1.6.1, `networks/blocks` (unetr_block, dynunet_block, mlp, patchembedding).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.attention import attend
from bhsd_jax.models.blocks import gelu
from bhsd_jax.models.conv import Conv, ConvTranspose, Triple
from bhsd_jax.models.dense import Dense, dense
from bhsd_jax.models.initializers import torch_bias, torch_uniform, torch_uniform_transpose
from bhsd_jax.models.norms import LayerNorm, NormSpec, make_norm


class PatchEmbed(nn.Module):
    """One linear map of every block of `token` voxels: a convolution whose stride is its kernel."""

    features: int
    token: Triple
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] | None = None  # None: PyTorch's, also for the bias

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        batch, *size, channels = image.shape
        d, h, w = (n // t for n, t in zip(size, self.token, strict=True))
        p, q, r = self.token
        fan_in = p * q * r * channels
        shape = (*self.token, channels, self.features)
        bias_init = torch_bias(fan_in)
        if self.kernel_init is not None:
            bias_init = nn.initializers.zeros
        kernel = self.param("kernel", self.kernel_init or torch_uniform, shape)
        bias = self.param("bias", bias_init, (self.features,))
        blocks = image.astype(self.dtype).reshape(batch, d, p, h, q, w, r, channels)
        blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, d, h, w, fan_in)
        weights = kernel.astype(self.dtype).reshape(fan_in, self.features)
        return dense(blocks, weights, bias.astype(self.dtype))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    width: int  # of the inner layer
    dropout: float
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        inner = drop()(gelu(Dense(self.width, dtype=self.dtype, name="linear1")(x)))
        return drop()(Dense(x.shape[-1], dtype=self.dtype, name="linear2")(inner))


def heads_of(
    qkv: Float[Array, "*b n F"], heads: int
) -> tuple[
    Float[Array, "*b n heads d"], Float[Array, "*b n heads d"], Float[Array, "*b n heads d"]
]:
    """Query, key, value of every head from one projection, which holds them in this order."""
    *lead, width = qkv.shape
    query, key, value = jnp.moveaxis(qkv.reshape(*lead, 3, heads, width // (3 * heads)), -3, 0)
    return query, key, value


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each around a shortcut."""

    heads: int
    mlp_dim: int
    qkv_bias: bool
    dropout: float
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        width = x.shape[-1]
        qkv = Dense(3 * width, self.qkv_bias, self.dtype, name="qkv")(norm(name="norm1")(x))
        # Each head is passed as a window: attention takes a few at a time, which a cache can hold.
        alone = [jnp.moveaxis(part, 2, 1)[..., None, :] for part in heads_of(qkv, self.heads)]
        mixed = attend(*alone, drop=drop() if self.train and self.dropout else None)
        mixed = Dense(width, dtype=self.dtype, name="out")(
            jnp.moveaxis(mixed, 1, 2).reshape(x.shape)
        )
        x = x + drop()(mixed)
        mlp = Mlp(self.mlp_dim, self.dropout, self.train, self.dtype, name="mlp")
        return x + mlp(norm(name="norm2")(x))


class ConvBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions with norm and leaky ReLU, by default around a shortcut.

    The shortcut is projected, and normalized, where the channels change. Without `residual` the
    second convolution gets its own activation.
    """

    features: int
    norm: NormSpec
    train: bool
    residual: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W F"]:
        out = nn.leaky_relu(self._conv(x, 1), 0.01)
        out = self._conv(out, 2)
        if self.residual:
            out += self._conv(x, 3, (1, 1, 1)) if x.shape[-1] != self.features else x
        return nn.leaky_relu(out, 0.01)

    def _conv(self, x: Array, index: int, kernel: Triple = (3, 3, 3)) -> Array:
        layer = functools.partial(Conv, self.features, kernel, use_bias=False, dtype=self.dtype)
        out = layer(kernel_init=torch_uniform, name=f"conv{index}")(x)
        return make_norm(self.norm, self.train, self.dtype, f"norm{index}")(out)


class UpBlock(nn.Module):
    """Up-samples, joins the skip behind it, and convolves."""

    features: int
    strides: Triple
    norm: NormSpec
    train: bool
    residual: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B d h w F"], skip: Float[Array, "B D H W C"]
    ) -> Float[Array, "B D H W C"]:
        x = up_sample(self.features, self.strides, self.dtype, "up")(x)
        block = ConvBlock(
            self.features, self.norm, self.train, self.residual, self.dtype, name="block"
        )
        return block(jnp.concatenate([x, skip], axis=-1))


def up_sample(features: int, strides: Triple, dtype: DTypeLike, name: str) -> ConvTranspose:
    """Transposed convolution without bias, whose kernel is its stride."""
    return ConvTranspose(
        features, strides, False, dtype, kernel_init=torch_uniform_transpose, name=name
    )
