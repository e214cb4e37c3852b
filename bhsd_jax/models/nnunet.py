"""nnU-Net's two networks: a plain U-Net and one with a residual encoder.

Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, and 2024, arXiv:2404.09556;
`dynamic_network_architectures` 0.4.4, whose outputs and gradients these reproduce.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import ConvUnit, require_patch
from bhsd_jax.models.conv import Conv, ConvTranspose, Triple
from bhsd_jax.types import Logits

# What nnU-Net plans for BHSD (5 mm slices, patch 20 x 320 x 256): in plane first, then in depth.
_STRIDES = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
_KERNELS = ((1, 3, 3),) * 3 + ((3, 3, 3),) * 4
_BLOCKS = (1, 3, 4, 6, 6, 6, 6)


class PlainConvUNet(nn.Module):
    """U-Net of convolution, instance norm, leaky ReLU; one head per decoder stage.

    Stage 0 is the full resolution. A field left empty takes the first stages of the BHSD plan; a
    single count stands for every stage. With `deep_supervision` there is a head, and an output,
    for every stage but the lowest; without, only the full-resolution head exists (nnU-Net keeps
    the others as dead weights).

    Raises:
        ValueError: If a field does not fit the number of stages, or the patch not `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = ()  # per stage, of its first convolution
    kernels: tuple[Triple, ...] = ()  # per stage; odd
    convs_encoder: int | tuple[int, ...] = 2
    convs_decoder: int | tuple[int, ...] = 2  # per stage but the lowest, stage 0 first
    deep_supervision: bool = True
    conv_bias: bool = True
    epsilon: float = 1e-5  # of the norm
    affine: bool = True  # of the norm
    slope: float = 0.01
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each stage in the backward pass

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return _total(_strides(self))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        del train  # one function: no dropout, no running statistics
        require_patch(type(self).__name__, image.shape[1:4], self.stride)
        stage = _rematerialized(ConvStage, self.remat)
        strides, kernels = _strides(self), _kernels(self)
        convs = _counts(self, "convs_encoder", len(self.features))
        x, skips = image.astype(self.dtype), []
        for i, features in enumerate(self.features):
            unit = _unit(self, kernels[i])
            x = stage(unit, features, convs[i], strides[i], name=f"encoder_{i}")(x)
            skips.append(x)
        return _decode(self, skips)


class ResidualEncoderUNet(nn.Module):
    """U-Net whose encoder is a stem and stages of residual blocks (nnU-Net's "ResEnc" presets).

    Everything else, defaults included, is as in `PlainConvUNet`.

    Raises:
        ValueError: If a field does not fit the number of stages, or the patch not `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = ()
    kernels: tuple[Triple, ...] = ()
    blocks_encoder: int | tuple[int, ...] = ()
    convs_decoder: int | tuple[int, ...] = 1
    bottleneck: tuple[int, ...] = ()  # inner channels per stage; empty: blocks have two convolutions
    stem: int | None = None  # channels; None: those of stage 0
    deep_supervision: bool = True
    conv_bias: bool = True
    epsilon: float = 1e-5
    affine: bool = True
    slope: float = 0.01
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return _total(_strides(self))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        del train  # one function: no dropout, no running statistics
        require_patch(type(self).__name__, image.shape[1:4], self.stride)
        stage = _rematerialized(ResidualStage, self.remat)
        strides, kernels = _strides(self), _kernels(self)
        stages = len(self.features)
        blocks = _per_stage(self, "blocks_encoder", _BLOCKS)
        inner = _counts(self, "bottleneck", stages) if self.bottleneck else (None,) * stages
        stem = self.features[0] if self.stem is None else self.stem
        x = _unit(self, kernels[0])(features=stem, name="stem")(image.astype(self.dtype))
        skips = []
        for i, features in enumerate(self.features):
            unit = _unit(self, kernels[i])
            x = stage(unit, features, blocks[i], strides[i], inner[i], name=f"encoder_{i}")(x)
            skips.append(x)
        return _decode(self, skips)
