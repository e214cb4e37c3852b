"""Which bleeds a phantom has and how big they are; painting them into the brain.

Prevalences and co-occurrence are those of BHSD's 192 scans. Volumes are larger than the
medians of 39 of them: on the slices looked at (see `check`) real bleeds are as large as these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bhsd_jax.phantom.anatomy import Head, Points, Triple, direction
from bhsd_jax.phantom.brain import CHUNK
from bhsd_jax.phantom.lesions import (
    Epidural,
    Intraparenchymal,
    Intraventricular,
    Lesion,
    Push,
    Space,
    Subarachnoid,
    Subdural,
    ball_radius_mm,
)
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE

EDH, IPH, IVH, SAH, SDH = range(1, len(HEMORRHAGE))

# Median (mL), standard deviation of the logarithm, largest (mL).
_VOLUME = {
    EDH: (3.3, 1.2, 135.0),
    IPH: (18.0, 1.4, 110.0),
    IVH: (5.0, 1.4, 60.0),
    SAH: (2.0, 1.4, 60.0),
    SDH: (20.0, 0.8, 170.0),
}
# Of subdural bleeds along falx and tentorium: size as a share of others, largest (mL).
_SHEET = 0.35, 14.0
_OLD = 4.0  # how much larger chronic subdural bleeds are: nobody notices small ones
# Share of a mask that is no blood: the rim raters draw too wide, and brain between filled sulci.
_RIM = {EDH: 0.18, IPH: 0.27, IVH: 0.24, SAH: 0.38, SDH: 0.07}
# Scans of 192 with exactly these classes. Counts of single classes, of every class and of scans
# with one, two, or more classes are BHSD's own. Alike sets stand together: see `class_set`.
_CLASS_SETS = (
    ((EDH,), 11),
    ((EDH, SAH), 2),
    ((EDH, IPH, SAH), 4),
    ((EDH, IPH, IVH, SAH, SDH), 1),
    ((EDH, SAH, SDH), 3),
    ((EDH, SDH), 2),
    ((SDH,), 10),
    ((SAH, SDH), 4),
    ((IVH, SAH, SDH), 14),
    ((IPH, IVH, SAH, SDH), 1),
    ((IPH, IVH, SDH), 11),
    ((IPH, SAH, SDH), 24),
    ((IPH, SAH), 8),
    ((IPH, IVH, SAH), 37),
    ((IVH, SAH), 2),
    ((SAH,), 9),
    ((IVH,), 8),
    ((IPH, IVH), 30),
    ((IPH,), 11),
)
_CHRONIC, _LAYERED = 2, 3  # of `Level.subdural_age`
# Earlier ones keep contested voxels.
_PAINT_ORDER = (EDH, SDH, IPH, IVH, SAH)


@dataclass(frozen=True)
class Level:
    """How hard the bleeds are to see."""

    blood_hu: tuple[float, float]  # fresh clot in brain and ventricles
    extra_axial_hu: tuple[float, float]  # fresh clot outside the brain: denser, in no mixture
    subarachnoid_hu: tuple[float, float]  # diluted by CSF
    subdural_age: tuple[float, float, float, float]  # chances: acute, subacute, chronic, layered
    loose: float  # 0: blood is outlined exactly; 1: as loosely as raters do, see `_RIM`
    smallest_ml: float
    noise: float  # factor
    surgery: float  # factor of how often a head was operated on or hit


LEVELS = {
    "default": Level(
        blood_hu=(46, 60),
        extra_axial_hu=(66, 80),
        subarachnoid_hu=(40, 55),
        subdural_age=(0.40, 0.10, 0.38, 0.12),
        loose=1.0,
        smallest_ml=0.12,
        noise=1.0,
        surgery=1.0,
    ),
    "large": Level(
        blood_hu=(43, 58),
        extra_axial_hu=(43, 58),
        subarachnoid_hu=(43, 56),
        subdural_age=(1, 0, 0, 0),
        loose=0.0,
        smallest_ml=10.0,
        noise=0.6,
        surgery=0.0,
    ),
    "easy": Level(
        blood_hu=(70, 74),
        extra_axial_hu=(70, 74),
        subarachnoid_hu=(66, 70),
        subdural_age=(1, 0, 0, 0),
        loose=0.0,
        smallest_ml=4.0,
        noise=0.6,
        surgery=0.0,
    ),
}


def class_set(share: float) -> tuple[int, ...]:
    """The set of classes at a share in [0, 1) of all bleeding scans.

    Shares spread evenly give every class its part even in a few scans, as EDH's sets adjoin.
    """
    total = sum(count for _, count in _CLASS_SETS)
    passed = 0
    for classes, count in _CLASS_SETS:
        passed += count
        if share * total < passed:
            return classes
    raise UserError(f"share of bleeding scans: {share} is not in [0, 1)")


def draw_lesions(
    rng: np.random.Generator,
    classes: tuple[int, ...],
    volumes_ml: Mapping[int, float],
    level: Level,
) -> dict[int, Lesion]:
    """Draws the bleeds, in the order they are painted.

    All five are drawn whatever `classes` asks for, so that the others stay where they are when one
    is left out. Given volumes win over drawn ones.
    """
    age = int(rng.choice(4, p=level.subdural_age))
    volume = {c: _volume_ml(rng, c, level.smallest_ml) for c in _VOLUME}
    kind = str(rng.choice(("convexity", "falx", "tentorium"), p=(0.86, 0.08, 0.06)))
    scale = (_OLD if age == _CHRONIC else 1) * (1 if kind == "convexity" else _SHEET[0])
    largest = _VOLUME[SDH][2] if kind == "convexity" else _SHEET[1]
    volume[SDH] = float(np.clip(scale * volume[SDH], level.smallest_ml, largest))
    volume |= volumes_ml
    side = {c: int(rng.choice((-1, 1))) for c in _VOLUME}
    same = rng.random(2)
    if IPH in classes and same[0] < 0.7:  # blood of one cause lies on one side
        side[SAH] = side[IPH]
    if SDH in classes and same[1] < 0.6:
        side[SAH] = side[SDH]
    drawn = {
        EDH: _epidural(rng, volume[EDH], side[EDH], level),
        SDH: _subdural(rng, volume[SDH], side[SDH], kind, age, level),
        IPH: _intraparenchymal(rng, volume[IPH], side[IPH], level),
        IVH: _intraventricular(rng, volume[IVH], side[IVH], level),
        SAH: _subarachnoid(rng, volume[SAH], side[SAH], level),
    }
    return {c: drawn[c] for c in _PAINT_ORDER if c in classes}


def displacement(lesions: Mapping[int, Lesion], points: Points) -> Points:
    """How far mass effect moved the tissue now at `points`, mm."""
    shift = tuple(np.zeros_like(p) for p in points)
    for lesion in lesions.values():
        push = lesion.push()
        if push is not None:
            _add_push(push, points, shift)
    return shift[0], shift[1], shift[2]


def with_hydrocephalus(head: Head, lesions: Mapping[int, Lesion]) -> Head:
    """The head with its ventricles widened by blood in them."""
    if IVH not in lesions:
        return head
    widened = 1 + 0.8 * (1 - np.exp(-lesions[IVH].volume_ml / 12))
    return replace(head, ventricles=float(head.ventricles * widened))


def paint(
    lesions: Mapping[int, Lesion], space: Space, hu: np.ndarray, voxel_ml: float, loose: float
) -> np.ndarray:
    """Writes blood and edema into `hu` [N] and returns the class of the blood, uint8 [N].

    A bleed that finds no room for its volume fills all the room there is. Its mask may be wider;
    for `loose` see `Level`.
    """
    label = np.zeros(hu.size, np.uint8)
    for index, lesion in lesions.items():
        free = np.flatnonzero(lesion.allowed(space) & (label == 0))
        own = space.take(free)
        order = lesion.order(own)
        ranked = lowest(order, (1 - loose * _RIM[index]) * lesion.volume_ml / voxel_ml)
        if isinstance(lesion, Intraparenchymal) and ranked.size:
            _add_edema(lesion, space, hu, label, float(order[ranked[-1]]))
        blood = free[ranked]
        label[blood] = index
        hu[blood] = lesion.hu(space.take(blood))
    return label


def lowest(values: np.ndarray, count: float) -> np.ndarray:
    """Indices of the `count` lowest values, lowest first; at least one if `count` is above 0."""
    wanted = min(max(round(count), int(count > 0)), values.size)
    if wanted == 0:
        return np.zeros(0, np.int64)
    found = np.argpartition(values, wanted - 1)[:wanted]
    return found[np.argsort(values[found], kind="stable")]


def _volume_ml(rng: np.random.Generator, index: int, smallest_ml: float) -> float:
    median, sigma, largest = _VOLUME[index]
    return float(np.clip(rng.lognormal(np.log(median), sigma), smallest_ml, largest))


def _epidural(rng: np.random.Generator, volume_ml: float, side: int, level: Level) -> Epidural:
    return Epidural(
        volume_ml=volume_ml,
        side=side,
        toward=direction(rng.uniform(-0.75, 0.75), rng.uniform(-0.15, 0.7), side),
        widen=rng.uniform(0.9, 1.2),
        suture=rng.uniform(0.5, 1.0),
        blood_hu=rng.uniform(*level.extra_axial_hu),
    )


def _subdural(
    rng: np.random.Generator, volume_ml: float, side: int, kind: str, age: int, level: Level
) -> Subdural:
    first, second = rng.uniform(0.6, 1.1, 2) * rng.permutation((1.0, -1.0))
    elevation = rng.uniform(0, 0.7)
    fresh = rng.uniform(*level.extra_axial_hu) - 10 * level.loose  # mixed with CSF
    blood_hu = (fresh, rng.uniform(38, 48), rng.uniform(-5, 2), 40.0)
    return Subdural(
        volume_ml=volume_ml,
        side=side,
        toward=direction(first, elevation, side),
        second=direction(second, elevation, side),
        lag_mm=rng.uniform(0, 1.5),
        kind=kind,
        taper_mm=rng.uniform(24, 38),
        blood_hu=blood_hu[age],
        layered=age == _LAYERED,
    )


def _intraparenchymal(
    rng: np.random.Generator, volume_ml: float, side: int, level: Level
) -> Intraparenchymal:
    centers: tuple[Triple, ...] = (  # basal ganglia and thalamus, lobes, posterior fossa
        (side * rng.uniform(16, 30), rng.uniform(-8, 22), rng.uniform(-6, 8)),
        (side * rng.uniform(24, 46), rng.uniform(-55, 48), rng.uniform(-6, 38)),
        (side * rng.uniform(0, 26), rng.uniform(-52, -28), rng.uniform(-52, -36)),
    )
    axes = rng.uniform(0.75, 1.35, 3)
    a, b, c = (axes / np.prod(axes) ** (1 / 3)).tolist()
    return Intraparenchymal(
        volume_ml=volume_ml,
        center=centers[int(rng.choice(3, p=(0.45, 0.42, 0.13)))],
        axes=(a, b, c),
        blood_hu=rng.uniform(*level.blood_hu),
        edema_mm=rng.uniform(2, 9),
        edema_hu=rng.uniform(6, 12),
    )


def _intraventricular(
    rng: np.random.Generator, volume_ml: float, side: int, level: Level
) -> Intraventricular:
    return Intraventricular(
        volume_ml=volume_ml,
        side=side,
        cast=rng.random() < 0.35,
        uneven_mm=rng.uniform(10, 45),
        blood_hu=rng.uniform(*level.blood_hu) + 6,  # cells sink and lie close
    )


def _subarachnoid(
    rng: np.random.Generator, volume_ml: float, side: int, level: Level
) -> Subarachnoid:
    basal = rng.random() < 0.35
    focus = (side * rng.uniform(28, 52), rng.uniform(-50, 40), rng.uniform(-8, 46))
    return Subarachnoid(
        volume_ml=volume_ml,
        center=(0, 14, -24) if basal else focus,
        spread=(32, 30, 12) if basal else (30, 34, 20),
        blood_hu=rng.uniform(*level.subarachnoid_hu),
    )


def _add_push(push: Push, points: Points, shift: tuple[np.ndarray, ...]) -> None:
    for start in range(0, points[0].size, CHUNK):
        cut = slice(start, start + CHUNK)
        x, y, z = (p[cut] for p in points)
        away = [p - np.float32(c) for p, c in zip((x, y, z), push.center, strict=True)]
        distance = np.sqrt(away[0] ** 2 + away[1] ** 2 + away[2] ** 2) + 1
        size = push.strength * push.radius_mm * np.exp(-distance / push.reach_mm)
        size *= np.clip(distance / (push.radius_mm + 4), 0, 1) / distance
        for total, a in zip(shift, away, strict=True):
            total[cut] += size * a
        # The skull does not give way: nothing moves there.
        free = np.clip(1 - (x / 62) ** 2 - (y / 78) ** 2 - (z / 70) ** 2, 0, 1)
        shift[0][cut] += push.midline_mm * free


def _add_edema(
    lesion: Intraparenchymal, space: Space, hu: np.ndarray, label: np.ndarray, edge: float
) -> None:
    """Darkens the brain around a bleed whose fill order ended at `edge`."""
    reach = edge + lesion.edema_mm / ball_radius_mm(lesion.volume_ml)
    hu[(lesion.order(space) < reach) & space.tissue.brain & (label == 0)] -= lesion.edema_hu
