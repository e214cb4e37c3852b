"""One case at a time: what planning must know of it, and its prepared form. Pure functions."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from bhsd_jax.ct import (
    blank,
    channels,
    geometry,
    hu,
    nifti,
    plausibility,
    scan,
    shear,
    slice_labels,
)
from bhsd_jax.ct import previous as first_stage
from bhsd_jax.ct.foreground import SEED, foreground_positions, target_positions
from bhsd_jax.ct.prepared import Facts, Prepared
from bhsd_jax.defects import Finding, Kind, Refusal, said_of, texts
from bhsd_jax.volume import Case, Grid, Millimeters, Plan, Volume

_DOUBTFUL = (
    *plausibility.KINDS,
    *(Kind.NO_DICOM, Kind.SERIES_PARTS, Kind.BLANK, Kind.BLANK_SLICES),
    *(Kind.NO_POSITION, Kind.NO_SPACING, Kind.TWO_SPACINGS, Kind.TWO_DIRECTIONS),
)


def fingerprint_case(
    case: Case,
    *,
    num_classes: int,
    modality: str,
    crop_hu: float | None,
    schemes: Sequence[tuple[str, str]] = (),
    samples: int = 100_000,
) -> Facts:
    """Reads one case in full and measures it.

    `schemes` are name and normalization of each channel, as a data set's `channels`.

    Foreground intensities are drawn with replacement, equally many from every case however small
    its lesion. nnU-Net draws floor(1e8 / cases); `samples` is less, so that the draws of a
    thousand cases fit in memory (on 208 MR scans that moves the statistics by 0.01 %).

    Raises:
        ValueError: If a file is broken, or image and mask do not belong together.
        FileNotFoundError: If a file is not there.

    Source: nnU-Net v2, `DatasetFingerprintExtractor` (crop, then sample).
    """
    every, found = scan.read_channels(case.image)
    raw = every[0]
    volume, label, more = _read(
        case, every, num_classes=num_classes, modality=modality, schemes=schemes
    )
    found += more
    if modality == "ct" and isinstance(case.image, Path):  # a series' positions are exact
        found += hu.tilt_findings(volume.affine, table_feed=case.table_feed)
    # The target spacing does not matter here: only the crop and the native spacing are used.
    shown = channels.union((volume, *every[1:]))
    grid = geometry.locate(shown, spacing_mm=volume.spacing_mm, crop_hu=crop_hu)
    slice_labels.align(case, grid, num_classes)
    slice_labels.require_agreeing(case, len(volume.voxels))
    found += slice_labels.doubts(case, grid, label)
    found += nifti.remarks(case.image, case.label)
    counts: tuple[int, ...] = ()
    drawn = np.zeros(0, np.float32)
    if label is not None:
        counts = tuple(np.bincount(label.ravel(), minlength=num_classes).tolist())
        labeled = geometry.native_box(label, grid) > 0
        seen = (volume,) if len(every) == 1 else every
        inside = [geometry.native_box(one.voxels, grid)[labeled] for one in seen]
        if inside[0].size < sum(counts[1:]):
            text = f"{sum(counts[1:]) - inside[0].size} labeled voxels lie outside the cropped scan"
            found.append(Finding(Kind.MASK_OUTSIDE, "kept", text))
        if inside[0].size:
            drawn = _drawn(inside, samples)
        else:
            found.append(Finding(Kind.MASK_EMPTY, "kept", "the mask is empty"))
    feed = case.table_feed and modality == "ct"
    voxel_ml = hu.voxel_ml(volume.affine, table_feed=feed)
    return Facts(
        case=case.id,
        patient=case.patient,
        split=case.split,
        bleeding=slice_labels.bleeding(case, label, modality, len(volume.voxels)),
        shape=grid.cropped_shape,
        spacing_mm=grid.native_spacing_mm,
        tilt_deg=float(shear.gantry_deg(volume.affine)) if modality == "ct" else 0.0,
        intensity=_extent(raw.voxels),
        voxels=counts,
        volume_ml=tuple(count * voxel_ml for count in counts),
        foreground=drawn,
        source_sha256=source_digest(case),
        findings=tuple(replace(finding, case=case.id) for finding in found),
        field_mm=grid.native_extent_mm,
        voxels_sha256=_voxels_digest(every),
        order=grid.order,
        relative_size=math.prod(grid.cropped_shape) / volume.voxels.size,
        tilt_corrected=hu.tilt_corrected(volume.affine, table_feed=feed),
    )


def prepare_case(
    case: Case,
    plan: Plan,
    *,
    source_sha256: str = "",
    seen: tuple[tuple[Volume, ...], list[Finding]] | None = None,
    to_train: bool = False,
) -> Prepared:
    """Reads, repairs, crops, resamples and normalizes one case as the plan says.

    CT stays in HU, rounded to int16; windows are applied in training. MR is brought to zero mean
    and unit variance over the whole cropped scan before it is resampled, as nnU-Net does it, or
    over its non-zero voxels where the plan says `use_mask_for_norm`; so is CT clipped and scaled
    where the plan says `normalize_first`, and not repaired unless it says `repaired` too.

    Args:
        case: To read.
        plan: Of the run.
        source_sha256: Of the case's files, if it is known already.
        seen: What `scan.read_channels` gave of its image, if it was read already.
        to_train: Channels whose plan says so are exactly 0 outside their mask, after resampling
            too: by that the augmentation knows what to leave at 0.

    Raises:
        ValueError: If a file is broken, or image and mask do not belong together.
        FileNotFoundError: If a file is not there.
    """
    values = plan.labels.values
    every, found = seen or scan.read_channels(case.image)
    volume, label, more = _read(
        case,
        every,
        num_classes=values,
        modality=plan.modality,
        as_it_lies=plan.as_it_lies,
        law=plan.law,
        schemes=_schemes(plan),
    )
    image, grid = _on_grid((volume, *every[1:]), plan)
    if to_train and plan.masked:
        image = channels.silence(image, (volume, *every[1:]), grid, plan.masked)
    if plan.previous_stage:
        maps, of_first = first_stage.channel(case, (volume, *every[1:]), grid, plan)
        image, found = first_stage.append(image, maps), [*found, *of_first]
    prepared_label, volume_ml = None, ()
    if plan.modality == "ct" and isinstance(case.image, Path):
        more = [*more, *hu.tilt_findings(volume.affine, table_feed=case.table_feed)]
    if label is not None:
        prepared_label = channels.label_on(label, (volume, *every[1:]), grid, plan)
        feed = case.table_feed and plan.modality == "ct"
        voxel_ml = hu.voxel_ml(volume.affine, table_feed=feed)
        counts = np.bincount(label.ravel(), minlength=values)
        volume_ml = tuple(float(count * voxel_ml) for count in counts)
    return Prepared(
        case=case.id,
        patient=case.patient,
        split=case.split,
        bleeding=slice_labels.bleeding(case, label, plan.modality, len(volume.voxels)),
        slice_labels=slice_labels.of_case(case, grid, prepared_label, len(plan.classes)),
        image=image,
        label=prepared_label,
        grid=grid,
        foreground=_positions(prepared_label, plan),
        values=0 if plan.labels.plain else values,
        volume_ml=volume_ml,
        source_sha256=source_sha256 or source_digest(case),
        sorted_by=case.sorted_by,
        warnings=tuple(texts([*found, *more])),
        doubts=doubts_of([*found, *more]),
    )


def prepare_volume(
    volume: Volume,
    plan: Plan,
    further: Sequence[Volume] = (),
    first_label: np.ndarray | None = None,
) -> tuple[np.ndarray, Grid, tuple[Finding, ...]]:
    """A scan in memory as `prepare_case` would prepare it from a file without a mask.

    Args:
        volume: The scan, or its first channel.
        plan: Of the run.
        further: Its other channels, voxel on voxel.
        first_label: Of a cascade, the label map [D H W] of its first network, on the same voxels.

    Returns:
        The image [D H W C], the way back to the scan's own voxels, and what was found or repaired;
        of a CT that is turned about x also that its affine does not say what turned it.

    Raises:
        ValueError: If it is no scan of the plan's kind; names `volume.case`.
    """
    case = Case(volume.case, volume.case, Path(volume.case), None, "test")
    ready, _, found = _read(
        case,
        (volume, *further),
        num_classes=len(plan.classes),
        modality=plan.modality,
        as_it_lies=plan.as_it_lies,
        law=plan.law,
        schemes=_schemes(plan),
    )
    if plan.modality == "ct":
        found += hu.tilt_findings(ready.affine, table_feed=False)
    image, grid = _on_grid((ready, *further), plan)
    if first_label is not None:
        maps = channels.label_on(first_label, (ready, *further), grid, plan)
        image = first_stage.append(image, maps)
    return image if image.ndim == 4 else image[..., None], grid, tuple(found)


def doubts_of(findings: Sequence[Finding]) -> tuple[str, ...]:
    """What those of them say that anyone who uses the scan has to know."""
    return tuple(texts(found for found in findings if found.kind in _DOUBTFUL))


def hu_doubts(every: Sequence[Volume], plan: Plan) -> tuple[str, ...]:
    """What `prepare_case` says in `doubts` of the HU of a scan that was read already; () for MR.

    Args:
        every: Its channels.
        plan: Of the run.

    Raises:
        Refusal: If it refuses the scan.
    """
    if plan.modality != "ct":
        return tuple(texts(_channel_doubts(every, _schemes(plan))))
    if plan.as_it_lies:
        return tuple(texts(plausibility.doubts(every[0].voxels)))
    _, found = plausibility.settle(every[0].voxels)
    return tuple(texts(one for one in found if one.kind in plausibility.KINDS))


def source_digest(case: Case) -> str:
    """SHA-256 over the digests of the case's files: changes when any byte of them does."""
    total = hashlib.sha256()
    total.update(scan.digest(case.image))
    total.update(b"-" if case.label is None else scan.digest(case.label))
    if case.previous is not None:
        total.update(scan.digest(case.previous))
    return total.hexdigest()


