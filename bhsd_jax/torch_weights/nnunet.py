"""How nnU-Net names the weights of its two networks.

Source: `dynamic_network_architectures` 0.4.4.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bhsd_jax.models import nnunet
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.nnunet import PlainConvUNet, ResidualEncoderUNet
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

UNet = PlainConvUNet | ResidualEncoderUNet
REFERENCES = ("PlainConvUNet", "ResidualEncoderUNet")
MODULES = (PlainConvUNet, ResidualEncoderUNet)
_ALIASES = (  # the same tensor under a second name; a conv unit lists its parts once more
    (r"^decoder\.encoder\.", "encoder."),
    (r"\.all_modules\.0\.", ".conv."),
    (r"\.all_modules\.[12]\.", ".norm."),  # 2 where a dropout, which has no weights, comes before
)
_SHARED = ("input_channels", "n_stages", "features_per_stage", "kernel_sizes", "strides")
_SHARED += ("num_classes", "n_conv_per_stage_decoder")
_REQUIRED = {
    "PlainConvUNet": (*_SHARED, "n_conv_per_stage"),
    "ResidualEncoderUNet": (*_SHARED, "n_blocks_per_stage"),
}
_NORMS = {"InstanceNorm3d": "instance", "BatchNorm3d": "batch"}
_OPTIONAL = (
    "conv_bias",
    "deep_supervision",
    "norm_op_kwargs",
    "dropout_op_kwargs",
    "nonlin_kwargs",
)
_OPTIONAL += ("bottleneck_channels", "stem_channels")


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of one of the two classes; layer types may be names or dotted paths.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    arguments = {"conv_bias": False, "deep_supervision": False, **constructor}
    _require_supported(reference, arguments)
    residual = reference == "ResidualEncoderUNet"
    stages = arguments["n_stages"]
    given, norm = arguments.get("norm_op_kwargs") or {}, str(_name(arguments["norm_op"]))
    fields = {
        "num_classes": arguments["num_classes"],
        "features": _each(arguments["features_per_stage"], stages),
        "strides": _triples(arguments["strides"], stages),
        "kernels": _triples(arguments["kernel_sizes"], stages),
        # PyTorch counts decoder stages from the lowest resolution.
        "convs_decoder": _each(arguments["n_conv_per_stage_decoder"], stages - 1)[::-1],
        "deep_supervision": bool(arguments["deep_supervision"]),
        "conv_bias": bool(arguments["conv_bias"]),
        "epsilon": _number(given.get("eps", 1e-5)),
        "norm": _NORMS[norm],
        "affine": bool(given.get("affine", norm == "BatchNorm3d")),
        "slope": _slope(arguments),
    }
    if residual:
        fields["blocks_encoder"] = _each(arguments["n_blocks_per_stage"], stages)
        fields["stem"] = arguments.get("stem_channels")
        if _name(arguments.get("block")) == "BottleneckD":
            fields["bottleneck"] = _each(arguments["bottleneck_channels"], stages)
        module = ResidualEncoderUNet(**fields)
    else:
        fields["convs_encoder"] = _each(arguments["n_conv_per_stage"], stages)
        module = PlainConvUNet(**fields)
    return recipe(module, arguments["input_channels"])


def recipe(module: UNet, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    residual = isinstance(module, ResidualEncoderUNet)
    weights = _residual_encoder(module) if residual else _plain_encoder(module)
    weights |= _decoder(module)
    image = (1, *module.stride, channels)
    return Recipe(
        module,
        image,
        weights,
        _canonical,
        unused=functools.partial(_is_unused, module),
        completed=functools.partial(_completed, module),
    )


def constructor_of(module: Any, channels: int) -> tuple[str, dict[str, Any]]:
    """Class and arguments of the PyTorch twin: what `from_torch` makes `module` of.

    Raises:
        ValueError: If it is another network than nnU-Net's two.
    """
    reference = type(module).__name__
    if reference not in REFERENCES:
        raise UserError(f"{reference}: only {' and '.join(REFERENCES)} have a twin in nnU-Net")
    stages = len(module.features)
    arguments = {
        "input_channels": channels,
        "num_classes": module.num_classes,
        "n_stages": stages,
        "features_per_stage": list(module.features),
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": [list(kernel) for kernel in nnunet.kernels_of(module)],
        "strides": [list(stride) for stride in nnunet.strides_of(module)],
        "n_conv_per_stage_decoder": list(nnunet.counts(module, "convs_decoder", stages - 1)[::-1]),
        "conv_bias": module.conv_bias,
        "norm_op": f"torch.nn.{next(n for n, ours in _NORMS.items() if ours == module.norm)}",
        "norm_op_kwargs": {"eps": module.epsilon, "affine": module.affine},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": module.slope, "inplace": True},
        "deep_supervision": module.deep_supervision,
    }
    if reference == "PlainConvUNet":
        convs = nnunet.counts(module, "convs_encoder", stages)
        return reference, arguments | {"n_conv_per_stage": list(convs)}
    arguments["n_blocks_per_stage"] = list(nnunet.blocks_of(module))
    if module.stem is not None:
        arguments["stem_channels"] = module.stem
    if module.bottleneck:
        inner = list(nnunet.counts(module, "bottleneck", stages))
        arguments |= {"block": "BottleneckD", "bottleneck_channels": inner}
    return reference, arguments


def _completed(module: UNet, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With every name PyTorch's own has: second names, and heads that are never computed, as 0."""
    whole = dict(state)
    for s in range(1, len(module.features) - 1):
        head = f"decoder.seg_layers.{len(module.features) - 2 - s}"
        shape = (module.num_classes, module.features[s], 1, 1, 1)
        whole.setdefault(f"{head}.weight", np.zeros(shape, np.float32))
        whole.setdefault(f"{head}.bias", np.zeros(shape[:1], np.float32))
    for main, second in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
        whole |= {n.replace(main, second): v for n, v in whole.items() if main in n}
    return whole | {f"decoder.{n}": v for n, v in whole.items() if n.startswith("encoder.")}


