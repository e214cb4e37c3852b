"""Scans and slices that hold one value everywhere: what a transfer that failed leaves behind."""

import numpy as np

from bhsd_jax.ct import geometry
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.volume import Volume

_LEAST = 1000  # voxels; fewer tell nothing


def findings(volume: Volume) -> list[Finding]:
    """Says of a CT that it is one value everywhere, or which axial slices between others are.

    A network finds nothing there, which would pass for no bleed. At an end of a scan such slices
    may be what a registration or a crop has added.
    """
    if volume.voxels.size < _LEAST:
        return []
    if not _is_shown(volume.voxels):
        value = float(volume.voxels.flat[0])
        text = (
            f"no image: every voxel is {value:g}; that no bleeding is found says nothing: fetch "
            "the scan, or convert it, again"
        )
        return [Finding(Kind.BLANK, "kept", text)]
    (axis, _, _), (flip, _, _) = geometry.canonical(volume.affine)
    shown = np.array([_is_shown(plane) for plane in np.moveaxis(volume.voxels, axis, 0)])
    inside, empty = np.flatnonzero(shown), np.flatnonzero(~shown)
    empty = empty[(empty > inside.min(initial=len(shown))) & (empty < inside.max(initial=0))]
    if not len(empty):
        return []
    first = len(shown) - int(empty[-1]) if flip else int(empty[0]) + 1
    text = (
        f"{len(empty)} of {len(shown)} slices hold one value alone between others, the first is "
        f"slice {first} from below: no bleeding is found there; fetch the scan, or convert it, "
        "again"
    )
    return [Finding(Kind.BLANK_SLICES, "kept", text)]


def _is_shown(voxels: np.ndarray) -> bool:
    """Whether there are two values."""
    return bool((voxels != voxels.flat[0]).any())
