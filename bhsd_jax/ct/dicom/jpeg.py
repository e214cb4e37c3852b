"""JPEG that pydicom decodes only with packages under another license, or with other values.

The former are lossless, what archives compress CT with most, and in 12 bits. A plug-in for
decoders, as pydicom's guide to them says; imagecodecs does the work.
"""

import importlib.util
import threading
from typing import Any

import numpy as np

DECODER_DEPENDENCIES = {
    "1.2.840.10008.1.2.4.57": ("imagecodecs",),  # lossless, any predictor
    "1.2.840.10008.1.2.4.70": ("imagecodecs",),  # lossless, the first predictor
    "1.2.840.10008.1.2.4.51": ("imagecodecs",),  # extended: 12 bits
}
_LABEL = "imagecodecs"
_LOCK = threading.Lock()


def is_available(uid: str) -> bool:
    """Whether frames of a transfer syntax can be decoded here."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def decode(source: bytes, runner: Any) -> bytes:
    """One frame's stored values, in little endian and as many bits as are allocated.

    Raises:
        ValueError: If the frame has another size than the header says.
    """
    import imagecodecs

    # Not its ljpeg_decode, which takes some lossless frames for corrupt that others decode.
    frame = imagecodecs.jpeg_decode(source)
    if frame.shape != (runner.rows, runner.columns):
        raise ValueError(f"a frame of {frame.shape} where {runner.rows, runner.columns} was stated")
    return frame.astype(np.dtype(f"<u{runner.bits_allocated // 8}")).tobytes()


def holds_signed(data: Any) -> bool:
    """Whether a file's frames are JPEG 2000 of signed values, whatever its header says.

    Some scanners and archives write signed codestreams under a header of unsigned values. GDCM, in
    SimpleITK 2.5, reads their values.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import get_j2k_parameters

    if data.file_meta.TransferSyntaxUID not in uid.JPEG2000TransferSyntaxes:
        return False
    count = int(data.get("NumberOfFrames") or 1)
    first = get_frame(data.PixelData, 0, number_of_frames=count)
    return bool(get_j2k_parameters(first).get("is_signed"))


def register() -> None:
    """Makes it one of pydicom's decoders, if it can work; once."""
    from pydicom.pixels.decoders.base import get_decoder

    with _LOCK:
        for uid in filter(is_available, DECODER_DEPENDENCIES):
            decoder = get_decoder(uid)
            if _LABEL not in decoder.available_plugins:
                decoder.add_plugin(_LABEL, (__name__, decode.__name__))
