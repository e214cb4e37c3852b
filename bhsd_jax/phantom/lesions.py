"""The five bleeds of the phantom: where each may lie, and which voxels it fills first.

Every bleed gives a *fill order*: a number per voxel and the voxels it may take. As many voxels as
its volume asks for are taken, lowest number first. So shapes are free and volumes exact.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from bhsd_jax.phantom.anatomy import Points, Triple, arc_mm
from bhsd_jax.phantom.brain import Tissues, ellipsoid, tentorium_mm

_MOST_SHIFT_MM = 14.0


class Space(NamedTuple):
    """The cavity's voxels [N] as the bleeds see them."""

    points: Points
    rest: Points  # where the tissue lay before it was pushed aside
    depth: np.ndarray
    tissue: Tissues

    def take(self, index: np.ndarray) -> "Space":
        """The space of these voxels alone."""
        names = self.tissue.__dataclass_fields__
        return Space(
            (self.points[0][index], self.points[1][index], self.points[2][index]),
            (self.rest[0][index], self.rest[1][index], self.rest[2][index]),
            self.depth[index],
            replace(self.tissue, **{n: getattr(self.tissue, n)[index] for n in names}),
        )


class Push(NamedTuple):
    """Mass effect: tissue moves straight away from a center, and the midline to the other side."""

    center: Triple
    radius_mm: float  # of a ball of the bleed's volume
    strength: float  # greatest shift away as a share of that radius
    reach_mm: float  # the shift away falls by e over this distance
    midline_mm: float  # how far the middle of the brain moves along x; with a sign


@runtime_checkable
class Lesion(Protocol):
    """One bleed: a frozen dataclass of everything drawn for it."""

    @property
    def volume_ml(self) -> float:
        """Volume that its mask is to have."""
        ...

    def allowed(self, space: Space) -> np.ndarray:
        """Voxels it may take, bool [N]."""
        ...

    def order(self, space: Space) -> np.ndarray:
        """Lower is filled earlier, [N]; asked only where allowed."""
        ...

    def hu(self, space: Space) -> np.ndarray:
        """HU of blood, [N]."""
        ...

    def push(self) -> Push | None:
        """Mass effect, if it has any."""
        ...


def ball_radius_mm(volume_ml: float) -> float:
    """Radius of a ball of that volume."""
    return (3000 * volume_ml / (4 * np.pi)) ** (1 / 3)


def _midline_mm(x: float, shift_mm: float) -> float:
    """Shift along x away from a bleed at `x`; none from one in the midline."""
    return float(np.clip(-x / 20, -1, 1)) * min(shift_mm, _MOST_SHIFT_MM)


@dataclass(frozen=True)
class Epidural:
    """A lens between inner table and dura; stops at a suture, may not cross it."""

    volume_ml: float
    side: int  # -1 right, 1 left
    toward: Triple
    widen: float  # of the lens's radius
    suture: float  # where the suture cuts, in radii beyond the center
    blood_hu: float

    @property
    def radius_mm(self) -> float:
        """Radius of the lens; its thickness is about 0.6 of it."""
        return float(np.clip(10 * self.volume_ml ** (1 / 3) * self.widen, 8, 60))

    def allowed(self, space: Space) -> np.ndarray:
        x, y, _ = space.points
        front = 1 if self.toward[1] >= 0 else -1
        cut = abs(self.toward[1]) * 84 + self.radius_mm * self.suture
        return (
            (arc_mm(space.points, self.toward) < self.radius_mm)
            & (y * front < cut)
            & (x * self.side > 2)
        )

    def order(self, space: Space) -> np.ndarray:
        # Depth under a paraboloid: the filled set is a lens whose rim lies at `radius_mm`.
        rho = arc_mm(space.points, self.toward) / self.radius_mm
        return space.depth / np.maximum(1 - rho * rho, 1e-3)

    def hu(self, space: Space) -> np.ndarray:
        swirl = 14 * (space.tissue.broad > 1)  # fresh blood in the clot
        return self.blood_hu + 3 * space.tissue.folia - swirl

    def push(self) -> Push:
        x, y, z = self.toward
        center = (61 * x, 76 * y, 65 * z)
        midline_mm = _midline_mm(center[0], 0.2 * self.volume_ml)
        return Push(center, ball_radius_mm(self.volume_ml), 0.45, 30, midline_mm)


