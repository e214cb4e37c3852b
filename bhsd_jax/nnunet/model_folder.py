"""The plans.json and dataset.json by which nnU-Net predicts with a network that was trained here.

Source: nnU-Net v2.8.1, `PlansManager`, `ConfigurationManager`, `LabelManager`, `nnUNetPredictor`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bhsd_jax.labels import Labels
from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.dataset_json import BACKGROUND, IGNORE
from bhsd_jax.nnunet.dataset_plan import CASCADE, FULL, PLANAR
from bhsd_jax.volume import Plan, Shape

PLANS_NAME, TRAINER = "nnUNetPlans", "nnUNetTrainer"
_OF_A_DATA_SET = ("input_channels", "num_classes", "deep_supervision")  # not in a plan
_PACKAGE = "dynamic_network_architectures"
_CLASSES = ("conv_op", "norm_op", "nonlin")  # arguments that name one
_PAIRS = ("SI", "AP", "RL")  # of letters, in the order of a reader's axes: z, y, x


def configuration_of(plan: Plan, named: str) -> str:
    """What nnU-Net calls the configuration of a plan; a name of its own stays."""
    usual = PLANAR if plan.planar else CASCADE if plan.previous_stage else FULL
    return usual if named in (PLANAR, CASCADE, FULL) else named


def reading(plan: Plan) -> tuple[str, Shape, str]:
    """The reader in whose arrays the plan's axes are found, its `transpose_forward`, and storage.

    The last are letters of x, y, z, as "LPS": so files must be stored, for that reader takes axes
    as they lie. "": it turns them, or the network was trained on axes as they lie.
    """
    if plan.axes == "file":
        return "SimpleITKIO", plan.transpose, ""
    wanted = [plan.axes[axis] for axis in plan.transpose]  # along D, H, W
    first, second, third = (
        next(index for index, pair in enumerate(_PAIRS) if letter in pair) for letter in wanted
    )
    order = first, second, third
    array = "".join(wanted[order.index(axis)] for axis in range(3))
    if array == "SAR":
        return "SimpleITKIOWithReorient", order, ""
    return "SimpleITKIO", order, array[::-1]


def plans(
    plan: Plan,
    network: tuple[str, Mapping[str, Any]],
    *,
    patch: Shape,
    foreground: Sequence[float],
    configuration: str,
) -> dict[str, Any]:
    """A plans.json of one configuration.

    Args:
        plan: Of the run.
        network: Class and arguments of the twin in PyTorch, as of 3D.
        patch: Tile, D, H, W.
        foreground: Of one channel of CT: clip from, subtract, divide by, clip to.
        configuration: As `configuration_of` names it.
    """
    reader, forward, _ = reading(plan)
    axes = slice(1, 3) if plan.planar else slice(0, 3)
    schemes, masks, statistics = _normalization(plan, foreground)
    settings = {
        "data_identifier": f"{PLANS_NAME}_{configuration}",
        "preprocessor_name": plans_json.PREPROCESSOR,
        "batch_size": plan.network.batch,
        "patch_size": list(patch[axes]),
        "median_image_size_in_voxels": list(plan.median_shape[axes]),
        "spacing": list(plan.spacing_mm[axes]),
        "normalization_schemes": schemes,
        "use_mask_for_norm": masks,
        **plans_json.resampling(),
        "architecture": _architecture(*network, planar=plan.planar),
        "batch_dice": plan.network.batch_dice,
    }
    if plan.previous_stage:
        settings["previous_stage"] = plan.previous_stage
    return {
        "dataset_name": plan.dataset,
        "plans_name": PLANS_NAME,
        "original_median_spacing_after_transp": list(plan.spacing_mm),
        "original_median_shape_after_transp": list(plan.median_shape),
        "image_reader_writer": reader,
        "transpose_forward": list(forward),
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": {configuration: settings},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": plans_json.LABEL_MANAGER,
        "foreground_intensity_properties_per_channel": statistics,
    }


def dataset(plan: Plan, labels: Labels, description: str = "") -> dict[str, Any]:
    """A dataset.json: channels, labels or regions, the license; of scans in NIfTI.

    Args:
        plan: Of the run.
        labels: What the network is asked for; of binary tasks not the plan's.
        description: For people.
    """
    names = [channel.name for channel in plan.channels] or [plan.modality.upper()]
    named: dict[str, Any] = {BACKGROUND: 0}
    for name, values in labels.targets:
        alone = len(values) == 1 and name not in labels.listed
        named[name] = values[0] if alone else list(values)
    if labels.ignore is not None:
        named[IGNORE] = labels.ignore
    found: dict[str, Any] = {
        "name": plan.dataset,
        "description": description,
        "licence": plan.license,  # as nnU-Net spells it
        "channel_names": {str(index): name for index, name in enumerate(names)},
        "labels": named,
        "file_ending": ".nii.gz",
    }
    if labels.regions:
        found["regions_class_order"] = list(labels.region_order)
    return found


def _normalization(
    plan: Plan, foreground: Sequence[float]
) -> tuple[list[str], list[bool], dict[str, dict[str, float]]]:
    """Of every channel: its class, whether inside a mask, and statistics."""
    if plan.channels:
        schemes = [channel.scheme for channel in plan.channels]
        masks = [channel.masked for channel in plan.channels]
        measured: list[Sequence[float]] = [channel.foreground for channel in plan.channels]
    else:
        schemes = [plans_json.NORMALIZATION[plan.modality]]
        masks, measured = [plan.use_mask_for_norm], [foreground]
    statistics: dict[str, dict[str, float]] = {
        str(index): {
            name: float(number) for name, number in zip(plans_json.STATISTICS, numbers, strict=True)
        }
        for index, numbers in enumerate(measured)
    }
    return schemes, masks, statistics


def _architecture(reference: str, arguments: Mapping[str, Any], *, planar: bool) -> dict[str, Any]:
    """Of 2D the axis across the slices is left out, along which kernels and strides are 1."""
    made = {name: value for name, value in arguments.items() if name not in _OF_A_DATA_SET}
    made |= {"dropout_op": None, "dropout_op_kwargs": None}
    imported = [*_CLASSES, "dropout_op"]
    if "block" in made:
        made["block"] = f"{_PACKAGE}.building_blocks.residual.{made['block']}"
        imported.append("block")
    if planar:
        for name in ("kernel_sizes", "strides"):
            made[name] = [list(sizes[1:]) for sizes in made[name]]
        made |= {name: made[name].replace("3d", "2d") for name in _CLASSES}
    return {
        "network_class_name": f"{_PACKAGE}.architectures.unet.{reference}",
        "arch_kwargs": made,
        "_kw_requires_import": imported,
    }
