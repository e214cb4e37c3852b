"""CoTr: a convolutional encoder and decoder, a transformer between on the two deepest maps.

Its deformable attention is plain gathers, no kernel of its own; `DeformableAttention` says what
they cost.

Source: Xie et al. 2021, arXiv:2103.03024; CoTr 521b4cc, whose outputs and gradients it reproduces.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models import torch_import
from bhsd_jax.models.blocks import rematerialized, require_patch
from bhsd_jax.models.conv import ConvTranspose, Triple
from bhsd_jax.models.cotr_attention import DeformableEncoder, Options
from bhsd_jax.models.cotr_layers import (
    BackboneBlock,
    DecoderBlock,
    Head,
    Unit,
    fan_out_normal_transpose,
    upsample,
)
from bhsd_jax.models.torch_import import Recipe, Weight
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits

# For 5 mm slices (patch 20 x 320 x 256): the depth is halved twice only, as nnU-Net plans it.
HEAD_CT: dict[str, Any] = {"strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))}

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


class CoTr(nn.Module):
    """Four maps, each half the size of the last; two are refined; skips are added.

    Defaults are the published ones. With `deep_supervision` there are three more outputs, from
    the maps of stride `strides[0]` on, and only then the heads for them exist. In training,
    `norm` "batch" needs the collection `batch_stats` to be mutable.

    Raises:
        ValueError: If a field is not one of its choices, or the patch no multiple of `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (64, 192, 384)  # of the first three maps; the last as third
    blocks: tuple[int, ...] = (3, 3, 2)  # of one convolution, in the last three maps
    strides: tuple[Triple, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))  # of each map
    heads: int = 6
    layers: int = 6  # of the transformer
    points: int = 4  # places each query looks at, per head and map
    ffn: int = 1536
    dropout: float = 0.1  # in the transformer; key "dropout"
    norm: str = "instance"  # "instance", "batch", "group"
    weight_std: bool = False  # standardize the filters of all convolutions but the heads
    slope: float = 0.01  # of the leaky ReLU; 0: ReLU
    axes: str = "reference"  # with its swapped sampling axes, or "fixed"
    deep_supervision: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute blocks and layers in the backward pass

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        d, h, w = (math.prod(s) for s in zip(*self.strides, strict=True))
        return d, h, w

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        _require_fields(self)
        require_patch("CoTr", image.shape[1:4], self.stride)
        unit = functools.partial(
            Unit,
            norm=self.norm,
            weight_std=self.weight_std,
            slope=self.slope,
            train=train,
            dtype=self.dtype,
        )
        x = unit(self.features[0], (7, 7, 7), self.strides[0], name="stem")(image)
        maps, block = [x], rematerialized(BackboneBlock, self.remat)
        for i in range(3):
            features = self.features[min(i + 1, 2)]
            for b in range(self.blocks[i]):
                # The reference compares a stride tuple with 1: every first block projects.
                strides = self.strides[i + 1] if b == 0 else None
                x = block(unit, features, strides, name=f"stage_{i}_{b}")(x)
            maps.append(x)
        options = Options(
            self.heads, self.points, self.ffn, self.dropout, self.axes, train, self.dtype
        )
        transformer = DeformableEncoder(options, self.layers, self.remat, name="transformer")
        maps[2:] = transformer(tuple(maps[2:]))
        return self._decode(unit, maps)

    def _decode(self, unit: functools.partial, maps: list[Array]) -> Logits:
        block = rematerialized(DecoderBlock, self.remat)
        x, logits = maps[3], []
        for i in reversed(range(3)):
            up = functools.partial(
                ConvTranspose, use_bias=False, kernel_init=fan_out_normal_transpose
            )
            features = maps[i].shape[-1]
            up = up(features, self.strides[i + 1], dtype=self.dtype, name=f"up_{i}")
            x = block(unit, name=f"decoder_{i}")(up(x) + maps[i])
            if self.deep_supervision:
                logits.append(self._head(x, f"head_{i}"))
        # The reference up-samples, then classifies. Both are linear and blends sum to 1, so they
        # may change places, which spares a full-resolution map of `features[0]` channels.
        full = upsample(self._head(x, "head"), self.strides[0])
        return (full, *logits[::-1])

    def _head(self, x: Array, name: str) -> Array:
        return Head(self.num_classes, self.dtype, name=name)(x).astype(jnp.float32)


def _require_fields(net: CoTr) -> None:
    choices = {
        "norm": ("instance", "batch", "group"),
        "axes": ("reference", "fixed"),
    }
    for field, good in choices.items():
        if getattr(net, field) not in good:
            raise UserError(f"CoTr: {field} is {getattr(net, field)!r}; choose from {good}")
    for field, count in {"features": 3, "blocks": 3, "strides": 4}.items():
        if len(getattr(net, field)) != count:
            raise UserError(f"CoTr: {field} needs {count} entries; got {getattr(net, field)}")


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of `ResTranUnet`; its literal sizes may be given as arguments too, see `_FIELDS`.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    known = (*_REQUIRED, *_FIELDS, "img_size", "in_channels")
    wrong = [f"{name} is not known" for name in constructor if name not in known]
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
    weights = _convolutions(module) | _transformer(module)
    image = (1, *module.stride, constructor.get("in_channels", 1))
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
        up = Weight(f"params/up_{i}/kernel", torch_import.conv_transpose)
        weights[f"transposeconv_stage{i}.weight"] = up
        for k in (1, 2):
            source = f"stage{i}_de.resconv{k}"
            weights |= _unit(module, f"{source}.conv", f"{source}.norm", f"decoder_{i}/conv{k}")
        if module.deep_supervision:
            heads[f"ds{i}_cls_conv"] = f"head_{i}"
    for source, target in heads.items():
        weights[f"{source}.weight"] = Weight(f"params/{target}/kernel", torch_import.conv)
        weights[f"{source}.bias"] = Weight(f"params/{target}/bias")
    return weights


def _unit(module: CoTr, conv: str, norm: str, target: str) -> dict[str, Weight]:
    weights = {
        f"{conv}.weight": Weight(f"params/{target}/kernel", torch_import.conv),
        f"{norm}.weight": Weight(f"params/{target}/norm/scale"),
        f"{norm}.bias": Weight(f"params/{target}/norm/bias"),
    }
    if module.norm == "batch":
        weights[f"{norm}.running_mean"] = Weight(f"batch_stats/{target}/norm/mean")
        weights[f"{norm}.running_var"] = Weight(f"batch_stats/{target}/norm/var")
    return weights


def _transformer(module: CoTr) -> dict[str, Weight]:
    weights = {"encoder_Detrans.level_embed": Weight("params/transformer/level_embed")}
    linear = {
        "self_attn.sampling_offsets": "attention/offsets",
        "self_attn.attention_weights": "attention/weights",
        "self_attn.value_proj": "attention/value",
        "self_attn.output_proj": "attention/output",
        "linear1": "linear1",
        "linear2": "linear2",
    }
    for i in range(module.layers):
        source = f"encoder_Detrans.encoder.layers.{i}"
        target = f"params/transformer/layer_{i}"
        for old, new in linear.items():
            kernel = Weight(f"{target}/{new}/kernel", torch_import.linear)
            weights[f"{source}.{old}.weight"] = kernel
            weights[f"{source}.{old}.bias"] = Weight(f"{target}/{new}/bias")
        for norm in ("norm1", "norm2"):
            weights[f"{source}.{norm}.weight"] = Weight(f"{target}/{norm}/scale")
            weights[f"{source}.{norm}.bias"] = Weight(f"{target}/{norm}/bias")
    return weights


def _canonical(name: str) -> str:
    return name.removeprefix("U_ResTran3D.")


def _is_unused(name: str) -> bool:
    """Counters, and the heads that exist in every file but count only under deep supervision."""
    unused = r".*\.num_batches_tracked|ds[012]_cls_conv\.(weight|bias)"
    return re.fullmatch(unused, name) is not None
