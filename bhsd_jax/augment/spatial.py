"""Moves voxels: one affine resampling, which also cuts the patch, and mirroring."""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Shape

Tap = tuple[Array, Array]  # weight and row of one of the voxels a sample point lies between

# nnU-Net caps the rotation for which it widens its crop, and divides the result by the smallest
# scale of an older recipe. Scales up to 1.4 with rotation therefore reach outside the crop.
_LARGEST_DEG = 90.0
_CROP_SCALE = 0.85
# Labels whose votes differ by less than this are a tie, and the nearest voxel decides.
_TIE = 1e-4


def check(op: object, shares: tuple[str, ...] = (), ranges: tuple[str, ...] = ()) -> None:
    """Validates hyper-parameters: shares lie in [0, 1], ranges are (low, high) and not negative.

    Raises:
        ValueError: Names the operation, the field and the value.
    """
    for name in shares:
        if not 0 <= getattr(op, name) <= 1:
            raise UserError(
                f"{type(op).__name__}: {name} must be in [0, 1]; got {getattr(op, name)}"
            )
    for name in ranges:
        low, high = getattr(op, name)
        if not 0 <= low <= high:
            raise UserError(
                f"{type(op).__name__}: {name} must be (low, high), not negative; got {low, high}"
            )


def is_in_plane(patch: Shape, dummy_2d: bool | str) -> bool:
    """Whether slices are treated one by one: "auto" if the longest side is over 3 times the depth.

    Source: nnU-Net v2 2.8.1, "dummy 2D" augmentation.
    """
    return max(patch) / patch[0] > 3 if dummy_2d == "auto" else bool(dummy_2d)


def center_crop(array: Array, patch: Shape) -> Array:
    """The middle `patch` of the first three axes; rounds as nnU-Net does where parities differ."""
    start = [have // 2 - want // 2 for have, want in zip(array.shape, patch, strict=False)]
    stop = [first + want for first, want in zip(start, patch, strict=True)]
    return lax.slice(array, (*start, *[0] * (array.ndim - 3)), (*stop, *array.shape[3:]))


@dataclass(frozen=True)
class Affine:
    """Rotates and scales about the center, independently, and cuts the patch from a larger one.

    A scale above 1 shrinks what is seen. In-plane ("dummy 2D") neither rotation nor scaling touches
    D, and one map serves all slices. If neither fires the patch is the plain center crop, bit for
    bit. The image is linear in between and `fill` outside; the label is the class with the largest
    share of the linear weights, -1 (outside) being one of them.

    Source: nnU-Net v2 2.8.1 with batchgeneratorsv2 0.3.6, `SpatialTransform` (no elastic part).
    """

    rotation_p: float = 0.2
    scale_p: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)  # drawn uniformly, one value for all axes
    dummy_2d: bool | str = "auto"
    rotation_deg: float | None = None  # largest angle per axis; None: nnU-Net's, by `largest_deg`
    fill: float | tuple[float, ...] = 0.0  # normalized value outside the source, or one per channel

    def __post_init__(self) -> None:
        check(self, ("rotation_p", "scale_p"), ("scale",))
        if self.scale[0] == 0 or self.dummy_2d not in ("auto", True, False):
            raise UserError(
                "Affine: scale must be above 0 and dummy_2d 'auto', True or False; "
                f"got {self.scale} and {self.dummy_2d!r}"
            )

    def largest_deg(self, patch: Shape) -> float:
        """Largest rotation: 180 in-plane, else 30; 15 for single slices longer than 3:2."""
        if self.rotation_deg is not None:
            return self.rotation_deg
        if patch[0] == 1 and max(patch[1:]) / min(patch[1:]) > 1.5:
            return 15.0
        return 180.0 if is_in_plane(patch, self.dummy_2d) else 30.0

    def source_patch(self, patch: Shape) -> Shape:
        """Size to cut from the scan so that most rotations stay inside it.

        The patch's corner is turned about each axis in turn; the farthest reach per axis is divided
        by 0.85 and truncated. The scale range plays no part: that is upstream's behavior.
        """
        if self.rotation_p == self.scale_p == 0:
            return patch
        angle = math.radians(min(self.largest_deg(patch), _LARGEST_DEG))
        axes = (0,) if patch[0] == 1 else (0, 1, 2)
        corner = np.asarray(patch, np.float64)
        turned = [np.abs(_rotations(np, np.full(3, angle))[axis].T @ corner) for axis in axes]
        d, h, w = (int(reach / _CROP_SCALE) for reach in np.max([corner, *turned], axis=0))
        return (patch[0] if is_in_plane(patch, self.dummy_2d) else d), h, w

    def draw(self, key: PRNGKeyArray, patch: Shape) -> tuple[Bool[Array, ""], Float[Array, "3 3"]]:
        """Whether anything happens, and the map from patch to source, as offsets from centers."""
        when_rotate, angle_key, when_scale, scale_key = jax.random.split(key, 4)
        rotates = jax.random.bernoulli(when_rotate, self.rotation_p)
        scales = jax.random.bernoulli(when_scale, self.scale_p)
        largest = math.radians(self.largest_deg(patch))
        angles = jax.random.uniform(angle_key, (3,), minval=-largest, maxval=largest)
        low, high = self.scale
        scale = jax.random.uniform(scale_key, (), minval=low, maxval=high)
        factors = jnp.full(3, jnp.where(scales, scale, 1.0))
        if is_in_plane(patch, self.dummy_2d):
            angles, factors = angles.at[1:].set(0.0), factors.at[0].set(1.0)
        return rotates | scales, affine_matrix(jnp.where(rotates, angles, 0.0), factors)

    def __call__(
        self,
        key: PRNGKeyArray,
        image: Float[Array, "D0 H0 W0 C"],
        label: Int[Array, "D0 H0 W0"],
        patch: Shape | None = None,
    ) -> tuple[Float[Array, "D H W C"], Int[Array, "D H W"]]:
        """A patch of size `patch` (None: the size of what comes in) and its label."""
        d, h, w, _ = image.shape
        size = patch or (d, h, w)

        def crop(image: Array, label: Array) -> tuple[Array, Array]:
            return center_crop(image, size), center_crop(label, size)

        if self.rotation_p == self.scale_p == 0:
            return crop(image, label)
        fires, matrix = self.draw(key, size)
        in_plane = is_in_plane(size, self.dummy_2d)

        def move(image: Array, label: Array) -> tuple[Array, Array]:
            return resample(image, label, matrix, size, in_plane=in_plane, fill=self.fill)

        return lax.cond(fires, move, crop, image, label)


