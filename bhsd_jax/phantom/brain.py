"""What lies in the phantom's cranial cavity: ventricles, sulci, cisterns, dura, vessels, brain.

Shapes are signed distances in mm, negative inside, that need only be right near their surface.
Almost all are symmetric and are written for x = |x|.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bhsd_jax.phantom.anatomy import Head, Points

FAR_MM = np.float32(99)
CHUNK = 1 << 16  # points at a time: their temporaries stay in the cache

# Lateral ventricle from the frontal to the occipital horn: center (mm, |x|) and radius (mm).
_LATERAL = (
    ((8, 46, -6), 3.2),
    ((9, 34, 4), 5.0),
    ((11, 14, 14), 5.2),
    ((15, -8, 16), 5.0),
    ((24, -26, 6), 7.0),
    ((22, -44, 0), 4.6),
    ((19, -55, -1), 2.4),
)
# Caudate, lentiform nucleus, thalamus: center and radii (mm).
_NUCLEI = (
    ((11, 28, 2), (5, 10, 9)),
    ((25, 15, -6), (7, 17, 10)),
    ((11, -1, 0), (8, 13, 9)),
)


@dataclass(frozen=True)
class Tissues:
    """Tissue at every point of the cavity; all [N], bool but the last three (float32)."""

    ventricle: np.ndarray
    subarachnoid: np.ndarray
    infratentorial: np.ndarray
    gray: np.ndarray
    dura: np.ndarray  # falx and tentorium
    sinus: np.ndarray
    vessel: np.ndarray
    calcified: np.ndarray
    broad: np.ndarray
    folds: np.ndarray
    folia: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Neither ventricle nor subarachnoid space."""
        return ~(self.ventricle | self.subarachnoid)


class _Place(NamedTuple):
    """One chunk of points with what several structures need."""

    points: Points
    mirrored: Points  # |x|, y, z
    depth: np.ndarray
    infratentorial: np.ndarray
    tentorium: np.ndarray  # its height, mm
    broad: np.ndarray
    folds: np.ndarray
    folia: np.ndarray


