"""DICOM folders to series, and series to volumes."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bhsd_jax.ct import hu
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.ct.dicom import stack as dicom_stack
from bhsd_jax.ct.dicom.image_kind import Flaw
from bhsd_jax.ct.dicom.slice_file import Plane, Slice
from bhsd_jax.ct.dicom.stack import Stack
from bhsd_jax.defects import Finding, Kind, Refusal, kind_of, said_of
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Series, Volume

_SAME_COSINE = 1e-3
_SAME_SPACING = 5e-3  # of each other: rounding, or a reconstruction slice by slice
_LEFT_OUT = {
    Flaw.MODALITY: Kind.LEFT_OUT_MODALITY,
    Flaw.LOCALIZER: Kind.LEFT_OUT_LOCALIZER,
    Flaw.COLOR: Kind.LEFT_OUT_COLOR,
    Flaw.POSITION: Kind.LEFT_OUT_POSITION,
    Flaw.SPACING: Kind.LEFT_OUT_SPACING,
    Flaw.ORIENTATION: Kind.LEFT_OUT_ORIENTATION,
    Flaw.EMPTY: Kind.LEFT_OUT_EMPTY,
    Flaw.ALONE: Kind.LEFT_OUT_ALONE,
    Flaw.HEADER: Kind.LEFT_OUT_HEADER,
    Flaw.REPORT: Kind.LEFT_OUT_REPORT,
    Flaw.CAPTURE: Kind.LEFT_OUT_CAPTURE,
    Flaw.PROJECTION: Kind.LEFT_OUT_PROJECTION,
    Flaw.MAP: Kind.LEFT_OUT_MAP,
    Flaw.PLACE: Kind.LEFT_OUT_PLACE,
}


@dataclass(frozen=True)
class Group:
    """Slices of one series that share orientation, matrix and pixel size; not yet ordered."""

    slices: tuple[Slice, ...]  # by file name
    findings: tuple[Finding, ...]  # what was left out of the study

    @property
    def folder(self) -> Path:
        """The deepest folder that holds all its files."""
        return Path(os.path.commonpath([item.file.parent for item in self.slices]))

    @property
    def first(self) -> Slice:
        """Any of them, for what all share: patient, study, series."""
        return self.slices[0]

    def as_series(
        self, name: str, *, uneven: str, unshear: bool, settings: str = "config.data"
    ) -> Series:
        """What a case holds of it; `settings` is where `uneven` and `unshear` were set."""
        files = tuple(item.file for item in self.slices)
        return Series(files, name, uneven, unshear, self.findings, settings)


@dataclass(frozen=True)
class Found:
    """What lies below a folder."""

    groups: tuple[Group, ...]  # in the order of their first files
    findings: tuple[Finding, ...]  # what was left out of studies that have no group


def find(root: Path, *, wanted: Callable[[Path], bool] = lambda path: True) -> list[Group]:
    """The groups of `survey`."""
    return list(survey(root, wanted=wanted).groups)


def survey(root: Path, *, wanted: Callable[[Path], bool] = lambda path: True) -> Found:
    """Every CT series below a folder, in the order of its first file; links are not followed.

    Files are known by content, not by name. Localizers, reports, captures, other kinds of images,
    single images and those all at one place are left out; the findings of their study's first
    series say so. Files that name no study are of that of their folder.

    Raises:
        ValueError: If there are DICOM images, but all of them are left out; says why.
    """
    slices = []
    left = Counter[tuple[str, Flaw]]()
    for path in _files(root):
        if not wanted(path):
            continue
        try:
            slices.append(slice_file.header(path))
        except UserError:
            left[str(path.parent), Flaw.HEADER] += 1
    groups = []
    for group in _grouped(slices):
        flaw = group[0].flaw or _flaw_together(group)
        if flaw in (None, Flaw.MULTI_FRAME):  # the latter is refused when it is read
            groups += map(_with_remarks, _passes(group))
        elif flaw is not Flaw.DIRECTORY:
            left[_study(group[0]), flaw] += len(group)
    if left and not groups:
        raise UserError(f"{root}: no CT volume in its DICOM files; {_told(left)}")
    groups.sort(key=lambda group: group.first.file)
    return _with_findings(groups, left)


def read(series: Series) -> tuple[Volume, list[Finding]]:
    """The volume of a series in HU, and what was found; as it lies, tilt kept as shear.

    Raises:
        Refusal: If a file is damaged or compressed beyond what is installed, or no single
            affine holds the slices. Files are called by their place in the order of their names.
    """
    stack = arrange(series)
    planes = [_plane(item, series) for item in stack.slices]
    if any(plane.unwrapped for plane in planes) and not _air_at_edges(planes):
        planes = [_plane(item, series, unwrap=False) for item in stack.slices]
    kind = np.result_type(*(plane.voxels.dtype for plane in planes))
    if (stack.source % 1).any():
        kind = np.dtype(np.float32)
    voxels = np.empty(stack.shape, kind)
    for target, place in zip(voxels, stack.source, strict=True):
        below, share = int(place), place % 1
        plane = planes[below].voxels
        if share:
            plane = (1 - share) * plane + share * planes[below + 1].voxels
        target[...] = plane[::-1]  # rows run to the front
    found = [*series.findings, *stack.findings, *_of_planes(planes)]
    return Volume(voxels, stack.affine, series.name), found


def arrange(series: Series) -> Stack:
    """The series' slices in order, from their headers alone.

    Raises:
        ValueError: As by `read`, damaged voxels excepted.
    """
    return order(_headers(series), series)


def order(headers: Sequence[Slice | None], series: Series) -> Stack:
    """As `arrange`, from headers in the order of the files' names; None where one is damaged."""
    slices, damaged = [], []
    for place, item in enumerate(headers, start=1):
        if item is None or not item.whole:
            damaged.append(place)
        else:
            _require_slice(item, place, series)
            slices.append(item)
    found = ()
    if damaged:
        text = (
            f"{len(damaged)} of {len(series.files)} files are damaged, the first is file "
            f"{damaged[0]} in the order of their names"
        )
        if series.uneven == "refuse":
            raise Refusal(
                Kind.SERIES_DAMAGED,
                f"{series.name}: {text}; fetch them again, or set "
                f"--{series.settings}.uneven=resample to do without",
            )
        found = (Finding(Kind.FILES_DAMAGED, "kept", f"{text}; left out"),)
    try:
        stack = dicom_stack.arrange(
            slices, uneven=series.uneven, setting=f"{series.settings}.uneven", same=_same
        )
    except UserError as error:
        raise said_of(series.name, error) from error
    return replace(stack, findings=(*found, *stack.findings))


