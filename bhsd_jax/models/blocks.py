"""Parts that more than one backbone is built from."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.conv import Conv, Triple
from bhsd_jax.platform.errors import UserError


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


class ConvUnit(nn.Module):
    """Convolution, instance normalization, leaky ReLU.

    The convolution's bias is a parameter but not added: the norm takes it out again.
    """

    features: int
    kernel: Triple = (3, 3, 3)
    strides: Triple = (1, 1, 1)
    use_bias: bool = True
    epsilon: float = 1e-5
    affine: bool = True
    slope: float | None = 0.01  # below zero; None: no activation
    dtype: DTypeLike = jnp.float32
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        conv = Conv(
            self.features,
            self.kernel,
            self.strides,
            self.use_bias,
            self.dtype,
            idle_bias=True,
            name="conv",
        )
        norm = InstanceNorm(
            self.epsilon, self.affine, self.dtype, self.scale_init, self.slope, name="norm"
        )
        return norm(conv(image))


def standardize(image: Float[Array, "B D H W C"], epsilon: float) -> Float[Array, "B D H W C"]:
    """Zero mean and unit variance over D, H, W, in float32."""
    channels = image.shape[-1]
    return normalize(image, jnp.ones(channels), jnp.zeros(channels), epsilon, 1.0)


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
    mean = wide.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
    inverse = lax.rsqrt(variance + epsilon)
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
    shift = grad.mean((1, 2, 3), keepdims=True)
    along = (grad * normal).mean((1, 2, 3), keepdims=True)
    to_image = (inverse * scale) * (grad - shift - normal * along)
    voxels = image[0, ..., 0].size
    to_scale, to_bias = (voxels * part.sum((0, 1, 2, 3)) for part in (along, shift))
    return to_image.astype(image.dtype), to_scale, to_bias


normalize.defvjp(_normalize, _normalize_grad)


def rematerialized(stage: Any, remat: str) -> Any:
    """The module class, recomputed in the backward pass if `remat` is "blocks".

    Raises:
        ValueError: If `remat` is neither "none" nor "blocks".
    """
    if remat not in ("none", "blocks"):
        raise UserError(f"remat is {remat!r}; choose 'none' or 'blocks'")
    return nn.remat(stage) if remat == "blocks" else stage


def require_patch(model: str, patch: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Refuses a patch that the network cannot halve as often as it wants.

    Raises:
        ValueError: If an axis is no positive multiple of its stride; names the nearest that is.
    """
    if all(n > 0 and n % s == 0 for n, s in zip(patch, stride, strict=True)):
        return
    nearest = tuple(max(1, (2 * n + s) // (2 * s)) * s for n, s in zip(patch, stride, strict=True))
    raise UserError(
        f"{model}: patch {tuple(patch)} must be a multiple of {tuple(stride)} (D, H, W);"
        f" nearest is {nearest}"
    )