def tissues(head: Head, points: Points, depth: np.ndarray) -> Tissues:
    """Tissue at points [N] that lie `depth` mm below the inner table.

    With mass effect the points are where the tissue was before it was pushed; the depth is true.
    """
    parts = []
    for start in range(0, depth.size, CHUNK):
        cut = slice(start, start + CHUNK)
        parts.append(_tissues(head, (points[0][cut], points[1][cut], points[2][cut]), depth[cut]))
    names = [f.name for f in fields(Tissues)]
    return Tissues(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def brain_hu(head: Head, tissue: Tissues) -> np.ndarray:
    """HU without bleeds, float32 [N]."""
    hu = np.where(tissue.gray, np.float32(head.gray_hu), np.float32(head.white_hu))
    hu += tissue.broad + np.float32(1.5) * tissue.infratentorial
    hu[~tissue.brain] = head.csf_hu
    hu[tissue.dura] = head.dura_hu
    hu[tissue.vessel] = head.vessel_hu
    hu[tissue.sinus] = head.sinus_hu
    hu[tissue.calcified & ~tissue.subarachnoid] = head.calcium_hu
    return hu


def tentorium_mm(points: Points) -> np.ndarray:
    """Height of the tentorium above or below the origin: a tent, rising to the back."""
    return -14 - 0.55 * np.abs(points[0]) + 0.25 * (points[1] + 40)


def ellipsoid(
    points: Points, center: tuple[float, float, float], radii: tuple[float, float, float]
) -> np.ndarray:
    """Distance from the center in units of the radii: below 1 inside."""
    terms = (((p - c) / r) ** 2 for p, c, r in zip(points, center, radii, strict=True))
    return np.sqrt(sum(terms, np.float32(0)))


def tube(
    points: Points,
    start: tuple[float, float, float],
    stop: tuple[float, float, float],
    start_mm: float,
    stop_mm: float,
) -> np.ndarray:
    """Signed distance to a segment whose radius goes from one value to another, mm."""
    axis = [b - a for a, b in zip(start, stop, strict=True)]
    offset = [p - a for p, a in zip(points, start, strict=True)]
    squared = sum(a * a for a in axis)
    along = (offset[0] * axis[0] + offset[1] * axis[1] + offset[2] * axis[2]) / squared
    along = np.clip(along, 0, 1)
    gap = [o - along * a for o, a in zip(offset, axis, strict=True)]
    distance = np.sqrt(gap[0] ** 2 + gap[1] ** 2 + gap[2] ** 2)
    return distance - (start_mm + (stop_mm - start_mm) * along)


def _tissues(head: Head, points: Points, depth: np.ndarray) -> Tissues:
    x, y, z = points
    tentorium = tentorium_mm(points)
    place = _Place(
        points=points,
        mirrored=(np.abs(x), y, z),
        depth=depth,
        infratentorial=(y < -8) & (z < tentorium),
        tentorium=tentorium,
        broad=head.broad(points),
        folds=head.folds(points),
        folia=head.folia(points),
    )
    ventricle = (_ventricles(head, place) < 0) & (depth > 6)
    sulci = _sulci(head, place)
    csf = np.minimum(np.minimum(sulci, _fissures(head, place)), _cisterns(head, place))
    surface = depth - (0.8 + 2.2 * head.atrophy)  # brain begins where this is positive
    outer = surface - 0.8 * place.broad
    return Tissues(
        ventricle=ventricle,
        subarachnoid=(np.minimum(csf, outer) < 0) & ~ventricle,
        infratentorial=place.infratentorial,
        gray=(np.minimum(surface, sulci) < 3.2) | _nuclei(place),
        dura=_dura(place),
        sinus=_sinuses(place) < 0,
        vessel=_arteries(place) < 0,
        calcified=_calcified(head, place),
        broad=place.broad,
        folds=place.folds,
        folia=place.folia,
    )


def _ventricles(head: Head, place: _Place) -> np.ndarray:
    x, y, z = place.mirrored
    scale = head.ventricles
    distance = np.full(x.shape, FAR_MM)
    near = np.flatnonzero((x < 48) & (y > -70) & (y < 62) & (np.abs(z) < 40))
    local = (x[near], y[near], z[near])
    lateral = tube(local, (25, -24, 4), (31, -2, -20), 3.2 * scale, 1.8 * scale)  # temporal horn
    for (start, start_mm), (stop, stop_mm) in pairwise(_LATERAL):
        part = tube(local, start, stop, start_mm * scale, stop_mm * scale)
        lateral = np.minimum(lateral, part)
    third = (ellipsoid(local, (0, 6, -4), (2.2 * scale, 14, 12)) - 1) * 3
    distance[near] = np.minimum(lateral, third)
    fourth = (ellipsoid(place.mirrored, (0, -28, -38), (8 * scale, 6 * scale, 9)) - 1) * 5
    return np.minimum(distance, fourth) + 0.6 * place.broad


def _sulci(head: Head, place: _Place) -> np.ndarray:
    """Sheets where a random field is zero, thinning inward; a wave's length makes it mm."""
    depth, below = place.depth, place.infratentorial
    half_width = (0.7 + 1.2 * head.atrophy) * np.clip(1 - (depth - 1) / 22, 0, 1) + 0.15
    cerebrum = np.abs(place.folds) * np.float32(22 / (2 * np.pi)) - half_width
    cerebellum = np.abs(place.folia) * np.float32(11 / (2 * np.pi)) - 0.3
    reach = np.where(below, np.float32(9), np.float32(22))
    return np.where(depth < reach, np.where(below, cerebellum, cerebrum), 9)


def _fissures(head: Head, place: _Place) -> np.ndarray:
    """Interhemispheric and Sylvian fissure, and the sheet over the insula."""
    x, y, z = place.mirrored
    atrophy, broad = head.atrophy, place.broad
    midline = ~place.infratentorial & ((z > 22) | (y > 48) | (y < -45))
    hemispheres = np.where(midline, x - (0.6 + 0.8 * atrophy) - 0.5 * broad, 9)
    sheet = np.abs(0.55 * (z + 4 - 0.5 * (y - 14)) + 2.2 * broad) - 0.9 - 1.1 * atrophy
    sylvian = np.maximum(np.maximum(sheet, 33 - x), np.maximum(-20 - y, y - 44))
    sheet = np.abs(x - 36 - 1.5 * broad) - 0.8 - 0.7 * atrophy
    insula = np.maximum(sheet, np.maximum(np.abs(z - 2) - 13, np.abs(y - 14) - 20))
    return np.minimum(hemispheres, np.minimum(sylvian, insula))


def _cisterns(head: Head, place: _Place) -> np.ndarray:
    """Suprasellar star, ambient, quadrigeminal and prepontine cistern."""
    x, y, z = place.mirrored
    angle = np.arctan2(y - 14, x)
    star = (np.hypot(x, y - 14) / (5 + 10 * np.abs(np.cos(2.5 * angle)) ** 3) - 1) * 9
    suprasellar = np.maximum(star, np.abs(z + 26) - 7)
    shell = np.abs(ellipsoid(place.mirrored, (0, -10, -18), (19, 17, 60)) - 1) * 18
    shell -= 1 + head.atrophy + 0.6 * place.broad
    ambient = np.maximum(shell, np.maximum(np.abs(z + 20) - 12, y + 4))
    quadrigeminal = (ellipsoid(place.mirrored, (0, -26, -10), (11, 5, 6)) - 1) * 5
    shell = np.abs(ellipsoid(place.mirrored, (0, -12, -44), (17, 13, 40)) - 1) * 15 - 1.6
    prepontine = np.maximum(shell, np.maximum(-8 - y, np.abs(z + 44) - 16))
    return np.minimum(np.minimum(suprasellar, ambient), np.minimum(quadrigeminal, prepontine))


def _nuclei(place: _Place) -> np.ndarray:
    inside = np.zeros(place.depth.shape, bool)
    for center, radii in _NUCLEI:
        inside |= ellipsoid(place.mirrored, center, radii) < 1
    return inside


def _dura(place: _Place) -> np.ndarray:
    x, y, z = place.mirrored
    falx = (x < 0.8) & ~place.infratentorial & ((z > 30) | (y > 55) | (y < -40))
    tentorium = (np.abs(z - place.tentorium) < 0.8) & (y < -14)
    return (falx & (place.depth < 34)) | tentorium


def _sinuses(place: _Place) -> np.ndarray:
    """Sagittal, straight and transverse sinus; the first and the last run along the inner table."""
    x, y, z = place.mirrored
    sagittal = np.maximum(np.hypot(x, place.depth - 1.5) - (3.4 - 0.012 * y), 8 - z)
    transverse = np.maximum(np.hypot(z - place.tentorium, place.depth - 1.5) - 3.6, y + 30)
    straight = tube(place.points, (0, -34, 2), (0, -78, -4), 2, 3)
    return np.minimum(np.minimum(sagittal, straight), transverse)


def _arteries(place: _Place) -> np.ndarray:
    basilar = tube(place.points, (0, -2, -46), (0, 2, -30), 1.8, 1.8)
    middle_cerebral = tube(place.mirrored, (6, 12, -27), (34, 16, -20), 1.4, 1.1)
    return np.minimum(basilar, middle_cerebral)


def _calcified(head: Head, place: _Place) -> np.ndarray:
    spots = np.zeros(place.depth.shape, bool)
    if head.calcification > 0.25:
        spots |= ellipsoid(place.mirrored, (0, -18, -6), (2.2, 2.6, 2.2)) < 1  # pineal gland
    if head.calcification > 0.5:
        spots |= ellipsoid(place.mirrored, (23, -27, 5), (2.6, 3.4, 2.6)) < 1  # choroid plexus
    return spots
