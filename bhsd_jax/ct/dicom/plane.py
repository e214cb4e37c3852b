"""Stored values of one DICOM image to HU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Num

from bhsd_jax.ct import hu

_TISSUE_HU = (-200.0, 200.0)
_WIDEST = 32  # bits; of the numbers that stored values are read as


@dataclass(frozen=True, eq=False)
class Plane:
    """Voxels of one image and what was done to them."""

    voxels: np.ndarray  # [H W] int16 if that is exact, else float32; HU
    padding: int  # voxels set to air because the file calls them padding
    doubtful: bool  # a padding value that is tissue was not believed
    unwrapped: bool  # 12-bit overflow undone
    unscaled: bool  # no rescale factors in the header; taken for 1 and 0
    flattened: bool = False  # by a slope of 0, taken for 1


def of(data: Any, stored: Num[np.ndarray, "H W"], unwrap: bool, *, signed: bool) -> Plane:
    """The image of a header and stored values, which it says are `signed`.

    `unwrap` as in `slice_file.planes`.

    Source: GDCM 3.0, in SimpleITK 2.5: a slope of 0, by which all voxels would be one, is none.
    """
    slope, intercept = (_first(data.get(f"Rescale{name}")) for name in ("Slope", "Intercept"))
    unscaled, flattened = slope is None or intercept is None, slope == 0
    slope, intercept = float(slope or 1), float(intercept or 0)
    bits = int(data.get("BitsStored") or 16)
    if signed and bits < _WIDEST:  # a codec of more bits than are stored has kept no sign
        stored = np.where(stored >= 1 << (bits - 1), stored - (1 << bits), stored)
    wraps = bits == 12 and not signed and intercept > -100 and slope == 1
    padding = _padding(data, stored, signed, 4096 if wraps else 65536)
    unwrapped = False
    if unwrap and wraps and (stored >= 3096).any():
        stored = np.where(stored >= 3096, stored - 4096, stored)
        unwrapped = True
    values = stored * slope + intercept
    doubtful = False
    if padding.any():
        low, high = _TISSUE_HU
        doubtful = bool(low <= values[padding][0] <= high)
        if doubtful:
            padding = np.zeros_like(padding)
        values = np.where(padding, hu.LOWEST_HU, values)
    exact = slope == 1 and intercept == int(intercept)
    exact = exact and values.min() >= -32768 and values.max() <= 32767
    return Plane(
        voxels=values.astype(np.int16 if exact else np.float32),
        padding=int(np.count_nonzero(padding)),
        doubtful=doubtful,
        unwrapped=unwrapped,
        unscaled=unscaled,
        flattened=flattened,
    )


def _first(value: Any) -> Any:
    """Of several values where one is meant, as of a factor that is stated twice."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return next(iter(value), None) if several else value


def _whole(value: Any) -> int | None:
    """A number, or the bytes of one that is stated as words; None of what is missing or neither."""
    first = _first(value)
    if isinstance(first, bytes):
        return int.from_bytes(first, "little") if len(first) == 2 else None
    try:
        return None if first is None else int(first)
    except (TypeError, ValueError):
        return None


def _padding(data: Any, stored: np.ndarray, signed: bool, modulus: int) -> np.ndarray:
    """Where the stored value is the padding value, or between it and the limit."""
    value, limit = (_whole(data.get(f"PixelPadding{name}")) for name in ("Value", "RangeLimit"))
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [value, value if limit is None else limit]
    if signed:  # some files state a negative number in the unsigned type
        ends = [end - 65536 if end > 32767 else end for end in ends]
    else:  # and some the other way round
        ends = [end % modulus for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))
