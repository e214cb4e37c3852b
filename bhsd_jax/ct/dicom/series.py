"""DICOM folders to series, and series to volumes."""

import itertools
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bhsd_jax.ct import hu
from bhsd_jax.ct.dicom import grouping, no_slice, slice_file
from bhsd_jax.ct.dicom import stack as dicom_stack
from bhsd_jax.ct.dicom.grouping import Group, Left
from bhsd_jax.ct.dicom.image_kind import Flaw
from bhsd_jax.ct.dicom.plane import Plane
from bhsd_jax.ct.dicom.slice_file import Slice
from bhsd_jax.ct.dicom.stack import Stack
from bhsd_jax.defects import Finding, Kind, Refusal, kind_of, said_of
from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Series, Volume

logger = logging.getLogger(__name__)

_THREADS = 16  # that read headers: on a shared disk a file is waited for longer than it is read
_AT_ONCE = 1024  # files that are handed to them
_LEFT_OUT = {
    Flaw.MODALITY: Kind.LEFT_OUT_MODALITY,
    Flaw.SEG: Kind.LEFT_OUT_SEG,
    Flaw.OUTLINE: Kind.LEFT_OUT_OUTLINE,
    Flaw.LOCALIZER: Kind.LEFT_OUT_LOCALIZER,
    Flaw.COLOR: Kind.LEFT_OUT_COLOR,
    Flaw.POSITION: Kind.LEFT_OUT_POSITION,
    Flaw.SPACING: Kind.LEFT_OUT_SPACING,
    Flaw.SIZE: Kind.LEFT_OUT_SIZE,
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
class Found:
    """What lies below a folder."""

    groups: tuple[Group, ...]  # in the order of their first files
    findings: tuple[Finding, ...]  # what was left out of studies that have no group
    segs: tuple[Path, ...] = ()  # DICOM SEG, where they are asked for: not among what is left out


def find(root: Path, *, wanted: Callable[[Path], bool] = lambda path: True) -> list[Group]:
    """The groups of `survey`."""
    return list(survey(root, wanted=wanted).groups)


def survey(
    root: Path, *, wanted: Callable[[Path], bool] = lambda path: True, segs: bool = False
) -> Found:
    """Every CT series below a folder, in the order of its first file.

    Links to files and to folders are followed; a folder that several lead to is looked at once, and
    those above `root` are not.

    Files are known by content, not by name. Localizers, reports, captures, other kinds of images,
    single images and those all at one place are left out; the findings of their study's first
    series say so. Files that name no study are of that of their folder. With `segs` a DICOM SEG is
    not left out but listed.

    Raises:
        ValueError: If there are DICOM images, but all of them are left out; says why. Or pydicom,
            which reads them, is not installed.
    """
    slices: list[Slice] = []
    broken, others = list[Path](), defaultdict[Path, list[Path]](list)
    for path, dicom, found in _looked_at(root, filter(wanted, _files(root))):
        slices += found
        if not dicom:
            others[path.parent].append(path)
        elif not found:
            broken.append(path)
    studies = {item.file.parent: grouping.study(item) for item in reversed(slices)}
    left = Left()
    for path in broken:
        left[studies.get(path.parent, str(path.parent)), Flaw.HEADER] += 1
    groups = grouping.split(sorted(slices, key=lambda item: item.file), left)
    if left and not groups:
        raise UserError(f"{root}: no CT volume in its DICOM files; {_told(left)}")
    masks = tuple(item.file for item in slices if segs and item.flaw is Flaw.SEG)
    for key in [key for key in left if masks and key[1] is Flaw.SEG]:
        del left[key]
    groups.sort(key=lambda group: group.first.file)
    groups = [no_slice.with_findings(group, others) for group in groups]
    return replace(_with_findings(groups, left), segs=masks)


def read(series: Series) -> tuple[Volume, list[Finding]]:
    """The volume of a series in HU, and what was found; as it lies, tilt kept as shear.

    Raises:
        Refusal: If a file is damaged or compressed beyond what is installed, or no single
            affine holds the slices. Files are called by their place in the order of their names.
    """
    stack = arrange(series)
    planes = _planes(stack.slices, series)
    if any(plane.unwrapped for plane in planes) and not _air_at_edges(planes):
        planes = _planes(stack.slices, series, unwrap=False)
    _require_alike(planes, series)
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
    """As `arrange`, from headers in the order of the files' names; None where one is damaged.

    Of files with several volumes (phases, say, or stacks) the series says which it is.
    """
    slices, damaged, place, last = [], [], 0, None
    for item in headers:
        place += item is None or item.file != last  # frames of one file share its place
        last = item and item.file
        if item is None or not (item.whole or item.flaw):  # the flaw says more
            damaged.append(place)
        else:
            slices.append(item)
    damaged = sorted(set(damaged))
    slices = _part(slices, series)
    _require_parts(slices, series)
    for item in slices:
        _require_slice(item, series)
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
            slices,
            uneven=series.uneven,
            setting=f"{series.settings}.uneven",
            same=_same,
            even_out=series.own_slices,
        )
    except UserError as error:
        raise said_of(series.name, error) from error
    return replace(stack, findings=(*found, *stack.findings))


