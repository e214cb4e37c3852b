"""Convolutions of CoTr: norms to choose from, weight standardization, its two residual blocks.

Source: Xie et al. 2021, arXiv:2103.03024; CoTr 521b4cc.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.conv import Triple, conv3d
from bhsd_jax.models.initializers import fan_out_normal, torch_bias
from bhsd_jax.models.norms import BatchNorm, InstanceNorm


class Unit(nn.Module):
    """Convolution without bias, norm, activation.

    `norm` "batch" keeps running statistics in the collection `batch_stats`; "group" has 16 groups.
    """

    features: int
    kernel: Triple = (3, 3, 3)
    strides: Triple = (1, 1, 1)
    norm: str = "instance"  # a choice of `cotr.CoTr`
    weight_std: bool = False  # standardize each filter before use
    slope: float | None = 0.01  # below zero; None: no activation
    train: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.kernel, image.shape[-1], self.features)
        kernel = self.param("kernel", fan_out_normal, shape)
        if self.weight_std:
            kernel = standardized(kernel)
        d, h, w = (((k - 1) // 2, (k - 1) // 2) for k in self.kernel)
        out = conv3d(image.astype(self.dtype), kernel.astype(self.dtype), self.strides, (d, h, w))
        out = _norm(self.norm, self.train, self.dtype)(out)
        return out if self.slope is None else nn.leaky_relu(out, self.slope)


class BackboneBlock(nn.Module):
    """One convolution around which the image is led; the activation follows the addition."""

    unit: functools.partial
    features: int
    strides: Triple | None  # None: the shortcut is the image; else it is projected, even unstrided

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        unit = functools.partial(
            self.unit, features=self.features, strides=self.strides or (1, 1, 1), slope=None
        )
        out, shortcut = unit(name="conv")(image), image
        if self.strides is not None:
            shortcut = unit(kernel=(1, 1, 1), name="shortcut")(image)
        return nn.leaky_relu(out + shortcut, self.unit.keywords["slope"])


class DecoderBlock(nn.Module):
    """Two convolutions around which the image is led; no activation follows the addition."""

    unit: functools.partial

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B D H W C"]:
        unit = functools.partial(self.unit, features=image.shape[-1])
        return image + unit(name="conv2")(unit(name="conv1")(image))


class Head(nn.Module):
    """Voxel by voxel, features to logits."""

    num_classes: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B D H W K"]:
        channels = image.shape[-1]
        kernel = self.param("kernel", fan_out_normal, (1, 1, 1, channels, self.num_classes))
        bias = self.param("bias", torch_bias(channels), (self.num_classes,))
        out = conv3d(image.astype(self.dtype), kernel.astype(self.dtype))
        return out + bias.astype(self.dtype)


def standardized(kernel: Float[Array, "kd kh kw C F"]) -> Float[Array, "kd kh kw C F"]:
    """Each filter with mean 0 and (unbiased) variance 1.

    Source: Qiao et al. 2019, arXiv:1903.10520; epsilon as in CoTr.
    """
    centered = kernel - kernel.mean((0, 1, 2, 3))
    count = kernel.size // kernel.shape[-1]
    variance = jnp.square(centered).sum((0, 1, 2, 3)) / (count - 1)
    return centered * lax.rsqrt(variance + 1e-12)


def upsample(image: Float[Array, "B D H W C"], factors: Triple) -> Float[Array, "B d h w C"]:
    """Trilinear up-sampling by whole factors; voxel centers align, edges are repeated.

    Two neighbors are blended per axis: `jax.image.resize` multiplies by a dense matrix instead.
    """
    for axis, factor in enumerate(factors, start=1):
        size = image.shape[axis]
        before = jnp.concatenate([_part(image, axis, 0, 1), _part(image, axis, 0, size - 1)], axis)
        after = jnp.concatenate(
            [_part(image, axis, 1, size), _part(image, axis, size - 1, size)], axis
        )
        phases = []
        for phase in range(factor):
            shift = (phase + 0.5) / factor - 0.5
            other = before if shift < 0 else after
            phases.append((1 - abs(shift)) * image + abs(shift) * other)
        shape = [n * factor if i == axis else n for i, n in enumerate(image.shape)]
        image = jnp.stack(phases, axis + 1).reshape(shape)
    return image


def _part(image: Array, axis: int, start: int, stop: int) -> Array:
    return lax.slice_in_dim(image, start, stop, axis=axis)


def _norm(kind: str, train: bool, dtype: DTypeLike) -> nn.Module:
    if kind == "instance":
        return InstanceNorm(dtype=dtype, name="norm")
    if kind == "batch":
        return BatchNorm(1e-5, True, dtype, 0.1, train, name="norm")
    return nn.GroupNorm(16, epsilon=1e-5, dtype=dtype, use_fast_variance=False, name="norm")
