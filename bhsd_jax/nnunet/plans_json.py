"""The configurations in nnU-Net's plans.json: planning them, and reading a network out of one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bhsd_jax.nnunet.topology import Planner, Pooling, fit, widths
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Network, Shape

# Of foreground intensities, in the order of `Plan.foreground`.
STATISTICS = ("percentile_00_5", "mean", "std", "percentile_99_5")
NORMALIZATION = {"ct": "CTNormalization", "mr": "ZScoreNormalization"}
PREPROCESSOR, LABEL_MANAGER = "DefaultPreprocessor", "LabelManager"  # nnU-Net's own classes
READERS = {  # by reader: what its arrays' axes are
    "SimpleITKIO": "file",
    "NibabelIO": "file",
    "NaturalImage2DIO": "file",
    "Tiff3DIO": "file",
    "NibabelIOWithReorient": "SAR",  # to R, A, S, then in the order z, y, x
    "SimpleITKIOWithReorient": "SAR",
}
_RESAMPLER = "resample_data_or_seg_to_shape"
_SPLINES = {  # key in the file: (is_seg, spline order)
    "data": (False, 3),
    "seg": (True, 1),
    "probabilities": (False, 1),
}
_UNETS = {False: "PlainConvUNet", True: "ResidualEncoderUNet"}
_LAYERS = {  # what all of nnU-Net's plans have in common, but for the number of axes
    "conv_bias": True,
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
_ENCODER = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
_PER_STAGE = ("n_conv_per_stage_decoder", "features_per_stage", *_ENCODER.values())
_PER_AXIS = ("kernel_sizes", "strides")
_COUNTS = (  # arguments that `network` reads, and those that come with a data set
    *("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder"),
    *(*_ENCODER.values(), "input_channels", "num_classes", "deep_supervision"),
)

_LOWRES_BELOW = 0.25  # patch / median scan in voxels under which a coarser network is wanted too
_LOWRES_GROWTH = 1.03  # of the spacing, per attempt
_LOWRES_SHRINK = 2  # a coarser network must make scans this many times smaller


@dataclass(frozen=True)
class Request:
    """What all configurations of one plan share."""

    planner: Planner
    memory_gb: float
    num_classes: int  # background included
    cases: int
    schemes: tuple[str, ...]  # normalization of each channel
    masked: bool  # z-scores inside the non-zero mask


def configurations(
    spacing_mm: list[float], median_shape: list[float], request: Request
) -> dict[str, dict[str, Any]]:
    """Plans 2d, 3d_fullres, and the coarser network before it where the patch sees little.

    Both arguments are along the transposed axes. A median of one slice gives 2d alone.

    Source: nnU-Net v2.8.1, `ExperimentPlanner.plan_experiment`.
    """
    voxels = math.prod(median_shape)
    planned = {"2d": _planned("2d", spacing_mm[1:], median_shape[1:], voxels, request)}
    if median_shape[0] == 1:
        return planned
    full = _planned("3d_fullres", spacing_mm, median_shape, voxels, request)
    low = _lowres(full, request)
    if low is None:
        return {**planned, "3d_fullres": full}
    return {
        **planned,
        "3d_lowres": {**low, "next_stage": "3d_cascade_fullres"},
        # Patches that see little of a scan take the Dice loss over the whole batch.
        "3d_fullres": {**full, "batch_dice": True},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }


def _lowres(full: Mapping[str, Any], request: Request) -> dict[str, Any] | None:
    """Coarser spacings are tried until the patch covers a quarter of the scan."""
    median, spacing = full["median_image_size_in_voxels"], list(full["spacing"])
    plan, voxels = None, math.prod(median)
    patch = full["patch_size"]
    while math.prod(patch) / voxels < _LOWRES_BELOW:
        coarsest = max(spacing)
        fine = [coarsest / s > 2 for s in spacing]  # these catch up first
        grown = fine if any(fine) else [True] * 3
        spacing = [s * _LOWRES_GROWTH if yes else s for s, yes in zip(spacing, grown, strict=True)]
        shape = [a / b * n for a, b, n in zip(full["spacing"], spacing, median, strict=True)]
        voxels = math.prod(shape)
        plan = _planned("3d_lowres", spacing, [round(n) for n in shape], voxels, request)
        patch = plan["patch_size"]
    return None if math.prod(median) / voxels < _LOWRES_SHRINK else plan


def _planned(
    name: str,
    spacing: Sequence[float],
    median: Sequence[float],
    scan_voxels: float,
    request: Request,
) -> dict[str, Any]:
    planner = request.planner
    pooling, batch = fit(
        spacing,
        median,
        scan_voxels * request.cases,
        planner,
        num_classes=request.num_classes,
        memory_gb=request.memory_gb,
    )
    # The residual planners share the default one's prepared data, except where it does not fit.
    owner = planner.plans_name if name == "3d_lowres" else "nnUNetPlans"
    return {
        "data_identifier": f"{owner}_{name}",
        "preprocessor_name": PREPROCESSOR,
        "batch_size": batch,
        "patch_size": list(pooling.patch),
        "median_image_size_in_voxels": list(median),
        "spacing": list(spacing),
        "normalization_schemes": list(request.schemes),
        "use_mask_for_norm": [
            request.masked and scheme == NORMALIZATION["mr"] for scheme in request.schemes
        ],
        **resampling(),
        "architecture": _architecture(planner, pooling),
        "batch_dice": name == "2d",
    }


def resampling() -> dict[str, Any]:
    """How nnU-Net plans that data, seg and probabilities are resampled."""
    fields: dict[str, Any] = {}
    for what, (is_seg, order) in _SPLINES.items():
        fields[f"resampling_fn_{what}"] = _RESAMPLER
        settings = {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
        fields[f"resampling_fn_{what}_kwargs"] = settings
    return fields


def _architecture(planner: Planner, pooling: Pooling) -> dict[str, Any]:
    stages, axes = len(pooling.strides), len(pooling.patch)
    unet = _UNETS[planner.residual]
    arguments = {
        "n_stages": stages,
        "features_per_stage": list(widths(stages, axes)),
        **_LAYERS,
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [list(kernel) for kernel in pooling.kernels],
        "strides": [list(stride) for stride in pooling.strides],
        _ENCODER[unet]: list(planner.encoder(stages)),
        "n_conv_per_stage_decoder": list(planner.decoder(stages)),
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{unet}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def resolve(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings of a configuration with those it inherits; its own win.

    Raises:
        ValueError: If it, or what it inherits from, is not there; or it inherits from itself.
    """
    configurations = plans.get("configurations", {})
    chain: list[str] = []
    while name is not None:
        if name not in configurations or name in chain:
            raise UserError(
                f"nnU-Net plans: no usable configuration {' -> '.join([*chain, name])}; "
                f"there are {', '.join(configurations) or 'none'}"
            )
        chain.append(name)
        name = configurations[name].get("inherits_from")
    return {key: value for link in reversed(chain) for key, value in configurations[link].items()}


