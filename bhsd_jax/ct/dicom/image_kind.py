"""What one DICOM image is of: a slice of a CT volume, or why it is none."""

import enum
import re
from typing import Any

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_CAPTURE = f"{_STORAGE}7"  # and its multi-frame relatives
PLAIN_CT = f"{_STORAGE}2"
ENHANCED_CT = (f"{_STORAGE}2.1", f"{_STORAGE}2.2")  # the latter: converted from plain CT
_DIRECTORY = "1.2.840.10008.1.3.10"  # what a DICOMDIR is, whatever the file is called
# Words of ImageType, in which underscores and spaces part words: REF_SURVIEW, SCREEN SAVE.
_LOCALIZERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM", "SCANO", "SCANOSCOPE"}
_REPORTS = {"DOSE", "REPORT", "PROTOCOL", "PROT", "INFO", "RESULTS", "SUMMARY"}
_CAPTURES = {"SCREEN", "SCREENSAVE", "SCREENSHOT"}
_PROJECTIONS = {"MIP", "MINIP", "VRT", "SSD", "RAYSUM", "PROJECTION", "MAXIMUM", "MINIMUM"}
_MAPS = {"CBF", "CBV", "MTT", "TTP", "TMAX", "TTD", "PERFUSION"}
# Letters of RescaleType for what dual energy measures: effective atomic number, electron density,
# that over water's, mg/ml of a material, percent. HU_MOD, and US for what is not said, are HU.
_MEASURES = {"ZEFF", "ED", "EDW", "MGML", "PCT"}


class Flaw(enum.StrEnum):
    """Why an image is no slice of a CT volume, as what follows "is"."""

    MODALITY = "of another kind than CT"
    SEG = "a DICOM SEG, which is a mask and no scan"
    OUTLINE = (
        "of outlines (RTSTRUCT), which are not read: a mask is NIfTI, into which plastimatch "
        "converts them, or a DICOM SEG"
    )
    LOCALIZER = "a localizer"
    MULTI_FRAME = "a multi-frame image"
    COLOR = "in color"
    POSITION = "without a usable position"
    SPACING = "without a pixel spacing"
    SIZE = "of a pixel spacing of 0 or less"
    ORIENTATION = "without a usable orientation"
    EMPTY = "without voxels"
    ALONE = "alone in its series"
    HEADER = "of a header that cannot be read"
    REPORT = "a page of a report"
    CAPTURE = "a secondary capture"
    PROJECTION = "a projection of a volume"
    MAP = "a map of another measure than HU"
    PLACE = "at one place with all others of its series"
    DIRECTORY = "a directory of a medium"  # no image at all: nobody has to be told


_MODALITIES = {"SEG": Flaw.SEG, "RTSTRUCT": Flaw.OUTLINE}  # else it is of another kind than CT


def flaw_of(data: Any) -> Flaw | None:
    """Why the image of this header, read without its voxels, is no slice; None if it is one.

    Images derived from others, such as reformats, are slices: thick ones are often all that was
    kept of a study.
    """
    if _is_directory(data):
        return Flaw.DIRECTORY
    modality = str(data.get("Modality") or "CT")
    if modality != "CT":
        return _MODALITIES.get(modality, Flaw.MODALITY)
    return _by_type(data) or _by_scale(data) or _by_class(data) or _by_place(data)


def is_derived(data: Any) -> bool:
    """Whether the image was computed from others, as its ImageType says first."""
    return str((_values(data) or ("",))[0]).upper() == "DERIVED"


def _is_directory(data: Any) -> bool:
    """Whether the file lists those of a medium, as a DICOMDIR does."""
    meta = getattr(data, "file_meta", {})
    return str(meta.get("MediaStorageSOPClassUID") or "") == _DIRECTORY


def _by_type(data: Any) -> Flaw | None:
    """What ImageType says it is, if that is no slice."""
    words = {word for value in _values(data) for word in re.split(r"[^A-Z0-9]+", value.upper())}
    if words & _LOCALIZERS:
        return Flaw.LOCALIZER
    if words & _REPORTS:
        return Flaw.REPORT
    if words & _CAPTURES:
        return Flaw.CAPTURE
    if words & _PROJECTIONS and is_derived(data):
        return Flaw.PROJECTION
    if words & _MAPS and is_derived(data):
        return Flaw.MAP
    return None


def _by_scale(data: Any) -> Flaw | None:
    letters = re.sub(r"[^A-Z]", "", str(data.get("RescaleType") or "").upper())
    return Flaw.MAP if letters in _MEASURES else None


def _by_class(data: Any) -> Flaw | None:
    sop_class = str(data.get("SOPClassUID") or "")
    if sop_class == _CAPTURE or sop_class.startswith(f"{_CAPTURE}."):
        return Flaw.CAPTURE
    if int(data.get("Rows") or 0) < 1 or int(data.get("Columns") or 0) < 1:
        return Flaw.EMPTY
    if int(data.get("NumberOfFrames") or 1) > 1 or sop_class in ENHANCED_CT:
        return Flaw.MULTI_FRAME
    return Flaw.COLOR if int(data.get("SamplesPerPixel") or 1) != 1 else None


def _by_place(data: Any) -> Flaw | None:
    counts = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6}
    if any(len(data.get(tag) or ()) != count for tag, count in counts.items()):
        return Flaw.POSITION
    return Flaw.SPACING if len(data.get("PixelSpacing") or ()) != 2 else None


def _values(data: Any) -> tuple[str, ...]:
    found = data.get("ImageType") or ()
    return (found,) if isinstance(found, str) else tuple(map(str, found))