@dataclass(frozen=True)
class Mirror:
    """Flips each of `axes` (0 is D) with probability `p`."""

    keeps_slices = True  # of the class, and so without a type: no field of a config

    p: float = 0.5
    axes: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        check(self, ("p",))
        if not set(self.axes) <= {0, 1, 2}:
            raise UserError(f"Mirror: axes must be among 0, 1, 2 (D, H, W); got {self.axes}")

    def __call__(
        self, key: PRNGKeyArray, image: Float[Array, "D H W C"], label: Int[Array, "D H W"]
    ) -> tuple[Float[Array, "D H W C"], Int[Array, "D H W"]]:
        """Both arrays flipped together."""
        if self.p == 0:
            return image, label
        flips = jax.random.bernoulli(key, self.p, (3,))
        for axis in self.axes:
            image, label = lax.cond(flips[axis], partial(_flip, axis=axis), _keep, image, label)
        return image, label


def _flip(image: Array, label: Array, axis: int) -> tuple[Array, Array]:
    return jnp.flip(image, axis), jnp.flip(label, axis)


def _keep(image: Array, label: Array) -> tuple[Array, Array]:
    return image, label


def affine_matrix(angles: Float[Array, " 3"], factors: Float[Array, " 3"]) -> Float[Array, "3 3"]:
    """Scales, then rotates about D, H and W (radians): Rz Ry Rx S, acting on (d, h, w) columns."""
    about_d, about_h, about_w = _rotations(jnp, angles)
    # Full precision: matrix units keep 8 to 11 bits, up to a third of a voxel at the rim.
    turned = jnp.matmul(
        about_w, jnp.matmul(about_h, about_d, precision="highest"), precision="highest"
    )
    return turned * factors


