"""Parts that more than one backbone is built from."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.conv import Conv, Triple
from bhsd_jax.models.norms import InstanceNorm, make_norm
from bhsd_jax.platform.errors import UserError

_THICK = 3  # ratio of the coarsest spacing to the finest


class ConvUnit(nn.Module):
    """Convolution, normalization, leaky ReLU.

    Before an instance norm the convolution's bias is a parameter but not added: the norm takes it
    out again. A batch norm has the statistics that it was trained with, and is for prediction.
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
    norm: str = "instance"  # or "batch"

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        batch = self.norm == "batch"
        conv = Conv(
            self.features,
            self.kernel,
            self.strides,
            self.use_bias,
            self.dtype,
            idle_bias=not batch,
            name="conv",
        )
        if batch:
            spec = ("batch", {"eps": self.epsilon, "affine": self.affine})
            out = make_norm(spec, False, self.dtype, "norm")(conv(image))
            return out if self.slope is None else nn.leaky_relu(out, self.slope)
        norm = InstanceNorm(
            self.epsilon, self.affine, self.dtype, self.scale_init, self.slope, name="norm"
        )
        return norm(conv(image))


@jax.custom_vjp
def gelu(x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """Every number times the share of the normal distribution below it; in float32 inside.

    As in PyTorch by `erf`, which on CPUs takes a quarter of the time of `erfc` in `jax.nn.gelu`.
    Its own gradient keeps what went in alone.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return _gelu(x)[0]


def _gelu(x: Array):
    wide = x.astype(jnp.float32)
    return (wide * _share_below(wide)).astype(x.dtype), x


def _gelu_grad(x: Array, grad: Array):
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (((_share_below(wide) + wide * density) * grad).astype(x.dtype),)


def _share_below(x: Array) -> Array:
    """Share of the normal distribution below each number."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


gelu.defvjp(_gelu, _gelu_grad)


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


def total_stride(strides: Sequence[Triple]) -> Triple:
    """Product over the steps, axis by axis."""
    d, h, w = (math.prod(axis) for axis in zip(*strides, strict=True))
    return d, h, w


def has_thick_slices(spacing_mm: Sequence[float]) -> bool:
    """Whether one axis is so much coarser that a backbone's own preset for head CT is used."""
    return max(spacing_mm) > _THICK * min(spacing_mm)
