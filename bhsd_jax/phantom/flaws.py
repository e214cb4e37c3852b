"""What spoils a scan or its mask: metal that throws streaks, and a rater's unsteady hand."""

import numpy as np
from scipy import ndimage

from bhsd_jax.phantom.scanner import AIR_HU, Scan

METAL_HU = 31000
_METAL_MM = 4.0  # radius of the clip or coil
_RAYS = 9  # bright streaks around it
_REDRAWN = ((-1, 0, 1), (0.15, 0.25, 0.6))  # pixels, how often: outlines tend to be loose


def add_metal(
    hu: np.ndarray, cavity: np.ndarray, scan: Scan, rng: np.random.Generator
) -> np.ndarray:
    """Puts a coil into the brain and a star of streaks around it: int16 [D H W].

    Args:
        hu: int16 [D H W].
        cavity: Share of every voxel that lies in the cranial cavity.
        scan: For the size of a pixel.
        rng: For place and phase.
    """
    inside = np.argwhere(cavity > 0.99)
    if not len(inside):
        return hu
    d, h, w = inside[rng.integers(len(inside))].tolist()
    rows, columns = np.ogrid[: hu.shape[1], : hu.shape[2]]
    y, x = (rows - h) * scan.pixel_mm, (columns - w) * scan.pixel_mm
    radius = np.hypot(y, x)
    phase = _RAYS * np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
    spoiled = hu.astype(np.float64)
    spoiled[d] += 900 * np.cos(phase) * np.exp(-radius / 25)
    spoiled = np.clip(np.rint(spoiled), AIR_HU, METAL_HU)
    spoiled[d, radius <= max(_METAL_MM, scan.pixel_mm)] = METAL_HU
    spoiled[hu < AIR_HU] = hu[hu < AIR_HU]  # padding
    return spoiled.astype(np.int16)


def redraw(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask as another rater may have drawn it, uint8 [D H W].

    In every slice, each class shrinks or grows by a pixel, or stays. Nothing grows over another
    class, and nothing vanishes.
    """
    drawn = label.copy()
    for plane, out in zip(label, drawn, strict=True):
        for index in np.unique(plane[plane > 0]).tolist():
            own = plane == index
            step = int(rng.choice(_REDRAWN[0], p=_REDRAWN[1]))
            share = ndimage.uniform_filter(own.astype(np.float32), 3, mode="constant")
            inner = share > 0.99
            if step > 0:
                out[(share > 0.01) & (out == 0)] = index
            elif step < 0 and inner.any():
                out[own & ~inner] = 0
    return drawn
