"""A DICOM SEG as a mask: which series it is drawn on, what its segments are, and their voxels.

Frames are laid by where they lie in space, so that those of empty slices may be missing, and a SEG
may have its rows and columns in another order than the scan.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from bhsd_jax.ct.dicom import directions, segment_codes, slice_file
from bhsd_jax.ct.dicom.frames import Frame
from bhsd_jax.ct.dicom.image_kind import Flaw
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.platform.errors import UserError, some
from bhsd_jax.volume import Masks, Shape, column_lengths

_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # SOP: SEG, label map
_TAGS = (
    *("SOPClassUID", "SegmentationType", "SegmentSequence", "ReferencedSeriesSequence"),
    "FrameOfReferenceUID",
)
_MOST = 255  # segments: label maps are of 8 bits
_LABEL = 64  # letters that one may have
_NAMELESS = re.compile(  # what tools call a segment that nobody has named
    r"(seg|segment|segmentation|label|mask|roi|)[\W_]*\d*", re.IGNORECASE | re.ASCII
)
_OFF_MM = 0.2  # from the voxel of a scan: what rounding of positions to tenths can do
_TO_RAS = np.array([-1.0, -1.0, 1.0])  # DICOM's world is LPS

Affine = Float[np.ndarray, "4 4"]


@dataclass(frozen=True)
class Segment:
    """What a SEG says of one of its segments."""

    label: str
    bleeds: bool  # by the code of its type
    automatic: bool  # an algorithm drew it


@dataclass(frozen=True)
class Outline:
    """What the header of a SEG says."""

    path: Path
    series: frozenset[str]  # SeriesInstanceUIDs that it refers to
    instances: frozenset[str]  # SOPInstanceUIDs likewise
    space: str  # FrameOfReferenceUID
    segments: Mapping[int, Segment]  # by their numbers in the file
    flaw: str = ""  # why it is no mask, whatever it shows

    @property
    def is_automatic(self) -> bool:
        """Whether an algorithm drew any of it alone."""
        return any(segment.automatic for segment in self.segments.values())


def is_seg(path: Path) -> bool:
    """Whether a file is a DICOM SEG, of whatever kind."""
    if not slice_file.is_dicom(path):
        return False
    slice_file.require()
    try:
        return slice_file.headers(path)[0].flaw is Flaw.SEG
    except UserError:
        return False


def outline(path: Path) -> Outline:
    """What the header of a SEG says.

    Raises:
        Refusal: If it cannot be read.
    """
    try:
        with slice_file.quiet(), path.open("rb") as file:
            data = slice_file.read(file, stop_before_pixels=True, specific_tags=list(_TAGS))
            return _outline(path, data)
    except UserError:
        raise
    except Exception as error:  # pydicom throws what the file makes it throw
        text = f"its DICOM header cannot be read ({type(error).__name__})"
        raise Refusal(Kind.UNREADABLE, text) from None


def shows(found: Outline, classes: Sequence[str]) -> bool:
    """Whether a segment is of one of the classes, as by `label`."""
    return any(_values(found, classes))


def label(found: Outline, classes: Sequence[str]) -> Masks:
    """What a case holds of a SEG: the class of each segment, by its label.

    That is the name of a class in any spelling, or a bleed's as RSNA or anatomy call it; where the
    only class is any bleeding it may be any bleed, and where there is one class and one segment
    that nobody has named (Segment_1), that is it.

    Raises:
        Refusal: If it has a flaw, or a segment is of no class; names its number, not its label,
            which may be of a patient.
    """
    _require_mask(found)
    values = _values(found, classes)
    if unknown := [str(number) for number in sorted(found.segments) if not values[number]]:
        which = f"segment {unknown[0]} is" if len(unknown) == 1 else f"segments {some(unknown)} are"
        raise Refusal(
            Kind.MASK_VALUES,
            f"its {which} labeled as none of the classes {', '.join(classes[1:])}; label segments "
            "as the classes, or name the classes as they are",
        )
    return Masks((found.path,), values=values)


def onto(
    path: Path,
    shape: Shape,
    affine: Affine,
    places: Float[np.ndarray, " D"] | None = None,
) -> UInt8[np.ndarray, "D H W"]:
    """Segment numbers on the voxels of a scan, 0 where nothing is drawn.

    Args:
        path: The SEG.
        shape: Of the scan.
        affine: Of its voxels, to RAS+ mm.
        places: Of its planes, in steps of the affine; None: 0, 1, 2, ...

    Raises:
        Refusal: If it is damaged, does not lie on these voxels, or segments overlap.
    """
    try:
        with slice_file.quiet(), path.open("rb") as file:
            data = slice_file.read(file)
            found = _outline(path, data)
            _require_mask(found)
            slice_file.require_decoder(data)
            known = set(found.segments)
            planes = np.arange(shape[0]) if places is None else places
            return _drawn(data, known, shape, affine, planes)
    except UserError:
        raise
    except Exception as error:
        text = f"its voxels cannot be read ({type(error).__name__}): damaged"
        raise Refusal(Kind.UNREADABLE, text) from None


def _require_mask(found: Outline) -> None:
    if found.flaw:
        raise Refusal(Kind.MASK_VALUES, found.flaw)


def _flaw_of(data: Any, segments: Mapping[int, Segment]) -> str:
    if str(data.get("SOPClassUID") or "") not in _CLASSES:
        return "a DICOM SEG without voxels, as one of surfaces, is no mask; save it as BINARY"
    kind = str(data.get("SegmentationType") or "")
    if kind not in ("BINARY", "LABELMAP"):
        return f"a DICOM SEG of type {kind or 'unknown'} is no mask; save it as BINARY or LABELMAP"
    if max(segments, default=0) > _MOST:
        return f"a DICOM SEG with segments above number {_MOST} is not read; save it with fewer"
    return ""


def _outline(path: Path, data: Any) -> Outline:
    referred = data.get("ReferencedSeriesSequence") or ()
    segments = {int(one.SegmentNumber): _segment(one) for one in data.get("SegmentSequence") or ()}
    segments.pop(0, None)  # by which a label map may name its background
    return Outline(
        path=path,
        series=frozenset(str(one.get("SeriesInstanceUID") or "") for one in referred) - {""},
        instances=frozenset(
            str(item.get("ReferencedSOPInstanceUID") or "")
            for one in referred
            for item in one.get("ReferencedInstanceSequence") or ()
        )
        - {""},
        space=str(data.get("FrameOfReferenceUID") or ""),
        segments=segments,
        flaw=_flaw_of(data, segments),
    )


def _segment(item: Any) -> Segment:
    kinds = item.get("SegmentedPropertyTypeCodeSequence") or ()
    codes = {str(kind.get("CodeValue") or "") for kind in kinds}
    automatic = str(item.get("SegmentAlgorithmType") or "") == "AUTOMATIC"
    bleeds = segment_codes.HEMORRHAGE[0] in codes
    return Segment(str(item.get("SegmentLabel") or ""), bleeds, automatic)


def _values(found: Outline, classes: Sequence[str]) -> tuple[int, ...]:
    """Class by number of a segment; 0 where a segment is of none."""
    values = [0] * (max(found.segments, default=0) + 1)
    for number, segment in found.segments.items():
        values[number] = _class_of(segment, classes, alone=len(found.segments) == 1)
    return tuple(values)


def _class_of(segment: Segment, classes: Sequence[str], *, alone: bool) -> int:
    """Index of the class of a segment; 0 if it is none."""
    names = [name[:_LABEL].strip() for name in classes[1:]]
    named = [n for n, name in enumerate(names, start=1) if segment.label.strip() == name]
    named = named or [
        n for n, name in enumerate(names, start=1) if segment_codes.is_named(segment.label, name)
    ]
    if len(named) == 1:
        return named[0]
    any_bleed = [n for n, name in enumerate(classes) if n and segment_codes.is_any(name)]
    if any_bleed and (segment.bleeds or segment_codes.is_any_bleed([segment.label])):
        return any_bleed[0]
    nameless = bool(_NAMELESS.fullmatch(segment.label.strip()))
    return 1 if alone and nameless and len(classes) == 2 else 0


def _drawn(
    data: Any, known: set[int], shape: Shape, affine: Affine, planes: np.ndarray
) -> UInt8[np.ndarray, "D H W"]:
    out = np.zeros(shape, np.uint8)
    inverse = np.linalg.inv(affine)
    twice = 0
    for frame, plane, number in _frames(data):
        start, steps = _lie(frame, plane.shape, inverse, column_lengths(affine), planes, shape)
        drawn = np.stack(np.nonzero(plane))
        at = tuple(start[:, None] + steps @ drawn)
        numbers = plane[tuple(drawn)].astype(int) * number
        if not known.issuperset(np.unique(numbers).tolist()):
            raise Refusal(Kind.MASK_VALUES, "voxels of a segment that its header does not list")
        before = out[at]
        twice += int(np.count_nonzero((before != 0) & (before != numbers)))
        out[at] = numbers
    if twice:
        text = f"segments overlap in {twice} voxels, of which each has one class; draw them apart"
        raise Refusal(Kind.MASK_VALUES, text)
    return out


def _frames(data: Any) -> Iterator[tuple[Frame, Int[np.ndarray, "R C"], int]]:
    """Each frame, its stored values, and by what these become segment numbers.

    One at a time, for all of them are large.
    """
    from pydicom.pixels.utils import iter_pixels

    groups = data.get("PerFrameFunctionalGroupsSequence") or ()
    if not groups:
        return  # nothing is drawn
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    binary = data.SegmentationType == "BINARY"
    for own, stored in zip(groups, iter_pixels(data), strict=True):
        frame = Frame(data, own, shared)
        number = int(frame.get("ReferencedSegmentNumber")) if binary else 1
        yield frame, np.asarray(stored), number


def _lie(
    frame: Frame,
    size: tuple[int, ...],
    inverse: Affine,
    lengths_mm: Float[np.ndarray, "3"],
    planes: np.ndarray,
    shape: Shape,
) -> tuple[Int[np.ndarray, "3"], Int[np.ndarray, "3 2"]]:
    """Index of a frame's first voxel in the scan, and the steps along its columns and rows."""
    axes = directions.axes(np.reshape([*map(float, frame.get("ImageOrientationPatient"))], (2, 3)))
    rows_mm, columns_mm = map(float, frame.get("PixelSpacing"))
    corner = np.array([*map(float, frame.get("ImagePositionPatient"))])
    if axes is None:
        raise _off()
    along = np.stack([np.array(axes[1]) * rows_mm, np.array(axes[0]) * columns_mm], axis=1)
    moved = inverse[:3, :3] @ (_TO_RAS[:, None] * along)
    place = inverse[:3] @ np.append(_TO_RAS * corner, 1.0)
    steps = np.rint(moved).astype(int)
    nearest = int(np.abs(planes - place[0]).argmin())
    start = np.array([nearest, *np.rint(place[1:])], int)
    ends = np.array(size) - 1
    off = np.abs(place - [planes[nearest], *start[1:]]) + np.abs(moved - steps) @ ends
    last = start + steps @ ends
    # Across planes at uneven places it would be no step of one voxel.
    parallel = not steps[0].any() or np.array_equal(planes, np.arange(len(planes)))
    single = (np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) <= 1).all()
    inside = min(start.min(), last.min()) >= 0 and (np.maximum(start, last) < shape).all()
    if not (parallel and single and inside and (off * lengths_mm <= _OFF_MM).all()):
        raise _off()
    return start, steps


def _off() -> Refusal:
    return Refusal(
        Kind.MASK_GEOMETRY,
        "a DICOM SEG that does not lie on the voxels of its scan; draw it on that very series, or "
        "resample it there, nearest neighbor",
    )
