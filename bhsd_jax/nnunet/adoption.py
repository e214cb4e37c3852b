"""A plans.json that nnU-Net has made for a data set, in place of our own plan."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.ct.prepared import Facts
from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.dataset_plan import median_shape
from bhsd_jax.nnunet.planner import from_nnunet_plans
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Channel, Plan, Shape


def read(path: str | Path) -> dict[str, Any]:
    """Reads a plans.json.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no JSON, or JSON of something else; names the file.
    """
    path = Path(path)
    if path.is_dir():
        there = ", ".join(sorted(one.name for one in path.glob("*Plans*.json"))) or "none is in it"
        raise UserError(f"{path}: a folder; config.preprocess.plan names a plans.json ({there})")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; config.preprocess.plan names it")
    if path.suffix == ".pkl":
        raise UserError(
            f"{path}: plans of nnU-Net v1 are not read; leave config.preprocess.plan out, and the "
            "data set is planned as by v2"
        )
    try:
        plans = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise UserError(f"{path}: has no `configurations`; is this a plans.json of nnU-Net v2?")
    return plans


def require_usable(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuses plans by which another network would be trained here, or on other voxels.

    Raises:
        ValueError: If the configuration cannot be used; or lists the layers, the preprocessor, the
            reader and the label manager that nnU-Net itself does not plan.
    """
    from_nnunet_plans(plans, configuration)
    settings = plans_json.resolve(plans, configuration)
    wrong = plans_json.unusual_layers(settings)
    preprocessor = settings.get("preprocessor_name", plans_json.PREPROCESSOR)
    reader = plans.get("image_reader_writer")
    wrong += [f"preprocessor_name={preprocessor}"] * (preprocessor != plans_json.PREPROCESSOR)
    wrong += [f"image_reader_writer={reader}"] * (reader not in (None, *plans_json.READERS))
    manager = plans.get("label_manager") or plans_json.LABEL_MANAGER
    wrong += [f"label_manager={manager}"] * (manager != plans_json.LABEL_MANAGER)
    if wrong:
        raise UserError(
            f"nnU-Net plans: {configuration} has {'; '.join(wrong)}, but what is trained here is "
            "as nnU-Net plans it by default; change these lines of the file to that, or leave "
            "config.preprocess.plan out"
        )


def adopt(plan: Plan, facts: Sequence[Facts], plans: Mapping[str, Any], configuration: str) -> Plan:
    """Replaces what nnU-Net decided: spacing, axis order, network, statistics; and says so.

    NnU-Net's axes are the files', ours the patient's: the files must agree in which is which,
    unless its reader turns them. The crop stays ours (`crop_hu` None is nnU-Net's), and so do the
    statistics if it has none.

    Args:
        plan: Ours, from the same facts.
        facts: Of the training cases.
        plans: NnU-Net's, as `read` gives it.
        configuration: Such as "3d_fullres", "3d_lowres" or "2d".

    Raises:
        ValueError: As by `require_usable`, or if it asks for another normalization.
    """
    require_usable(plans, configuration)
    network, spacing_mm, files = from_nnunet_plans(plans, configuration)
    settings = plans_json.resolve(plans, configuration)
    _check_normalization(settings, plan)
    planar = plans_json.is_planar(settings)
    # Readers that reorient have axes along the same lines as ours.
    turned = plans_json.READERS.get(plans.get("image_reader_writer", "")) == "SAR"
    order = (0, 1, 2) if turned else _order(facts)
    first, second, third = (order.index(axis) for axis in files)
    transpose = first, second, third
    a, b, c = (float(spacing_mm[transpose.index(axis)]) for axis in range(3))
    intensities = plans_json.intensities(plans)
    statistics = _statistics(intensities, 0, plan.foreground)
    return dataclasses.replace(
        plan,
        spacing_mm=spacing_mm,
        transpose=transpose,
        network=network,
        foreground=statistics,
        median_shape=median_shape(facts, (a, b, c), transpose, planar=planar),
        notes=_notes(plans, settings, configuration, own=statistics is plan.foreground),
        use_mask_for_norm=_mask(settings, plan),
        channels=_channels(settings, plan, intensities),
        planar=planar,
        previous_stage=plans_json.previous_stage(settings),
    )


def _statistics(
    intensities: Mapping[str, Any], channel: int, own: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """The file's of a channel, if it has all of them; else our own."""
    given = intensities.get(str(channel), {})
    if not all(name in given for name in plans_json.STATISTICS):
        return own
    low, mean, std, high = (float(given[name]) for name in plans_json.STATISTICS)
    return low, mean, std, high


def _check_normalization(settings: Mapping[str, Any], plan: Plan) -> None:
    own = [channel.scheme for channel in plan.channels]
    wanted = own or [plans_json.NORMALIZATION[plan.modality]]
    schemes = list(settings.get("normalization_schemes", wanted))
    if schemes != wanted:
        many = f"{len(own)} channels" if own else "one channel"
        raise UserError(
            f"nnU-Net plans: normalization {schemes}, but scans of this data set ({many}, "
            f"{plan.modality}) get {wanted}; look at config.data.modality"
        )


def _mask(settings: Mapping[str, Any], plan: Plan) -> bool:
    """What the file says of its one channel, else what we have decided; no mask for CT."""
    said = settings.get("use_mask_for_norm", [plan.use_mask_for_norm])
    return plan.modality == "mr" and any(said) and not plan.channels


def _channels(
    settings: Mapping[str, Any], plan: Plan, intensities: Mapping[str, Any]
) -> tuple[Channel, ...]:
    """Ours with the file's masks and statistics."""
    masks = settings.get("use_mask_for_norm") or [one.masked for one in plan.channels]
    return tuple(
        dataclasses.replace(
            one, masked=bool(masked), foreground=_statistics(intensities, index, one.foreground)
        )
        for index, (one, masked) in enumerate(zip(plan.channels, masks, strict=False))
    )


def _order(facts: Sequence[Facts]) -> Shape:
    orders = sorted({fact.order for fact in facts})
    if len(orders) != 1:
        raise UserError(
            f"nnU-Net plans: its axes are those of the files, but these lie along {orders} "
            "(file axes that run superior, posterior, left); store all scans alike"
        )
    return orders[0]


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
    for how in plans_json.unusual_resampling(settings, ("data", "seg")):
        notes.append(f"it has {how}; here scans and masks are resampled as nnU-Net plans it")
    return tuple(notes)
