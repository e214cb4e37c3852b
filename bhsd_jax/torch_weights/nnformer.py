"""How the reference names nnFormer's weights, the same in all three of its variants.

Source: nnFormer d48aaeb.
"""

import re
from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.blocks import total_stride
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.nnformer import ACDC, SYNAPSE, TUMOR, NNFormer
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("nnFormer",)
MODULES = (NNFormer,)
_VARIANTS = {"synapse": SYNAPSE, "acdc": ACDC, "tumor": TUMOR}
_REQUIRED = ("crop_size", "num_classes")
_FIELDS = {"embedding_dim": "embed", "depths": "depths", "num_heads": "heads"}
_FIELDS |= {"window_size": "attn_windows", "deep_supervision": "deep_supervision"}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of a variant's `nnFormer`; `reference` is "nnFormer/synapse", "/acdc", or "/tumor".

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    variant = reference.partition("/")[2]
    if variant not in _VARIANTS:
        raise UserError(f"{reference}: name the variant, as nnFormer/<{'|'.join(_VARIANTS)}>")
    names = (*_REQUIRED, *_FIELDS, "input_channels", "patch_size", "down_stride")
    wrong = [f"{name} is not known" for name in constructor if name not in names]
    wrong += [f"{name} is missing" for name in _REQUIRED if name not in constructor]
    given = {_FIELDS[k]: files.tuples(v) for k, v in constructor.items() if k in _FIELDS}
    if variant == "tumor" and "heads" in given:
        given["heads_decoder"] = given["heads"][1:]
    fields = _VARIANTS[variant] | given
    if "patch_size" in constructor:
        fields["embed_strides"] = _embed_strides(variant, files.tuples(constructor["patch_size"]))
    module = NNFormer(constructor.get("num_classes", 1), **fields)
    sizes = {  # where the reference repeats what its own layers fix
        "patch_size": total_stride(module.embed_strides),
        "down_stride": tuple(
            total_stride((*module.embed_strides, *module.merge_strides[:i])) for i in range(4)
        ),
    }
    for name, size in sizes.items():
        if files.tuples(constructor.get(name, size)) != size:
            wrong.append(f"{name}={constructor[name]} (supported: {size})")
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")
    return recipe(module, constructor.get("input_channels", 1), tuple(constructor["crop_size"]))


def recipe(module: NNFormer, channels: int, patch: Triple | None = None) -> Recipe:
    """Names of the weights of a network that there is."""
    image = (1, *(patch or module.stride), channels)
    weights = _embedding() | _encoder(module) | _decoder(module)
    return Recipe(module, image, weights, unused=_is_unused)


def _embed_strides(variant: str, patch: Triple) -> tuple[Triple, Triple]:
    """The reference splits the stride between two convolutions, each variant in its own way."""
    d, h, w = patch
    if variant == "acdc":
        return (d, h // 2, w // 2), (d, h // 2, w // 2)
    half = (d // 2, h // 2, w // 2)
    return (d, *half[1:]) if variant == "synapse" else half, half


def _embedding() -> dict[str, Weight]:
    weights = layout.norm("model_down.patch_embed.norm", "embed_norm")
    for i, norms in enumerate(((1, 2), (1,))):  # the last convolution has no norm of its own
        source = f"model_down.patch_embed.proj{i + 1}"
        for k in (1, 2):
            weights |= layout.layer(f"{source}.conv{k}", f"embed_{i}/conv{k}", layout.CONV)
        for k in norms:
            weights |= layout.norm(f"{source}.norm{k}", f"embed_{i}/norm{k}")
    return weights


def _encoder(module: NNFormer) -> dict[str, Weight]:
    weights = {}
    for i, depth in enumerate(module.depths):
        source = f"model_down.layers.{i}"
        for b in range(depth):
            weights |= _block(f"{source}.blocks.{b}", f"encoder_{i}_{b}", "qkv")
        weights |= layout.norm(f"model_down.norm{i}", f"norm_{i}")
        if i < 3:
            down = f"{source}.downsample"
            weights |= layout.norm(f"{down}.norm", f"merge_norm_{i}")
            weights |= layout.layer(f"{down}.reduction", f"merge_{i}", layout.CONV)
    return weights


def _decoder(module: NNFormer) -> dict[str, Weight]:
    """In the reference's decoder, too, index 0 is the highest resolution."""
    weights = {}
    for i, depth in enumerate(module.depths[:3]):
        source = f"decoder.layers.{i}"
        for b in range(depth):
            linear = "qkv" if b else "kv"
            weights |= _block(f"{source}.blocks.{b}", f"decoder_{i}_{b}", linear)
        weights |= layout.norm(f"{source}.Upsample.norm", f"up_norm_{i}")
        weights |= layout.layer(f"{source}.Upsample.up", f"up_{i}", layout.CONV_TRANSPOSE)
        if i == 0 or module.deep_supervision:
            weights |= layout.layer(f"final.{i}.up", f"head_{i}", layout.CONV_TRANSPOSE)
    return weights


def _block(source: str, target: str, linear: str) -> dict[str, Weight]:
    table = f"{source}.attn.relative_position_bias_table"
    weights = {table: Weight(f"params/{target}/table")}
    for part in ("norm1", "norm2"):
        weights |= layout.norm(f"{source}.{part}", f"{target}/{part}")
    for part in (f"attn.{linear}", "attn.proj", "mlp.fc1", "mlp.fc2"):
        name = part.partition(".")[2]
        weights |= layout.layer(f"{source}.{part}", f"{target}/{name}", layout.LINEAR)
    return weights


def _is_unused(name: str) -> bool:
    """Rows of the position tables, computed here; heads of deep supervision, if it is off."""
    unused = r".*\.attn\.relative_position_index|final\.[12]\.up\.(weight|bias)"
    return re.fullmatch(unused, name) is not None
