"""How MONAI names and lays out the weights of the parts UNETR and Swin UNETR share."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bhsd_jax.models import torch_import
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.torch_import import Weight
from bhsd_jax.models.unetr_blocks import NormSpec, norm_options
from bhsd_jax.platform.errors import UserError

# Weights without influence: norms and layers of a cross-attention that is never run (written since
# MONAI 1.4), the number of batches seen, and an index that follows from the window.
_UNUSED = (
    r"vit\.blocks\.\d+\.(norm_cross_attn|cross_attn)\..*"
    r"|.*\.num_batches_tracked"
    r"|.*\.relative_position_index"
)


def is_unused(name: str) -> bool:
    """Whether a tensor of a state dict changes nothing."""
    return re.fullmatch(_UNUSED, name) is not None


def arguments(
    reference: str,
    given: Mapping[str, Any],
    *,
    required: tuple[str, ...],
    defaults: Mapping[str, Any],
    supported: Mapping[str, tuple],
) -> dict[str, Any]:
    """A reference's constructor arguments with its defaults filled in.

    Raises:
        ValueError: Lists what is unknown, missing, or has a value without a counterpart.
    """
    whole = {**defaults, **given}
    wrong = [f"{name} is not known" for name in given if name not in (*defaults, *required)]
    wrong += [f"{name} is missing" for name in required if name not in given]
    wrong += [
        f"{name}={whole[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in supported.items()
        if whole[name] not in values
    ]
    try:
        norm_options(norm_spec(whole["norm_name"]))
    except ValueError as error:
        wrong.append(f"norm_name: {error}")
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")
    return whole


def norm_spec(norm_name: Any) -> NormSpec:
    """A norm as the modules take it; from JSON it may be a list."""
    return norm_name if isinstance(norm_name, str) else tuple(norm_name)


def triple(value: Any) -> Triple:
    """One number stands for all three axes."""
    d, h, w = (value,) * 3 if isinstance(value, int) else value
    return d, h, w


def layer(
    source: str,
    target: str,
    bias: bool = True,
    layout: Callable[[np.ndarray], np.ndarray] = torch_import.linear,
) -> dict[str, Weight]:
    """A linear or convolution layer."""
    weights = {f"{source}.weight": Weight(f"params/{target}/kernel", layout)}
    if bias:
        weights[f"{source}.bias"] = Weight(f"params/{target}/bias")
    return weights


def scale_and_bias(source: str, target: str) -> dict[str, Weight]:
    """The learned part of a norm."""
    return {
        f"{source}.weight": Weight(f"params/{target}/scale"),
        f"{source}.bias": Weight(f"params/{target}/bias"),
    }


def norm(spec: NormSpec, source: str, target: str) -> dict[str, Weight]:
    """A norm of the convolutional part; most kinds have no weights by default."""
    kind, options = norm_options(spec)
    weights = scale_and_bias(source, target) if options.get("affine") else {}
    if kind == "batch":
        weights[f"{source}.running_mean"] = Weight(f"batch_stats/{target}/mean")
        weights[f"{source}.running_var"] = Weight(f"batch_stats/{target}/var")
    return weights


def up(source: str, target: str) -> dict[str, Weight]:
    """A transposed convolution."""
    return layer(f"{source}.conv", target, False, torch_import.conv_transpose)


def conv_block(
    spec: NormSpec, source: str, target: str, *, projected: bool = False
) -> dict[str, Weight]:
    """Two convolutions and their norms; `projected`: a third on the shortcut."""
    weights = {}
    for i in (1, 2, 3) if projected else (1, 2):
        name = f"{source}.conv{i}.conv"
        weights |= layer(name, f"{target}/conv{i}", False, torch_import.conv)
        weights |= norm(spec, f"{source}.norm{i}", f"{target}/norm{i}")
    return weights


def up_block(
    spec: NormSpec, source: str, target: str, *, residual: bool = True
) -> dict[str, Weight]:
    """Up-sampling and a convolution block; joined to the skip it always changes the channels."""
    weights = up(f"{source}.transp_conv", f"{target}/up")
    block = conv_block(spec, f"{source}.conv_block", f"{target}/block", projected=residual)
    return weights | block


def head(target: str = "head") -> dict[str, Weight]:
    """The last convolution, one voxel wide: a linear layer here."""
    return layer("out.conv.conv", target, True, pointwise)


def pointwise(weight: np.ndarray) -> np.ndarray:
    """(out, in, 1, 1, 1) -> [in out]."""
    return weight.squeeze((2, 3, 4)).T


def transformer_block(
    source: str, target: str, attention: str, *, out: str, bias: bool
) -> dict[str, Weight]:
    """Attention with norms and MLP; query, key and value need no reordering.

    `attention` is the path of its layers below `target`, `out` the reference's word for the
    second of them.
    """
    weights = layer(f"{source}.attn.qkv", f"{target}{attention}/qkv", bias)
    weights |= layer(f"{source}.attn.{out}", f"{target}{attention}/out")
    for i in (1, 2):
        weights |= scale_and_bias(f"{source}.norm{i}", f"{target}/norm{i}")
        weights |= layer(f"{source}.mlp.linear{i}", f"{target}/mlp/linear{i}")
    return weights
