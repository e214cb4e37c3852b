"""How nnU-Net's package of networks names Primus' weights.

Source: `dynamic_network_architectures` 0.4.4, `architectures.primus`.
"""

from collections.abc import Mapping
from typing import Any

from bhsd_jax.models import primus
from bhsd_jax.models.primus import Primus
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

_SIZES = {  # width, layers, heads
    "S": (396, 12, 6),
    "B": (792, 12, 12),
    "M": (864, 16, 12),
    "L": (1056, 24, 16),
}
_SIZED = {f"Primus{v}{size}": size for v in ("", "V2") for size in _SIZES}
REFERENCES = ("Primus", "PrimusV2", *_SIZED)
MODULES = (Primus,)
_FIELDS = {  # of the reference: ours
    "num_classes": "num_classes",
    "input_shape": "patch",
    "patch_embed_size": "token",
    "embed_dim": "width",
    "eva_depth": "layers",
    "eva_numheads": "heads",
    "mlp_ratio": "mlp_ratio",
    "num_register_tokens": "registers",
    "use_abs_pos_embed": "absolute",
    "use_rot_pos_emb": "rotary",
    "scale_attn_inner": "norm_attention",
    "init_values": "layer_scale",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path",
}
_REQUIRED = ("input_channels", "num_classes", "input_shape", "patch_embed_size", "embed_dim")
_DEFAULTS = {"eva_depth": 24, "eva_numheads": 16}  # where they are not those of our class
# What is left out of an input (for pretraining) is not; norm, activation and rotation are fixed.
_FIXED = {
    "patch_drop_rate": (0, 0.0),
    "decoder_norm": ("LayerNormNd",),
    "decoder_act": ("GELU",),
    "rope_impl": ("RotaryEmbeddingCat",),
    "rope_kwargs": (None, {}),
}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of `Primus` or `PrimusV2`, or of one of their sizes; class names may be dotted paths.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    given, second = dict(constructor), reference.startswith("PrimusV2")
    if reference in _SIZED:
        width, layers, heads = _SIZES[_SIZED[reference]]
        given |= {"embed_dim": width, "eva_depth": layers, "eva_numheads": heads}
        given["num_classes"] = given.pop("output_channels", given.get("num_classes"))
        given = {"init_values": 0.1, "scale_attn_inner": True, **given}
    given.pop("deep_supervision", None)  # nnU-Net gives it to every network; there is one head
    known = {"input_channels", *_FIELDS, *_FIXED}
    wrong = [f"{name} is not known" for name in given if name not in known]
    wrong += [f"{name} is missing" for name in _REQUIRED if given.get(name) is None]
    wrong += [
        f"{name}={given[name]!r} (supported: {', '.join(map(repr, good))})"
        for name, good in _FIXED.items()
        if name in given and _plain(given[name]) not in good
    ]
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")
    fields: dict[str, Any] = {_FIELDS[k]: v for k, v in (_DEFAULTS | given).items() if k in _FIELDS}
    fields |= {name: tuple(fields[name]) for name in ("patch", "token")}
    if second:  # it makes tokens of 8 x 8 x 8, whatever size the decoder is told
        fields["embedding"] = "residual"
    return recipe(Primus(**fields), given["input_channels"])


def recipe(module: Primus, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    patch = module.patch or module.stride
    weights = _embedding(module, channels)
    if module.registers:
        weights["register_tokens"] = Weight("params/registers")
    if module.absolute:
        weights["eva.pos_embed"] = Weight("params/positions")
    for i in range(module.layers):
        weights |= _block(module, f"eva.blocks.{i}", f"block_{i}")
    weights |= layout.norm("eva.norm", "norm")
    steps = len(primus.decoder_of(module)[0])
    for i in range(steps):
        # The last step is bare; the others are a sequence of it, a norm and an activation.
        name = f"up_projection.decode.{i}" + (".0" if i < steps - 1 else "")
        weights |= layout.layer(name, f"up_{i}", layout.CONV_TRANSPOSE)
        if i < steps - 1:
            weights |= layout.norm(f"up_projection.decode.{i}.1", f"up_norm_{i}")
    image = (1, *patch, channels)
    return Recipe(module, image, weights, _canonical, unused=lambda name: name == "mask_token")


def _embedding(module: Primus, channels: int) -> dict[str, Weight]:
    source = "down_projection"
    if module.embedding == "linear":
        return layout.layer(f"{source}.proj", "patch_embedding", layout.CONV)
    weights = _residual(f"{source}.stem", "embed_stem", bias=True, skip=channels != primus.STEM)
    for i in range(3):
        # The first stage keeps the channels of the stem.
        stage, target = f"{source}.stages.{i}", f"embed_{i}"
        weights |= _residual(stage, target, bias=False, skip=i > 0)
    return weights | layout.layer(f"{source}.final_proj", "embed_out", layout.CONV)


def _residual(source: str, target: str, *, bias: bool, skip: bool) -> dict[str, Weight]:
    """A stage of one block; where it halves, a pooling comes first in the list of its shortcut."""
    parts = {"conv1": "conv1", "conv2": "conv2"}
    if skip:
        parts[f"skip.{int(not bias)}"] = "skip"
    weights = {}
    for name, part in parts.items():
        own = f"{source}.blocks.0.{name}"
        has_bias = bias and part != "skip"
        weights |= layout.layer(
            f"{own}.conv", f"{target}/block_0_{part}/conv", layout.CONV, bias=has_bias
        )
        weights |= layout.norm(f"{own}.norm", f"{target}/block_0_{part}/norm")
    return weights


def _block(module: Primus, source: str, target: str) -> dict[str, Weight]:
    linear = {  # ours by theirs; keys alone have no bias
        "attn.q_proj": "query",
        "attn.k_proj": "key",
        "attn.v_proj": "value",
        "attn.proj": "out",
        "mlp.fc1_g": "gate",
        "mlp.fc1_x": "inner",
        "mlp.fc2": "mlp_out",
    }
    weights = {}
    for theirs, ours in linear.items():
        name, has_bias = f"{source}.{theirs}", ours != "key"
        weights |= layout.layer(name, f"{target}/{ours}", layout.LINEAR, bias=has_bias)
    norms = {"norm1": "norm1", "norm2": "norm2", "mlp.norm": "norm_mlp"}
    if module.norm_attention:
        norms["attn.norm"] = "norm_attention"
    for theirs, ours in norms.items():
        weights |= layout.norm(f"{source}.{theirs}", f"{target}/{ours}")
    if module.layer_scale is not None:
        for i in (1, 2):
            weights[f"{source}.gamma_{i}"] = Weight(f"params/{target}/scale{i}")
    return weights


def _canonical(name: str) -> str:
    """A convolution unit lists its parts once more."""
    return name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")


def _plain(value: Any) -> Any:
    """A class by its name alone: `torch.nn.GELU` and `GELU` are one."""
    return value.rpartition(".")[2] if isinstance(value, str) else value
