"""A trained nnU-Net v2 model, as its plans.json and dataset.json tell of it.

nnU-Net takes a scan's axes as they lie in the file and normalizes before it resamples; the plans
made here say so, so that a network sees what it was trained on.
"""

import re
from collections.abc import Mapping
from typing import Any

from bhsd_jax.ct.channels import SCHEMES
from bhsd_jax.nnunet import dataset_json, plans_json
from bhsd_jax.nnunet.planner import from_nnunet_plans
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Channel, Plan

_MODALITIES = {scheme: modality for modality, scheme in plans_json.NORMALIZATION.items()}
_PRIMUS = re.compile(r"(nnUNet)?_Primus(?P<version>(V2)?)_?(?P<size>[SBML])_")  # its trainers


def plan_of(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str, source_sha256: str
) -> Plan:
    """What prediction must know of the data, as nnU-Net's own prediction does it.

    Raises:
        ValueError: Lists everything that has no counterpart here: other normalizations, readers,
            or ways to resample; or the network does.
    """
    network, spacing, transpose = from_nnunet_plans(plans, configuration)
    settings = plans_json.resolve(plans, configuration)
    _require_supported(plans, dataset, settings)
    channels = _channels_of(plans, dataset, settings)
    modality = _MODALITIES.get(channels[0].scheme, "mr") if len(channels) == 1 else "mr"
    usual = len(channels) == 1 and channels[0].scheme in _MODALITIES
    labels = dataset_json.labels(dataset, "nnU-Net dataset.json")
    return Plan(
        dataset=str(plans.get("dataset_name") or dataset.get("name", "nnU-Net")),
        classes=labels.classes,
        modality=modality,
        spacing_mm=spacing,
        transpose=transpose,
        crop_hu=None,
        foreground=channels[0].foreground,
        median_shape=plans_json.with_slice(settings["median_image_size_in_voxels"]),
        network=network,
        source_sha256=source_sha256,
        license=str(dataset.get("licence") or dataset.get("license") or ""),
        notes=(f"imported from nnU-Net, configuration {configuration}",),
        axes=plans_json.READERS[plans["image_reader_writer"]],
        normalize_first=True,
        use_mask_for_norm=usual and modality == "mr" and channels[0].masked,
        channels=() if usual else channels,
        regions=labels.regions,
        region_order=labels.region_order,
        ignore=labels.ignore,
        listed=labels.listed,
        planar=plans_json.is_planar(settings),
        previous_stage=plans_json.previous_stage(settings),
    )


def network_of(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str, trainer: str = ""
) -> tuple[str, dict[str, Any]]:
    """The class of the network and its constructor arguments, all heads included.

    The trainers of Primus build it for the patch of the plans, whatever network those name.

    Source: nnU-Net v2.8.1, `primus_trainers`.

    Raises:
        ValueError: If there is no such configuration, or labels or channels are not given.
    """
    settings = plans_json.resolve(plans, configuration)
    reference, arguments = plans_json.architecture(settings)
    if named := _PRIMUS.match(trainer):
        reference = f"Primus{named['version']}{named['size']}"
        arguments = {"input_shape": list(settings["patch_size"]), "patch_embed_size": [8, 8, 8]}
        arguments |= {"drop_path_rate": 0.2, "scale_attn_inner": True, "init_values": 0.1}
    elif plans_json.is_planar(settings):
        arguments = _with_slices(arguments)
    labels = dataset_json.labels(dataset, "nnU-Net dataset.json")
    # The second network of a cascade sees where the first has put each foreground label.
    maps = len(labels.classes) - 1 if plans_json.previous_stage(settings) else 0
    given = {
        "input_channels": len(dataset_json.channels(dataset)) + maps,
        "num_classes": labels.outputs,
        "deep_supervision": True,
    }
    return reference, {**arguments, **given}


def _with_slices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A 2D network as the 3D one that treats every slice alone."""
    made = dict(arguments)
    for name in ("kernel_sizes", "strides"):
        made[name] = [list(plans_json.with_slice(values)) for values in made[name]]
    for name in ("conv_op", "norm_op", "dropout_op"):
        if made.get(name):
            made[name] = str(made[name]).replace("2d", "3d")
    return made


def _channels_of(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Channel, ...]:
    """Normalization of every channel, with the statistics of those that need them."""
    measured = plans_json.intensities(plans)
    masks = settings["use_mask_for_norm"]
    named = dataset_json.channels(dataset)
    made = []
    for index, scheme in enumerate(settings["normalization_schemes"]):
        if scheme == "CTNormalization" and str(index) not in measured:
            raise UserError("nnU-Net plans: CTNormalization, but no foreground intensities of it")
        first = measured.get(str(index), {})
        low, mean, std, high = (float(first.get(name, 0)) for name in plans_json.STATISTICS)
        made.append(Channel(named[index][0], scheme, (low, mean, std, high), bool(masks[index])))
    return tuple(made)


def _require_supported(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    schemes = settings["normalization_schemes"]
    wrong = []
    if not len(dataset_json.channels(dataset)) == len(schemes) > 0:
        channels = len(dataset_json.channels(dataset))
        wrong.append(f"{channels} channels in dataset.json, {len(schemes)} in the plans")
    wrong += [f"{s} (known: {', '.join(SCHEMES)})" for s in schemes if s not in SCHEMES]
    reader = plans.get("image_reader_writer")
    if reader not in plans_json.READERS:
        wrong.append(f"reader {reader} (known: {', '.join(plans_json.READERS)})")
    if settings.get("preprocessor_name", plans_json.PREPROCESSOR) != plans_json.PREPROCESSOR:
        wrong.append(f"preprocessor {settings['preprocessor_name']}")
    manager = plans.get("label_manager") or plans_json.LABEL_MANAGER
    if manager != plans_json.LABEL_MANAGER:
        wrong.append(f"label manager {manager}")
    wrong += plans_json.unusual_resampling(settings, ("data", "probabilities"))
    if wrong:
        raise UserError(f"nnU-Net plans: not supported: {'; '.join(wrong)}")
