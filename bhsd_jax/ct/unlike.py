"""Whether a scan is of the kind that a run was trained on: spacing, field of view, HU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct import channels
from bhsd_jax.platform import files
from bhsd_jax.volume import Grid, Millimeters, Plan

_SLACK = 1.25  # times what was seen is still like it
_LEAST_SHARE = 0.05  # of the voxels that have the intensities of brain and bleeds
_AIR_HU = -500.0  # only air and padding of a CT are below
_LEAST_AIR = 0.02  # of the voxels of a CT
_AT_BOUND = 0.01  # of the range: as close to an end of it as clipped voxels are once resampled
_AXES = ("slices", "rows", "columns")

Foreground = tuple[float, float, float, float]  # 0.5 %, mean, std, 99.5 % of it, HU


@dataclass(frozen=True)
class Seen:
    """Ranges over the scans that a data set had when it was prepared, canonical axes."""

    spacing_mm: tuple[Millimeters, Millimeters]  # least and most
    field_mm: tuple[Millimeters, Millimeters]
    lowest: float | None = None  # intensity of all scans, as stored; older files lack it

    @classmethod
    def load(cls, folders: Sequence[Path]) -> "Seen | None":
        """From `integrity.json` in the first of the folders that has one that says it."""
        for folder in folders:
            found = files.recall_json(folder / "integrity.json", _parse, remove=False)
            if found is not None:
                return found
        return None


def sentences(
    image: np.ndarray,
    grid: Grid,
    plan: Plan,
    seen: Seen | None,
    stored: np.ndarray | None = None,
) -> tuple[str, ...]:
    """What is unlike the training data about a prepared scan; () where nothing is known to be.

    Spacing and field of view are compared with the ranges of the prepared data set, a quarter
    beyond which still counts as like it. Of a CT in HU at least 5 % of the crop must have
    intensities between the plan's 0.5 % and 99.5 % of bleeding voxels, where brain lies too. A CT
    that was normalized first is clipped to them, and imported plans do not crop air away: of its
    voxels above the lower, 5 % must be below the upper. So it is with each channel that is CT.
    An MR network brings any scan to zero mean, so that nothing else tells it from a CT in HU: the
    air of that, which no scan of an MR data set has.

    Args:
        image: [D H W C] as `prepare_case` gives it, or without C.
        grid: Its way back to the scan's own voxels.
        plan: Of the run.
        seen: Ranges; None: they are not known, as of imported weights.
        stored: Voxels of the scan as its file has them; None: they are not at hand.
    """
    told = []
    ct = plan.modality == "ct" or (plan.channels and plan.channels[0].scheme == channels.CT)
    if seen is not None and stored is not None and not ct:
        told += _air(stored, seen)
    if seen is not None and plan.transpose == (0, 1, 2):
        told += _outside("spacing", "mm", grid.native_spacing_mm, seen.spacing_mm)
        told += _outside("field of view", "mm", grid.native_extent_mm, seen.field_mm)
    if plan.modality == "ct":
        image = image[..., : plan.scan_channels] if image.ndim == 4 else image
        told += _intensities(image, plan.foreground, clipped=plan.normalize_first)
    for index, channel in enumerate(plan.channels):
        if channel.scheme == channels.CT:
            lacking = _intensities(image[..., index], channel.foreground, clipped=True)
            told += [f"channel {channel.name!r}: {text}" for text in lacking]
    return tuple(told)


def _air(stored: np.ndarray, seen: Seen) -> list[str]:
    """What is to be said of a scan with the air of a CT, where the data set had none."""
    share = float(np.mean(stored < _AIR_HU))
    if seen.lowest is None or seen.lowest < _AIR_HU or share < _LEAST_AIR:
        return []
    return [
        f"{100 * share:.0f} % of the voxels lie below {_AIR_HU:.0f}, as air of a CT in HU does; "
        f"lowest seen {seen.lowest:.4g}"
    ]


def _intensities(image: np.ndarray, foreground: Foreground, *, clipped: bool) -> list[str]:
    """What is to be said of a CT, which was clipped to those of `foreground` or is in HU."""
    low, _, _, high = foreground
    share = _clipped_share(image, foreground) if clipped else _share(image, low, high)
    if share >= _LEAST_SHARE:
        return []
    where = f"voxels above {low:.0f} HU" if clipped else "head"
    return [f"{100 * share:.1f} % of the {where} lie in {low:.0f} to {high:.0f} HU"]


def _share(image: np.ndarray, low: float, high: float) -> float:
    return float(np.mean((image >= low) & (image <= high)))


def _clipped_share(image: np.ndarray, foreground: Foreground) -> float:
    """Of the voxels that were not clipped to the lower bound, those not clipped to the upper."""
    low, mean, std, high = foreground
    least, most = ((bound - mean) / max(std, 1e-8) for bound in (low, high))
    near = _AT_BOUND * (most - least)
    above = image > least + near
    return float(np.mean(image[above] < most - near)) if above.any() else 0.0


def _outside(
    what: str, unit: str, values: Millimeters, seen: tuple[Millimeters, Millimeters]
) -> list[str]:
    least, most = seen
    return [
        f"{what} of {axis} {value:.3g} {unit}, seen {low:.3g} to {high:.3g}"
        for axis, value, low, high in zip(_AXES, values, least, most, strict=True)
        if not low / _SLACK <= value <= high * _SLACK
    ]


def _parse(data: Mapping[str, Any]) -> Seen:
    spacing, field = (
        tuple(tuple(map(float, data[name][end])) for end in ("min", "max"))
        for name in ("spacing_mm", "field_mm")
    )
    lowest = data.get("intensity", {}).get("min")
    return Seen(spacing, field, float(lowest[0]) if lowest else None)  # pyright: ignore[reportArgumentType]
