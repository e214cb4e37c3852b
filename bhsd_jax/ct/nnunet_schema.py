"""One configuration of nnU-Net's plans.json: writing it, and reading a network out of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from bhsd_jax.ct.topology import Planner, Pooling, widths
from bhsd_jax.volume import Network

NORMALIZATION = {"ct": "CTNormalization", "mr": "ZScoreNormalization"}
_RESAMPLING = {  # key in the file: (is_seg, spline order)
    "data": (False, 3),
    "seg": (True, 1),
    "probabilities": (False, 1),
}
_UNETS = {False: "PlainConvUNet", True: "ResidualEncoderUNet"}
_ENCODER = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}


def configuration(
    name: str,
    planner: Planner,
    pooling: Pooling,
    *,
    batch: int,
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    modality: str,
    num_channels: int,
    masked: bool,
    batch_dice: bool,
) -> dict[str, Any]:
    """Writes what nnU-Net calls a configuration: "2d", "3d_lowres" or "3d_fullres"."""
    # The residual planners share the default one's prepared data, except where it does not fit.
    owner = planner.plans_name if name == "3d_lowres" else "nnUNetPlans"
    function = "resample_data_or_seg_to_shape"
    resampling: dict[str, Any] = {}
    for what, (is_seg, order) in _RESAMPLING.items():
        resampling[f"resampling_fn_{what}"] = function
        resampling[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": is_seg,
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
    return {
        "data_identifier": f"{owner}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": list(pooling.patch),
        "median_image_size_in_voxels": list(median_shape),
        "spacing": list(spacing_mm),
        "normalization_schemes": [NORMALIZATION[modality]] * num_channels,
        "use_mask_for_norm": [masked] * num_channels,
        **resampling,
        "architecture": _architecture(planner, pooling),
        "batch_dice": batch_dice,
    }


def _architecture(planner: Planner, pooling: Pooling) -> dict[str, Any]:
    stages, axes = len(pooling.strides), len(pooling.patch)
    unet = _UNETS[planner.residual]
    arguments = {
        "n_stages": stages,
        "features_per_stage": list(widths(stages, axes)),
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [list(kernel) for kernel in pooling.kernels],
        "strides": [list(stride) for stride in pooling.strides],
        _ENCODER[unet]: list(planner.encoder(stages)),
        "n_conv_per_stage_decoder": list(planner.decoder(stages)),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
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
            raise ValueError(
                f"nnU-Net plans: no usable configuration {' -> '.join([*chain, name])}; "
                f"there are {', '.join(configurations) or 'none'}"
            )
        chain.append(name)
        name = configurations[name].get("inherits_from")
    return {key: value for link in reversed(chain) for key, value in configurations[link].items()}


def network(settings: Mapping[str, Any]) -> Network:
    """Reads the 3D U-Net of a resolved configuration, as nnU-Net 2.0 to 2.8 spell it.

    Raises:
        KeyError: If a setting is missing.
        ValueError: If it is another network than the plain or the residual-encoder U-Net, not 3D,
            or takes a coarser network's output as input.
    """
    architecture = settings["architecture"] if "architecture" in settings else _older(settings)
    unet = architecture["network_class_name"].rpartition(".")[2]
    found = architecture["arch_kwargs"]
    if unet not in _ENCODER or len(settings["patch_size"]) != 3 or settings.get("previous_stage"):
        raise ValueError(
            f"nnU-Net plans: need a 3D {' or '.join(_ENCODER)} that is no second stage; got {unet}, "
            f"patch {settings['patch_size']}, previous stage {settings.get('previous_stage')}"
        )
    return Network(
        patch=_triple(settings["patch_size"]),
        batch=int(settings["batch_size"]),
        features=tuple(found["features_per_stage"]),
        strides=tuple(_triple(stride) for stride in found["strides"]),
        kernels=tuple(_triple(kernel) for kernel in found["kernel_sizes"]),
        convs_encoder=tuple(found[_ENCODER[unet]]),
        convs_decoder=tuple(found["n_conv_per_stage_decoder"]),
        batch_dice=bool(settings["batch_dice"]),
    )


def _older(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the words of the files before 2.4, which held sizes, not constructor arguments."""
    unet = settings["UNet_class_name"]
    convs = settings["n_conv_per_stage_encoder"]
    base, widest = settings["UNet_base_num_features"], settings["unet_max_num_features"]
    arguments = {
        "features_per_stage": widths(len(convs), base=base, widest=widest),
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        _ENCODER.get(unet, ""): convs,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
    }
    return {"network_class_name": unet, "arch_kwargs": arguments}


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    d, h, w = (int(value) for value in values)
    return d, h, w
