"""Area of the surface inside one 2 x 2 x 2 neighborhood of voxels, by marching cubes.

The eight voxel centers are the corners of a cell. The surface runs through the middles of those
cell edges whose ends differ. Three rules make it unique: the rarer kind of corner (inside or
outside; inside, if there are four of each) is the one that gets cut off where a face is ambiguous;
each closed loop of edge middles is cut into triangles; and of all ways to do that, the one with
the largest area at unit spacing counts. Which of several such ways does not matter: they have the
same area at every spacing.

Source: Lorensen and Cline 1987; the rules were found by comparing areas with those of DeepMind's
`surface-distance` 0.1, whose table they reproduce for all 256 codes.
"""

import functools
import itertools
from collections.abc import Collection, Iterator

import numpy as np
from jaxtyping import Float

from bhsd_jax.volume import Millimeters

CORNERS = tuple(itertools.product((0, 1), repeat=3))  # offsets along D, H, W; bit i is corner i

_Corner = tuple[int, ...]
_Point = tuple[float, float, float]
_Triangle = tuple[_Point, _Point, _Point]


def table(spacing_mm: Millimeters) -> Float[np.ndarray, " 256"]:
    """Area in mm^2 by neighborhood code: the sum of 1 << i over the corners i that are inside."""
    d, h, w = spacing_mm
    # The D component of an area vector is an area in the plane of H and W, and so on.
    scale = np.array([h * w, d * w, d * h])
    return np.linalg.norm(_area_vectors() * scale, axis=2).sum(1)


@functools.cache
def _area_vectors() -> Float[np.ndarray, "256 triangles 3"]:
    """Area vectors at unit spacing of the triangles of every code, filled up with zeros."""
    areas = [[_area_vector(t) for t in _triangles(code)] for code in range(256)]
    most = max(map(len, areas))
    vectors = np.zeros((256, most, 3))
    for code, triangles in enumerate(areas):
        vectors[code, : len(triangles)] = np.reshape(triangles, (-1, 3))
    return vectors


def _triangles(code: int) -> list[_Triangle]:
    inside = {corner: bool(code >> i & 1) for i, corner in enumerate(CORNERS)}
    rare = sum(inside.values()) <= 4
    cut_off = {corner for corner, value in inside.items() if value == rare}
    return [t for loop in _loops(cut_off) for t in _largest(loop)]


def _loops(cut_off: Collection[_Corner]) -> Iterator[list[_Point]]:
    """Closed loops of edge middles around the given corners."""
    links: dict[_Point, list[_Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        for one, other in _segments(axis, side, cut_off):
            links.setdefault(one, []).append(other)
            links.setdefault(other, []).append(one)
    while links:
        loop = [next(iter(links))]
        while loop[-1] in links:
            ahead = links.pop(loop[-1])
            loop.append(next((p for p in ahead if p in links), loop[0]))
        yield loop[:-1]


def _segments(
    axis: int, side: int, cut_off: Collection[_Corner]
) -> Iterator[tuple[_Point, _Point]]:
    """Where the surface meets one face of the cell: no, one or two straight lines."""
    around = ((0, 0), (0, 1), (1, 1), (1, 0))
    ring = [tuple(np.insert(pair, axis, side).tolist()) for pair in around]
    middles = [_middle(ring[i], ring[(i + 1) % 4]) for i in range(4)]  # of ring i and i + 1
    crossed = [i for i in range(4) if (ring[i] in cut_off) != (ring[(i + 1) % 4] in cut_off)]
    if len(crossed) == 2:
        yield middles[crossed[0]], middles[crossed[1]]
    elif crossed:
        for i in range(4):
            if ring[i] in cut_off:
                yield middles[i - 1], middles[i]


def _largest(loop: list[_Point]) -> list[_Triangle]:
    # Rounded, so that of equal areas the first is taken, whatever their last bits are.
    return max(_triangulations(loop), key=lambda ts: round(sum(map(_area, ts)), 9))


def _triangulations(loop: list[_Point]) -> Iterator[list[_Triangle]]:
    """All ways to cut a loop into triangles between its own points."""
    if len(loop) < 3:
        yield []
        return
    for k in range(1, len(loop) - 1):
        for one in _triangulations(loop[: k + 1]):
            for other in _triangulations(loop[k:]):
                yield [*one, *other, (loop[0], loop[k], loop[-1])]


def _middle(one: _Corner, other: _Corner) -> _Point:
    d, h, w = ((a + b) / 2 for a, b in zip(one, other, strict=True))
    return d, h, w


def _area_vector(triangle: _Triangle) -> np.ndarray:
    a, b, c = np.asarray(triangle)
    return np.cross(b - a, c - a) / 2


def _area(triangle: _Triangle) -> float:
    return float(np.linalg.norm(_area_vector(triangle)))
