"""Parts shared by UNETR and Swin UNETR: linear layers, attention, convolution blocks, norms.

All of them start as PyTorch's layers do, weights and biases uniform within 1 / sqrt(fan-in).

Source: MONAI 1.6.1, `networks/blocks` (unetr_block, dynunet_block, mlp, patchembedding).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.attention import attend
from bhsd_jax.models.blocks import InstanceNorm
from bhsd_jax.models.conv import Conv, ConvTranspose, Triple
from bhsd_jax.platform.errors import UserError

NormSpec = str | tuple[str, Any]  # kind, or (kind, PyTorch's keyword arguments)
NORMS = {  # kind: PyTorch's defaults
    "": {},
    "instance": {"eps": 1e-5, "affine": False},
    "batch": {"eps": 1e-5, "affine": True, "momentum": 0.1},
    "group": {"eps": 1e-5, "affine": True, "num_groups": None},
}
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_torch_uniform_transpose = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2
)
# PyTorch's `trunc_normal_` cuts at +-2 by default, not at two standard deviations: never.
trunc_normal = nn.initializers.normal(0.02)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
# The exact Gaussian error function; the tanh approximation moves the outputs by 3e-4.
gelu = functools.partial(jax.nn.gelu, approximate=False)


class Linear(nn.Module):
    """Dense layer over the last axis."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n F"]:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", _torch_uniform, (fan_in, self.features))
        out = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias_init = functools.partial(_symmetric_uniform, bound=fan_in**-0.5)
            out += self.param("bias", bias_init, (self.features,)).astype(self.dtype)
        return out


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
        bias_init = functools.partial(_symmetric_uniform, bound=fan_in**-0.5)
        if self.kernel_init is not None:
            bias_init = nn.initializers.zeros
        kernel = self.param("kernel", self.kernel_init or _torch_uniform, shape)
        bias = self.param("bias", bias_init, (self.features,))
        blocks = image.astype(self.dtype).reshape(batch, d, p, h, q, w, r, channels)
        blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, d, h, w, fan_in)
        weights = kernel.astype(self.dtype).reshape(fan_in, self.features)
        return blocks @ weights + bias.astype(self.dtype)


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    width: int  # of the inner layer
    dropout: float
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        inner = drop()(gelu(Linear(self.width, dtype=self.dtype, name="linear1")(x)))
        return drop()(Linear(x.shape[-1], dtype=self.dtype, name="linear2")(inner))


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
        qkv = Linear(3 * width, self.qkv_bias, self.dtype, name="qkv")(norm(name="norm1")(x))
        # Every head is a window of its own: one at a time is as much as a cache may hold.
        alone = [jnp.moveaxis(part, 2, 1)[..., None, :] for part in heads_of(qkv, self.heads)]
        mixed = attend(*alone, drop=drop() if self.train and self.dropout else None)
        mixed = Linear(width, dtype=self.dtype, name="out")(
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
        out = layer(kernel_init=_torch_uniform, name=f"conv{index}")(x)
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
        features, strides, False, dtype, kernel_init=_torch_uniform_transpose, name=name
    )


def norm_options(norm: NormSpec) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of a norm; kinds in any case, "syncbatch" being "batch".

    Raises:
        ValueError: If the kind or an argument has no counterpart here.
    """
    kind, given = (norm, {}) if isinstance(norm, str) else norm
    kind = {"syncbatch": "batch"}.get(kind.lower(), kind.lower())
    if kind not in NORMS:
        raise UserError(f"norm {kind!r} is not known; choose from {', '.join(map(repr, NORMS))}")
    if not isinstance(given, Mapping) or not given.keys() <= NORMS[kind].keys():
        raise UserError(f"norm {kind!r} takes {', '.join(NORMS[kind])}; got {given!r}")
    options = NORMS[kind] | dict(given)
    if None in options.values():
        raise UserError(f"norm {kind!r} needs {', '.join(NORMS[kind])}; got {given!r}")
    return kind, options


def make_norm(norm: NormSpec, train: bool, dtype: DTypeLike, name: str) -> Callable[[Array], Array]:
    """The layer a norm is named for; "" is no norm."""
    kind, options = norm_options(norm)
    if kind == "":
        return lambda x: x
    shared = (options["eps"], options["affine"], dtype)
    if kind == "instance":
        return InstanceNorm(*shared, name=name)
    if kind == "group":
        return GroupNorm(*shared, groups=options["num_groups"], name=name)
    return BatchNorm(*shared, momentum=options["momentum"], train=train, name=name)


class GroupNorm(nn.Module):
    """Normalizes every sample and group of channels over D, H, W; float32 statistics."""

    epsilon: float
    affine: bool
    dtype: DTypeLike
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        mean = grouped.mean((1, 2, 3, 5), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 2, 3, 5), keepdims=True)
        normal = ((grouped - mean) * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return _scaled(self, normal)


class BatchNorm(nn.Module):
    """Normalizes every channel over the batch; running statistics in `batch_stats`.

    PyTorch's update: the running variance takes the unbiased variance of the batch, linen's own
    layer the biased one. Statistics change only where the caller made `batch_stats` mutable.
    """

    epsilon: float
    affine: bool
    dtype: DTypeLike
    momentum: float  # weight of the new value
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        wide = x.astype(jnp.float32)
        mean, variance = running_mean.value, running_var.value
        if self.train:
            mean = wide.mean((0, 1, 2, 3))
            variance = jnp.square(wide - mean).mean((0, 1, 2, 3))
        if self.train and self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = math.prod(x.shape[:-1])
            running_mean.value += self.momentum * (mean - running_mean.value)
            unbiased = variance * (count / max(1, count - 1))
            running_var.value += self.momentum * (unbiased - running_var.value)
        return _scaled(self, (wide - mean) * lax.rsqrt(variance + self.epsilon))


def _scaled(layer: Any, normal: Array) -> Array:
    """With learned scale and bias, in the layer's type."""
    if layer.affine:
        channels = (normal.shape[-1],)
        normal = normal * layer.param("scale", nn.initializers.ones, channels)
        normal += layer.param("bias", nn.initializers.zeros, channels)
    return jnp.asarray(normal, layer.dtype)


def total_stride(strides: tuple[Triple, ...]) -> Triple:
    """Product over the steps, axis by axis."""
    d, h, w = np.prod(strides, axis=0).tolist()
    return d, h, w


def _symmetric_uniform(key: Array, shape: Any, dtype: Any = jnp.float32, *, bound: float) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
