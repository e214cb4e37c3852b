"""UNETR: a vision transformer as encoder, joined to a convolutional decoder at four depths.

Source: Hatamizadeh et al. 2022, arXiv:2103.10504; MONAI 1.6.1 `UNETR`, whose outputs and gradients
these reproduce with its own weights.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models import torch_import, unetr_torch
from bhsd_jax.models.blocks import rematerialized, require_patch
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.torch_import import Recipe, Weight
from bhsd_jax.models.unetr_blocks import (
    ConvBlock,
    LayerNorm,
    Linear,
    NormSpec,
    PatchEmbed,
    TransformerBlock,
    UpBlock,
    total_stride,
    trunc_normal,
    up_sample,
)
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits

# For 5 mm slices: tokens of 4 x 16 x 16 voxels, so that a patch of 20 slices keeps five planes of
# tokens (5 x 20 x 16 = 1600 in all) and attention still has a depth to look along.
HEAD_CT = {
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
    # Skips leave after so many blocks. The paper says 3, 6, 9; its code counts from zero.
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
        head = Linear(self.num_classes, dtype=self.dtype, name="head")
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


_ARGUMENTS = {  # of the reference: its default, or where it must be given, nothing
    "feature_size": 16,
    "hidden_size": 768,
    "mlp_dim": 3072,
    "num_heads": 12,
    "proj_type": "conv",
    "norm_name": "instance",
    "conv_block": True,
    "res_block": True,
    "dropout_rate": 0.0,
    "spatial_dims": 3,
    "qkv_bias": False,
    "save_attn": False,
}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of MONAI's `UNETR`; `pos_embed` is the old word for `proj_type`.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    given = dict(constructor)
    if "pos_embed" in given:
        given["proj_type"] = given.pop("pos_embed")
    required = ("in_channels", "out_channels", "img_size")
    arguments = unetr_torch.arguments(
        reference,
        given,
        required=required,
        defaults=_ARGUMENTS,
        supported={"spatial_dims": (3,), "proj_type": ("conv", "perceptron")},
    )
    patch = unetr_torch.triple(arguments["img_size"])
    module = UNETR(
        num_classes=arguments["out_channels"],
        patch=patch,
        feature_size=arguments["feature_size"],
        hidden_size=arguments["hidden_size"],
        mlp_dim=arguments["mlp_dim"],
        heads=arguments["num_heads"],
        embedding=arguments["proj_type"],
        norm=unetr_torch.norm_spec(arguments["norm_name"]),
        conv_block=arguments["conv_block"],
        res_block=arguments["res_block"],
        qkv_bias=arguments["qkv_bias"],
        dropout=arguments["dropout_rate"],
    )
    channels = arguments["in_channels"]
    weights = _transformer_weights(module, channels) | _decoder_weights(module, channels)
    return Recipe(module, (1, *patch, channels), weights, unused=unetr_torch.is_unused)


def _transformer_weights(module: UNETR, channels: int) -> dict[str, Weight]:
    source, target = "vit.patch_embedding", "patch_embedding"
    weights = {f"{source}.position_embeddings": Weight("params/positions")}
    if module.embedding == "conv":
        layout = torch_import.conv
        weights |= unetr_torch.layer(f"{source}.patch_embeddings", target, layout=layout)
    else:  # a linear layer over blocks of voxels, in the order [D H W C]
        shape = (*module.stride, channels, module.hidden_size)
        layout = functools.partial(block_kernel, shape=shape)
        weights |= unetr_torch.layer(f"{source}.patch_embeddings.1", target, layout=layout)
    for i in range(module.layers):
        weights |= unetr_torch.transformer_block(
            f"vit.blocks.{i}", f"block_{i}", "", out="out_proj", bias=module.qkv_bias
        )
    return weights | unetr_torch.scale_and_bias("vit.norm", "norm")


def block_kernel(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(out, d * h * w * in) -> [d h w in out], a `shape` with a stride of its first three."""
    return weight.T.reshape(shape)


def _decoder_weights(module: UNETR, channels: int) -> dict[str, Weight]:
    block = functools.partial(unetr_torch.conv_block, module.norm)
    projected = module.res_block and channels != module.feature_size
    weights = block("encoder1.layer", "encoder1", projected=projected)
    for encoder in (2, 3, 4):
        name = f"encoder{encoder}"
        weights |= unetr_torch.up(f"{name}.transp_conv_init", f"{name}/up_0")
        for i in range(1, 5 - encoder):
            step = f"{name}.blocks.{i - 1}"
            if module.conv_block:
                weights |= unetr_torch.up(f"{step}.0", f"{name}/up_{i}")
                weights |= block(f"{step}.1", f"{name}/block_{i}")
            else:
                weights |= unetr_torch.up(step, f"{name}/up_{i}")
    for decoder in (2, 3, 4, 5):
        name = f"decoder{decoder}"
        weights |= unetr_torch.up_block(module.norm, name, name, residual=module.res_block)
    return weights | unetr_torch.head()