def intensities(plans: Mapping[str, Any]) -> Mapping[str, Any]:
    """Foreground statistics by number of the channel; the first v2 called channels modalities.

    Source: nnU-Net v2.8.1, `PlansManager.foreground_intensity_properties_per_channel`.
    """
    name = "foreground_intensity_properties"
    return plans.get(f"{name}_per_channel", plans.get(f"{name}_by_modality")) or {}


def network(settings: Mapping[str, Any]) -> Network:
    """Reads the U-Net of a resolved configuration, as nnU-Net 2.0 to 2.8 spell it.

    A 2D network is the 3D one of patches of one slice, with kernels and strides of 1 across it.

    Raises:
        KeyError: If a setting is missing.
        ValueError: If it is another network than the plain or the residual-encoder U-Net.
    """
    unet, arguments = architecture(settings)
    if unet not in _ENCODER or len(settings["patch_size"]) not in (2, 3):
        raise UserError(
            f"nnU-Net plans: need a 2D or 3D {' or '.join(_ENCODER)}; got {unet}, patch "
            f"{settings['patch_size']}"
        )
    return Network(
        patch=with_slice(settings["patch_size"]),
        batch=int(settings["batch_size"]),
        features=tuple(arguments["features_per_stage"]),
        strides=tuple(with_slice(stride) for stride in arguments["strides"]),
        kernels=tuple(with_slice(kernel) for kernel in arguments["kernel_sizes"]),
        convs_encoder=tuple(arguments[_ENCODER[unet]]),
        convs_decoder=tuple(arguments["n_conv_per_stage_decoder"])[::-1],  # theirs: lowest first
        batch_dice=bool(settings["batch_dice"]),
        residual=unet == _UNETS[True],
    )