@dataclass(frozen=True)
class Subdural:
    """Crescents over one hemisphere, crossing sutures; or a sheet along falx or tentorium."""

    volume_ml: float
    side: int
    toward: Triple
    second: Triple  # the middle of another crescent
    lag_mm: float  # how much thinner that one is
    kind: str  # "convexity", "falx" or "tentorium"
    taper_mm: float  # how much thinner the crescent is 67 mm from its center
    blood_hu: float
    layered: bool  # fresh on old blood

    def allowed(self, space: Space) -> np.ndarray:
        x, y, z = space.rest
        hemisphere = (space.points[0] * self.side > 1.5) & ~space.tissue.infratentorial
        if self.kind == "falx":
            return hemisphere & (z > 16) & (np.abs(x) < 9)
        if self.kind == "tentorium":
            return hemisphere & (y < -10)
        return hemisphere & (space.depth < 24)

    def order(self, space: Space) -> np.ndarray:
        x, y, z = space.rest
        rough = 0.4 * space.tissue.broad
        if self.kind == "falx":
            return np.abs(np.abs(x) - 1.2) + 0.03 * np.hypot(y + 35, z - 40) + rough
        if self.kind == "tentorium":
            above = np.abs(z - tentorium_mm(space.rest) - 1)
            return above + 0.05 * np.abs(np.abs(x) - 25) + rough
        first = arc_mm(space.points, self.toward) / 67
        second = arc_mm(space.points, self.second) / 67
        apart = np.minimum(
            self.taper_mm * first * first, self.lag_mm + self.taper_mm * second * second
        )
        height = (space.points[2] - 69 * self.toward[2]) / 50
        return space.depth + apart + self.taper_mm * height * height + rough

    def hu(self, space: Space) -> np.ndarray:
        hu = self.blood_hu + 3 * space.tissue.folia
        if not self.layered:
            return hu
        # Cells sink in a patient lying on the back.
        sunk = space.points[1] + 8 * space.tissue.broad < 80 * self.toward[1]
        return hu + np.where(sunk, np.float32(20), np.float32(-22))

    def push(self) -> Push | None:
        if self.kind != "convexity":
            return None
        x, y, z = self.toward
        center = (64 * x, 80 * y, 69 * z)
        midline_mm = _midline_mm(center[0], 0.2 * self.volume_ml)
        return Push(center, ball_radius_mm(self.volume_ml), 0.45, 42, midline_mm)


@dataclass(frozen=True)
class Intraparenchymal:
    """A ragged blob in the brain, with a rim of edema."""

    volume_ml: float
    center: Triple
    axes: Triple  # relative, product 1
    blood_hu: float
    edema_mm: float
    edema_hu: float  # subtracted

    def allowed(self, space: Space) -> np.ndarray:
        return ~space.tissue.ventricle & ~space.tissue.dura & (space.depth > 4)

    def order(self, space: Space) -> np.ndarray:
        radius = ball_radius_mm(self.volume_ml)
        a, b, c = self.axes
        distance = ellipsoid(space.points, self.center, (a * radius, b * radius, c * radius))
        return distance + 0.12 * space.tissue.folds + 0.08 * space.tissue.broad

    def hu(self, space: Space) -> np.ndarray:
        swirl = 12 * (space.tissue.broad > 0.9)
        return self.blood_hu + 5 * space.tissue.folia - swirl

    def push(self) -> Push:
        midline_mm = _midline_mm(self.center[0], 0.15 * self.volume_ml)
        return Push(self.center, ball_radius_mm(self.volume_ml), 0.5, 26, midline_mm)


@dataclass(frozen=True)
class Intraventricular:
    """Blood in the ventricles: sunk to the back of a patient lying down, or a cast of a horn."""

    volume_ml: float
    side: int
    cast: bool
    uneven_mm: float  # how much higher the level stands on `side`
    blood_hu: float

    def allowed(self, space: Space) -> np.ndarray:
        return space.tissue.ventricle

    def order(self, space: Space) -> np.ndarray:
        other = np.where(space.points[0] * self.side > 0, np.float32(0), np.float32(self.uneven_mm))
        level = space.points[1] + other + 0.4 * space.tissue.broad
        if not self.cast:
            return level
        return 30 * ellipsoid(space.rest, (self.side * 14, 10, 8), (20, 45, 25)) + 2 * other

    def hu(self, space: Space) -> np.ndarray:
        return self.blood_hu + 3 * space.tissue.folia

    def push(self) -> None:
        return None


@dataclass(frozen=True)
class Subarachnoid:
    """Blood in the sulci or cisterns around a focus: sheets about 2 mm thick."""

    volume_ml: float
    center: Triple
    spread: Triple  # mm
    blood_hu: float

    def allowed(self, space: Space) -> np.ndarray:
        tissue = space.tissue
        return tissue.subarachnoid & ~tissue.sinus & ~tissue.dura

    def order(self, space: Space) -> np.ndarray:
        distance = ellipsoid(space.points, self.center, self.spread)
        return distance + 0.35 * space.tissue.folds + 0.25 * space.tissue.broad

    def hu(self, space: Space) -> np.ndarray:
        return self.blood_hu + 3 * space.tissue.folia

    def push(self) -> None:
        return None