def _target_spacing(volume: Volume, plan: Plan) -> Millimeters:
    """The plan's; of a 2D plan, the distance of the slices is the scan's own."""
    if not plan.planar:
        return plan.spacing_mm
    order, _ = geometry.canonical(volume.affine, plan.axes)
    return volume.spacing_mm[order[plan.transpose[0]]], *plan.spacing_mm[1:]


def _positions(label: np.ndarray | None, plan: Plan) -> tuple[np.ndarray, ...]:
    if plan.labels.plain:
        return foreground_positions(label, len(plan.classes))
    return target_positions(label, plan.labels)


def _drawn(inside: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """Intensities drawn from each channel with replacement, at the same voxels in all."""
    drawn = [np.random.default_rng(SEED).choice(one, samples).astype(np.float32) for one in inside]
    return drawn[0] if len(drawn) == 1 else np.stack(drawn, axis=-1)


def _voxels_digest(every: Sequence[Volume]) -> str:
    total = hashlib.sha256()
    for one in every:
        total.update(np.ascontiguousarray(one.voxels).data)
    return total.hexdigest()


def _read(
    case: Case,
    every: Sequence[Volume],
    *,
    num_classes: int,
    modality: str,
    as_it_lies: bool = False,
    law: str = "faces",
    schemes: Sequence[tuple[str, str]] = (),
) -> tuple[Volume, np.ndarray | None, list[Finding]]:
    """A scan whose CT is in HU, its label, and what was found; or a scan `as_it_lies`.

    Of several channels it is the first, and all are taken as they lie. By BLAST-CT's law padding
    and metal are not clipped, and a scan of whole numbers is one of integers, in whatever type it
    comes: of an array in memory nobody knows the type that its file had.
    """
    raw, label, found = every[0], None, []
    if case.label is not None:
        mask, found = scan.read_label(case.label, case.image, raw, num_classes=num_classes)
        label = mask.voxels
    if modality != "ct":
        return raw, label, [*found, *_channel_doubts(every, schemes)]
    found += blank.findings(raw)
    if as_it_lies:
        return raw, label, [*found, *plausibility.doubts(raw.voxels)]
    try:
        voxels, repairs = plausibility.settle(raw.voxels, clip=law != geometry.CENTERS)
    except Refusal as error:
        raise said_of(scan.called(case.image), error) from error
    if law == geometry.CENTERS and _is_whole(raw.voxels):
        voxels = np.rint(voxels).astype(np.int32)
    return replace(raw, voxels=voxels), label, [*found, *repairs]


def _is_whole(voxels: np.ndarray) -> bool:
    return voxels.dtype.kind != "f" or bool((np.rint(voxels) == voxels).all())


def _schemes(plan: Plan) -> list[tuple[str, str]]:
    return [(channel.name, channel.scheme) for channel in plan.channels]


def _channel_doubts(every: Sequence[Volume], schemes: Sequence[tuple[str, str]]) -> list[Finding]:
    """What is doubtful about the HU of those of several channels that are CT."""
    return [
        replace(doubt, text=f"channel {name!r}: {doubt.text}")
        for volume, (name, scheme) in zip(every, schemes, strict=False)  # `_on_grid` counts them
        if scheme == channels.CT
        for doubt in plausibility.doubts(volume.voxels)
    ]


def _on_grid(every: Sequence[Volume], plan: Plan) -> tuple[np.ndarray, Grid]:
    """All channels of a scan that was repaired, as training reads it, and where it lies."""
    volume = every[0]
    grid = geometry.locate(
        channels.union(every),
        spacing_mm=_target_spacing(volume, plan),
        transpose=plan.transpose,
        crop_hu=plan.crop_hu,
        axes=plan.axes,
        law=plan.law,
    )
    if plan.channels or len(every) > 1:
        return channels.prepare(every, grid, plan.channels), grid
    if not plan.normalized_before:
        image = geometry.to_grid(volume.voxels, grid, "image")
        exact = plan.law == geometry.CENTERS
        return image if exact else np.rint(image).astype(np.int16), grid
    ct = plan.modality == "ct"
    voxels = _scaled(volume.voxels, plan) if ct else _standardized(volume.voxels, grid, plan)
    return geometry.to_grid(voxels, grid, "image").astype(np.float32), grid


def _standardized(voxels: np.ndarray, grid: Grid, plan: Plan) -> np.ndarray:
    """Zero mean and unit variance over the crop; or over its non-zero voxels and the holes in them.

    What lies outside such a mask keeps its 0. The mask is of the scan alone, so that prediction,
    which has no labels, sees what training has seen.

    Source: nnU-Net v2.8.1, `ZScoreNormalization`, `create_nonzero_mask`.
    """
    inside = geometry.native_box(voxels, grid).astype(np.float64)
    if not plan.use_mask_for_norm:
        mean, std = inside.mean(), max(float(inside.std()), 1e-8)
        return ((voxels - mean) / std).astype(np.float32)
    mask = np.asarray(ndimage.binary_fill_holes(inside != 0))
    chosen = inside[mask] if mask.any() else np.zeros(1)
    mean, std = chosen.mean(), max(float(chosen.std()), 1e-8)
    standard = np.zeros(voxels.shape, np.float32)
    geometry.native_box(standard, grid)[...] = np.where(mask, (inside - mean) / std, 0)
    return standard


def _scaled(voxels: np.ndarray, plan: Plan) -> np.ndarray:
    """Source: nnU-Net v2.8.1, `CTNormalization`, in float32 as there."""
    low, mean, std, high = plan.foreground
    return (np.clip(voxels.astype(np.float32), low, high) - mean) / max(std, 1e-8)


def _extent(voxels: np.ndarray) -> tuple[float, float, float]:
    return float(voxels.min()), float(np.median(voxels)), float(voxels.max())
