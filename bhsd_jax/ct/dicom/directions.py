"""The directions of an image's rows and columns from the cosines that its header states."""

import numpy as np
from jaxtyping import Float

_LENGTH, _ASKEW = 0.05, 0.02  # from unit length and a right angle: what two decimals can do


def axes(cosines: Float[np.ndarray, "2 3"]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Unit vectors at right angles from cosines that were rounded; None if that is not all.

    GDCM and dcm2niix take such cosines for directions too.
    """
    lengths = np.linalg.norm(cosines, axis=1)
    if np.abs(lengths - 1).max() > _LENGTH:
        return None
    row, column = cosines / lengths[:, None]
    askew = float(row @ column)
    if abs(askew) > _ASKEW:
        return None
    column = column - askew * row
    return tuple(row.tolist()), tuple((column / np.linalg.norm(column)).tolist())
