"""One DICOM file: what its header says of a slice, and its voxels in HU; the place for pydicom.

Messages never quote a header or a path: both may name the patient.
"""

import contextlib
import logging
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bhsd_jax.ct.dicom import bare_file, directions, frames, header_repairs, image_kind, jpeg, plane
from bhsd_jax.ct.dicom.image_kind import Flaw
from bhsd_jax.ct.dicom.plane import Plane
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.platform.errors import UserError, explain_extra

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("Modality", "ImageType", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"),
    *("AcquisitionNumber", "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime"),
    *("SeriesNumber", "InstanceNumber", "FrameOfReferenceUID"),
    *("TemporalPositionIdentifier", "ConvolutionKernel", "SliceThickness", "RescaleType", "KVP"),
    *frames.TAGS,
)
_BROKEN = (Exception,)  # pydicom throws what the file makes it throw: KeyError, struct.error, ...


@dataclass(frozen=True, slots=True)  # there can be a million of them
class Slice:
    """What the header of one file, or of one frame in it, says.

    World coordinates are DICOM's: x runs to the left, y to the back.
    """

    file: Path = field(repr=False)
    patient: str = field(repr=False)
    study: str = field(repr=False)
    series: str = field(repr=False)
    instance: str = field(repr=False)
    flaw: Flaw | None  # why it is no slice of a CT volume; None if it is
    shape: tuple[int, int] = (0, 0)  # rows, columns
    spacing_mm: tuple[float, float] = (0.0, 0.0)  # between rows, between columns
    along_row: tuple[float, ...] = ()  # direction in which the column index grows
    along_column: tuple[float, ...] = ()  # direction in which the row index grows
    position: tuple[float, ...] = ()  # center of the first voxel, mm
    acquisition: str = ""  # number of the pass; "" if the file does not say, as below
    time: str = ""  # when it was acquired
    moment: str = ""  # number of its place in time, in files of one image
    kernel: str = ""  # of the reconstruction
    image_type: str = ""
    energy: str = ""  # peak voltage of the tube
    series_number: str = ""
    space: str = ""  # UID of the coordinates that positions are in
    number: str = ""  # of the image in its series
    thickness_mm: float = 0.0  # of the slice; 0 if the file does not say
    derived: bool = False  # computed from other images, as a reformat is
    frame: int | None = None  # which of the file's, from 0; None: the file is one image
    phase: str = ""  # its place in time, where slices were taken several times; "" if not said
    container: str = ""  # what frames of one image share: its file, or UID if it has several
    part: tuple[int, int] = (0, 0)  # of an image in several files: which, and of how many
    whole: bool = True  # the file is long enough for its voxels; not known of compressed ones


