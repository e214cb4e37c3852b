"""The head of the phantom: shape of the skull, its tables and diploe, scalp, face.

Points are patient coordinates in mm, x toward the left, y anterior, z superior, origin in the
middle of the head; a `Points` is three float32 arrays of one shape. Depths are in mm below the
inner table, negative outside the cavity.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

Points = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, z in mm, float32, one shape
Triple = tuple[float, float, float]

SCALP_MM = 6.5  # skin to outer table
HEAD_TO_CAVITY_MM = 11  # skin to inner table at the occiput, about
_ARC_MM = 75  # mean radius of the inner table


@dataclass(frozen=True)
class Waves:
    """A smooth random field of zero mean and unit variance: a sum of plane waves."""

    vectors: tuple[tuple[float, float, float], ...]  # radians per mm along x, y, z
    phases: tuple[float, ...]  # radians

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        count: int,
        shortest_mm: float,
        longest_mm: float,
        stretch: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> "Waves":
        """Draws `count` waves; `stretch` makes an axis carry more of the variation."""
        direction = rng.normal(size=(count, 3)) * stretch
        length = np.linalg.norm(direction, axis=1) * rng.uniform(shortest_mm, longest_mm, count)
        vectors = 2 * np.pi * direction / length[:, None]
        phases = rng.uniform(0, 2 * np.pi, count)
        return cls(tuple(map(tuple, vectors.tolist())), tuple(phases.tolist()))

    def __call__(self, points: Points) -> np.ndarray:
        """Values of the field, float32, in the shape of the points."""
        x, y, z = points
        total = np.zeros(x.shape, np.float32)
        # Term by term and not as a matrix product: that would depend on the BLAS and its threads.
        for (a, b, c), phase in zip(self.vectors, self.phases, strict=True):
            total += np.cos(a * x + b * y + (c * z + phase))
        return total * np.float32(np.sqrt(2 / len(self.phases)))


@dataclass(frozen=True)
class Head:
    """All that is drawn for one head; the rest follows."""

    half_width_mm: float  # of the cavity
    half_length_mm: float
    height_up_mm: float
    height_down_mm: float
    atrophy: float  # 0 young to 1 old: wider CSF, darker white matter
    ventricles: float  # scale of the ventricles' radii
    calcification: float  # above 0.25 the pineal gland, above 0.5 the choroid plexus too
    gray_hu: float
    white_hu: float
    csf_hu: float
    dura_hu: float
    vessel_hu: float
    sinus_hu: float
    calcium_hu: float
    bumps: Waves  # of the skull
    face: Waves  # bone, air and soft tissue below the skull base
    broad: Waves  # slow variation in the brain
    folds: Waves  # its zeros are the sulci
    folia: Waves  # its zeros are the fissures of the cerebellum


def draw_head(rng: np.random.Generator) -> Head:
    """Draws a head.

    Source: brain and ventricle sizes and HU of an average of 3D head CTs; skull and textbook HU.
    """
    width, length, height = rng.normal(1, 0.035, 3).tolist()
    atrophy = rng.beta(2, 2.5)
    offset_hu = rng.normal(0, 1)
    return Head(
        half_width_mm=67 * width,
        half_length_mm=84 * length,
        height_up_mm=72 * height,
        height_down_mm=70 * height,
        atrophy=atrophy,
        ventricles=0.72 + 0.75 * atrophy * rng.uniform(0.6, 1.4),
        calcification=rng.random(),
        gray_hu=39.5 + offset_hu,
        white_hu=31.5 - 4 * atrophy + offset_hu,
        csf_hu=rng.normal(8, 2),
        dura_hu=rng.uniform(42, 56),
        vessel_hu=rng.uniform(40, 56),
        sinus_hu=rng.uniform(46, 62),
        calcium_hu=rng.uniform(110, 320),
        bumps=Waves.draw(rng, 4, 60, 120),
        face=Waves.draw(rng, 8, 18, 30),
        broad=Waves.draw(rng, 8, 16, 30),
        folds=Waves.draw(rng, 12, 18, 28),
        folia=Waves.draw(rng, 6, 8, 12, (0.2, 1, 1.2)),
    )


def direction(azimuth: float, elevation: float, side: int) -> Triple:
    """Unit vector from the head's middle; azimuth from the ear toward the face, in radians."""
    flat = np.cos(elevation)
    return (
        float(side * flat * np.cos(azimuth)),
        float(flat * np.sin(azimuth)),
        float(np.sin(elevation)),
    )