def _headers(series: Series) -> list[Slice | None]:
    slice_file.require()
    found: list[Slice | None] = []
    for path in sorted(series.files):
        try:
            found += slice_file.headers(path)
        except (UserError, OSError):
            found.append(None)
    return found


def _part(slices: Sequence[Slice], series: Series) -> list[Slice]:
    """Of the slices in the series' files those that are its volume."""
    if all(item.frame is None for item in slices):
        return list(slices)
    groups = grouping.split(slices, Left())
    return list(groups[series.part].slices if series.part < len(groups) else slices)


def _require_parts(slices: Sequence[Slice], series: Series) -> None:
    """Whether an image that was cut into several files is there from its first to its last."""
    for container in sorted({item.container for item in slices if item.part != (0, 0)}):
        parts = {item.part for item in slices if item.container == container}
        numbers = {number for number, _ in parts}
        total = max(max(total for _, total in parts), max(numbers))
        if lost := sorted(set(range(1, total + 1)) - numbers):
            raise Refusal(
                Kind.MISSING,
                f"{series.name}: a concatenation, an image in several files, lacks "
                f"{', '.join(f'part {number}' for number in lost)} of {total}; fetch what is "
                "missing",
            )


def _require_slice(item: Slice, series: Series) -> None:
    if item.flaw is Flaw.MULTI_FRAME:
        raise Refusal(
            Kind.MULTI_FRAME,
            f"{series.name}: {item.flaw}, but no enhanced CT that says where its frames lie; "
            "convert the series to NIfTI with dcm2niix",
        )
    if item.flaw:
        raise Refusal(Kind.NO_SLICE, f"{_called(item, series)} is {item.flaw}")


def _looked_at(root: Path, paths: Iterator[Path]) -> Iterator[tuple[Path, bool, list[Slice]]]:
    """What `_look` finds of each file, in their order; says now and then how many there were."""
    count, told = 0, time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(itertools.islice(paths, _AT_ONCE)):
            for path, (dicom, slices) in zip(some, pool.map(_look, some), strict=True):
                yield path, dicom, slices
                count += 1
                if time.monotonic() - told >= machine.log_every_s():
                    told = time.monotonic()
                    logger.info("%s: %d files looked at for DICOM", root, count)


def _look(path: Path) -> tuple[bool, list[Slice]]:
    """Whether the file is DICOM, and its slices; of one whose header cannot be read there are none.

    Raises:
        ValueError: If pydicom is not installed.
    """
    if not slice_file.is_dicom(path):
        return False, []
    slice_file.require()
    try:
        return True, slice_file.headers(path)
    except UserError:
        return True, []


def _files(root: Path) -> Iterator[Path]:
    """All but hidden ones, those behind links to folders last; each folder once."""
    seen: set[str] = set()
    waiting = [str(root)]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            waiting += _links(root, folder, folders, seen)
            for name in sorted(names):
                path = Path(folder, name)
                if not name.startswith(".") and name != "DICOMDIR":
                    yield path