def is_dicom(path: Path) -> bool:
    """True if the file says so after its preamble, or begins with a data set at once."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or bare_file.begins(start)


def headers(path: Path) -> list[Slice]:
    """Reads a header without the voxels; of enhanced CT, one for each frame.

    Raises:
        ValueError: If it cannot be read, or pydicom is not installed.
    """
    require()
    try:
        with quiet(), path.open("rb") as file:
            data = read(file, stop_before_pixels=True, specific_tags=list(_TAGS))
            left = path.stat().st_size - file.tell()
            whole = _is_whole(data, left)
            return [replace(item, whole=whole) for item in _slices(path, data)]
    except _BROKEN as error:
        # Not chained: pydicom's messages quote the header.
        raise UserError(f"its DICOM header cannot be read ({type(error).__name__})") from None


def pixels(path: Path) -> Plane:
    """Reads the voxels of a file that is one image, as `planes` does."""
    (only,) = planes(path, (None,))
    return only


def planes(path: Path, wanted: Sequence[int | None], *, unwrap: bool = True) -> list[Plane]:
    """Reads the voxels of frames in HU; None stands for the one image of a file without frames.

    What the file calls padding becomes air, unless that value is tissue, which real voxels have
    too. A slice stored in unsigned 12 bits without an offset has everything below 0 HU wrapped
    around to +3096..+4095: with `unwrap` that is undone.

    Raises:
        ValueError: If it is compressed in a way that nothing installed decodes, or damaged; or
            pydicom is not installed.

    Source: the RSNA 2019 hemorrhage data, in which a part of the scans is stored so.
    """
    require()
    try:
        with quiet(), path.open("rb") as file:
            data = read(file)
            header_repairs.complete(data)
            require_decoder(data)
            signed = int(data.PixelRepresentation) == 1
            if jpeg.holds_signed(data):
                data.PixelRepresentation = 1  # else Pillow's shift by half their range would stay
            if None in wanted:
                stored = np.asarray(data.pixel_array)
                if stored.ndim != 2:
                    raise Refusal(Kind.MULTI_FRAME, f"{Flaw.MULTI_FRAME}, not a slice")
                return [plane.of(data, stored.astype(np.int32), unwrap, signed=signed)]
            frames_wanted = [index for index in wanted if index is not None]
            return _planes(data, frames_wanted, unwrap, signed)
    except Refusal:  # the message is ours, and safe to show
        raise
    except _BROKEN as error:
        text = f"its voxels cannot be read ({type(error).__name__}): damaged"
        raise Refusal(Kind.SERIES_DAMAGED, text) from None


def read(file: BinaryIO, **options: Any) -> Any:
    """A data set; one that does not state its transfer syntax gets that which it is written in.

    Decimal commas become points.

    Warnings and errors are pydicom's, which quote values: for callers that hold them back.
    """
    bare = bare_file.begins(file.read(132))
    file.seek(0)
    data = _pydicom().dcmread(file, force=bare, **options)
    if not data.file_meta.get("TransferSyntaxUID"):
        if not ("SOPClassUID" in data or "Rows" in data):
            raise ValueError("no transfer syntax, and no image in the one that was guessed")
        from pydicom import uid

        implicit, little = data.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    header_repairs.put_points(data)
    return data


def require() -> None:
    """Raises `UserError` with the remedy if pydicom is not installed.

    For callers that take an error of `headers` for one of the file.
    """
    _pydicom()


def _pydicom() -> Any:
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise UserError(f"DICOM files need pydicom; {explain_extra('dicom')}") from error
    return pydicom


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no log of either package: both quote values of the header, names among them.

    Levels and filters are the whole process's. So the first of several threads that are inside at
    once silences both, and the last one gives them back.
    """
    with _QUIET.lock:
        if not _QUIET.inside:
            _QUIET.begin()
        _QUIET.inside += 1
    try:
        yield
    finally:
        with _QUIET.lock:
            _QUIET.inside -= 1
            if not _QUIET.inside:
                _QUIET.undo.close()