def arc_mm(points: Points, toward: Triple) -> np.ndarray:
    """Distance along the inner table from where a direction meets it."""
    x, y, z = points
    norm = np.sqrt(x * x + y * y + z * z) + np.float32(1e-3)
    cosine = (x * toward[0] + y * toward[1] + z * toward[2]) / norm
    return np.arccos(np.clip(cosine, -1, 1)) * np.float32(_ARC_MM)


def depths(head: Head, points: Points, bumps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth below the vault alone, and below vault and skull base together."""
    x, y, z = points
    radius = np.sqrt(x * x + y * y + z * z) + np.float32(1e-3)
    # The occiput is broader than the forehead.
    half_width = head.half_width_mm * (1 - 0.06 * np.clip(y / head.half_length_mm, -1, 1))
    height = np.where(z > 0, np.float32(head.height_up_mm), np.float32(head.height_down_mm))
    u, v, w = (q * q for q in (x / half_width, y / head.half_length_mm, z / height))
    # Factor 2 would be an ellipsoid; a smaller one is boxier, as skulls are.
    scale = np.sqrt(np.sqrt(u * u + v * v + w * w + 1.7 * (u * v + u * w + v * w)))
    vault = (1 - scale) * radius / np.maximum(scale, 0.2) + bumps
    cavity = vault.copy()
    under = vault > 0
    x, y, z = x[under], y[under], z[under]
    cavity[under] = np.minimum(vault[under], 0.9 * (z - _floor(x, y)))
    return vault, cavity


def _floor(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the skull base: anterior, middle (with the sella between) and posterior fossa."""
    anterior = expit((y - 34) / 2)
    middle = expit((34 - y) / 2) * expit((y + 6) / 3)
    temporal = expit((np.abs(x) - 16) / 3)
    return -34 * anterior - middle * (30 + 22 * temporal) - 86 * expit((-6 - y) / 3)


def bone_mm(points: Points, bumps: np.ndarray) -> np.ndarray:
    """Thickness of the vault; greatest at both poles."""
    poles = expit((np.abs(points[1]) - 70) / 5)
    return np.maximum(5.3 + 1.0 * bumps + 3.2 * poles, np.float32(2))


def outside_hu(
    head: Head,
    points: Points,
    vault: np.ndarray,
    cavity: np.ndarray,
    bone: np.ndarray,
    swollen_mm: np.ndarray,
) -> np.ndarray:
    """HU around the cavity: air, skin, fat, muscle, two tables and diploe, skull base, face.

    Inside the cavity the values mean nothing. All arrays have the shape of the points.

    Args:
        head: The head.
        points: Patient coordinates.
        vault: Depth below the vault.
        cavity: Depth below vault and skull base.
        bone: Thickness of the vault, mm.
        swollen_mm: How much thicker than usual the scalp is.
    """
    outward = -vault
    layer = outward - bone
    diploe = (outward > 0.3 * bone) & (outward < 0.7 * bone)
    # Fluid takes the place of the fat where the scalp is swollen.
    fat = np.minimum(-75 + 12 * swollen_mm, np.float32(28))
    hu = np.select(
        [layer > SCALP_MM + swollen_mm, layer > 5.2 + swollen_mm, layer > 2.5, layer > 0],
        [np.float32(-1000), np.float32(30), fat, np.float32(45)],
        np.where(diploe, np.float32(650), np.float32(1700)),
    ).astype(np.float32)
    below = (vault > 0) & (cavity <= 0)
    if below.any():
        hu[below] = _face_hu(
            head, (points[0][below], points[1][below], points[2][below]), cavity[below]
        )
    return hu


def _face_hu(head: Head, points: Points, cavity: np.ndarray) -> np.ndarray:
    texture = head.face(points)
    air = (texture < -0.75) & (np.abs(points[0]) < 40)
    return np.select([cavity > -3.5, texture > 0.55, air], [950, 900, -950], 35).astype(np.float32)
