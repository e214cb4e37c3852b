"""CoTr: a convolutional encoder and decoder, a transformer between on the two deepest maps.

Its deformable attention is plain gathers, no kernel of its own; `DeformableAttention` says what
they cost.

Source: Xie et al. 2021, arXiv:2103.03024; CoTr 521b4cc, whose outputs and gradients it reproduces.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import (
    has_thick_slices,
    rematerialized,
    require_patch,
    total_stride,
)
from bhsd_jax.models.conv import ConvTranspose, Triple
from bhsd_jax.models.cotr_attention import DeformableEncoder, Options
from bhsd_jax.models.cotr_layers import (
    BackboneBlock,
    DecoderBlock,
    Head,
    Unit,
    upsample,
)
from bhsd_jax.models.initializers import fan_out_normal_transpose
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

# For 5 mm slices (patch 20 x 320 x 256): the depth is halved twice only, as nnU-Net plans it.
HEAD_CT: dict[str, Any] = {"strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))}


class CoTr(nn.Module):
    """Four maps, each half the size of the last; two are refined; skips are added.

    Defaults are the published ones. With `deep_supervision` there are three more outputs, from
    the maps of stride `strides[0]` on, and only then the heads for them exist. `norm` "batch"
    learns its statistics where the collection `batch_stats` is mutable.

    Raises:
        ValueError: If a field is not one of its choices, or the patch no multiple of `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (64, 192, 384)  # of the first three maps; the last as third
    blocks: tuple[int, ...] = (3, 3, 2)  # of one convolution, in the last three maps
    strides: tuple[Triple, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))  # of each map
    heads: int = 6
    layers: int = 6  # of the transformer
    points: int = 4  # places each query looks at, per head and map
    ffn: int = 1536
    dropout: float = 0.1  # in the transformer; key "dropout"
    norm: str = "instance"  # "instance", "batch", "group"
    weight_std: bool = False  # standardize the filters of all convolutions but the heads
    slope: float = 0.01  # of the leaky ReLU; 0: ReLU
    axes: str = "reference"  # with its swapped sampling axes, or "fixed"
    deep_supervision: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute blocks and layers in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "CoTr":
        """`HEAD_CT` for thick slices, else the defaults; `fields` take precedence."""
        del network, patch  # nnU-Net's topology; any multiple of `stride` goes
        preset = HEAD_CT if has_thick_slices(spacing_mm) else {}
        return cls(**{**preset, **fields})

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return total_stride(self.strides)

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        _require_fields(self)
        require_patch("CoTr", image.shape[1:4], self.stride)
        unit = functools.partial(
            Unit,
            norm=self.norm,
            weight_std=self.weight_std,
            slope=self.slope,
            train=train,
            dtype=self.dtype,
        )
        x = unit(self.features[0], (7, 7, 7), self.strides[0], name="stem")(image)
        maps, block = [x], rematerialized(BackboneBlock, self.remat)
        for i in range(3):
            features = self.features[min(i + 1, 2)]
            for b in range(self.blocks[i]):
                # The reference compares a tuple of strides with 1, so every first block projects.
                strides = self.strides[i + 1] if b == 0 else None
                x = block(unit, features, strides, name=f"stage_{i}_{b}")(x)
            maps.append(x)
        options = Options(
            self.heads, self.points, self.ffn, self.dropout, self.axes, train, self.dtype
        )
        transformer = DeformableEncoder(options, self.layers, self.remat, name="transformer")
        maps[2:] = transformer(tuple(maps[2:]))
        return self._decode(unit, maps)

    def _decode(self, unit: functools.partial, maps: list[Array]) -> Logits:
        block = rematerialized(DecoderBlock, self.remat)
        x, logits = maps[3], []
        for i in reversed(range(3)):
            up = functools.partial(
                ConvTranspose, use_bias=False, kernel_init=fan_out_normal_transpose
            )
            features = maps[i].shape[-1]
            up = up(features, self.strides[i + 1], dtype=self.dtype, name=f"up_{i}")
            x = block(unit, name=f"decoder_{i}")(up(x) + maps[i])
            if self.deep_supervision:
                logits.append(self._head(x, f"head_{i}"))
        # The reference up-samples, then classifies. Both are linear and blends sum to 1, so they
        # may change places, which spares a full-resolution map of `features[0]` channels.
        full = upsample(self._head(x, "head"), self.strides[0])
        return (full, *logits[::-1])

    def _head(self, x: Array, name: str) -> Array:
        return Head(self.num_classes, self.dtype, name=name)(x).astype(jnp.float32)


def _require_fields(net: CoTr) -> None:
    choices = {
        "norm": ("instance", "batch", "group"),
        "axes": ("reference", "fixed"),
    }
    for field, good in choices.items():
        if getattr(net, field) not in good:
            raise UserError(f"CoTr: {field} is {getattr(net, field)!r}; choose from {good}")
    for field, count in {"features": 3, "blocks": 3, "strides": 4}.items():
        if len(getattr(net, field)) != count:
            raise UserError(f"CoTr: {field} needs {count} entries; got {getattr(net, field)}")
