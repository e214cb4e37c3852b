"""Swin UNETR, versions 1 and 2: a shifted-window transformer joined to a convolutional decoder.

Source: Hatamizadeh et al. 2022, arXiv:2201.01266; He et al. 2023, MICCAI (version 2);
MONAI 1.6.1 `SwinUNETR`, whose outputs and gradients these reproduce with its own weights.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import (
    has_thick_slices,
    rematerialized,
    require_patch,
    total_stride,
)
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.dense import Dense
from bhsd_jax.models.norms import LayerNorm, NormSpec
from bhsd_jax.models.swin_blocks import PatchMerging, SwinBlock, SwinStage, merging_order
from bhsd_jax.models.unetr_blocks import ConvBlock, PatchEmbed, UpBlock
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

# For 5 mm slices: in plane first, depth is halved twice only, as in the PI-CAI baseline. The window
# divides the 20 x 160 x 128 ... 5 x 20 x 16 tokens of a 20 x 320 x 256 patch, so nothing is padded.
HEAD_CT: dict[str, Any] = {
    "patch_embed": (1, 2, 2),
    "merge_strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    "attn_window": (5, 10, 8),
}


class SwinUNETR(nn.Module):
    """Swin transformer encoder of four stages, convolutional decoder; one full-resolution output.

    `convolve_stages` is version 2. Every stage merges, also the last, so that there are five
    resolutions below the image. Weights published before 2025 need `merging="legacy"`.

    Raises:
        ValueError: If a field does not fit the others, or the patch not `stride`.
    """

    num_classes: int
    feature_size: int = 48  # channels at full resolution and after the embedding
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    attn_window: Triple = (7, 7, 7)  # tokens
    patch_embed: Triple = (2, 2, 2)  # voxels per token
    merge_strides: tuple[Triple, ...] = ((2, 2, 2),) * 4  # after each stage; 1 or 2
    merging: str = "fixed"  # order of channels: "fixed", "legacy" (before MONAI 1.5), "v2"
    clamped_bias: str = "corner"  # the reference's; "geometry": see `WindowAttention`
    convolve_stages: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = False  # layer norm after the embedding
    normalize: bool = True  # layer norm, without weights, on every map that leaves the encoder
    norm: NormSpec = "instance"  # or "batch", ("group", {"num_groups": 4}), with PyTorch's words
    dropout: float = 0.0  # after embedding, attention, and in the MLP
    attention_dropout: float = 0.0  # of attention weights
    path_dropout: float = 0.0  # of whole branches, growing to this in the last block
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each stage and block in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "SwinUNETR":
        """`HEAD_CT` for thick slices, else the defaults; `fields` take precedence."""
        del network, patch  # nnU-Net's topology; any multiple of `stride` goes
        preset = HEAD_CT if has_thick_slices(spacing_mm) else {}
        return cls(**{**preset, **fields})

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return total_stride((self.patch_embed, *self.merge_strides))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        self._require_fitting(image.shape[1:4])
        x = image.astype(self.dtype)
        maps = self._encoder(x, train)
        shared = {"norm": self.norm, "train": train, "dtype": self.dtype}
        block = rematerialized(ConvBlock, self.remat)
        size = self.feature_size
        skips = [block(size, **shared, name="encoder1")(x)]
        for i in range(3):
            skips.append(block(size * 2**i, **shared, name=f"encoder{i + 2}")(maps[i]))
        skips.append(maps[3])  # the reference has no block here
        x = block(size * 16, **shared, name="encoder10")(maps[4])
        up = rematerialized(UpBlock, self.remat)
        for i, strides in reversed(list(enumerate((self.patch_embed, *self.merge_strides)))):
            features = size * 2 ** max(0, i - 1)
            x = up(features, strides, **shared, name=f"decoder{i + 1}")(x, skips[i])
        head = Dense(self.num_classes, dtype=self.dtype, name="head")
        return (head(x).astype(jnp.float32),)

    def _encoder(self, x: Array, train: bool) -> list[Array]:
        """Map after the embedding and after each of the four stages."""
        x = PatchEmbed(self.feature_size, self.patch_embed, self.dtype, name="patch_embed")(x)
        if self.patch_norm:
            x = LayerNorm(dtype=self.dtype, name="patch_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        maps = [self._leaving(x)]
        rates = np.linspace(0, self.path_dropout, sum(self.depths)).tolist()
        stage = rematerialized(SwinStage, self.remat)
        for i, depth in enumerate(self.depths):
            first = sum(self.depths[:i])
            block = functools.partial(
                SwinBlock,
                heads=self.heads[i],
                window=self.attn_window,
                clamped_bias=self.clamped_bias,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
            )
            drops = tuple(rates[first : first + depth])
            x = stage(block, drops, self.convolve_stages, train, self.dtype, name=f"stage_{i}")(x)
            merge = PatchMerging(
                self.merge_strides[i], self.merging, self.dtype, name=f"merging_{i}"
            )
            x = merge(x)
            maps.append(self._leaving(x))
        return maps

    def _leaving(self, x: Array) -> Array:
        """What the decoder sees; the next stage goes on with the map itself."""
        if not self.normalize:
            return x
        return LayerNorm(affine=False, dtype=self.dtype)(x)

    def _require_fitting(self, size: tuple[int, ...]) -> None:
        stages = [len(self.depths), len(self.heads), len(self.merge_strides)]
        if stages != [4, 4, 4]:
            raise UserError(
                f"SwinUNETR: depths, heads and merge_strides need 4 entries each; got {stages}"
            )
        widths = [self.feature_size * 2**i for i in range(4)]
        if any(width % heads for width, heads in zip(widths, self.heads, strict=True)):
            raise UserError(f"SwinUNETR: heads {self.heads} must divide the channels {widths}")
        for strides in self.merge_strides:
            merging_order(self.merging, strides)
        require_patch("SwinUNETR", size, self.stride)
