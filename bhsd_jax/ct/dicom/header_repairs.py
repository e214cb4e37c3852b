"""What headers write otherwise than the standard has it, or leave out, where one thing is meant.

dcm2niix 1.0 and GDCM, in SimpleITK 2.5, read such files too.
"""

from typing import Any

_DECIMALS = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "RescaleSlope", "RescaleIntercept"),
)
_USUAL = {  # what describes stored values; the standard demands all of it
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "PixelRepresentation": 0,
}


def put_points(data: Any) -> None:
    """Numbers with a decimal comma, in bytes as they were read, get a point."""
    for name in _DECIMALS:
        item = data.get_item(name)
        value = getattr(item, "value", None)
        if isinstance(value, bytes) and b"," in value and b"." not in value:
            data[name] = item._replace(value=value.replace(b",", b"."))


def complete(data: Any) -> None:
    """Fills in how CT stores its values where a header does not say."""
    for name, value in _USUAL.items():
        if data.get(name) is None:
            setattr(data, name, value)
    if data.get("BitsStored") is None:
        data.BitsStored = data.BitsAllocated
