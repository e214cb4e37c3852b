"""JPEG that pydicom decodes only with packages under another license: lossless, and in 12 bits.

The first is what archives compress CT with most. A plug-in for decoders, as pydicom's guide to
them says; imagecodecs does the work.
"""

import importlib.util
from typing import Any

import numpy as np

_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")  # any predictor; the first one
_EXTENDED = "1.2.840.10008.1.2.4.51"
DECODER_DEPENDENCIES = dict.fromkeys((*_LOSSLESS, _EXTENDED), ("imagecodecs",))
_LABEL = "imagecodecs"


def is_available(uid: str) -> bool:
    """Whether frames of a transfer syntax can be decoded here."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def decode(source: bytes, runner: Any) -> bytes:
    """One frame's stored values, in little endian and as many bits as are allocated.

    Raises:
        ValueError: If the frame has another size than the header says.
    """
    import imagecodecs

    lossless = str(runner.transfer_syntax) in _LOSSLESS
    frame = (imagecodecs.ljpeg_decode if lossless else imagecodecs.jpeg_decode)(source)
    if frame.shape != (runner.rows, runner.columns):
        raise ValueError(f"a frame of {frame.shape} where {runner.rows, runner.columns} was stated")
    return frame.astype(np.dtype(f"<u{runner.bits_allocated // 8}")).tobytes()


def register() -> None:
    """Makes it one of pydicom's decoders, once; not to be called by several threads at once."""
    from pydicom.pixels.decoders.base import get_decoder

    for uid in DECODER_DEPENDENCIES:
        decoder = get_decoder(uid)
        if _LABEL not in (*decoder.available_plugins, *decoder.missing_dependencies):
            decoder.add_plugin(_LABEL, (__name__, decode.__name__))
