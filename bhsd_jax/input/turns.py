"""Scans turned by quarters in their plane and mirrored, before a patch is cut from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bhsd_jax.volume import Shape

# Of 0 to 3 quarter turns from H toward W: whether rows and columns are exchanged, and which of the
# new axes H and W then run backward. `np.rot90(array, k, axes=(1, 2))`.
_QUARTERS = (
    (False, (False, False)),
    (True, (True, False)),
    (False, (True, True)),
    (True, (False, True)),
)


@dataclass(frozen=True)
class Turn:
    """One of the eight ways in which a plane can lie; a turned scan is never made whole.

    A box of the turned scan is a box of the scan itself, read and then turned.
    """

    exchanged: bool = False  # rows and columns
    backward: tuple[bool, bool] = (False, False)  # the axes H and W of the turned scan

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Turn":
        """SSL4MIS' `RandomRotFlip`: a number of quarter turns, then a mirror along H or along W.

        As one of the two is always mirrored, what comes out is one of the four mirror images with
        equal chances, and never the scan as it was.

        Source: SSL4MIS 06df604, `dataloaders/brats2019.py`, whose last axis is our first.
        """
        exchanged, (rows, columns) = _QUARTERS[int(rng.integers(4))]
        mirrored = int(rng.integers(2))
        return cls(exchanged, (rows != (mirrored == 0), columns != (mirrored == 1)))

    def shape(self, shape: Shape) -> Shape:
        """D, H, W of the turned scan, or the other way round."""
        d, h, w = shape
        return (d, w, h) if self.exchanged else shape

    def corner(self, corner: Shape, cut: Shape, turned: Shape) -> Shape:
        """First voxel, in the scan itself, of a cut at `corner` of the scan of shape `turned`."""
        d, *plane = corner
        h, w = (
            size - length - first if back else first
            for first, length, size, back in zip(
                plane, cut[1:], turned[1:], self.backward, strict=True
            )
        )
        return (d, w, h) if self.exchanged else (d, h, w)

    def points(self, points: Sequence[np.ndarray], turned: Shape) -> tuple[np.ndarray, ...]:
        """Voxel positions [n 3] of the scan itself as they lie in the scan of shape `turned`."""
        if self == AS_IT_IS:
            return tuple(points)
        order = [0, 2, 1] if self.exchanged else [0, 1, 2]
        last = np.array([0, *(n - 1 for n in turned[1:])])
        sign = np.array([1, *(-1 if back else 1 for back in self.backward)])
        return tuple(
            np.where(sign < 0, last - at[:, order], at[:, order]) if len(at) else at
            for at in points
        )

    def __call__(self, cut: np.ndarray) -> np.ndarray:
        """A cut [D H W] of the scan itself as it lies in the turned scan."""
        if self == AS_IT_IS:
            return cut
        turned = cut.swapaxes(1, 2) if self.exchanged else cut
        rows, columns = (-1 if back else 1 for back in self.backward)
        return np.ascontiguousarray(turned[:, ::rows, ::columns])


AS_IT_IS = Turn()