def resample(
    image: Float[Array, "D0 H0 W0 C"],
    label: Int[Array, "D0 H0 W0"],
    matrix: Float[Array, "3 3"],
    patch: Shape,
    *,
    in_plane: bool,
    fill: float | tuple[float, ...] = 0.0,
) -> tuple[Float[Array, "D H W C"], Int[Array, "D H W"]]:
    """Samples both arrays at source center + matrix (voxel - patch center).

    In-plane only the H, W block of `matrix` is used, and D is cropped about its middle.
    """
    if not in_plane:
        taps = _taps(matrix, patch, label.shape)
        values = _ring(image, 3, fill)
        moved = _interpolate(values.reshape(-1, image.shape[3]), taps)
        classes = _vote(_ring(label, 3, -1).reshape(-1, 1), taps)
        return moved.reshape(*patch, -1), classes.reshape(patch)
    middle = (patch[0], label.shape[1], label.shape[2])
    image, label = center_crop(image, middle), center_crop(label, middle)
    taps = _taps(matrix[1:, 1:], patch[1:], label.shape[1:])
    # D goes last: one index then fetches a whole column of slices, which is what makes this fast.
    values = _ring(jnp.moveaxis(image, 0, 2), 2, fill)  # [H0+2 W0+2 D C]
    moved = _interpolate(values.reshape(-1, patch[0] * image.shape[3]), taps)
    classes = _vote(_ring(jnp.moveaxis(label, 0, 2), 2, -1).reshape(-1, patch[0]), taps)
    moved = moved.reshape(*patch[1:], patch[0], -1)
    return jnp.moveaxis(moved, 2, 0), jnp.moveaxis(classes.reshape(*patch[1:], -1), 2, 0)


def _rotations(numpy, angles) -> list:
    """Matrices about D, H and W, made by `numpy` or `jax.numpy`; signs as upstream's."""
    cos, sin = numpy.cos(angles), numpy.sin(angles)
    one, zero = numpy.ones_like(cos[0]), numpy.zeros_like(cos[0])
    rows = (
        (one, zero, zero, zero, cos[0], -sin[0], zero, sin[0], cos[0]),
        (cos[1], zero, sin[1], zero, one, zero, -sin[1], zero, cos[1]),
        (cos[2], -sin[2], zero, sin[2], cos[2], zero, zero, zero, one),
    )
    return [numpy.stack(row).reshape(3, 3) for row in rows]


def _ring(array: Array, axes: int, value: ArrayLike | tuple[float, ...]) -> Array:
    """Puts one layer of `value` (per last axis) around the first axes: all that lies outside."""
    around = tuple(n + 2 for n in array.shape[:axes]) + array.shape[axes:]
    outside = jnp.broadcast_to(jnp.asarray(value, array.dtype), around)
    return lax.dynamic_update_slice(outside, array, (1,) * axes + (0,) * (array.ndim - axes))


def _taps(matrix: Array, size: tuple[int, ...], source: tuple[int, ...]) -> list[Tap]:
    """The 4 or 8 voxels around each sample point: linear weight, and row of the ringed source."""
    offsets = [jnp.arange(n) - (n - 1) / 2 for n in size]
    grid = jnp.meshgrid(*offsets, indexing="ij")
    corners: list[list[Tap]] = []
    for axis, n in enumerate(source):
        place = sum(matrix[axis, k] * grid[k] for k in range(len(size))) + (n - 1) / 2
        low = jnp.floor(place)
        share = place - low
        # Clipped into the ring, where a voxel far outside has the same value as one just outside.
        index = [jnp.clip(low + step, -1, n).astype(jnp.int32) + 1 for step in (0, 1)]
        corners.append([(1 - share, index[0]), (share, index[1])])
    taps = []
    for choice in itertools.product(*corners):
        weight, row = jnp.ones(()), jnp.zeros((), jnp.int32)
        for (share, index), n in zip(choice, source, strict=True):
            weight, row = weight * share, row * (n + 2) + index
        taps.append((weight.reshape(-1, 1), row.reshape(-1)))
    return taps


def _rows(table: Array, rows: Array) -> Array:
    return table.at[rows].get(mode="promise_in_bounds")


def _interpolate(table: Array, taps: list[Tap]) -> Array:
    return sum((weight * _rows(table, rows) for weight, rows in taps), start=jnp.zeros(()))


def _vote(table: Array, taps: list[Tap]) -> Array:
    """Class with the most weight among the taps: the arg-max of an interpolated one-hot."""
    seen = [(weight, _rows(table, rows)) for weight, rows in taps]
    best, winner = jnp.full((), -1.0), seen[0][1]
    for own, candidate in seen:
        votes = sum((weight * (other == candidate) for weight, other in seen), start=_TIE * own)
        winner = jnp.where(votes > best, candidate, winner)
        best = jnp.maximum(votes, best)
    return winner