def _headers(series: Series) -> list[Slice | None]:
    found: list[Slice | None] = []
    for path in sorted(series.files):
        try:
            found.append(slice_file.header(path))
        except (UserError, OSError):
            found.append(None)
    return found


def _require_slice(item: Slice, place: int, series: Series) -> None:
    if item.flaw is Flaw.MULTI_FRAME:
        raise Refusal(
            Kind.MULTI_FRAME,
            f"{series.name}: {item.flaw}: enhanced CT is not read; convert the "
            "series to NIfTI with dcm2niix",
        )
    if item.flaw:
        raise Refusal(Kind.NO_SLICE, f"{_called(place, series)} is {item.flaw}")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and name != "DICOMDIR" and slice_file.is_dicom(path):
                yield path


def _grouped(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices that may be one volume: a series, split where matrix, pixels or orientation differ."""
    groups: dict[tuple, list[list[Slice]]] = {}
    for item in slices:
        alone = item.file if item.flaw is Flaw.MULTI_FRAME else None
        # Files that name no series are of one only if they lie in one folder.
        series = item.series or str(item.file.parent)
        key = (_study(item), series, item.flaw, item.shape, alone)
        for group in groups.setdefault(key, []):
            if item.flaw or _alike(item, group[0]):
                group.append(item)
                break
        else:
            groups[key].append([item])
    return [group for some in groups.values() for group in some]


def _study(item: Slice) -> str:
    """What tells studies apart: the UID, or the folder where that is missing."""
    return item.study or str(item.file.parent)


def _flaw_together(group: Sequence[Slice]) -> Flaw | None:
    """Why slices, each of them good, are no volume."""
    if len(group) < 2:
        return Flaw.ALONE
    places = [dicom_stack.along_normal(item) for item in group]
    # A timing bolus, for one, or the same localizer with several lines drawn into it.
    return Flaw.PLACE if max(places) - min(places) < dicom_stack.SAME_MM else None


def _passes(slices: Sequence[Slice]) -> list[Group]:
    """One group; or one per acquisition, where several went over the same stretch.

    A second pass, after contrast or because the patient moved, may lie half a step off and would
    be stacked in between. Acquisitions one after another, as in step and shoot, stay together.
    """
    passes: dict[str, list[Slice]] = {}
    for item in slices:
        passes.setdefault(item.acquisition, []).append(item)
    if "" in passes or min(map(len, passes.values())) < 2 or not _overlap(passes.values()):
        return [Group(tuple(slices), ())]
    text = f"{len(passes)} acquisitions of one series over the same stretch: a volume each"
    found = (Finding(Kind.ACQUISITIONS, "kept", text),)
    return [Group(tuple(part), found) for part in passes.values()]


def _with_remarks(group: Group) -> Group:
    if not all(item.derived for item in group.slices):
        return group
    text = "images derived from others: a reformat, perhaps, whose original lies beside it"
    return replace(group, findings=(*group.findings, Finding(Kind.DERIVED, "kept", text)))


def _overlap(passes: Iterable[Sequence[Slice]]) -> bool:
    """Whether one begins before another ends."""
    along = [[dicom_stack.along_normal(item) for item in part] for part in passes]
    ranges = sorted((min(places), max(places)) for places in along)
    return any(after[0] < before[1] for before, after in itertools.pairwise(ranges))


def _alike(one: Slice, other: Slice) -> bool:
    turned = np.subtract(one.along_row + one.along_column, other.along_row + other.along_column)
    wider = np.divide(one.spacing_mm, other.spacing_mm) - 1
    return bool(np.abs(turned).max() < _SAME_COSINE and np.abs(wider).max() < _SAME_SPACING)


def _told(left: Counter[tuple[str, Flaw]]) -> str:
    """How many images were left out, by reason."""
    total = Counter[Flaw]()
    for (_, flaw), count in left.items():
        total[flaw] += count
    return "left out: " + "; ".join(_images(count, flaw) for flaw, count in sorted(total.items()))


def _images(count: int, flaw: Flaw) -> str:
    return f"{count} image{'s' if count > 1 else ''} {flaw}"


def _with_findings(groups: Sequence[Group], left: Counter[tuple[str, Flaw]]) -> Found:
    """Findings go to the first group of their study; those of a study without one stay apart."""
    out = list(groups)
    apart = Counter[Flaw]()
    for (study, flaw), count in sorted(left.items()):
        place = next((i for i, group in enumerate(out) if _study(group.first) == study), None)
        if place is None:
            apart[flaw] += count
        else:
            findings = (*out[place].findings, _left_out(flaw, count))
            out[place] = replace(out[place], findings=findings)
    return Found(tuple(out), tuple(_left_out(flaw, n) for flaw, n in sorted(apart.items())))


def _left_out(flaw: Flaw, count: int) -> Finding:
    return Finding(_LEFT_OUT[flaw], "kept", f"left out: {_images(count, flaw)}")


def _same(one: Slice, other: Slice) -> bool:
    return np.array_equal(slice_file.pixels(one.file).voxels, slice_file.pixels(other.file).voxels)


def _air_at_edges(planes: Sequence[Plane]) -> bool:
    """Whether a fifth or more of the slices' edges is air; what is called padding is none.

    If not, values above 3095 were bone or metal of a scan that only lost its offset.
    """
    found = []
    for voxels in (plane.voxels for plane in planes):
        edges = np.concatenate([voxels[[0, -1]].ravel(), voxels[:, [0, -1]].ravel()])
        found.append(np.mean((edges < -500) & (edges > hu.LOWEST_HU)))
    return float(np.mean(found)) >= hu.LEAST_AIR


def _plane(item: Slice, series: Series, *, unwrap: bool = True) -> Plane:
    try:
        return slice_file.pixels(item.file, unwrap=unwrap)
    except (UserError, OSError) as error:
        place = sorted(series.files).index(item.file) + 1
        said = str(error) if isinstance(error, UserError) else type(error).__name__
        # Not chained: the original may quote the path.
        raise Refusal(kind_of(error), f"{_called(place, series)}: {said}") from None


def _called(place: int, series: Series) -> str:
    return f"{series.name}: file {place} of {len(series.files)} in the order of their names"


def _of_planes(planes: Sequence[Plane]) -> list[Finding]:
    found = []
    total = len(planes)
    if count := sum(plane.unwrapped for plane in planes):
        text = f"12-bit overflow undone in {count} of {total} slices"
        found.append(Finding(Kind.OVERFLOW, "repaired", text))
    if count := sum(plane.padding for plane in planes):
        text = f"{count} voxels of padding set to {hu.LOWEST_HU:.0f} HU"
        found.append(Finding(Kind.PADDING_VALUE, "kept", text))
    if any(plane.doubtful for plane in planes):
        text = "the padding value is among tissue: not believed"
        found.append(Finding(Kind.PADDING_IN_TISSUE, "kept", text))
    if count := sum(plane.unscaled for plane in planes):
        text = f"no rescale factors in {count} of {total} slices; taken for 1 and 0"
        found.append(Finding(Kind.UNSCALED, "kept", text))
    return found
