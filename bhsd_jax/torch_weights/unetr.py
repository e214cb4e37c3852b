"""How MONAI names UNETR's weights.

Source: MONAI 1.6.1 `UNETR`.
"""

import functools
from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.unetr import UNETR
from bhsd_jax.torch_weights import layout, monai
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("UNETR",)
MODULES = (UNETR,)
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
    arguments = monai.arguments(
        reference,
        given,
        required=required,
        defaults=_ARGUMENTS,
        supported={"spatial_dims": (3,), "proj_type": ("conv", "perceptron")},
    )
    patch = monai.triple(arguments["img_size"])
    module = UNETR(
        num_classes=arguments["out_channels"],
        patch=patch,
        feature_size=arguments["feature_size"],
        hidden_size=arguments["hidden_size"],
        mlp_dim=arguments["mlp_dim"],
        heads=arguments["num_heads"],
        embedding=arguments["proj_type"],
        norm=monai.norm_spec(arguments["norm_name"]),
        conv_block=arguments["conv_block"],
        res_block=arguments["res_block"],
        qkv_bias=arguments["qkv_bias"],
        dropout=arguments["dropout_rate"],
    )
    return recipe(module, arguments["in_channels"])


def recipe(module: UNETR, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    patch = module.patch or module.stride
    weights = _transformer(module, channels) | _decoder(module, channels)
    return Recipe(module, (1, *patch, channels), weights, unused=monai.is_unused)


def _transformer(module: UNETR, channels: int) -> dict[str, Weight]:
    source, target = "vit.patch_embedding", "patch_embedding"
    weights = {f"{source}.position_embeddings": Weight("params/positions")}
    if module.embedding == "conv":
        weights |= layout.layer(f"{source}.patch_embeddings", target, layout.CONV)
    else:  # a linear layer over blocks of voxels, in the order [D H W C]
        blocks = layout.linear_over_blocks((*module.stride, channels, module.hidden_size))
        weights |= layout.layer(f"{source}.patch_embeddings.1", target, blocks)
    for i in range(module.layers):
        weights |= monai.transformer_block(
            f"vit.blocks.{i}", f"block_{i}", "", out="out_proj", bias=module.qkv_bias
        )
    return weights | layout.norm("vit.norm", "norm")


def _decoder(module: UNETR, channels: int) -> dict[str, Weight]:
    block = functools.partial(monai.conv_block, module.norm)
    projected = module.res_block and channels != module.feature_size
    weights = block("encoder1.layer", "encoder1", projected=projected)
    for encoder in (2, 3, 4):
        name = f"encoder{encoder}"
        weights |= monai.up(f"{name}.transp_conv_init", f"{name}/up_0")
        for i in range(1, 5 - encoder):
            step = f"{name}.blocks.{i - 1}"
            if module.conv_block:
                weights |= monai.up(f"{step}.0", f"{name}/up_{i}")
                weights |= block(f"{step}.1", f"{name}/block_{i}")
            else:
                weights |= monai.up(step, f"{name}/up_{i}")
    for decoder in (2, 3, 4, 5):
        name = f"decoder{decoder}"
        weights |= monai.up_block(module.norm, name, name, residual=module.res_block)
    return weights | monai.head()