@dataclass
class _Quiet:
    """Who is inside `quiet`, and how to undo it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self) -> None:
        """Silences both packages until `undo` is closed."""
        for log in map(logging.getLogger, ("pydicom", "highdicom")):
            self.undo.callback(log.setLevel, log.level)
            log.setLevel(logging.CRITICAL + 1)
        self.undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")


_QUIET = _Quiet()


def _slices(path: Path, data: Any) -> list[Slice]:
    uid, part = frames.concatenation(data)
    found = frames.of(data)
    if not found:
        return [_slice(path, data)]
    container = uid or (str(path) if len(found) > 1 else "")
    return [
        replace(
            _slice(path, frame),
            frame=index,
            acquisition=sys.intern(_acquisition(frame)),
            phase=frame.phase,
            container=container,
            part=part,
        )
        for index, frame in enumerate(found)
    ]


def _acquisition(frame: frames.Frame) -> str:
    """Of a frame: the number of the pass, and its stack."""
    number = _text(frame, "AcquisitionNumber")
    return f"{number}/{frame.stack}" if number or frame.stack else ""


def _planes(data: Any, wanted: Sequence[int], unwrap: bool, signed: bool) -> list[Plane]:
    """Of frames; one at a time, for a volume of them in 32 bits is large."""
    from pydicom.pixels.utils import iter_pixels

    found = frames.of(data)
    stored = iter_pixels(data, indices=list(wanted))
    return [
        plane.of(found[index], np.asarray(one).astype(np.int32), unwrap, signed=signed)
        for index, one in zip(wanted, stored, strict=True)
    ]


def _slice(path: Path, data: Any) -> Slice:
    known = Slice(
        path,
        patient=_text(data, "PatientID"),
        study=_text(data, "StudyInstanceUID"),
        series=_text(data, "SeriesInstanceUID"),
        instance=str(data.get("SOPInstanceUID") or ""),
        acquisition=_text(data, "AcquisitionNumber"),
        time=_text(data, "AcquisitionDateTime")
        or _text(data, "AcquisitionDate") + _text(data, "AcquisitionTime"),
        moment=_text(data, "TemporalPositionIdentifier"),
        kernel=_text(data, "ConvolutionKernel"),
        image_type=_text(data, "ImageType"),
        energy=_text(data, "KVP"),
        series_number=_text(data, "SeriesNumber"),
        space=_text(data, "FrameOfReferenceUID"),
        number=_text(data, "InstanceNumber"),
        flaw=image_kind.flaw_of(data),
        derived=image_kind.is_derived(data),
    )
    if known.flaw:
        return known
    orientation = [float(value) for value in data.get("ImageOrientationPatient")]
    rows, columns = (float(value) for value in data.get("PixelSpacing"))
    position = tuple(float(value) for value in data.get("ImagePositionPatient"))
    if not all(map(math.isfinite, (*orientation, rows, columns, *position))):
        return replace(known, flaw=Flaw.POSITION)
    if min(rows, columns) <= 0:
        return replace(known, flaw=Flaw.SIZE)
    axes = directions.axes(np.asarray(orientation).reshape(2, 3))
    if axes is None:
        return replace(known, flaw=Flaw.ORIENTATION)
    return replace(
        known,
        shape=(int(data.get("Rows")), int(data.get("Columns"))),
        spacing_mm=(rows, columns),
        along_row=axes[0],
        along_column=axes[1],
        position=position,
        thickness_mm=_number(data.get("SliceThickness")),
    )


def _text(data: Any, name: str) -> str:
    """What the header says, kept once for all slices that say the same; "" if it does not."""
    try:
        value = data.get(name)
    except _BROKEN:  # a number that is none does no harm to the slice
        value = None
    return "" if value is None else sys.intern(str(value))


def _number(value: Any) -> float:
    """Of what may be missing or no number at all: 0."""
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _is_whole(data: Any, left: int) -> bool:
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated or syntax.is_deflated:
        return True
    voxels = int(data.get("Rows") or 0) * int(data.get("Columns") or 0)
    voxels *= int(data.get("NumberOfFrames") or 1)
    start = 8 if syntax.is_implicit_VR else 12  # of the element, where reading stopped
    return left >= start + voxels * int(data.get("BitsAllocated") or 16) // 8


def require_decoder(data: Any) -> None:
    """Raises a `Refusal` with the remedy if nothing installed decodes the voxels."""
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder

    jpeg.register()
    try:
        ready = set(get_decoder(syntax).available_plugins)
    except NotImplementedError:
        ready = set()
    if syntax == uid.JPEGExtended12Bit and data.get("BitsStored") != 8:
        # In pydicom 3.0.2 both say that they decode it, and then refuse all but 8 bits
        # (findings/pydicom_jpeg12_decoder_refuses.sh).
        ready -= {"pillow", "gdcm"}
    if not ready:
        ours = syntax in jpeg.DECODER_DEPENDENCIES
        remedy = explain_extra("dicom") if ours else "install pylibjpeg with its plug-ins"
        raise Refusal(
            Kind.COMPRESSED,
            f"compressed as {syntax.name}, and no decoder for it is installed; decompress the "
            f"files (gdcmconv --raw), or {remedy}",
        )