def _plain_encoder(module: PlainConvUNet) -> dict[str, Weight]:
    weights = {}
    stages = len(module.features)
    for s, convs in enumerate(nnunet.counts(module, "convs_encoder", stages)):
        for i in range(convs):
            weights |= _unit(module, f"encoder.stages.{s}.0.convs.{i}", f"encoder_{s}/conv_{i}")
    return weights


def _residual_encoder(module: ResidualEncoderUNet) -> dict[str, Weight]:
    weights = _unit(module, "encoder.stem.convs.0", "stem")
    channels = module.features[0] if module.stem is None else module.stem
    parts = ("conv1", "conv2", "conv3") if module.bottleneck else ("conv1", "conv2")
    for s, blocks in enumerate(nnunet.blocks_of(module)):
        for b in range(blocks):
            source, target = f"encoder.stages.{s}.blocks.{b}", f"encoder_{s}/block_{b}"
            for part in parts:
                weights |= _unit(module, f"{source}.{part}", f"{target}_{part}")
            if channels != module.features[s]:
                # In the reference's list of shortcut steps a pooling may come first.
                index = int(nnunet.strides_of(module)[s] != (1, 1, 1))
                skip = _unit(module, f"{source}.skip.{index}", f"{target}_skip", bias=False)
                weights |= skip
            channels = module.features[s]
    return weights


def _decoder(module: UNet) -> dict[str, Weight]:
    weights = {}
    stages = len(module.features) - 1
    for s, convs in enumerate(nnunet.counts(module, "convs_decoder", stages)):
        u = stages - 1 - s
        weights |= layout.layer(
            f"decoder.transpconvs.{u}", f"up_{s}", layout.CONV_TRANSPOSE, bias=module.conv_bias
        )
        for i in range(convs):
            weights |= _unit(module, f"decoder.stages.{u}.convs.{i}", f"decoder_{s}/conv_{i}")
        if s == 0 or module.deep_supervision:
            weights |= layout.layer(f"decoder.seg_layers.{u}", f"head_{s}", layout.CONV)
    return weights


def _unit(module: UNet, source: str, target: str, bias: bool | None = None) -> dict[str, Weight]:
    bias = module.conv_bias if bias is None else bias
    weights = layout.layer(f"{source}.conv", f"{target}/conv", layout.CONV, bias=bias)
    weights |= layout.norm(f"{source}.norm", f"{target}/norm") if module.affine else {}
    if module.norm == "batch":
        weights |= layout.running_statistics(f"{source}.norm", f"{target}/norm")
    return weights


def _canonical(name: str) -> str:
    for pattern, main in _ALIASES:
        name = re.sub(pattern, main, name)
    return name


def _is_unused(module: UNet, name: str) -> bool:
    """Heads of lower stages exist in every file, but count only under deep supervision.

    A batch norm counts the batches it has seen, on which nothing depends.
    """
    if module.norm == "batch" and name.endswith(".norm.num_batches_tracked"):
        return True
    lower = len(module.features) - 2
    match = re.fullmatch(r"decoder\.seg_layers\.(\d+)\.(weight|bias)", name)
    return match is not None and int(match[1]) < lower


def _require_supported(reference: str, arguments: Mapping[str, Any]) -> None:
    norm = arguments.get("norm_op_kwargs") or {}
    batch = _name(arguments.get("norm_op")) == "BatchNorm3d"
    choices = {  # argument: what it is, what is supported
        "conv_op": (_name(arguments.get("conv_op", "Conv3d")), ("Conv3d",)),
        "norm_op": (_name(arguments.get("norm_op")), tuple(_NORMS)),
        "track_running_stats": (norm.get("track_running_stats", batch), (batch,)),
        # Nothing is dropped in prediction.
        "dropout_op": (_name(arguments.get("dropout_op")), (None, "Dropout3d", "Dropout")),
        "nonlin": (_name(arguments.get("nonlin")), ("LeakyReLU", "ReLU")),
        "nonlin_first": (arguments.get("nonlin_first", False), (False,)),
        "block": (_name(arguments.get("block")), (None, "BasicBlockD", "BottleneckD")),
    }
    wrong = [
        f"{name}={given!r} (supported: {', '.join(map(repr, good))})"
        for name, (given, good) in choices.items()
        if given not in good
    ]
    names = (*choices, *_OPTIONAL, *_REQUIRED[reference])
    wrong += [f"{name} is not known" for name in arguments if name not in names]
    wrong += [f"{name} is missing" for name in _REQUIRED[reference] if name not in arguments]
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")


def _name(layer: Any) -> str | None:
    """The class alone: `torch.nn.LeakyReLU` and `LeakyReLU` are one."""
    return None if layer is None else str(layer).rpartition(".")[2]


def _slope(arguments: Mapping[str, Any]) -> float:
    if _name(arguments["nonlin"]) == "ReLU":
        return 0.0
    return _number((arguments.get("nonlin_kwargs") or {}).get("negative_slope", 0.01))


def _number(value: Any) -> float:
    """Also out of a remark such as "default 0.01"."""
    return float(str(value).split()[-1])


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _triples(value: Any, stages: int) -> tuple[Triple, ...]:
    d_h_w = (_each(entry, 3) for entry in _each(value, stages))
    return tuple((d, h, w) for d, h, w in d_h_w)
