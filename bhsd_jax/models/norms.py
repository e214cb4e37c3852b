"""Norms of maps [B D H W C] and of channels, with float32 statistics and PyTorch's numbers."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.sums import mean_of_voxels, sum_of_all_tokens, sum_of_channels
from bhsd_jax.platform.errors import UserError

NormSpec = str | tuple[str, Any]  # kind, or (kind, PyTorch's keyword arguments)
NORMS = {  # kind: PyTorch's defaults
    "": {},
    "instance": {"eps": 1e-5, "affine": False},
    "batch": {"eps": 1e-5, "affine": True, "momentum": 0.1},
    "group": {"eps": 1e-5, "affine": True, "num_groups": None},
}


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


class InstanceNorm(nn.Module):
    """Normalizes every sample and channel by its own mean and variance over D, H, W.

    Statistics are float32 and the variance is biased (divided by n), found in a second pass over
    centered values: E[x^2] - E[x]^2 loses all digits where the mean is large. There are no running
    statistics: training and inference are one function. A single voxel becomes the bias.

    Source: Ulyanov et al. 2016, arXiv:1607.08022; PyTorch `InstanceNorm3d`.
    """

    epsilon: float = 1e-5
    affine: bool = True  # learned scale and bias; PyTorch's own default is False
    dtype: DTypeLike = jnp.float32  # of the result
    scale_init: Callable[..., Any] = nn.initializers.ones
    slope: float | None = None  # of a leaky ReLU behind it; None: no activation

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        channels = (image.shape[-1],)
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
        if self.affine:
            scale = self.param("scale", self.scale_init, channels)
            bias = self.param("bias", nn.initializers.zeros, channels)
        slope = 1.0 if self.slope is None else self.slope
        return jnp.asarray(normalize(image, scale, bias, self.epsilon, slope), self.dtype)


class LayerNorm(nn.Module):
    """Normalizes every voxel by the mean and variance of its channels; float32 statistics.

    Source: Ba et al. 2016, arXiv:1607.06450; PyTorch `LayerNorm`.
    """

    epsilon: float = 1e-5
    affine: bool = True  # learned scale and bias
    dtype: DTypeLike = jnp.float32  # of the result

    @nn.compact
    def __call__(self, x: Float[Array, "B *n C"]) -> Float[Array, "B *n C"]:
        channels = (x.shape[-1],)
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, channels)
            bias = self.param("bias", nn.initializers.zeros, channels)
        return jnp.asarray(normalize_channels(x, scale, bias, self.epsilon), self.dtype)


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
    """Normalizes every channel by statistics of the batch in training, by running ones otherwise.

    The batch is the whole one, all devices together. As in PyTorch, and unlike in `nn.BatchNorm`,
    the running variance takes in the unbiased one (divided by n - 1). Running statistics lie in
    the collection `batch_stats` and change only where the caller made that mutable.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; PyTorch `BatchNorm3d`.
    """

    epsilon: float
    affine: bool
    dtype: DTypeLike
    momentum: float  # weight of the new value; PyTorch's default is 0.1
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
    """Multiplies by a learned scale and adds a bias, if the layer has them; in its type."""
    if layer.affine:
        channels = (normal.shape[-1],)
        normal = normal * layer.param("scale", nn.initializers.ones, channels)
        normal += layer.param("bias", nn.initializers.zeros, channels)
    return jnp.asarray(normal, layer.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    image: Float[Array, "B D H W C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    epsilon: float,
    slope: float,
) -> Float[Array, "B D H W C"]:
    """Zero mean and unit variance over D, H, W, scale and bias, leaky ReLU; in float32.

    Its own gradient keeps the image and two numbers per channel; the derived one would keep
    three float32 copies and a mask.
    """
    return _normalize(image, scale, bias, epsilon, slope)[0]


def _normalize(image: Array, scale: Array, bias: Array, epsilon: float, slope: float):
    wide = image.astype(jnp.float32)
    mean = mean_of_voxels(wide)
    inverse = lax.rsqrt(mean_of_voxels(jnp.square(wide - mean)) + epsilon)
    out = (wide - mean) * (inverse * scale) + bias
    out = out if slope == 1 else jnp.where(out > 0, out, slope * out)
    return out, (image, mean, inverse, scale, bias)


def _normalize_grad(epsilon: float, slope: float, residuals: tuple[Array, ...], grad: Array):
    image, mean, inverse, scale, bias = residuals
    normal = (image.astype(jnp.float32) - mean) * inverse
    if slope != 1:
        grad = jnp.where(normal * scale + bias > 0, grad, slope * grad)
    # The result ignores shifts and (but for epsilon) scalings of the image, so the gradient loses
    # its components along the constant and along the result itself.
    shift = mean_of_voxels(grad)
    along = mean_of_voxels(grad * normal)
    to_image = (inverse * scale) * (grad - shift - normal * along)
    voxels = image[0, ..., 0].size
    to_scale, to_bias = (voxels * part.sum((0, 1, 2, 3)) for part in (along, shift))
    return to_image.astype(image.dtype), to_scale, to_bias


normalize.defvjp(_normalize, _normalize_grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_channels(
    x: Float[Array, "B *n C"], scale: Float[Array, " C"], bias: Float[Array, " C"], epsilon: float
) -> Float[Array, "B *n C"]:
    """Zero mean and unit variance over channels, scale and bias; in float32.

    Its own gradient keeps what went in and two numbers per voxel.
    """
    return _normalize_channels(x, scale, bias, epsilon)[0]


def _normalize_channels(x: Array, scale: Array, bias: Array, epsilon: float):
    wide, channels = x.astype(jnp.float32), x.shape[-1]
    mean = sum_of_channels(wide) / channels
    inverse = lax.rsqrt(sum_of_channels(jnp.square(wide - mean)) / channels + epsilon)
    return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalize_channels_grad(epsilon: float, residuals: tuple[Array, ...], grad: Array):
    del epsilon
    x, mean, inverse, scale = residuals
    normal, channels = (x.astype(jnp.float32) - mean) * inverse, x.shape[-1]
    scaled = grad * scale
    shift = sum_of_channels(scaled) / channels
    along = sum_of_channels(scaled * normal) / channels
    to_x = inverse * (scaled - shift - normal * along)
    return to_x.astype(x.dtype), sum_of_all_tokens(grad * normal), sum_of_all_tokens(grad)


normalize_channels.defvjp(_normalize_channels, _normalize_channels_grad)