def _links(root: Path, folder: str, names: Sequence[str], seen: set[str]) -> list[str]:
    """Those of a folder's entries that link to folders not yet seen, but for those around it."""
    links = []
    for link in (os.path.join(folder, name) for name in names):
        target = os.path.realpath(link)
        if not os.path.islink(link) or target in seen:
            continue
        inside = (os.path.realpath(place) for place in (root, folder))
        if any(os.path.commonpath([target, place]) == target for place in inside):
            text = "%s: a link in it leads to a folder above and is not followed; link the series"
            logger.warning(text, root)
        else:
            links.append(link)
    return links


def _told(left: Left) -> str:
    """How many images were left out, by reason."""
    total = Counter[Flaw]()
    for (_, flaw), count in left.items():
        total[flaw] += count
    return "left out: " + "; ".join(_images(count, flaw) for flaw, count in sorted(total.items()))


def _images(count: int, flaw: Flaw) -> str:
    return f"{count} image{'s' if count > 1 else ''} {flaw}"


def _with_findings(groups: Sequence[Group], left: Left) -> Found:
    """Findings go to the first group of their study; those of a study without one stay apart."""
    out = list(groups)
    apart = Counter[Flaw]()
    first: dict[str, int] = {}  # group of a study
    for place, group in enumerate(groups):
        first.setdefault(grouping.study(group.first), place)
    for (study, flaw), count in sorted(left.items()):
        if study not in first:
            apart[flaw] += count
        else:
            group = out[first[study]]
            findings = (*group.findings, _left_out(flaw, count))
            out[first[study]] = replace(group, findings=findings)
    return Found(tuple(out), tuple(_left_out(flaw, n) for flaw, n in sorted(apart.items())))


def _left_out(flaw: Flaw, count: int) -> Finding:
    return Finding(_LEFT_OUT[flaw], "kept", f"left out: {_images(count, flaw)}")


def _same(one: Slice, other: Slice) -> bool:
    first, second = (slice_file.planes(item.file, (item.frame,))[0] for item in (one, other))
    return np.array_equal(first.voxels, second.voxels)


def _air_at_edges(planes: Sequence[Plane]) -> bool:
    """Whether a fifth or more of the slices' edges is air; what is called padding is none.

    If not, values above 3095 were bone or metal of a scan that only lost its offset.
    """
    found = []
    for voxels in (plane.voxels for plane in planes):
        edges = np.concatenate([voxels[[0, -1]].ravel(), voxels[:, [0, -1]].ravel()])
        found.append(np.mean((edges < -500) & (edges > hu.LOWEST_HU)))
    return float(np.mean(found)) >= hu.LEAST_AIR


def _planes(slices: Sequence[Slice], series: Series, *, unwrap: bool = True) -> list[Plane]:
    """In the order of the slices; each file is opened once."""
    wanted: dict[Path, list[Slice]] = {}
    for item in slices:
        wanted.setdefault(item.file, []).append(item)
    found = {}
    for file, items in wanted.items():
        try:
            planes = slice_file.planes(file, [item.frame for item in items], unwrap=unwrap)
        except (UserError, OSError) as error:
            said = str(error) if isinstance(error, UserError) else type(error).__name__
            # Not chained: the original may quote the path.
            raise Refusal(kind_of(error), f"{_called(items[0], series)}: {said}") from None
        found |= {(file, item.frame): plane for item, plane in zip(items, planes, strict=True)}
    return [found[item.file, item.frame] for item in slices]


def _require_alike(planes: Sequence[Plane], series: Series) -> None:
    """That all slices state rescale factors, or none: what lacks them may be 1024 HU off."""
    lacking = sum(plane.unscaled for plane in planes)
    if 0 < lacking < len(planes):
        raise Refusal(
            Kind.SERIES_DAMAGED,
            f"{series.name}: {lacking} of {len(planes)} slices lack the rescale factors that the "
            "others have, and may be in other units; fetch them again",
        )


def _called(item: Slice, series: Series) -> str:
    place = sorted(series.files).index(item.file) + 1
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
    if count := sum(plane.flattened for plane in planes):
        text = f"rescale slope of 0 in {count} of {total} slices; taken for 1"
        found.append(Finding(Kind.FLATTENED, "repaired", text))
    return found
