"""DICOM SEG: the answer on a series' own instances, for the archive that the series is in.

It carries the patient's and the study's attributes, as the standard demands of every object that is
to be filed with a study. It is the one output that does; it is written only where it is asked for.
The place for highdicom.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Num, UInt8

from bhsd_jax import __version__
from bhsd_jax.ct.dicom import image_kind, segment_codes, slice_file
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom.stack import Stack
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.volume import Series

KINDS = ("binary", "labelmap", "fractional")
FOLDER = "seg"
_SERIES_NUMBER = 9000  # plus the series' own: after those of scanners
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (  # type 2 of the standard: highdicom wants them there
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
_DATES, _TIMES = ("PatientBirthDate", "StudyDate"), ("StudyTime",)
_SEXES = ("M", "F", "O")  # of the standard; some files have others, such as HL7's U


@dataclass(frozen=True)
class Maker:
    """Who made the answer."""

    name: str  # of the network and what it was trained on
    version: str = __version__


def place(target: Path) -> Path:
    """Where the SEG goes that belongs to the label map at `target`."""
    name = target.name.removesuffix(".gz").removesuffix(".nii")
    return target.parent / FOLDER / f"{name}.dcm"


def require() -> None:
    """Raises `UserError` with the remedy if highdicom is not installed."""
    _highdicom()


def write(
    path: Path,
    series: Series,
    label: UInt8[np.ndarray, "N H W"],
    classes: Sequence[str],
    *,
    kind: str,
    maker: Maker,
    probabilities: Float32[np.ndarray, "K N H W"] | None = None,
) -> None:
    """Writes a segment for every class but the background, on the instances of the series.

    `label` has a plane for every slice, as `scan.write` wants it. Kind "binary" has a frame of bits
    for each class and slice that shows it, "labelmap" one of class numbers for each slice, and
    "fractional" `probabilities` in steps of 1/255. The file appears whole or not at all.

    Raises:
        ValueError: If the series lacks what a SEG has to refer to, or is cut into several files;
            or the shapes do not fit, or highdicom is not installed.
        faults.WriteError: If the system says no.
    """
    if kind not in KINDS:
        raise UserError(f"a SEG is one of {', '.join(KINDS)}; got {kind!r}")
    stack = dicom_series.arrange(series)
    if label.shape != (len(stack.slices), *stack.shape[1:]):
        raise UserError(
            f"{series.name}: the label map has {len(label)} planes of {label.shape[1:]}, the "
            f"series {len(stack.slices)} of {stack.shape[1:]}; no SEG can refer to planes that "
            "were interpolated: name the folder of the series in config.predict.images"
        )
    voxels: np.ndarray = label
    if kind == "fractional":
        if probabilities is None or probabilities.shape[1:] != label.shape:
            raise ValueError("a fractional SEG needs probabilities on the slices")
        voxels = np.moveaxis(probabilities[1:], 0, -1)
    try:
        with slice_file.quiet():
            sources, frames = _sources(stack, voxels[:, ::-1], series)
            made = _make(sources, frames, classes, kind, maker)
            for _ in made.iterall():  # text in sequences is decoded when it is looked at
                pass
            data = io.BytesIO()
            made.save_as(data)
    except UserError:
        raise
    except Exception as error:  # highdicom raises of many kinds, with values of the header in them
        raise UserError(
            f"{series.name}: no SEG can refer to its headers ({type(error).__name__}); predict "
            "without one"
        ) from None
    files.write_bytes(path, data.getvalue())


def is_whole(path: Path, kind: str) -> bool:
    """Whether there is a SEG of this kind that can be read."""
    try:
        with slice_file.quiet(), path.open("rb") as file:
            data = _highdicom().seg.segread(file)
            bits = data.Rows * data.Columns * data.NumberOfFrames * data.BitsAllocated
            return str(data.SegmentationType).lower() == kind and 8 * len(data.PixelData) >= bits
    except UserError:
        raise
    except Exception:  # pydicom throws what the file makes it throw
        return False


def leads(series: Series) -> dict[str, str]:
    """What leads to a series in an archive, and tells it from others of its UID, by DICOM's names.

    "" where the file cannot be read or does not say. The instance is one of its slices.
    """
    try:
        found = slice_file.headers(min(series.files))
    except (UserError, OSError):
        found = []
    first = found[0] if found else None
    return {
        "StudyInstanceUID": first.study if first else "",
        "SeriesInstanceUID": first.series if first else "",
        "SeriesNumber": first.series_number if first else "",
        "ConvolutionKernel": first.kernel if first else "",
        "SliceThickness": f"{first.thickness_mm:g}" if first and first.thickness_mm else "",
        "SOPInstanceUID": first.instance if first else "",
        "files": str(len(series.files)),
    }


def _sources(
    stack: Stack, voxels: Num[np.ndarray, "N H W ..."], series: Series
) -> tuple[list[Any], np.ndarray]:
    """Headers of the instances, and a frame for each of them or, in one file, of its frames.

    Slices without a thickness get the usual distance between them.
    """
    slices = stack.slices
    thickness_mm = round(float(np.median(np.diff(stack.places_mm))), 4)
    paths = list(dict.fromkeys(item.file for item in slices))
    if slices[0].frame is not None and len(paths) > 1:
        raise UserError(
            f"{series.name}: an image in several files (a concatenation) takes no SEG; predict "
            "without one"
        )
    sources = [_header(path, series) for path in paths]
    if slices[0].frame is None:
        for data in sources:
            data.SliceThickness = data.get("SliceThickness") or thickness_mm
            # Rounded slice by slice it differs in its last digit, and a SEG has one for all.
            data.ImageOrientationPatient = sources[0].ImageOrientationPatient
        return sources, np.ascontiguousarray(voxels)
    _share(sources[0], slices[0].frame, thickness_mm)
    frames = np.zeros((int(sources[0].NumberOfFrames), *voxels.shape[1:]), voxels.dtype)
    for item, plane in zip(slices, voxels, strict=True):
        frames[item.frame] = plane
    return sources, frames


def _share(data: Any, frame: int, thickness_mm: float) -> None:
    """Says of all frames what highdicom asks of all of them; in memory only.

    The frames of one volume have it in common, also where a file repeats it for each.
    """
    own = data.PerFrameFunctionalGroupsSequence[frame]
    if not data.get("SharedFunctionalGroupsSequence"):
        data.SharedFunctionalGroupsSequence = [type(own)()]
    shared = data.SharedFunctionalGroupsSequence[0]
    for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if name not in shared and name in own:
            setattr(shared, name, own[name].value)
    measures = shared.PixelMeasuresSequence[0]
    measures.SliceThickness = measures.get("SliceThickness") or thickness_mm


def _header(path: Path, series: Series) -> Any:
    with path.open("rb") as file:
        data = slice_file.read(file, stop_before_pixels=True)
    lacks = [name for name in _NEEDED if not data.get(name)]
    if lacks:
        raise UserError(
            f"{series.name}: its headers lack {' and '.join(lacks)}, which a SEG refers to; "
            "predict without one"
        )
    if not data.get("SOPClassUID"):
        data.SOPClassUID = image_kind.PLAIN_CT
    for name in _MAY_BE_EMPTY:
        if name not in data:
            setattr(data, name, "")
    _clear_impossible(data)
    if data.PatientSex not in _SEXES:
        data.PatientSex = ""
    coded = "DeidentificationMethodCodeSequence"
    if data.get("PatientIdentityRemoved") == "YES" and not data.get(coded):
        # Required of what is copied from the source, which may have left it empty.
        data.DeidentificationMethod = data.get("DeidentificationMethod") or "not stated"
    return data


def _clear_impossible(data: Any) -> None:
    """Empties dates and times that are none, such as 19700000 of a tool that hides the day.

    The standard allows it, and objects are filed by UIDs.
    """
    from pydicom.valuerep import DA, TM

    for kind, names in ((DA, _DATES), (TM, _TIMES)):
        for name in names:
            text = str(data.get(name) or "")
            if kind is TM:
                text = text.replace(":", "")  # as ACR-NEMA wrote it
            try:
                kind(text)
            except ValueError:
                text = ""
            setattr(data, name, text)


def _make(
    sources: Sequence[Any], frames: np.ndarray, classes: Sequence[str], kind: str, maker: Maker
) -> Any:
    highdicom = _highdicom()
    number = sources[0].get("SeriesNumber")
    # An archive shows these words beside the scan: no other network's answer is called bleeding.
    bleeds = segment_codes.are_bleeds(classes[1:])
    what, outline = (
        ("Bleeding", "bleeding") if bleeds else ("Segmentation", "what its segments say")
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type=kind.upper(),
        segment_descriptions=_descriptions(classes, maker),
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER + int(number or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="bhsd_jax",
        manufacturer_model_name="bhsd predict",
        software_versions=maker.version,
        device_serial_number="none",
        content_label="HEMORRHAGE" if bleeds else "SEGMENTATION",
        content_description=f"Automatic outline of {outline}, research use only",
        series_description=f"{what} (AI), research use only",
        # Its own, whatever the source has: highdicom refuses values of the source that files have.
        specific_character_set="ISO_IR 192",
    )


def _descriptions(classes: Sequence[str], maker: Maker) -> list[Any]:
    highdicom = _highdicom()
    from pydicom.sr.coding import Code

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=maker.name[:64],
        family=Code("123109", "DCM", "Artificial Intelligence"),
        version=maker.version,
    )
    made = []
    for number, name in enumerate(classes[1:], start=1):
        meaning = segment_codes.of(name)
        category, kind, place = (
            Code(value, "SCT", text)
            for value, text in (segment_codes.ABNORMAL, meaning.kind, meaning.place)
        )
        one = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=[place],
            display_color=highdicom.color.CIELabColor.from_rgb(*meaning.rgb),
        )
        one.SegmentDescription = meaning.description
        made.append(one)
    return made


def _highdicom() -> Any:
    try:
        import highdicom
    except ModuleNotFoundError as error:
        raise UserError(f"a DICOM SEG needs highdicom; {explain_extra('dicom')}") from error
    return highdicom
