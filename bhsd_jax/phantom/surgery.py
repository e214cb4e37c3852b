"""What an operation or a blow leaves in a head: bone flap, air, drain, swollen scalp.

None of it is a bleed, and most of it lies where bleeds lie: what a network must learn to leave out.
"""

from dataclasses import dataclass

import numpy as np

from bhsd_jax.phantom.anatomy import Points, Triple, arc_mm, direction
from bhsd_jax.phantom.brain import Tissues, tube

_AIR_HU = -980
_SAW_MM = 1.0  # half the width of the cut around a bone flap
_HOLE_MM = 6.0  # radius of a burr hole
_DRAIN_MM = 1.5  # radius of the tube
_DRAIN_HU = 150
_TARGET_MM = (9.0, 16.0, 4.0)  # of a drain: the frontal horn near the foramen, |x|


@dataclass(frozen=True)
class Surgery:
    """What was done to one head; lengths of 0 stand for nothing."""

    toward: Triple  # the middle of the bone flap, from the middle of the head
    flap_mm: float  # radius of the bone flap along the inner table
    removed: bool  # the flap has not been put back
    air_mm: float  # thickness of the air under the flap
    drain: int  # side of a ventricular drain, -1 right or 1 left
    bruise: Triple  # the middle of a swelling of the scalp
    swollen_mm: float

    @property
    def burr(self) -> Triple:
        """Where the drain enters: in front of the coronal suture, beside the midline."""
        return direction(1.0, 0.95, self.drain or 1)

    def swelling(self, points: Points) -> np.ndarray:
        """How much thicker than usual the scalp is, mm, in the shape of the points."""
        swollen = np.zeros(points[0].shape, np.float32)
        if self.swollen_mm:
            swollen += self.swollen_mm * _bump(arc_mm(points, self.bruise) / 45)
        if self.flap_mm:
            swollen += 6 * _bump(arc_mm(points, self.toward) / (self.flap_mm + 25))
        return swollen

    def opened(self, points: Points) -> np.ndarray:
        """Where there is no bone in the vault, bool, in the shape of the points."""
        gone = np.zeros(points[0].shape, bool)
        if self.flap_mm:
            arc = arc_mm(points, self.toward)
            gone |= arc < self.flap_mm if self.removed else np.abs(arc - self.flap_mm) < _SAW_MM
        if self.drain:
            gone |= arc_mm(points, self.burr) < _HOLE_MM
        return gone

    def leave(
        self, points: Points, depth: np.ndarray, tissue: Tissues, hu: np.ndarray
    ) -> np.ndarray:
        """Writes air and drain into the HU [N] of the cavity; the indices of where they are."""
        written = [np.zeros(0, np.int64)]
        if self.air_mm:
            shallow = np.flatnonzero(depth < self.air_mm)
            near = (points[0][shallow], points[1][shallow], points[2][shallow])
            dome = self.air_mm * _bump(arc_mm(near, self.toward) / self.flap_mm)
            # Air rises: a patient who lies on the back has it in front.
            dome *= np.clip(1 + near[1] / 60 + 0.3 * tissue.broad[shallow], 0.2, 1)
            written.append(shallow[depth[shallow] < dome])
            hu[written[-1]] = _AIR_HU
        if self.drain:
            x, y, z = self.burr
            start, stop = (90 * x, 90 * y, 90 * z), (self.drain * _TARGET_MM[0], *_TARGET_MM[1:])
            written.append(np.flatnonzero(tube(points, start, stop, _DRAIN_MM, _DRAIN_MM) < 0))
            hu[written[-1]] = _DRAIN_HU
        return np.concatenate(written)


def draw_surgery(rng: np.random.Generator, often: float) -> Surgery:
    """Draws what was done; nothing in half of the heads where `often` is 1, in all where it is 0.

    Everything is drawn whatever comes of it, so that one thing more leaves the others as they are.
    """
    opened, drained, swollen = (rng.random(3) < often * np.array((0.22, 0.15, 0.25))).tolist()
    side = int(rng.choice((-1, 1)))
    toward = direction(rng.uniform(-0.4, 0.8), rng.uniform(0.1, 0.8), side)
    flap_mm, air_mm = rng.uniform(28, 48), rng.uniform(2, 12)
    removed, airy = (rng.random(2) < (0.25, 0.7)).tolist()
    bruise = direction(rng.uniform(-1.3, 1.3), rng.uniform(-0.2, 0.9), int(rng.choice((-1, 1))))
    swollen_mm = rng.uniform(3, 10)
    drain = int(rng.choice((-1, 1)))
    return Surgery(
        toward=toward,
        flap_mm=flap_mm * opened,
        removed=removed,
        air_mm=air_mm * (opened and airy),
        drain=drain * drained,
        bruise=bruise,
        swollen_mm=swollen_mm * swollen,
    )


def _bump(rho: np.ndarray) -> np.ndarray:
    """1 in the middle, falling to 0 at 1 and beyond."""
    return np.maximum(1 - rho * rho, np.float32(0))