def architecture(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class of the network, without its module, and arguments of its constructor.

    Raises:
        KeyError: If a setting is missing.
    """
    described = settings["architecture"] if "architecture" in settings else _older(settings)
    arguments = _by_stage(described["arch_kwargs"], axes=len(settings["patch_size"]))
    return described["network_class_name"].rpartition(".")[2], arguments


def _by_stage(given: Mapping[str, Any], axes: int) -> dict[str, Any]:
    """Arguments with an entry for every stage and axis, where one number stands for all of them.

    Source: `dynamic_network_architectures` 0.4.4, `PlainConvEncoder` and `UNetDecoder`.
    """
    arguments = dict(given)
    stages = arguments.get("n_stages", 0)
    for name in (*_PER_STAGE, *_PER_AXIS):
        if isinstance(arguments.get(name), int):
            entries = stages - 1 if name == _PER_STAGE[0] else stages
            arguments[name] = [arguments[name]] * entries
    for name in (name for name in _PER_AXIS if name in arguments):
        sizes = arguments[name]
        arguments[name] = [[size] * axes if isinstance(size, int) else size for size in sizes]
    return arguments


def unusual_layers(settings: Mapping[str, Any]) -> list[str]:
    """What of a resolved configuration's layers is not as nnU-Net plans them, `name=value` each.

    Raises:
        KeyError: If a setting is missing.
    """
    _, arguments = architecture(settings)
    norm, dropout, nonlin = (
        arguments.get(f"{name}_kwargs") or {} for name in ("norm_op", "dropout_op", "nonlin")
    )
    drops = dropout.get("p", 0.5) > 0
    parts = {  # as built, as planned; what is not said is PyTorch's default
        "conv_op": (_layer(arguments.get("conv_op")), "Conv"),
        "conv_bias": (bool(arguments.get("conv_bias", False)), True),
        "norm_op": (_layer(arguments.get("norm_op")), "InstanceNorm"),
        "norm_op_kwargs.eps": (float(norm.get("eps", 1e-5)), 1e-5),
        "norm_op_kwargs.affine": (bool(norm.get("affine", False)), True),
        "norm_op_kwargs.track_running_stats": (bool(norm.get("track_running_stats")), False),
        "dropout_op": (_layer(arguments.get("dropout_op") if drops else None), ""),
        "nonlin": (_layer(arguments.get("nonlin")), "LeakyReLU"),
        "nonlin_kwargs.negative_slope": (float(nonlin.get("negative_slope", 0.01)), 0.01),
        "block": (_layer(arguments.get("block")) or "BasicBlockD", "BasicBlockD"),
    }
    found = [f"{name}={built}" for name, (built, planned) in parts.items() if built != planned]
    known = (*_COUNTS, *_LAYERS, "block")
    return found + [f"{k}={v}" for k, v in arguments.items() if k not in known and v]


def unusual_resampling(settings: Mapping[str, Any], every: Sequence[str]) -> list[str]:
    """Lists what of data, seg and probabilities is not resampled as nnU-Net plans it, and how."""
    found = []
    for what in every:
        used = settings.get(f"resampling_fn_{what}", _RESAMPLER)
        how = {"order": _SPLINES[what][1], "order_z": 0, "force_separate_z": None}
        planned = tuple(how.values())
        how |= settings.get(f"resampling_fn_{what}_kwargs", {})
        orders = how["order"], how["order_z"], how["force_separate_z"]
        if used != _RESAMPLER or orders != planned:
            found.append(f"resampling of {what} by {used} {how}")
    return found


def _layer(name: Any) -> str:
    """The class alone, without its number of axes: of `torch.nn.Conv3d` Conv; "" of none."""
    return str(name or "").rpartition(".")[2].removesuffix("2d").removesuffix("3d")


def _older(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture out of a file before 2.4, which has sizes and no constructor arguments."""
    unet = settings["UNet_class_name"]
    convs = settings["n_conv_per_stage_encoder"]
    base, widest = settings["UNet_base_num_features"], settings["unet_max_num_features"]
    arguments = {
        **_LAYERS,
        "n_stages": len(convs),
        "features_per_stage": widths(len(convs), base=base, widest=widest),
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        _ENCODER.get(unet, ""): convs,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
    }
    return {"network_class_name": unet, "arch_kwargs": arguments}


def is_planar(settings: Mapping[str, Any]) -> bool:
    """Whether a resolved configuration is 2D: slices on their own, as far apart as they are."""
    return len(settings["patch_size"]) == 2


def previous_stage(settings: Mapping[str, Any]) -> str:
    """The configuration whose label maps a resolved one takes as input; empty: none."""
    return str(settings.get("previous_stage") or "")


def with_slice(values: Sequence[float]) -> Shape:
    """Three whole numbers; of two, those of a slice, the first is 1."""
    d, h, w = (int(value) for value in (values if len(values) == 3 else (1, *values)))
    return d, h, w
