"""How MONAI names Swin UNETR's weights, and which of its releases built the network.

Source: MONAI 1.6.1 `SwinUNETR`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.swin_unetr import SwinUNETR
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout, monai
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("SwinUNETR",)
MODULES = (SwinUNETR,)
_ARGUMENTS = {  # of the reference, with its defaults
    "patch_size": 2,
    "depths": (2, 2, 2, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "qkv_bias": True,
    "mlp_ratio": 4.0,
    "feature_size": 24,
    "norm_name": "instance",
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "dropout_path_rate": 0.0,
    "normalize": True,
    "norm_layer": "LayerNorm",
    "patch_norm": False,
    "use_checkpoint": False,  # changes memory, not numbers
    "use_flash_attention": False,  # changes speed alone
    "use_hyena": False,
    "spatial_dims": 3,
    "downsample": "legacy",  # of those that say `img_size`: see `from_torch`
    "use_v2": False,
    "img_size": None,  # before MONAI 1.5; checked, never used
}
_VIT = "swinViT."
_MERGING = {"merging": "fixed", "mergingv2": "v2"} | {n: n for n in ("fixed", "legacy", "v2")}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of MONAI's `SwinUNETR`.

    `downsample` says which release built it: "merging" since MONAI 1.5, "legacy" before, with the
    same name and other results; no tensor tells. It must be given, as `"SwinUNETR/legacy"` or an
    argument `merging` too, or follow from `img_size`, which no release since MONAI 1.5 takes.

    Raises:
        ValueError: Lists every argument that has no counterpart here; or asks for the release.
    """
    given = dict(constructor)
    merging = given.pop("merging", None) or reference.partition("/")[2]
    if merging:
        given["downsample"] = merging
    arguments = monai.arguments(
        reference,
        given,
        required=("in_channels", "out_channels"),
        defaults=_ARGUMENTS,
        supported={
            "spatial_dims": (3,),
            "patch_size": (2,),
            "downsample": tuple(_MERGING),
            "norm_layer": ("LayerNorm",),
            "use_hyena": (False,),
        },
    )
    if not {"downsample", "img_size"} & set(given):
        raise UserError(
            "SwinUNETR: MONAI 1.5 changed the order in which patches are merged, and the weights "
            'do not tell which they have; add to --constructor "downsample": "merging" if MONAI '
            '1.5 or later built the network, "legacy" for those before (all that were published '
            "until 2025); of a bundle say --reference SwinUNETR/merging or SwinUNETR/legacy"
        )
    module = SwinUNETR(
        num_classes=arguments["out_channels"],
        feature_size=int(arguments["feature_size"]),
        depths=tuple(arguments["depths"]),
        heads=tuple(arguments["num_heads"]),
        attn_window=monai.triple(arguments["window_size"]),
        merging=_MERGING[arguments["downsample"]],
        convolve_stages=arguments["use_v2"],
        mlp_ratio=float(arguments["mlp_ratio"]),
        qkv_bias=arguments["qkv_bias"],
        patch_norm=arguments["patch_norm"],
        normalize=arguments["normalize"],
        norm=monai.norm_spec(arguments["norm_name"]),
        dropout=arguments["drop_rate"],
        attention_dropout=arguments["attn_drop_rate"],
        path_dropout=arguments["dropout_path_rate"],
    )
    return recipe(module, arguments["in_channels"])


def recipe(module: SwinUNETR, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    weights = _encoder(module) | _decoder(module, channels)
    return Recipe(
        module, (1, *module.stride, channels), weights, _canonical, unused=monai.is_unused
    )


def _canonical(name: str) -> str:
    """Also of encoders that were trained alone, by themselves.

    Source: MONAI 1.6.1, `SwinUNETR.load_from` (`layers1.0.blocks.0.mlp.fc1`) and
    `filter_swinunetr` (`encoder.layers1.0.0.blocks.0.mlp.linear1`).
    """
    name = re.sub(r"^(encoder\.)?(?=patch_embed\.|layers\d)", _VIT, name)
    name = re.sub(rf"^({_VIT}layers\d\.0)\.0\.", r"\1.", name)
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name)


def _encoder(module: SwinUNETR) -> dict[str, Weight]:
    layer, norm = layout.layer, layout.norm
    weights = layer("swinViT.patch_embed.proj", "patch_embed", layout.CONV)
    if module.patch_norm:
        weights |= norm("swinViT.patch_embed.norm", "patch_norm")
    for i, depth in enumerate(module.depths):
        stage = f"swinViT.layers{i + 1}.0"
        for j in range(depth):
            name, block = f"{stage}.blocks.{j}", f"stage_{i}/block_{j}"
            weights |= monai.transformer_block(
                name, block, "/attention", out="proj", bias=module.qkv_bias
            )
            table = Weight(f"params/{block}/attention/position_bias")
            weights[f"{name}.attn.relative_position_bias_table"] = table
        down, merging = f"{stage}.downsample", f"merging_{i}"
        weights |= layer(f"{down}.reduction", f"{merging}/reduction", layout.LINEAR, bias=False)
        weights |= norm(f"{down}.norm", f"{merging}/norm")
        if module.convolve_stages:
            name = f"swinViT.layers{i + 1}c.0.layer"
            weights |= monai.conv_block("instance", name, f"stage_{i}/conv")
    return weights


def _decoder(module: SwinUNETR, channels: int) -> dict[str, Weight]:
    block = functools.partial(monai.conv_block, module.norm)
    weights = block("encoder1.layer", "encoder1", projected=channels != module.feature_size)
    for name in ("encoder2", "encoder3", "encoder4", "encoder10"):
        weights |= block(f"{name}.layer", name)
    for i in range(1, 6):
        weights |= monai.up_block(module.norm, f"decoder{i}", f"decoder{i}")
    return weights | monai.head()
