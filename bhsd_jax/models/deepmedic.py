"""DeepMedic: paths of unpadded convolutions at several resolutions, joined voxel by voxel.

Source: Kamnitsas et al. 2017, arXiv:1603.05959; BLAST-CT (Monteiro et al. 2020), commit ccfa6ef of
biomedia-mira/blast-ct, `models/deepmedic.py` and `models/base.py`, whose outputs and gradients
these reproduce with its own weights.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import has_thick_slices, rematerialized, require_patch
from bhsd_jax.models.conv import Triple, conv3d
from bhsd_jax.models.initializers import torch_uniform
from bhsd_jax.models.norms import NormSpec, make_norm, norm_options
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

CONTEXTS = ("edge", "given")
_KERNEL: Triple = (3, 3, 3)  # of the paths; each layer takes one voxel off every side


class DeepMedic(nn.Module):
    """Paths that see the same place at several resolutions; one full-resolution output.

    A path takes every n-th voxel, convolves without padding, and repeats its result n times. The
    logits of a voxel thus depend on `reach` voxels on every side. With `context` "edge" an image
    is continued by its outermost voxels and gets logits of its own size. With "given", which is
    for prediction alone, it brings them along as its `margin`, and the logits are smaller by it:
    tiles side by side then give what the whole volume would.

    Raises:
        ValueError: If a field does not fit the others, or the size of the logits not `stride`.
    """

    num_classes: int
    scales: tuple[Triple, ...] = ((5, 5, 5), (3, 3, 3), (1, 1, 1))  # one path each, coarse to fine
    features: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)  # of the layers of every path
    joined: tuple[int, ...] = (250, 250)  # of the layers behind the paths, one voxel wide
    dropout: tuple[float, ...] = (0.0, 0.5, 0.5)  # in each of those layers and in the last one
    norm: NormSpec = "instance"  # the published networks have "batch"
    context: str = "edge"
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each path in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "DeepMedic":
        """Paths at a quarter, half and all of the resolution, as far as the patch divides by it.

        Thick slices are all seen by every path. `fields` take precedence.
        """
        del network  # nnU-Net's topology
        thick = max(spacing_mm) if has_thick_slices(spacing_mm) else math.inf
        d, h, w = (
            1 if mm == thick else math.gcd(n, 4) for n, mm in zip(patch, spacing_mm, strict=True)
        )
        scales = ((d, h, w), (min(d, 2), min(h, 2), min(w, 2)), (1, 1, 1))
        return cls(**{"scales": scales, **fields})

    @property
    def stride(self) -> Triple:
        """The size of the logits must be a multiple of it: what every scale divides."""
        d, h, w = (math.lcm(*axis) for axis in zip(*self.scales, strict=True))
        return d, h, w

    @property
    def reach(self) -> Triple:
        """How many voxels on every side the logits of a voxel may depend on."""
        d, h, w = (max(axis) * len(self.features) for axis in zip(*self.scales, strict=True))
        return d, h, w

    @property
    def margin(self) -> Triple:
        """Voxels on every side of the image that get no logits."""
        return self.reach if self.context == "given" else (0, 0, 0)

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        self._require_fitting(train)
        d, h, w = (n - 2 * m for n, m in zip(image.shape[1:4], self.margin, strict=True))
        require_patch("DeepMedic", (d, h, w), self.stride)
        x = image.astype(self.dtype)
        if self.context == "edge":
            x = jnp.pad(x, ((0, 0), *((n, n) for n in self.reach), (0, 0)), mode="edge")
        path = rematerialized(Path, self.remat)
        seen = []
        for i, scale in enumerate(self.scales):
            layers = path(self.features, scale, self.norm, train, self.dtype, name=f"path_{i}")
            off = [n - s * len(self.features) for n, s in zip(self.reach, scale, strict=True)]
            seen.append(layers(_inner(x, off)))
        x = jnp.concatenate(seen, axis=-1)
        widths = (*self.joined, self.num_classes)
        for i, (features, dropout) in enumerate(zip(widths, self.dropout, strict=True)):
            x = Unit(
                features, (1, 1, 1), self.norm, train, dropout, self.dtype, name=f"joined_{i}"
            )(x)
        return (x.astype(jnp.float32),)

    def _require_fitting(self, train: bool) -> None:
        if self.context not in CONTEXTS:
            raise UserError(
                f"DeepMedic: context is {self.context!r}; choose from {', '.join(CONTEXTS)}"
            )
        if train and self.context == "given":
            raise UserError("DeepMedic: context 'given' is for prediction; train with 'edge'")
        if len(self.dropout) != len(self.joined) + 1:
            raise UserError(
                f"DeepMedic: dropout needs {len(self.joined) + 1} shares, one for each of `joined` "
                f"and one for the last layer; got {self.dropout}"
            )


class Path(nn.Module):
    """Every n-th voxel, a stack of unpadded convolutions, and the result repeated n times."""

    features: tuple[int, ...]
    scale: Triple
    norm: NormSpec
    train: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        d, h, w = (slice(s // 2, None, s) for s in self.scale)
        x = image[:, d, h, w]
        for i, features in enumerate(self.features):
            # On the image itself a norm of each sample would remove how bright the sample is.
            bare = i == 0 and norm_options(self.norm)[0] != "batch"
            norm = "" if bare else self.norm
            unit = Unit(features, _KERNEL, norm, self.train, 0.0, self.dtype, name=f"unit_{i}")
            x = unit(x)
        for axis, times in enumerate(self.scale, start=1):
            x = jnp.repeat(x, times, axis=axis)
        return x


class Unit(nn.Module):
    """Norm, dropout, PReLU and unpadded convolution; added to its input where the widths agree."""

    features: int
    kernel: Triple
    norm: NormSpec
    train: bool
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        inner = make_norm(self.norm, self.train, self.dtype, "norm")(x)
        inner = nn.Dropout(self.dropout, deterministic=not self.train)(inner)
        slope = self.param("slope", nn.initializers.constant(0.25), (1,)).astype(self.dtype)
        inner = jnp.where(inner >= 0, inner, slope * inner)
        shape = (*self.kernel, x.shape[-1], self.features)
        out = conv3d(inner, self.param("kernel", torch_uniform, shape).astype(self.dtype))
        if x.shape[-1] == self.features:
            out += _inner(x, [n // 2 for n in self.kernel])
        return out


def _inner(x: jax.Array, off: list[int]) -> jax.Array:
    """Cuts `off` voxels from either side of D, H, W."""
    d, h, w = (slice(n, size - n) for n, size in zip(off, x.shape[1:4], strict=True))
    return x[:, d, h, w]
