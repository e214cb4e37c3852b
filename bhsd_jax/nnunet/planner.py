"""nnU-Net's planner: spacings and shapes of a data set -> target spacing, patch, network, batch.

Gives the numbers of nnU-Net v2.8.1's `ExperimentPlanner` and residual-encoder presets, from the
same input: one spacing and one shape (after cropping) per training scan, both along the same three
axes. A target spacing passed in is along those axes too; everything in a finished plan, target
spacing included, is along the transposed axes (coarsest first).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bhsd_jax.nnunet import plans_json
from bhsd_jax.nnunet.plans_json import Request
from bhsd_jax.nnunet.topology import PLANNERS, planner_named, pool, widths
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Millimeters, Network, Shape

Numbers = Sequence[Any] | np.ndarray  # three numbers, or rows of three

_ANISOTROPY = 3  # an axis this many times coarser (and shorter) than the others is treated apart
_MASK_BELOW = 3 / 4  # of the scan left by the crop to its non-zero voxels
_HALVES = 200  # random half data sets drawn to see whether the target spacing holds


def target_spacing(spacings: Numbers, shapes: Numbers) -> Millimeters:
    """Picks the spacing to resample to: the median, or a finer one along a very coarse axis.

    Where one axis is more than 3 times coarser than the next and has less than a third of the
    voxels of the shortest other, its 10th percentile is taken (but never less than the other axes).

    Raises:
        ValueError: If the lists differ in length, are empty, or hold anything but positive numbers.

    Source: nnU-Net v2.8.1, `determine_fullres_target_spacing`.
    """
    return _target(*_fingerprint(spacings, shapes))


def transpose_for(spacing_mm: Numbers) -> Shape:
    """Orders the axes for the network: the coarsest first, the other two as they were."""
    coarsest = int(np.argmax(np.asarray(spacing_mm)))
    first, second = (axis for axis in range(3) if axis != coarsest)
    return coarsest, first, second


def uses_mask(modality: str, relative_sizes: Sequence[float]) -> bool:
    """Decides whether scans are normalized inside the mask of their non-zero voxels.

    So are those that get z-scores, where the crop to the non-zero voxels leaves less than 3/4 of
    the median scan: skull-stripped MR. `relative_sizes` are voxels after over before that crop.

    Source: nnU-Net v2.8.1, `determine_normalization_scheme_and_whether_mask_is_used_for_norm`.
    """
    return modality == "mr" and float(np.median(relative_sizes)) < _MASK_BELOW


def spacing_warnings(spacings: Numbers, shapes: Numbers) -> list[str]:
    """Warns of every axis whose target spacing rests on a few scans.

    Draws 200 halves of the data set (fixed seed, without replacement) and applies the same rule to
    each. An axis is named if more than 1 in 20 halves puts it over 20 % off the whole set's value.

    Raises:
        ValueError: As `target_spacing`.
    """
    spacing, shape = _fingerprint(spacings, shapes)
    whole = np.array(_target(spacing, shape))
    generator = np.random.default_rng(0)
    picks = (generator.permutation(len(spacing))[: (len(spacing) + 1) // 2] for _ in range(_HALVES))
    picked = np.array([_target(spacing[pick], shape[pick]) for pick in picks])
    share = np.mean(np.abs(picked / whole - 1) > 0.2, axis=0)
    return [
        f"target spacing along axis {axis}: {whole[axis]:.4g} mm for all {len(spacing)} scans, but "
        f"{picked[:, axis].min():.4g} to {picked[:, axis].max():.4g} mm over random halves of them "
        f"({share[axis]:.0%} differ by more than 20 %); pin it (config.preprocess.spacing_mm)"
        for axis in range(3)
        if share[axis] > 0.05
    ]


def make_plans(
    spacings: Numbers,
    shapes_after_crop: Numbers,
    *,
    planner: str = "default",
    modality: str = "ct",
    num_channels: int = 1,
    schemes: Sequence[str] = (),
    num_classes: int = 2,
    spacing_mm: Numbers | None = None,
    transpose: Sequence[int] | None = None,
    memory_gb: float | None = None,
    cases: int | None = None,
    relative_size: float = 1.0,
    foreground: Mapping[str, Any] | None = None,
    dataset: str = "",
    reader: str = "SimpleITKIO",
) -> dict[str, Any]:
    """Plans all configurations nnU-Net would, in the schema of its plans.json.

    Args:
        spacings: mm, per scan.
        shapes_after_crop: Voxels, per scan, along the same axes.
        planner: A key of `topology.PLANNERS`.
        modality: "ct" or "mr"; decides the normalization only.
        num_channels: Of a scan.
        schemes: Normalization of every channel, where the modality does not say it.
        num_classes: Background included.
        spacing_mm: Pins the target spacing.
        transpose: Pins the order of axes.
        memory_gb: GPU to plan for; None: the one the planner was made for.
        cases: Training scans, where the fingerprint covers another number.
        relative_size: Median of cropped over uncropped size; below 3/4, z-scores are taken inside
            the non-zero mask.
        foreground: Copied to `foreground_intensity_properties_per_channel`.
        dataset: Copied to `dataset_name`.
        reader: Copied to `image_reader_writer`.

    Raises:
        ValueError: If the fingerprint, the planner or the modality is not usable.
    """
    spacing, shape = _fingerprint(spacings, shapes_after_crop)
    chosen = planner_named(planner)
    if modality not in plans_json.NORMALIZATION:
        raise UserError(f"make_plans: modality is ct or mr; got {modality!r}")
    target = _target(spacing, shape) if spacing_mm is None else _three(spacing_mm, "spacing_mm")
    forward = list(transpose_for(target) if transpose is None else transpose)
    request = Request(
        planner=chosen,
        memory_gb=memory_gb or chosen.memory_gb,
        num_classes=num_classes,
        cases=cases or len(spacing),
        schemes=tuple(schemes) or (plans_json.NORMALIZATION[modality],) * num_channels,
        masked=uses_mask("mr" if schemes else modality, [relative_size]),
    )
    median = _median_shape(spacing, shape, target)[forward].tolist()
    return {
        "dataset_name": dataset,
        "plans_name": chosen.plans_name,
        "original_median_spacing_after_transp": np.median(spacing, 0)[forward].tolist(),
        "original_median_shape_after_transp": [round(n) for n in np.median(shape, 0)[forward]],
        "image_reader_writer": reader,
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": plans_json.configurations(
            [target[axis] for axis in forward], median, request
        ),
        "experiment_planner_used": chosen.kind,
        "label_manager": plans_json.LABEL_MANAGER,
        "foreground_intensity_properties_per_channel": dict(foreground or {}),
    }


def network_for(
    spacings: Numbers,
    shapes: Numbers,
    *,
    planner: str = "default",
    memory_gb: float | None = None,
    spacing_mm: Numbers | None = None,
    transpose: Sequence[int] | None = None,
    num_classes: int = 2,
) -> Network:
    """Plans nnU-Net's 3d_fullres: patch, batch and topology, along the transposed axes.

    Raises:
        ValueError: As `make_plans`; or if the scans are single slices.
    """
    plans = make_plans(
        spacings,
        shapes,
        planner=planner,
        num_classes=num_classes,
        spacing_mm=spacing_mm,
        transpose=transpose,
        memory_gb=memory_gb,
    )
    if "3d_fullres" not in plans["configurations"]:
        raise UserError(
            "network_for: the median scan is a single slice; 3D networks need more: set "
            "preprocess.configuration=2d"
        )
    return from_nnunet_plans(plans)[0]


def topology(
    spacing_mm: Numbers,
    patch: Numbers,
    *,
    batch: int = 2,
    batch_dice: bool = False,
    planar: bool = False,
) -> Network:
    """Applies the default planner's rules to a patch somebody chose; `planar` to one of its slices.

    Raises:
        ValueError: If an axis of the patch is no multiple of the network's total stride; names the
            nearest patch that is.
    """
    spacing, size = _three(spacing_mm, "spacing_mm"), _three(patch, "patch")
    whole = tuple(round(n) for n in size)
    pooling = pool(spacing[1:], size[1:]) if planar else pool(spacing, size)
    if planar and (size[0] != 1 or pooling.patch != size[1:]):
        raise UserError(
            f"topology: a 2D network takes patches of one slice, such as {(1, *pooling.patch)}; "
            f"got {whole}"
        )
    if not planar and pooling.patch != size:
        raise UserError(
            f"topology: patch {whole} does not divide by the total stride "
            f"{pooling.total_stride} that {spacing} mm asks for; the nearest patch that does is "
            f"{_nearest_patch(spacing, size)}"
        )
    stages, default = len(pooling.strides), PLANNERS["default"]
    return Network(
        patch=plans_json.with_slice(pooling.patch),
        batch=batch,
        features=widths(stages, axes=len(pooling.patch)),
        strides=tuple(map(plans_json.with_slice, pooling.strides)),
        kernels=tuple(map(plans_json.with_slice, pooling.kernels)),
        convs_encoder=default.encoder(stages),
        convs_decoder=default.decoder(stages),
        batch_dice=batch_dice,
    )


def for_patch(network: Network, patch: Shape, spacing_mm: Millimeters) -> Network:
    """The network as planned, or for another patch the topology of the default planner.

    Then a residual encoder keeps its counts; further stages have those of the last.

    Raises:
        ValueError: As `topology`.
    """
    if tuple(patch) == network.patch:
        return network
    planar = bool(network.kernels) and all(kernel[0] == 1 for kernel in network.kernels)
    changed = topology(
        spacing_mm, patch, batch=network.batch, batch_dice=network.batch_dice, planar=planar
    )
    if not network.residual:
        return changed
    stages = len(changed.features)
    return dataclasses.replace(
        changed,
        convs_encoder=_continued(network.convs_encoder, stages),
        convs_decoder=_continued(network.convs_decoder, stages - 1),
        residual=True,
    )


def from_nnunet_plans(
    plans: Mapping[str, Any], configuration: str = "3d_fullres"
) -> tuple[Network, Millimeters, Shape]:
    """Reads network, target spacing and transpose out of a plans.json of nnU-Net v2.

    The spacing is along the transposed axes. `transpose` refers to the axes of the files as
    nnU-Net's reader gives them: k, j, i.

    Raises:
        ValueError: If the configuration is missing or incomplete, or is another network than the
            plain or the residual-encoder U-Net.
    """
    settings = plans_json.resolve(plans, configuration)
    try:
        network = plans_json.network(settings)
        spacing = list(settings["spacing"])
        if plans_json.is_planar(settings):  # only so that there is a number: it is never used
            spacing.insert(0, plans["original_median_spacing_after_transp"][0])
        d, h, w = (float(s) for s in spacing)
        first, second, third = (int(axis) for axis in plans["transpose_forward"])
    except KeyError as error:
        raise UserError(
            f"nnU-Net plans: configuration {configuration!r} says nothing of {error}; "
            "is this a plans.json of nnU-Net v2?"
        ) from error
    return network, (d, h, w), (first, second, third)


def _continued(counts: tuple[int, ...], stages: int) -> tuple[int, ...]:
    return tuple(counts[min(stage, len(counts) - 1)] for stage in range(stages))


def _target(spacings: np.ndarray, shapes: np.ndarray) -> Millimeters:
    target = np.percentile(spacings, 50, axis=0)
    size = np.percentile(shapes, 50, axis=0)
    axis = int(np.argmax(target))
    others = [other for other in range(3) if other != axis]
    next_coarsest = target[others].max()
    if target[axis] > _ANISOTROPY * next_coarsest and size[axis] * _ANISOTROPY < size[others].min():
        target[axis] = np.percentile(spacings[:, axis], 10)
        if target[axis] < next_coarsest:
            target[axis] = next_coarsest + 1e-5  # stays the coarsest, so the transpose holds
    d, h, w = target.tolist()
    return d, h, w


def _median_shape(spacings: np.ndarray, shapes: np.ndarray, target: Millimeters) -> np.ndarray:
    # np.rint and Python's round, which nnU-Net uses, both round halves to even.
    median = np.median(np.rint(spacings / np.array(target) * shapes), axis=0)
    if median.min() < 1:
        raise UserError(f"planner: at {target} mm the median scan has {median.tolist()} voxels")
    return median


def _fingerprint(spacings: Numbers, shapes: Numbers) -> tuple[np.ndarray, np.ndarray]:
    spacing, shape = _rows(spacings, "spacings"), _rows(shapes, "shapes")
    if len(spacing) != len(shape):
        raise ValueError(
            f"planner: one spacing and one shape per scan; got {len(spacing)} and {len(shape)}"
        )
    return spacing, shape


def _nearest_patch(spacing: Millimeters, size: Sequence[float]) -> tuple[int, ...]:
    padded = pool(spacing, size)  # always accepted
    down = (int(n // step) * step for n, step in zip(size, padded.total_stride, strict=True))
    candidates = itertools.product(*zip(padded.patch, down, strict=True))
    accepted = [c for c in candidates if min(c) > 0 and pool(spacing, c).patch == c]
    ratio = np.array(accepted) / np.array(size)
    return accepted[int(np.argmin(np.abs(ratio - 1).sum(axis=1)))]


def _rows(values: Numbers, name: str) -> np.ndarray:
    try:
        rows = np.atleast_2d(np.asarray(values, dtype=float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"planner: {name} must be numbers, three per scan: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise ValueError(f"planner: {name} must be three numbers per scan; got shape {rows.shape}")
    fine = (np.isfinite(rows) & (rows > 0)).all(axis=1)
    if not fine.all():
        first = int(np.argmin(fine))
        raise ValueError(
            f"planner: {name} must be positive; scan {first} has {rows[first].tolist()}"
        )
    return rows


def _three(values: Numbers, name: str) -> Millimeters:
    rows = _rows(values, name)
    if len(rows) != 1:
        raise ValueError(f"planner: {name} must be three numbers; got shape {rows.shape}")
    d, h, w = rows[0].tolist()
    return d, h, w
