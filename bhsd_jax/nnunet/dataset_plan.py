"""The plan of a data set, from what was measured of its training cases."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bhsd_jax.ct.prepared import Facts
from bhsd_jax.ct.resample import resampled_shape
from bhsd_jax.defects import Kind
from bhsd_jax.labels import Labels
from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.dataset_json import Z_SCORES, planned_labels
from bhsd_jax.nnunet.planner import (
    from_nnunet_plans,
    make_plans,
    network_for,
    spacing_warnings,
    target_spacing,
    transpose_for,
    uses_mask,
)
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Channel, Millimeters, Plan, Shape

FULL, PLANAR, CASCADE = "3d_fullres", "2d", "3d_cascade_fullres"

_NO_MASKS = (
    "no training case with a mask; nothing to plan from: look whether masks lie where config.data "
    "has them"
)


def make_plan(
    facts: Sequence[Facts],
    *,
    dataset: str,
    classes: tuple[str, ...],
    modality: str,
    license: str,
    source_sha256: str,
    planner: str = "default",
    memory_gb: float | None = None,
    spacing_mm: Millimeters | None = None,
    crop_hu: float | None = None,
    labels: Labels | None = None,
    channels: Sequence[tuple[str, str]] = (),
    configuration: str = "3d_fullres",
) -> Plan:
    """Decides spacing, axis order, network and normalization from the training cases.

    `memory_gb` is the GPU to plan for; None leaves it to the planner. `spacing_mm` pins the target
    in canonical axes; None leaves it to nnU-Net's rule. CT without air, which may have been
    clipped, does not count for the intensities if there is other. `labels` are those that are more
    than `classes`; `channels` are names and normalizations of scans that have several, or another
    normalization than the modality's.

    Raises:
        ValueError: If there is no training case with a mask, or all masks are empty.
    """
    if not facts:
        raise UserError(f"{dataset}: {_NO_MASKS}")
    # No intensities were drawn of scans with an empty mask.
    seen = [fact.foreground for fact in _in_full_range(facts) if fact.foreground.size]
    if not seen:
        raise UserError(
            f"{dataset}: the masks of all {len(facts)} training cases are empty; some mirrors "
            "ship them so: fetch the data set from its first source"
        )
    drawn = np.concatenate(seen).astype(np.float64)
    spacings = np.asarray([fact.spacing_mm for fact in facts])
    shapes = np.asarray([fact.shape for fact in facts])
    notes = () if spacing_mm else tuple(spacing_warnings(spacings, shapes))
    target = spacing_mm or target_spacing(spacings, shapes)
    transpose = transpose_for(np.asarray(target))
    statistics = [_statistics(one) for one in drawn.reshape(len(drawn), -1).T]
    labels = labels or Labels(classes)
    masked = uses_mask(modality, [fact.relative_size for fact in facts])
    fitting = {
        "planner": planner,
        "memory_gb": memory_gb,
        "spacing_mm": np.asarray(target),
        "transpose": transpose,
        "num_classes": planned_labels(labels),
    }
    previous_stage = ""
    if configuration == FULL:
        network = network_for(spacings, shapes, **fitting)
    else:
        theirs = make_plans(spacings, shapes, **fitting)
        network, spacing, _ = from_nnunet_plans(theirs, configuration)
        previous_stage = plans_json.previous_stage(plans_json.resolve(theirs, configuration))
        a, b, c = (spacing[transpose.index(axis)] for axis in range(3))
        target = a, b, c
    planar = configuration == PLANAR
    d, h, w = (float(target[axis]) for axis in transpose)
    return Plan(
        dataset=dataset,
        classes=classes,
        modality=modality,
        spacing_mm=(d, h, w),
        transpose=transpose,
        crop_hu=crop_hu,
        foreground=statistics[0],
        median_shape=median_shape(facts, target, transpose, planar=planar),
        network=network,
        source_sha256=source_sha256,
        license=license,
        notes=notes,
        use_mask_for_norm=masked and not channels,
        channels=_channels(channels, statistics, masked),
        regions=labels.regions,
        region_order=labels.region_order,
        ignore=labels.ignore,
        listed=labels.listed,
        planar=planar,
        previous_stage=previous_stage,
    )


def _channels(
    named: Sequence[tuple[str, str]], statistics: Sequence[Any], masked: bool
) -> tuple[Channel, ...]:
    return tuple(
        Channel(name, scheme, measured, masked and scheme == Z_SCORES)
        for (name, scheme), measured in zip(named, statistics, strict=bool(named))
    )


def median_shape(
    facts: Sequence[Facts], target: Millimeters, transpose: Shape, *, planar: bool
) -> Shape:
    """Voxels of the median case at the target spacing, along the transposed axes.

    The target is along the patient's axes. Slices of a `planar` plan are not resampled across.
    """
    shapes = []
    for fact in facts:
        wanted = list(target)
        if planar:
            wanted[transpose[0]] = fact.spacing_mm[transpose[0]]
        a, b, c = wanted
        shapes.append(resampled_shape(fact.shape, fact.spacing_mm, (a, b, c)))
    median = np.median(shapes, axis=0)
    depth, height, width = (round(float(median[axis])) for axis in transpose)
    return depth, height, width


def _statistics(drawn: np.ndarray) -> tuple[float, float, float, float]:
    """Percentile 0.5, mean, standard deviation and percentile 99.5 of one channel."""
    low, high = np.percentile(drawn, (0.5, 99.5))
    return float(low), float(drawn.mean()), float(drawn.std()), float(high)


def _in_full_range(facts: Sequence[Facts]) -> Sequence[Facts]:
    """Scans whose intensities say what tissue has: not CT without air, which may be a window.

    All of them if nothing else would be left to measure.
    """
    full = [fact for fact in facts if all(f.kind is not Kind.NO_AIR for f in fact.findings)]
    return full if any(fact.foreground.size for fact in full) else facts
