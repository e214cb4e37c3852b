"""Primus: a vision transformer that does the work of segmentation itself, between two light ends.

Blocks of voxels become tokens, transformer blocks with rotary positions exchange between them, and
a few transposed convolutions bring them back to voxels: there is no skip from the image.

Source: Wald et al. 2025, arXiv:2503.01835; `dynamic_network_architectures` 0.4.4, `Primus` and
`PrimusV2`, whose outputs and gradients these reproduce with its own weights. Sizes S, B, M, L there
are width, heads and layers 396, 6, 12; 792, 12, 12; 864, 12, 16; 1056, 16, 24.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import (
    ConvUnit,
    gelu,
    has_thick_slices,
    rematerialized,
    require_patch,
    total_stride,
)
from bhsd_jax.models.conv import Conv, ConvTranspose, Triple
from bhsd_jax.models.initializers import he_normal, trunc_normal
from bhsd_jax.models.nnunet import ResidualStage
from bhsd_jax.models.norms import LayerNorm
from bhsd_jax.models.primus_blocks import PrimusBlock, rotary_angles
from bhsd_jax.models.unetr_blocks import PatchEmbed
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

EMBEDDINGS = ("linear", "residual")
STEM = 32  # channels of the residual embedding at full resolution
# For 5 mm slices, as for UNETR: five planes of 320 tokens.
HEAD_CT: dict[str, Any] = {"token": (4, 16, 16)}


class Primus(nn.Module):
    """Transformer over tokens of voxels; one full-resolution output.

    `embedding` "linear" maps every token's voxels at once (Primus); "residual" halves the image
    three times by residual blocks (PrimusV2), and its tokens are 8 x 8 x 8. With `absolute`
    positions, which are learned, the parameters belong to one patch size.

    Raises:
        ValueError: If a field does not fit the others, or the patch not `token` or `patch`.
    """

    num_classes: int
    patch: Triple | None = None  # the one image size D, H, W; None: that of the first image
    token: Triple = (8, 8, 8)  # voxels; powers of two
    width: int = 864
    heads: int = 12
    layers: int = 16
    mlp_ratio: float = 8 / 3
    embedding: str = "linear"
    registers: int = 0  # tokens without a place
    absolute: bool = True
    rotary: bool = True
    norm_attention: bool = False  # normalize what attention gives, before its last layer
    layer_scale: float | None = None  # start of a learned factor on both branches; None: no factor
    dropout: float = 0.0  # behind attention and in the MLP
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of a whole branch, per sample; growing to this in the last block
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each block in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "Primus":
        """The plan's patch and, for thick slices, `HEAD_CT`; `fields` take precedence."""
        del network  # nnU-Net's topology
        thick = has_thick_slices(spacing_mm) and fields.get("embedding") != "residual"
        return cls(**{**(HEAD_CT if thick else {}), "patch": patch, **fields})

    @property
    def stride(self) -> Triple:
        """Size of a token; the patch must be a multiple of it, axis by axis."""
        return self.token

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        self._require_fitting(image.shape[1:4])
        x = self._embedded(image.astype(self.dtype))
        batch, d, h, w, _ = x.shape
        x = self._transformed(x.reshape(batch, -1, self.width), (d, h, w), train)
        x = x[:, self.registers :].reshape(batch, d, h, w, self.width)
        strides, channels = decoder_of(self)
        for i, (stride, features) in enumerate(zip(strides, channels, strict=True)):
            x = ConvTranspose(features, stride, True, self.dtype, name=f"up_{i}")(x)
            if i < len(strides) - 1:
                x = gelu(LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"up_norm_{i}")(x))
        return (x.astype(jnp.float32),)

    def _embedded(self, x: Array) -> Float[Array, "B d h w E"]:
        if self.embedding == "linear":
            name = "patch_embedding"
            return PatchEmbed(self.width, self.token, self.dtype, he_normal, name=name)(x)
        stage = rematerialized(ResidualStage, self.remat)
        unit = functools.partial(ConvUnit, slope=0.0, dtype=self.dtype)
        x = stage(unit, STEM, 1, (1, 1, 1), None, zero_last=False, name="embed_stem")(x)
        unit = functools.partial(unit, use_bias=False)
        for i in range(3):
            x = stage(unit, STEM * 2**i, 1, (2, 2, 2), None, False, name=f"embed_{i}")(x)
        return Conv(self.width, (1, 1, 1), dtype=self.dtype, name="embed_out")(x)

    def _transformed(self, x: Float[Array, "B N E"], grid: Triple, train: bool) -> Array:
        """Tokens in order D, H, W, the registers before them."""
        if self.registers:
            shape = (1, self.registers, self.width)
            own = self.param("registers", nn.initializers.normal(1e-6), shape).astype(self.dtype)
            own = jnp.broadcast_to(own, (x.shape[0], *shape[1:]))  # it may be symbolic
            x = jnp.concatenate([own, x], axis=1)
        if self.absolute:
            positions = self.param("positions", trunc_normal, (1, *x.shape[1:]))
            x = x + positions.astype(self.dtype)
        angles = rotary_angles(grid, self.width // self.heads) if self.rotary else None
        block = rematerialized(PrimusBlock, self.remat)
        for i, drop_path in enumerate(np.linspace(0, self.drop_path, self.layers)):
            x = block(
                depth=i + 1,
                heads=self.heads,
                hidden=hidden_of(self),
                registers=self.registers,
                angles=angles,
                norm_attention=self.norm_attention,
                layer_scale=self.layer_scale,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                drop_path=float(drop_path),
                train=train,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x)
        return LayerNorm(dtype=self.dtype, name="norm")(x)

    def _require_fitting(self, size: tuple[int, ...]) -> None:
        each, rest = divmod(self.width, self.heads)
        powers = all(n > 0 and n & (n - 1) == 0 for n in self.token) and max(self.token) > 1
        checks = (
            (rest == 0, "width must be a multiple of heads"),
            (rest or not self.rotary or each % 6 == 0, "width / heads must be a multiple of 6"),
            (powers, "the edges of token must be powers of two, one of them above 1"),
            (self.embedding in EMBEDDINGS, f"embedding must be {' or '.join(EMBEDDINGS)}"),
            (
                self.embedding != "residual" or tuple(self.token) == (8, 8, 8),
                "embedding residual makes tokens of (8, 8, 8)",
            ),
        )
        wrong = [rule for fits, rule in checks if not fits]
        if wrong:
            raise UserError(f"Primus: {'; '.join(wrong)}; got {self}")
        require_patch("Primus", size, self.stride)
        if self.absolute and self.patch is not None and tuple(self.patch) != tuple(size):
            require_patch("Primus", self.patch, self.stride)
            raise UserError(
                f"Primus: its positions are those of patch {tuple(self.patch)} (D, H, W); got an"
                f" image of {tuple(size)}, the nearest accepted is {tuple(self.patch)}"
            )


def hidden_of(net: Primus) -> int:
    """Width of the inner layer of the MLPs."""
    return int(net.width * net.mlp_ratio)


def decoder_of(net: Primus) -> tuple[tuple[Triple, ...], tuple[int, ...]]:
    """Stride and channels of every step from tokens to voxels.

    An axis of a token that is shorter than another is doubled in the last steps. The channels fall
    by one factor, to multiples of 8, towards the classes, which the last step gives.

    Source: `dynamic_network_architectures` 0.4.4, `PatchDecode`.
    """
    steps = int(math.log2(max(net.token)))
    strides = []
    for n in reversed(range(steps)):
        d, h, w = (2 if size >> n > 1 else 1 for size in net.token)
        strides.append((d, h, w))
    assert total_stride(strides) == tuple(net.token)
    factor = (net.width / (2 * net.num_classes)) ** (1 / steps)
    inner = [max(8, round((net.width / factor**n + 1e-6) / 8) * 8) for n in range(1, steps)]
    return tuple(strides), (*inner, net.num_classes)
