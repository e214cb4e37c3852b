"""The plane between the two sides of a head, from the skull's outer edges."""

import numpy as np
from jaxtyping import Float, Num

_BONE_HU, _SKIN_HU = 300.0, -200.0
_LEAST_MM = 90.0  # of a chord through the head: shorter ones are the neck, the nose, or a clip
_LEAST_CHORDS = 50
_POINTS_MM = 2.5  # between the voxels that are looked at
_BIN_MM = 4.0  # width of a bundle of chords
_TURNS = 12  # each leaves 0.6 of the angle that is left, in a head of 140 x 180 mm
_ROUNDS = 15  # of reweighting, until outliers count for little


def of(
    voxels: Num[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, " 4"] | None:
    """The plane a x + b y + c z + d = 0 in RAS+ mm, a > 0, of a head CT in HU; None without a head.

    It runs through the middles of chords from bone to bone across the head, in the sense of least
    absolute deviations; the chords are laid anew at right angles to it until it stays, so that it
    follows a head that is turned or bent aside. It is the skull's, not the brain's: a shifted
    septum lies beside it. A skull is nearly round from ear to ear, so that a head's lean to one
    side is known to about 2 degrees.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    strides = [max(1, round(_POINTS_MM / each)) for each in lengths.tolist()]
    kept = voxels[:: strides[0], :: strides[1], :: strides[2]]
    for threshold in (_BONE_HU, _SKIN_HU):
        points = np.argwhere(kept > threshold) * strides @ affine[:3, :3].T + affine[:3, 3]
        if len(points) and (plane := _settle(points)) is not None:
            return plane
    return None


def _settle(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " 4"] | None:
    """Chords along x first, then along what the plane before says."""
    across, offset = np.array([1.0, 0.0, 0.0]), 0.0
    for _ in range(_TURNS):
        frame = _frame(across)
        middles = _middles(points @ frame.T)
        if len(middles) < _LEAST_CHORDS:
            return None
        place, by_u, by_v = _fit(middles)
        normal = np.array([1.0, -by_u, -by_v]) @ frame
        length = float(np.linalg.norm(normal))
        across, offset = normal / length, place / length
    return np.append(across, -offset)


def _frame(across: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Unit vectors in rows, `across` first."""
    up = np.array([0.0, 0.0, 1.0]) - across[2] * across
    up /= np.linalg.norm(up)
    return np.stack([across, np.cross(up, across), up])


def _middles(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "m 3"]:
    """Of each bundle of chords along the first axis: the middle, and where it lies."""
    bins = np.floor(points[:, 1:] / _BIN_MM).astype(np.int64)
    bins -= bins.min(0)
    key = bins[:, 0] * (bins[:, 1].max() + 1) + bins[:, 1]
    unique, index = np.unique(key, return_inverse=True)
    low, high = np.full(len(unique), np.inf), np.full(len(unique), -np.inf)
    np.minimum.at(low, index, points[:, 0])
    np.maximum.at(high, index, points[:, 0])
    count = np.bincount(index)
    sums = [np.bincount(index, points[:, axis]) / count for axis in (1, 2)]
    return np.column_stack([(low + high) / 2, *sums])[high - low >= _LEAST_MM]


def _fit(middles: Float[np.ndarray, "m 3"]) -> tuple[float, float, float]:
    """The first as a linear function of the others, by iteratively reweighted least squares."""
    given = np.column_stack([np.ones(len(middles)), middles[:, 1:]])
    weight = np.ones(len(middles))
    answer = np.zeros(3)
    for _ in range(_ROUNDS):
        root = np.sqrt(weight)
        answer = np.linalg.lstsq(given * root[:, None], middles[:, 0] * root, rcond=None)[0]
        weight = 1 / np.maximum(np.abs(middles[:, 0] - given @ answer), 0.1)
    place, by_u, by_v = answer.tolist()
    return place, by_u, by_v
