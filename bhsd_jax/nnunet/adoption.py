"""A plans.json that nnU-Net has made for a data set, in place of our own plan."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct.prepare import Facts
from bhsd_jax.ct.resample import resampled_shape
from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.planner import from_nnunet_plans
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Plan, Shape

_RESAMPLING = "resample_data_or_seg_to_shape"


def read(path: str | Path) -> dict[str, Any]:
    """Reads a plans.json.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no JSON, or JSON of something else; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; config.preprocess.plan names it")
    try:
        plans = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise UserError(f"{path}: has no `configurations`; is this a plans.json of nnU-Net v2?")
    return plans


def adopt(plan: Plan, facts: Sequence[Facts], plans: Mapping[str, Any], configuration: str) -> Plan:
    """Replaces what nnU-Net decided: spacing, axis order, network, statistics; and says so.

    NnU-Net's axes are the files', ours the patient's: the files must agree in which is which. The
    crop stays ours (`crop_hu` None is nnU-Net's), and so do the statistics if it has none.

    Args:
        plan: Ours, from the same facts.
        facts: Of the training cases.
        plans: NnU-Net's, as `read` gives it.
        configuration: Such as "3d_fullres" or "3d_lowres".

    Raises:
        ValueError: If the configuration cannot be used, or asks for another normalization.
    """
    network, spacing_mm, files = from_nnunet_plans(plans, configuration)
    settings = plans_json.resolve(plans, configuration)
    _check_normalization(settings, plan.modality)
    order = _order(facts)
    first, second, third = (order.index(axis) for axis in files)
    transpose = first, second, third
    intensity = plans.get("foreground_intensity_properties_per_channel", {}).get("0", {})
    statistics = plan.foreground
    if all(name in intensity for name in plans_json.STATISTICS):
        low, mean, std, high = (float(intensity[name]) for name in plans_json.STATISTICS)
        statistics = low, mean, std, high
    return dataclasses.replace(
        plan,
        spacing_mm=spacing_mm,
        transpose=transpose,
        network=network,
        foreground=statistics,
        median_shape=_median_shape(facts, spacing_mm, transpose),
        notes=_notes(plans, settings, configuration, own=statistics is plan.foreground),
        use_mask_for_norm=_mask(settings, plan),
    )


def _check_normalization(settings: Mapping[str, Any], modality: str) -> None:
    wanted = [plans_json.NORMALIZATION[modality]]
    schemes = list(settings.get("normalization_schemes", wanted))
    if schemes != wanted:
        raise UserError(
            f"nnU-Net plans: normalization {schemes}, but scans of this data set (one channel, "
            f"{modality}) get {wanted}; look at config.data.modality"
        )


def _mask(settings: Mapping[str, Any], plan: Plan) -> bool:
    """What the file says of its one channel, else what we have decided; no mask for CT."""
    said = settings.get("use_mask_for_norm", [plan.use_mask_for_norm])
    return plan.modality == "mr" and any(said)


def _order(facts: Sequence[Facts]) -> Shape:
    orders = sorted({fact.order for fact in facts})
    if len(orders) != 1:
        raise UserError(
            f"nnU-Net plans: its axes are those of the files, but these lie along {orders} "
            "(file axes that run superior, posterior, left); store all scans alike"
        )
    return orders[0]


def _median_shape(facts: Sequence[Facts], spacing_mm: Sequence[float], transpose: Shape) -> Shape:
    a, b, c = (float(spacing_mm[transpose.index(axis)]) for axis in range(3))
    shapes = [resampled_shape(fact.shape, fact.spacing_mm, (a, b, c)) for fact in facts]
    median = np.median(shapes, axis=0)
    depth, height, width = (round(float(median[axis])) for axis in transpose)
    return depth, height, width


def _notes(
    plans: Mapping[str, Any], settings: Mapping[str, Any], configuration: str, *, own: bool
) -> tuple[str, ...]:
    name = plans.get("plans_name", "no name")
    notes = [f"plan of nnU-Net: {name}, {configuration}, of {plans.get('dataset_name', '?')}"]
    unet = settings.get("architecture", {}).get("network_class_name", "").rpartition(".")[2]
    if unet == "ResidualEncoderUNet":
        notes.append("made for --config.model.name=nnunet.ResidualEncoderUNet")
    if own:
        notes.append("it has no intensity statistics; ours are used")
    resampling = settings.get("resampling_fn_data", _RESAMPLING)
    if resampling != _RESAMPLING:
        notes.append(f"it resamples with {resampling}; here scans are resampled by {_RESAMPLING}")
    return tuple(notes)
