"""How the reference names nnFormer's weights (nnFormer d48aaeb, the same in all variants)."""

import re
from collections.abc import Callable
from typing import Any

from bhsd_jax.models import torch_import
from bhsd_jax.models.torch_import import Weight


def weights(net: Any) -> dict[str, Weight]:
    """Every variable of an `nnformer.NNFormer` by its PyTorch name.

    In the reference's decoder, too, index 0 is the highest resolution.
    """
    return _embedding() | _encoder(net) | _decoder(net)


def is_unused(name: str) -> bool:
    """Rows of the position tables, computed here; heads of deep supervision, if it is off."""
    unused = r".*\.attn\.relative_position_index|final\.[12]\.up\.(weight|bias)"
    return re.fullmatch(unused, name) is not None


def _embedding() -> dict[str, Weight]:
    found = _norm("model_down.patch_embed.norm", "embed_norm")
    for i, norms in enumerate(((1, 2), (1,))):  # the last convolution has no norm of its own
        source = f"model_down.patch_embed.proj{i + 1}"
        for k in (1, 2):
            found |= _layer(f"{source}.conv{k}", f"embed_{i}/conv{k}", torch_import.conv)
        for k in norms:
            found |= _norm(f"{source}.norm{k}", f"embed_{i}/norm{k}")
    return found


def _encoder(net: Any) -> dict[str, Weight]:
    found = {}
    for i, depth in enumerate(net.depths):
        source = f"model_down.layers.{i}"
        for b in range(depth):
            found |= _block(f"{source}.blocks.{b}", f"encoder_{i}_{b}", "qkv")
        found |= _norm(f"model_down.norm{i}", f"norm_{i}")
        if i < 3:
            found |= _norm(f"{source}.downsample.norm", f"merge_norm_{i}")
            found |= _layer(f"{source}.downsample.reduction", f"merge_{i}", torch_import.conv)
    return found


def _decoder(net: Any) -> dict[str, Weight]:
    found = {}
    for i, depth in enumerate(net.depths[:3]):
        source = f"decoder.layers.{i}"
        for b in range(depth):
            linear = "qkv" if b else "kv"
            found |= _block(f"{source}.blocks.{b}", f"decoder_{i}_{b}", linear)
        found |= _norm(f"{source}.Upsample.norm", f"up_norm_{i}")
        found |= _layer(f"{source}.Upsample.up", f"up_{i}", torch_import.conv_transpose)
        if i == 0 or net.deep_supervision:
            found |= _layer(f"final.{i}.up", f"head_{i}", torch_import.conv_transpose)
    return found


def _block(source: str, target: str, linear: str) -> dict[str, Weight]:
    table = f"{source}.attn.relative_position_bias_table"
    found = {table: Weight(f"params/{target}/table")}
    for part in ("norm1", "norm2"):
        found |= _norm(f"{source}.{part}", f"{target}/{part}")
    for part in (f"attn.{linear}", "attn.proj", "mlp.fc1", "mlp.fc2"):
        name = part.partition(".")[2]
        found |= _layer(f"{source}.{part}", f"{target}/{name}", torch_import.linear)
    return found


def _layer(source: str, target: str, layout: Callable[..., Any]) -> dict[str, Weight]:
    return {
        f"{source}.weight": Weight(f"params/{target}/kernel", layout),
        f"{source}.bias": Weight(f"params/{target}/bias"),
    }


def _norm(source: str, target: str) -> dict[str, Weight]:
    return {
        f"{source}.weight": Weight(f"params/{target}/scale"),
        f"{source}.bias": Weight(f"params/{target}/bias"),
    }
