"""How MONAI names and lays out the weights of the parts UNETR and Swin UNETR share.

Source: MONAI 1.6.1, `networks/blocks` (unetr_block, dynunet_block, mlp, patchembedding).
"""

import re
from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.conv import Triple
from bhsd_jax.models.norms import NormSpec, norm_options
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.layout import Weight

# Weights without influence: norms and layers of a cross-attention that is never run (written since
# MONAI 1.4), a token of classification and the third convolution of encoder blocks that keep their
# width (both in NVIDIA's published UNETR), the number of batches seen, and an index that follows
# from the window.
_UNUSED = (
    r"vit\.blocks\.\d+\.(norm_cross_attn|cross_attn)\..*"
    r"|vit\.patch_embedding\.cls_token"
    r"|encoder\d+\.(layer|blocks\.\d+\.1)\.(conv3|norm3)\..*"
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


def up(source: str, target: str) -> dict[str, Weight]:
    """A transposed convolution."""
    return layout.layer(f"{source}.conv", target, layout.CONV_TRANSPOSE, bias=False)


def conv_block(
    spec: NormSpec, source: str, target: str, *, projected: bool = False
) -> dict[str, Weight]:
    """Two convolutions and their norms; `projected`: a third on the shortcut."""
    weights = {}
    for i in (1, 2, 3) if projected else (1, 2):
        name = f"{source}.conv{i}.conv"
        weights |= layout.layer(name, f"{target}/conv{i}", layout.CONV, bias=False)
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
    """The last convolution, one voxel wide."""
    return layout.layer("out.conv.conv", target, layout.POINTWISE)


def transformer_block(
    source: str, target: str, attention: str, *, out: str, bias: bool
) -> dict[str, Weight]:
    """Attention with norms and MLP; query, key and value need no reordering.

    `attention` is the path of its layers below `target`, `out` the reference's word for the
    second of them.
    """
    linear = layout.LINEAR
    weights = layout.layer(f"{source}.attn.qkv", f"{target}{attention}/qkv", linear, bias=bias)
    weights |= layout.layer(f"{source}.attn.{out}", f"{target}{attention}/out", linear)
    for i in (1, 2):
        weights |= layout.norm(f"{source}.norm{i}", f"{target}/norm{i}")
        weights |= layout.layer(f"{source}.mlp.linear{i}", f"{target}/mlp/linear{i}", linear)
    return weights


def norm(spec: NormSpec, source: str, target: str) -> dict[str, Weight]:
    """A norm of the convolutional part; most kinds have no weights by default."""
    kind, options = norm_options(spec)
    weights = layout.norm(source, target) if options.get("affine") else {}
    return weights | (layout.running_statistics(source, target) if kind == "batch" else {})
