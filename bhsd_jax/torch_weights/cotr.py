"""How the reference names CoTr's weights.

Source: CoTr 521b4cc.
"""

import re
from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.cotr import CoTr
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("CoTr",)
MODULES = (CoTr,)
_NORMS = {"IN": "instance", "BN": "batch", "SyncBN": "batch", "GN": "group"}
_SLOPES = {"LeakyReLU": 0.01, "ReLU": 0.0}
_REQUIRED = ("num_classes", "norm_cfg", "activation_cfg")
_FIELDS = {  # argument of the reference, or literal in its code -> field
    "widths": "features",
    "blocks": "blocks",
    "ffn": "ffn",
    "nhead": "heads",
    "layers": "layers",
    "points": "points",
    "weight_std": "weight_std",
    "deep_supervision": "deep_supervision",
}
_LINEAR = {  # layers of the transformer by name, there and here
    "self_attn.sampling_offsets": "attention/offsets",
    "self_attn.attention_weights": "attention/weights",
    "self_attn.value_proj": "attention/value",
    "self_attn.output_proj": "attention/output",
    "linear1": "linear1",
    "linear2": "linear2",
}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of `ResTranUnet`; its literal sizes may be given as arguments too, see `_FIELDS`.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    names = (*_REQUIRED, *_FIELDS, "img_size", "in_channels")
    wrong = [f"{name} is not known" for name in constructor if name not in names]
    wrong += [f"{name} is missing" for name in _REQUIRED if name not in constructor]
    for name, table in (("norm_cfg", _NORMS), ("activation_cfg", _SLOPES)):
        if constructor.get(name, "IN" if table is _NORMS else "ReLU") not in table:
            wrong.append(f"{name}={constructor[name]!r} (supported: {', '.join(table)})")
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")
    fields: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        if name in constructor:
            value = constructor[name]
            fields[field] = tuple(value) if isinstance(value, list) else value
    module = CoTr(
        constructor["num_classes"],
        norm=_NORMS[constructor["norm_cfg"]],
        slope=_SLOPES[constructor["activation_cfg"]],
        **fields,
    )
    return recipe(module, constructor.get("in_channels", 1))


def recipe(module: CoTr, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    image = (1, *module.stride, channels)
    weights = _convolutions(module) | _transformer(module)
    return Recipe(module, image, weights, _canonical, _is_unused)


def _convolutions(module: CoTr) -> dict[str, Weight]:
    weights = _unit(module, "backbone.conv1", "backbone.norm1", "stem")
    for i, blocks in enumerate(module.blocks):
        for b in range(blocks):
            source, target = f"backbone.layer{i + 1}.{b}", f"stage_{i}_{b}"
            weights |= _unit(module, f"{source}.conv1", f"{source}.norm1", f"{target}/conv")
            if b == 0:
                down = f"{source}.downsample"
                weights |= _unit(module, f"{down}.0", f"{down}.1", f"{target}/shortcut")
    heads = {"cls_conv": "head"}
    for i in range(3):
        weights |= layout.layer(
            f"transposeconv_stage{i}", f"up_{i}", layout.CONV_TRANSPOSE, bias=False
        )
        for k in (1, 2):
            source = f"stage{i}_de.resconv{k}"
            weights |= _unit(module, f"{source}.conv", f"{source}.norm", f"decoder_{i}/conv{k}")
        if module.deep_supervision:
            heads[f"ds{i}_cls_conv"] = f"head_{i}"
    for source, target in heads.items():
        weights |= layout.layer(source, target, layout.CONV)
    return weights


def _unit(module: CoTr, conv: str, norm: str, target: str) -> dict[str, Weight]:
    weights = layout.layer(conv, target, layout.CONV, bias=False)
    weights |= layout.norm(norm, f"{target}/norm")
    if module.norm == "batch":
        weights |= layout.running_statistics(norm, f"{target}/norm")
    return weights


def _transformer(module: CoTr) -> dict[str, Weight]:
    weights = {"encoder_Detrans.level_embed": Weight("params/transformer/level_embed")}
    for i in range(module.layers):
        source, target = f"encoder_Detrans.encoder.layers.{i}", f"transformer/layer_{i}"
        for old, new in _LINEAR.items():
            weights |= layout.layer(f"{source}.{old}", f"{target}/{new}", layout.LINEAR)
        for norm in ("norm1", "norm2"):
            weights |= layout.norm(f"{source}.{norm}", f"{target}/{norm}")
    return weights


def _canonical(name: str) -> str:
    return name.removeprefix("U_ResTran3D.")


def _is_unused(name: str) -> bool:
    """Counters, and the heads that exist in every file but count only under deep supervision."""
    unused = r".*\.num_batches_tracked|ds[012]_cls_conv\.(weight|bias)"
    return re.fullmatch(unused, name) is not None
