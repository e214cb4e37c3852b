"""Changes values, not places: nnU-Net's noise, blur, brightness, contrast, resolution and gamma.

Every operation treats the two directions of an axis alike, so mirroring may come before or after.
Channels: each draws parameters of its own, except the standard deviation of the noise. Blur and low
resolution also choose channels: `p` is the chance of one channel; the patch as a whole is chosen
with min(1, 2 p) and then each channel with the rest, which for one channel is simply `p`.

Source: nnU-Net v2 2.8.1 (`nnUNetTrainer.get_training_transforms`), batchgeneratorsv2 0.3.6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bhsd_jax.augment.spatial import check, is_in_plane
from bhsd_jax.platform.errors import UserError

Patch = Float[Array, "D H W C"]
_EPS = 1e-7  # keeps constant patches finite
_SPACE = (0, 1, 2)


@dataclass(frozen=True)
class GaussianNoise:
    """Adds independent noise; one standard deviation for all channels.

    nnU-Net calls the range a variance but uses it as the standard deviation, and so do we.
    """

    p: float = 0.1
    std: tuple[float, float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        check(self, ("p",), ("std",))

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, std_key, noise_key = jax.random.split(key, 3)
        std = _uniform(std_key, self.std, ())
        return _sometimes(
            when_key,
            self.p,
            lambda image: image + std * jax.random.normal(noise_key, image.shape, image.dtype),
            image,
        )


@dataclass(frozen=True)
class GaussianBlur:
    """Smooths with a short Gaussian: a width in voxels per axis and channel, D included.

    The kernel has 3 taps below a sigma of 0.583, 5 below 0.917, then 7; edges are reflected.
    """

    p: float = 0.1
    sigma: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        check(self, ("p",), ("sigma",))
        if self.sigma[0] == 0:
            raise UserError(f"GaussianBlur: sigma must be above 0; got {self.sigma}")

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, sigma_key, channel_key = jax.random.split(key, 3)
        channels = image.shape[3]
        sigmas = _uniform(sigma_key, self.sigma, (3, channels))
        reach = math.floor(_half_width(self.sigma[1]))

        def change(image: Patch) -> Patch:
            smooth = image
            for axis in _SPACE:
                smooth = blur_axis(smooth, sigmas[axis], axis, reach)
            return jnp.where(_chosen(channel_key, self.p, channels), smooth, image)

        return _sometimes(when_key, min(1.0, 2 * self.p), change, image)


@dataclass(frozen=True)
class Brightness:
    """Multiplies by a factor that is below or above 1 with equal chance (see `two_sided`)."""

    p: float = 0.15
    factor: tuple[float, float] = (0.75, 1.25)

    def __post_init__(self) -> None:
        check(self, ("p",), ("factor",))

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, factor_key = jax.random.split(key)
        factor = two_sided(factor_key, self.factor, image.shape[3])
        return _sometimes(when_key, self.p, lambda image: image * factor, image)


@dataclass(frozen=True)
class Contrast:
    """Stretches around the mean of the patch, clipped to the range it had."""

    p: float = 0.15
    factor: tuple[float, float] = (0.75, 1.25)

    def __post_init__(self) -> None:
        check(self, ("p",), ("factor",))

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, factor_key = jax.random.split(key)
        factor = two_sided(factor_key, self.factor, image.shape[3])

        def change(image: Patch) -> Patch:
            mean = image.mean(_SPACE)
            return jnp.clip((image - mean) * factor + mean, image.min(_SPACE), image.max(_SPACE))

        return _sometimes(when_key, self.p, change, image)


@dataclass(frozen=True)
class LowResolution:
    """Throws voxels away (nearest) and fills in again (linear), at the same shape.

    One zoom per channel, shared by the axes; D is left alone where slices are treated one by one.
    """

    p: float = 0.125
    zoom: tuple[float, float] = (0.5, 1.0)
    dummy_2d: bool | str = "auto"

    def __post_init__(self) -> None:
        check(self, ("p",), ("zoom",))
        if self.zoom[1] > 1:
            raise UserError(f"LowResolution: zoom must not exceed 1; got {self.zoom}")

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, zoom_key, channel_key = jax.random.split(key, 3)
        d, h, w, channels = image.shape
        zooms = _uniform(zoom_key, self.zoom, (channels,))
        in_plane = is_in_plane((d, h, w), self.dummy_2d)

        def change(image: Patch) -> Patch:
            coarse = image
            for axis in _SPACE[1:] if in_plane else _SPACE:
                size = image.shape[axis]
                kept = jnp.maximum(jnp.round(size * zooms), 1).astype(jnp.int32)
                coarse = _apply(jax.vmap(lambda k, n=size: coarse_matrix(n, k))(kept), coarse, axis)
            return jnp.where(_chosen(channel_key, self.p, channels), coarse, image)

        return _sometimes(when_key, min(1.0, 2 * self.p), change, image)


@dataclass(frozen=True)
class Gamma:
    """Raises the patch, scaled to 0..1, to a power; then restores its mean and standard deviation.

    `invert` does so on the negative. The standard deviation is the unbiased one.
    """

    p: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.5)
    invert: bool = False

    def __post_init__(self) -> None:
        check(self, ("p",), ("gamma",))

    def __call__(self, key: PRNGKeyArray, image: Patch) -> Patch:
        when_key, gamma_key = jax.random.split(key)
        power = two_sided(gamma_key, self.gamma, image.shape[3])
        sign = -1.0 if self.invert else 1.0

        def change(image: Patch) -> Patch:
            before = sign * image
            low = before.min(_SPACE)
            span = before.max(_SPACE) - low
            bent = ((before - low) / jnp.maximum(span, _EPS)) ** power * span + low
            spread = _deviation(before) / jnp.maximum(_deviation(bent), _EPS)
            return sign * ((bent - bent.mean(_SPACE)) * spread + before.mean(_SPACE))

        return _sometimes(when_key, self.p, change, image)


def two_sided(key: PRNGKeyArray, bounds: tuple[float, float], channels: int) -> Float[Array, " C"]:
    """Half the time uniform in [low, 1], else in [1, high]; uniform if the range is on one side.

    Source: batchgeneratorsv2 0.3.6, `BGContrast`.
    """
    low, high = bounds
    side_key, value_key = jax.random.split(key)
    place = jax.random.uniform(value_key, (channels,))
    if low >= 1 or high <= 1:
        return low + (high - low) * place
    above = jax.random.bernoulli(side_key, 0.5, (channels,))
    return jnp.where(above, 1 + (high - 1) * place, 1 - (1 - low) * place)


def blur_axis(image: Patch, sigma: Float[Array, " C"], axis: int, reach: int) -> Patch:
    """Gaussian along one axis, a sigma per channel, of at most `reach` taps to either side."""
    steps = jnp.arange(-reach, reach + 1)[:, None]
    weights = jnp.exp(-0.5 * (steps / sigma) ** 2) * (
        jnp.abs(steps) <= jnp.floor(_half_width(sigma))
    )
    weights = weights / weights.sum(0)  # [taps, C]
    margins = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
    padded = jnp.pad(image, margins, mode="reflect")
    size = image.shape[axis]
    shifted = (lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * reach + 1))
    return sum((w * part for w, part in zip(weights, shifted, strict=True)), start=jnp.zeros(()))


def coarse_matrix(size: int, kept: Int[Array, ""]) -> Float[Array, "N N"]:
    """Nearest sampling of `size` voxels down to `kept`, then linear back up: one matrix.

    Voxel centers are aligned at halves. Places are exact fractions of integers, so that no rounding
    picks another voxel on another machine.
    """
    position = jnp.arange(size)
    # 2 size times the place among the kept
    twice = jnp.maximum((2 * position + 1) * kept - size, 0)
    low, share = twice // (2 * size), (twice % (2 * size)) / (2 * size)
    high = jnp.minimum(low + 1, kept - 1)
    nearest = [((2 * index + 1) * size) // (2 * kept) for index in (low, high)]
    rows = [(index[:, None] == position).astype(jnp.float32) for index in nearest]
    return (1 - share)[:, None] * rows[0] + share[:, None] * rows[1]


def _half_width(sigma):
    """Taps to either side, to be rounded down: batchgeneratorsv2 truncates at six sigma in all."""
    return 3 * sigma + 0.25


def _apply(matrices: Float[Array, "C N N"], image: Patch, axis: int) -> Patch:
    moved = jnp.moveaxis(image, axis, 2)
    # Full precision: matrix units would otherwise round the image to 10 or 8 bits.
    mixed = jnp.einsum("cij,abjc->abic", matrices, moved, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(mixed, 2, axis)


def _deviation(image: Patch) -> Float[Array, " C"]:
    voxels = math.prod(image.shape[:3])
    squares = ((image - image.mean(_SPACE)) ** 2).sum(_SPACE)
    return jnp.sqrt(squares / max(voxels - 1, 1))


def _uniform(key: PRNGKeyArray, bounds: tuple[float, float], shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=bounds[0], maxval=bounds[1])


def _chosen(key: PRNGKeyArray, p: float, channels: int) -> Array:
    """Channels of a patch that was chosen with min(1, 2 p)."""
    return jax.random.bernoulli(key, max(p, 0.5), (channels,))


def _sometimes(
    key: PRNGKeyArray, p: float, change: Callable[[Array], Array], image: Array
) -> Array:
    if p == 0:
        return image
    return lax.cond(jax.random.bernoulli(key, p), change, lambda image: image, image)
