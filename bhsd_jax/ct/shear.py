"""Sheared stacks, as a tilted gantry leaves them, straightened for the network and back."""

import math

import numpy as np
from jaxtyping import Float, Float32, Num, UInt8
from scipy import ndimage

from bhsd_jax.ct import geometry, hu
from bhsd_jax.volume import Shape


def angle_deg(affine: Float[np.ndarray, "4 4"]) -> float:
    """Angle between the step from slice to slice (axis D) and the slices' normal."""
    across = np.cross(affine[:3, 1], affine[:3, 2])
    cosine = across @ affine[:3, 0] / np.linalg.norm(across) / np.linalg.norm(affine[:3, 0])
    return math.degrees(math.acos(min(1.0, abs(float(cosine)))))


def gantry_deg(affine: Float[np.ndarray, "4 4"]) -> float:
    """The gantry's tilt, whether the affine says it as a shear or hides it as a rotation.

    Signed as `hu.tilt_deg` is: positive if the anterior direction of the slices points up.
    """
    angle = angle_deg(affine)
    if angle < geometry.LEAST_TILT_DEG:
        return hu.tilt_deg(affine)
    order, flip = geometry.canonical(affine)
    posterior = affine[2, order[1]] * (-1 if flip[1] else 1)
    return math.copysign(angle, -posterior)


def unshear(
    voxels: Num[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"], *, fill: float
) -> tuple[Num[np.ndarray, "D _ _"], Float[np.ndarray, "4 4"]]:
    """Moves the slices of a sheared image over each other; none is blended with another.

    Rows and columns are added so that nothing is lost, filled with `fill`. The affine that comes
    with it has the true distances, and axes parallel to the world's: where a tilted gantry stood
    is forgotten, so that no reader takes the new volume for one whose header hides a shear.
    Below half a degree nothing is done.
    """
    if angle_deg(affine) < geometry.LEAST_TILT_DEG:
        return voxels, affine
    out = move_image(voxels, affine, fill=fill)
    return out, _upright(affine, voxels.shape, out.shape)


def unshear_label(
    label: UInt8[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"]
) -> UInt8[np.ndarray, "D _ _"]:
    """The label map of an image that went through `unshear`; moved by whole voxels."""
    if angle_deg(affine) < geometry.LEAST_TILT_DEG:
        return label
    return move_label(label, affine)


def shear_label(
    label: UInt8[np.ndarray, "N _ _"],
    affine: Float[np.ndarray, "4 4"],
    shape: Shape,
    places: Float[np.ndarray, " N"] | None = None,
) -> UInt8[np.ndarray, "N H W"]:
    """Undoes `unshear_label`: back onto the sheared grid of that affine and shape.

    With `places` the planes are others, which lie there between those of the grid.
    """
    if angle_deg(affine) < geometry.LEAST_TILT_DEG:
        return label
    moves, _ = _moves(affine, shape, places)
    out = np.zeros((len(label), *shape[1:]), np.uint8)
    for plane, target, (row, column) in zip(label, out, np.rint(moves).astype(int), strict=True):
        target[...] = plane[row : row + shape[1], column : column + shape[2]]
    return out


def move_image(
    voxels: Num[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"], *, fill: float
) -> Float32[np.ndarray, "D _ _"]:
    """Slices moved over each other, however little the image is sheared; linear, edges `fill`."""
    moves, grown = _moves(affine, (voxels.shape[0], voxels.shape[1], voxels.shape[2]))
    out = np.full(grown, fill, np.float32)
    for plane, target, move in zip(voxels, out, moves, strict=True):
        padded = np.full(grown[1:], fill, np.float32)
        padded[: plane.shape[0], : plane.shape[1]] = plane
        target[...] = ndimage.shift(padded, move, order=1, mode="constant", cval=fill)
    return out


def move_label(
    label: UInt8[np.ndarray, "D H W"], affine: Float[np.ndarray, "4 4"]
) -> UInt8[np.ndarray, "D _ _"]:
    """As `move_image`, by whole voxels: each slice keeps every voxel of every class."""
    moves, grown = _moves(affine, (label.shape[0], label.shape[1], label.shape[2]))
    out = np.zeros(grown, np.uint8)
    for plane, target, (row, column) in zip(label, out, np.rint(moves).astype(int), strict=True):
        target[row : row + plane.shape[0], column : column + plane.shape[1]] = plane
    return out


def moved_affine(affine: Float[np.ndarray, "4 4"], shape: Shape) -> Float[np.ndarray, "4 4"]:
    """Of what `move_image` gives: axes at right angles, every voxel where it was in the patient.

    Rows and columns that rounding has left a little off a right angle are turned onto one, about
    the middle of the volume.
    """
    moves, grown = _moves(affine, shape)
    made = affine.copy()
    across = np.cross(affine[:3, 1], affine[:3, 2])
    made[:3, 0] = across * float(across @ affine[:3, 0]) / float(across @ across)
    made[:3, 3] -= affine[:3, 1:3] @ moves[0]
    middle = np.append((np.asarray(grown) - 1) / 2, 1.0)
    before = made @ middle
    row, column = made[:3, 1], made[:3, 2]
    straight = row - column * float(row @ column) / float(column @ column)
    made[:3, 1] = straight * float(np.linalg.norm(row) / np.linalg.norm(straight))
    made[:3, 3] += (before - made @ middle)[:3]
    return made


def _moves(
    affine: Float[np.ndarray, "4 4"], shape: Shape, places: Float[np.ndarray, " N"] | None = None
) -> tuple[Float[np.ndarray, "_ 2"], Shape]:
    """Rows and columns by which each slice has to move, none below 0; the shape that holds all."""
    across = np.cross(affine[:3, 1], affine[:3, 2])
    axes = np.stack([across, affine[:3, 1], affine[:3, 2]], axis=1)
    per_slice = np.linalg.solve(axes, affine[:3, 0])[1:]
    moves = np.arange(shape[0])[:, None] * per_slice
    least = moves.min(axis=0)
    rows, columns = (math.ceil(v - 1e-6) for v in (moves - least).max(axis=0))
    if places is not None:
        moves = places[:, None] * per_slice
    return moves - least, (shape[0], shape[1] + rows, shape[2] + columns)


def _upright(
    affine: Float[np.ndarray, "4 4"], old: tuple[int, ...], new: Shape
) -> Float[np.ndarray, "4 4"]:
    across = np.cross(affine[:3, 1], affine[:3, 2])
    across = across * float(across @ affine[:3, 0]) / float(across @ across)
    straight = affine.copy()
    straight[:3, 0] = across
    order, _ = geometry.canonical(straight)
    made = np.eye(4)
    made[:3, :3] = 0
    for axis, world in zip(order, (2, 1, 0), strict=True):  # superior, posterior, left
        column = straight[:3, axis]
        made[world, axis] = math.copysign(float(np.linalg.norm(column)), column[world])
    middle = affine @ np.append((np.asarray(old) - 1) / 2, 1.0)
    made[:3, 3] = middle[:3] - made[:3, :3] @ ((np.asarray(new) - 1) / 2)
    return made
