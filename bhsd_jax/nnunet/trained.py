"""A trained nnU-Net v2 model, as its plans.json and dataset.json tell of it.

nnU-Net takes a scan's axes as they lie in the file and normalizes before it resamples; the plans
made here say so, so that a network sees what it was trained on.
"""

from collections.abc import Mapping
from typing import Any

from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.planner import from_nnunet_plans
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Plan

_AXES = {  # by reader: what its arrays' axes are
    "SimpleITKIO": "file",
    "NibabelIO": "file",
    "NibabelIOWithReorient": "SAR",  # to R, A, S, then in the order z, y, x
}
_MODALITIES = {scheme: modality for modality, scheme in plans_json.NORMALIZATION.items()}
_RESAMPLING = {"data": 3, "probabilities": 1}  # what: spline order


def plan_of(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str, source_sha256: str
) -> Plan:
    """What prediction must know of the data, as nnU-Net's own prediction does it.

    Raises:
        ValueError: Lists everything that has no counterpart here: several channels, regions,
            other normalizations, readers, or ways to resample; or the network does.
    """
    network, spacing, transpose = from_nnunet_plans(plans, configuration)
    settings = plans_json.resolve(plans, configuration)
    _require_supported(plans, dataset, settings)
    modality = _MODALITIES[settings["normalization_schemes"][0]]
    measured = plans.get("foreground_intensity_properties_per_channel") or {}
    if modality == "ct" and "0" not in measured:
        raise UserError("nnU-Net plans: CTNormalization, but no foreground intensities of it")
    first = measured.get("0", {})
    low, mean, std, high = (float(first.get(name, 0)) for name in plans_json.STATISTICS)
    return Plan(
        dataset=str(plans.get("dataset_name") or dataset.get("name", "nnU-Net")),
        classes=classes_of(dataset),
        modality=modality,
        spacing_mm=spacing,
        transpose=transpose,
        crop_hu=None,
        foreground=(low, mean, std, high),
        median_shape=plans_json.triple(settings["median_image_size_in_voxels"]),
        network=network,
        source_sha256=source_sha256,
        license=str(dataset.get("licence") or dataset.get("license") or ""),
        notes=(f"imported from nnU-Net, configuration {configuration}",),
        axes=_AXES[plans["image_reader_writer"]],
        normalize_first=True,
        use_mask_for_norm=modality == "mr" and any(settings["use_mask_for_norm"]),
    )


def network_of(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str
) -> tuple[str, dict[str, Any]]:
    """The class of the network and its constructor arguments, all heads included.

    Raises:
        ValueError: If there is no such configuration, or labels or channels are not given.
    """
    reference, arguments = plans_json.architecture(plans_json.resolve(plans, configuration))
    given = {
        "input_channels": len(_channels(dataset)),
        "num_classes": len(classes_of(dataset)),
        "deep_supervision": True,
    }
    return reference, {**arguments, **given}


def classes_of(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Names by class index, background first; an `ignore` label is none.

    Raises:
        ValueError: If labels are regions, or not numbered 0, 1, 2, ...
    """
    labels = {k: v for k, v in (dataset.get("labels") or {}).items() if k != "ignore"}
    try:
        index = {int(value): str(name) for name, value in labels.items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"nnU-Net dataset.json: a label is one number, regions are not known; got {labels}"
        ) from error
    if not index or sorted(index) != list(range(len(labels))):
        raise UserError(
            f"nnU-Net dataset.json: labels must be numbered 0, 1, 2, ...; got {labels or 'none'}"
        )
    return tuple(index[i] for i in range(len(index)))


def _channels(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    return dataset.get("channel_names") or dataset.get("modality") or {}


def _require_supported(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    schemes = settings["normalization_schemes"]
    wrong = []
    if len(_channels(dataset)) != 1 or len(schemes) != 1:
        wrong.append(f"one channel per scan; got {len(_channels(dataset))}")
    wrong += [f"{s} (known: {', '.join(_MODALITIES)})" for s in schemes if s not in _MODALITIES]
    reader = plans.get("image_reader_writer")
    if reader not in _AXES:
        wrong.append(f"reader {reader} (known: {', '.join(_AXES)})")
    if settings.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        wrong.append(f"preprocessor {settings['preprocessor_name']}")
    for what, order in _RESAMPLING.items():
        used = settings.get(f"resampling_fn_{what}", "resample_data_or_seg_to_shape")
        how = {"order": order, "order_z": 0, "force_separate_z": None}
        how |= settings.get(f"resampling_fn_{what}_kwargs", {})
        orders = how["order"], how["order_z"], how["force_separate_z"]
        if used != "resample_data_or_seg_to_shape" or orders != (order, 0, None):
            wrong.append(f"resampling of {what} by {used} {how}")
    if wrong:
        raise UserError(f"nnU-Net plans: not supported: {'; '.join(wrong)}")
