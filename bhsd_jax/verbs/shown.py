"""Scans with their label maps, upright and in the axes of a reading room, for pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import geometry, hu, own_slices, plausibility, scan, shear
from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.report import viewer
from bhsd_jax.report.viewer import Shown, Viewer
from bhsd_jax.volume import Case, Label, Volume, bounding_box

_AIR = 0.2  # of the way from the lowest to the highest intensity: below it is air
_MARGIN_MM = 10.0


@dataclass(frozen=True)
class Entry:
    """A scan that a page is to show, before any file of it is read."""

    case: Case  # its label is the reference, where there is one
    label_map: Path
    name: str  # on the page
    ml: Mapping[str, float]
    dice: float | None = None
    disagreement: float | None = None  # of the networks, 0 to 1; None: not measured
    review: float | None = None
    all_ml: float | None = None  # of regions, which overlap: of all together
    flags: tuple[str, ...] = field(default=())

    @property
    def total_ml(self) -> float:
        """Of all classes, or of all regions together."""
        return sum(self.ml.values()) if self.all_ml is None else self.all_ml


def scans(run: Run, entries: Iterable[Entry]) -> Iterator[Shown]:
    """Reads one scan after the other.

    Raises:
        ValueError: If a file is damaged; names it.
        FileNotFoundError: If one is gone.
    """
    for entry in entries:
        yield read(run, entry)


def read(run: Run, entry: Entry) -> Shown:
    """One scan: sheared stacks are set upright, and CT is in HU, whatever its networks are given.

    Of a series at uneven steps the even planes are shown that the network saw, each with the label
    of the nearest slice.
    """
    place = scan.native(entry.case.image)
    volume, _ = scan.read(place)
    d, h, w = volume.voxels.shape
    own = own_slices.of(place, (d, h, w), volume.affine)
    labels = [_label(run, entry.label_map, entry, volume, own)]
    if entry.case.label is not None:
        labels.append(_label(run, entry.case.label, entry, volume, own))
    voxels, flags = volume.voxels, entry.flags
    if not own.is_even:
        flags = (*flags, f"{own.shape[0]} slices at uneven steps, shown on {d} even planes")
    if run.plan.in_hu:
        voxels = plausibility.settle(voxels)[0]
    elif run.plan.modality == "ct" and (settled := plausibility.in_hu(voxels)) is not None:
        voxels = settled
    if run.labels.regions:
        entry = replace(entry, ml=_by_value(run, labels[0], volume))
    return of_arrays(entry, Volume(voxels, volume.affine, entry.name), labels, flags)


def of_arrays(
    entry: Entry, volume: Volume, labels: Sequence[np.ndarray], flags: tuple[str, ...] = ()
) -> Shown:
    """A scan in memory with its label map and, where there is one, the reference, [D H W] each.

    A sheared one gets wider when its slices are moved over each other: rows and columns that show
    nothing but air and what was added are left out. Slices keep their numbers.
    """
    upright, made = shear.unshear(volume.voxels, volume.affine, fill=float(volume.voxels.min()))
    if upright is not volume.voxels:
        labels = [shear.unshear_label(label, volume.affine) for label in labels]
        box = _shown_box(upright, labels, made)
        upright, labels = upright[box], [label[box] for label in labels]
        flags = (*flags, "shown upright")
    order, flip = geometry.canonical(made)
    image, *masks = (geometry.turn(array, order, flip) for array in (upright, *labels))
    spacing = np.linalg.norm(made[:3, :3], axis=0)
    d, h, w = (float(spacing[axis]) for axis in order)
    reference = masks[1] if len(masks) > 1 else None
    return Shown(
        *(entry.name, image, (d, h, w), masks[0], reference, entry.ml),
        dice=entry.dice,
        review=entry.review,
        flags=flags,
    )


def around(run: Run, title: str, subtitle: str, notice: str, count: int) -> Viewer:
    """What stands around `count` scans of a run."""
    ct = run.plan.modality == "ct"
    windows, unit = (viewer.CT_WINDOWS, "HU") if ct else (viewer.NO_WINDOWS, "")
    auto = not run.plan.in_hu  # a scan may be in other units, where CT is taken as it lies
    return Viewer(title, subtitle, notice, run.classes[1:], windows, unit, count, auto)


def _shown_box(
    voxels: np.ndarray, labels: Sequence[np.ndarray], affine: np.ndarray
) -> tuple[slice, slice, slice]:
    """Rows and columns of patient, table or label, and some air around; all slices."""
    low, high = float(voxels.min()), float(np.percentile(voxels, 99.5))
    seen: np.ndarray = np.any(voxels > low + _AIR * (high - low), axis=0)
    for label in labels:
        seen |= np.any(label > 0, axis=0)
    box = bounding_box(seen) or (slice(0, seen.shape[0]), slice(0, seen.shape[1]))
    spacing = np.linalg.norm(affine[:3, 1:3], axis=0)
    rows, columns = (
        slice(max(part.start - margin, 0), part.stop + margin)
        for part, margin in zip(
            box, np.ceil(_MARGIN_MM / spacing).astype(int).tolist(), strict=True
        )
    )
    return slice(None), rows, columns


def _by_value(run: Run, label: np.ndarray, volume: Volume) -> dict[str, float]:
    """Milliliters of every value of a label map, which the page colors; regions overlap."""
    counts = np.bincount(label.ravel(), minlength=len(run.classes)) * hu.voxel_ml(
        volume.affine, table_feed=False
    )
    return dict(zip(run.classes[1:], map(float, counts[1:]), strict=True))


def _label(
    run: Run, place: Label, entry: Entry, volume: Volume, own: OwnSlices
) -> UInt8[np.ndarray, "D H W"]:
    """A label map on the planes of the volume; it lies on the scan's own slices.

    What is not annotated is shown as background: it is of no class.
    """
    like = volume if own.is_even else own.blank(volume.case)
    where = scan.native(entry.case.image)
    found, _ = scan.read_label(place, where, like, num_classes=None)
    label = own.on_planes(found.voxels)
    label = np.where(run.labels.annotated(label), label, 0).astype(np.uint8)
    return (label > 0).astype(np.uint8) if len(run.classes) == 2 else label
