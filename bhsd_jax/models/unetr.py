"""UNETR: a vision transformer as encoder, joined to a convolutional decoder at four depths.

Source: Hatamizadeh et al. 2022, arXiv:2103.10504; MONAI 1.6.1 `UNETR`, whose outputs and gradients
these reproduce with its own weights.
"""

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
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.dense import Dense
from bhsd_jax.models.initializers import trunc_normal
from bhsd_jax.models.norms import LayerNorm, NormSpec
from bhsd_jax.models.unetr_blocks import (
    ConvBlock,
    PatchEmbed,
    TransformerBlock,
    UpBlock,
    up_sample,
)
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

# For 5 mm slices: tokens of 4 x 16 x 16 voxels, so that a patch of 20 slices keeps five planes of
# tokens (5 x 20 x 16 = 1600 in all) and attention still has a depth to look along.
HEAD_CT: dict[str, Any] = {
    "patch": (20, 320, 256),
    "up_strides": ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
}


class UNETR(nn.Module):
    """Vision transformer encoder, convolutional decoder; one full-resolution output.

    The learned positions tie the parameters to one patch size: what was trained on a patch can
    only be applied to that patch.

    Raises:
        ValueError: If a field does not fit the others, or the patch not `stride` or `patch`.
    """

    num_classes: int
    patch: Triple | None = None  # the one image size D, H, W; None: that of the first image
    feature_size: int = 16  # channels at full resolution
    hidden_size: int = 768
    mlp_dim: int = 3072
    heads: int = 12
    layers: int = 12
    # After how many blocks the skips leave. The paper says 3, 6, 9, but its code counts from zero.
    taps: tuple[int, ...] = (4, 7, 10)
    up_strides: tuple[Triple, ...] = ((2, 2, 2),) * 4  # from tokens to voxels, coarse to fine
    embedding: str = "conv"  # "perceptron" (published recipe): the same map, started differently
    norm: NormSpec = "instance"  # or "batch", ("group", {"num_groups": 4}), with PyTorch's words
    conv_block: bool = True  # convolve after every further up-sampling of a skip
    res_block: bool = True  # convolution blocks have a shortcut
    qkv_bias: bool = False
    dropout: float = 0.0  # after positions, attention weights, attention, and in the MLP
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each block in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "UNETR":
        """The plan's patch and, for thick slices, `HEAD_CT`; `fields` take precedence."""
        del network  # nnU-Net's topology
        preset = HEAD_CT if has_thick_slices(spacing_mm) else {}
        return cls(**{**preset, "patch": patch, **fields})

    @property
    def stride(self) -> Triple:
        """Size of a token; the patch must be a multiple of it, axis by axis."""
        return total_stride(self.up_strides)

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        self._require_fitting(image.shape[1:4])
        x = image.astype(self.dtype)
        taps = self._transformer(x, train)
        shared = {"norm": self.norm, "train": train, "dtype": self.dtype}
        shared["residual"] = self.res_block
        skips = [
            rematerialized(ConvBlock, self.remat)(self.feature_size, **shared, name="encoder1")(x)
        ]
        climb = rematerialized(Climb, self.remat)
        for level in (1, 2, 3):  # skip `level` is at stride 2**level in the isotropic network
            steps = self.up_strides[: 4 - level]
            features = self.feature_size * 2**level
            encoder = climb(features, steps, self.conv_block, **shared, name=f"encoder{level + 1}")
            skips.append(encoder(taps[level - 1]))
        x = taps[-1]
        up = rematerialized(UpBlock, self.remat)
        for level, strides in zip((3, 2, 1, 0), self.up_strides, strict=True):
            features = self.feature_size * 2**level
            x = up(features, strides, **shared, name=f"decoder{level + 2}")(x, skips[level])
        head = Dense(self.num_classes, dtype=self.dtype, name="head")
        return (head(x).astype(jnp.float32),)

    def _transformer(self, x: Array, train: bool) -> list[Array]:
        """Tapped states, then the normalized last one; each [B d h w hidden_size].

        Only the last passes the final norm: the taps are the raw states between the blocks.
        """
        kernel_init = trunc_normal if self.embedding == "perceptron" else None
        embed = PatchEmbed(
            self.hidden_size, self.stride, self.dtype, kernel_init, name="patch_embedding"
        )
        x = embed(x)
        grid = x.shape[:-1]
        x = x.reshape(x.shape[0], -1, self.hidden_size)  # [B N E], tokens in order D, H, W
        positions = self.param("positions", trunc_normal, (1, *x.shape[1:]))
        x = x + positions.astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = rematerialized(TransformerBlock, self.remat)
        states = []
        for i in range(self.layers):
            x = block(
                self.heads,
                self.mlp_dim,
                self.qkv_bias,
                self.dropout,
                train,
                self.dtype,
                name=f"block_{i}",
            )(x)
            states.append(x)
        last = LayerNorm(dtype=self.dtype, name="norm")(x)
        taps = [states[count - 1] for count in self.taps]
        return [state.reshape(*grid, self.hidden_size) for state in (*taps, last)]

    def _require_fitting(self, size: tuple[int, ...]) -> None:
        taps_fit = len(self.taps) == 3 and all(1 <= tap <= self.layers for tap in self.taps)
        checks = (
            (self.hidden_size % self.heads == 0, "hidden_size must be a multiple of heads"),
            (len(self.up_strides) == 4, "up_strides needs 4 steps"),
            (taps_fit, "taps needs 3 numbers of blocks, none above layers"),
            (self.embedding in ("conv", "perceptron"), "embedding must be conv or perceptron"),
        )
        wrong = [rule for fits, rule in checks if not fits]
        if wrong:
            raise UserError(f"UNETR: {'; '.join(wrong)}; got {self}")
        require_patch("UNETR", size, self.stride)
        if self.patch is not None and tuple(self.patch) != tuple(size):
            require_patch("UNETR", self.patch, self.stride)
            raise UserError(
                f"UNETR: its positions are those of patch {tuple(self.patch)} (D, H, W); got an"
                f" image of {tuple(size)}, the nearest accepted is {tuple(self.patch)}"
            )


class Climb(nn.Module):
    """Brings transformer states to the resolution of a skip, one up-sampling after another.

    The first is bare; the further ones are followed by a convolution block, if there are any.
    """

    features: int
    steps: tuple[Triple, ...]
    conv_block: bool
    norm: NormSpec
    train: bool
    residual: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B d h w E"]) -> Float[Array, "B D H W F"]:
        for i, strides in enumerate(self.steps):
            x = up_sample(self.features, strides, self.dtype, f"up_{i}")(x)
            if i > 0 and self.conv_block:
                block = ConvBlock(
                    self.features,
                    self.norm,
                    self.train,
                    self.residual,
                    self.dtype,
                    name=f"block_{i}",
                )
                x = block(x)
        return x
