"""Changes a first network's label map, so that the second does not learn to trust it blindly.

A map has a channel per foreground label, 1 where the label is. It has been moved with the image;
what comes here is nnU-Net's: maps that are too thick or too thin, and components that are missing.

Source: nnU-Net v2 2.8.1 (`nnUNetTrainer.get_training_transforms`), batchgeneratorsv2 0.3.6.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bhsd_jax.augment.spatial import check

Maps = Float[Array, "D H W C"]
_FAR = 1e6  # squared distance of a voxel that no ball reaches


@dataclass(frozen=True)
class BinaryOperator:
    """Dilates, erodes, closes or opens the maps of some labels, in random order, with a ball.

    What a label gains the others lose. The ball has `floor(2 r + 1)` voxels across, r being drawn
    from `radius`; one of an even number has its center half a voxel before the voxel it is for.
    What lies outside the patch is background to a dilation, and to an erosion as if it were inside.

    Source: `ApplyRandomBinaryOperatorTransform`, with the ball of scikit-image (which by rounding
    loses a few of its outermost voxels in one draw of six).
    """

    p: float = 0.4
    p_per_label: float = 0.5
    radius: tuple[float, float] = (1.0, 8.0)

    def __post_init__(self) -> None:
        check(self, ("p", "p_per_label"), ("radius",))

    def __call__(self, key: PRNGKeyArray, maps: Maps) -> Maps:
        """The maps, some of them changed."""

        def change(key: PRNGKeyArray, mask: Bool[Array, "D H W"]) -> Bool[Array, "D H W"]:
            radius_key, operator_key = jax.random.split(key)
            low, high = self.radius
            size = jnp.floor(2 * jax.random.uniform(radius_key, (), minval=low, maxval=high) + 1)
            # 0 dilates, 1 erodes, 2 closes, 3 opens: an erosion is a dilation of the background.
            operator = jax.random.randint(operator_key, (), 0, 4)
            once = _dilate_either(mask, size, operator % 2 == 1, high)
            return lax.cond(
                operator >= 2,
                lambda mask: _dilate_either(mask, size, operator == 2, high),
                lambda mask: mask,
                once,
            )

        return _some_labels(key, maps, self.p, self.p_per_label, change)


@dataclass(frozen=True)
class RemoveComponent:
    """Takes one component out of the maps of some labels: each that is not too large is as likely.

    Voxels that touch at a corner are of one component.

    Source: `RemoveRandomConnectedComponentFromOneHotEncodingTransform`.
    """

    p: float = 0.2
    p_per_label: float = 0.5
    largest: float = 0.15  # share of the patch from which on a component stays

    def __post_init__(self) -> None:
        check(self, ("p", "p_per_label", "largest"))

    def __call__(self, key: PRNGKeyArray, maps: Maps) -> Maps:
        """The maps, some of them without a component."""

        def change(key: PRNGKeyArray, mask: Bool[Array, "D H W"]) -> Bool[Array, "D H W"]:
            names = components(mask)
            sizes = jnp.zeros(mask.size + 1, jnp.int32).at[names.ravel()].add(1)
            fits = ((sizes > 0) & (sizes < self.largest * mask.size)).at[0].set(False)
            lots = jnp.where(fits, jax.random.uniform(key, fits.shape), -1.0)
            return mask & ~(fits.any() & (names == jnp.argmax(lots)))

        return _some_labels(key, maps, self.p, self.p_per_label, change)


def _some_labels(
    key: PRNGKeyArray, maps: Maps, p: float, p_per_label: float, change: Callable[..., Array]
) -> Maps:
    """With chance `p` applies `change` to each label with chance `p_per_label`, in random order."""
    when_key, order_key, chosen_key, change_key = jax.random.split(key, 4)
    labels = maps.shape[3]
    order = jax.random.permutation(order_key, labels)
    chosen = jax.random.bernoulli(chosen_key, p_per_label, (labels,))

    def one(turn: Int[Array, ""], maps: Maps) -> Maps:
        label = order[turn]

        def changed(maps: Maps) -> Maps:
            mask = lax.dynamic_index_in_dim(maps, label, 3, keepdims=False) > 0
            result = change(jax.random.fold_in(change_key, turn), mask)
            gained = (result & ~mask)[..., None]
            maps = jnp.where(gained, 0, maps)
            return lax.dynamic_update_index_in_dim(maps, result.astype(maps.dtype), label, 3)

        return lax.cond(chosen[turn], changed, lambda maps: maps, maps)

    return lax.cond(
        jax.random.bernoulli(when_key, p),
        lambda maps: lax.fori_loop(0, labels, one, maps),
        lambda maps: maps,
        maps,
    )


def _dilate_either(
    mask: Bool[Array, "D H W"], size: Array, background: Array, most: float
) -> Bool[Array, "D H W"]:
    """The mask dilated; or eroded, which is its `background` dilated."""
    return dilate(mask ^ background, size, math.floor(most)) ^ background


def dilate(mask: Bool[Array, "D H W"], size: Float[Array, ""], reach: int) -> Bool[Array, "D H W"]:
    """Every voxel that a ball about a voxel of the mask covers.

    Squared distances to the nearest voxel of the mask, one axis after another, up to `reach`; a
    ball of any size then costs the same.

    Args:
        mask: What is dilated.
        size: Voxels across the ball, a whole number up to 2 `reach`.
        reach: Voxels that are looked at to either side.
    """
    shift = jnp.where(size % 2 == 0, -0.5, 0.0)
    squared = jnp.where(mask, 0.0, _FAR)
    for axis in range(3):
        sides = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        padded = jnp.pad(squared, sides, constant_values=_FAR)
        length = mask.shape[axis]
        shifted = (
            lax.slice_in_dim(padded, reach + step, reach + step + length, axis=axis)
            + (step + shift) ** 2
            for step in range(-reach, reach + 1)
        )
        squared = functools.reduce(jnp.minimum, shifted)
    return squared <= ((size - 1) / 2) ** 2


def components(mask: Bool[Array, "D H W"]) -> Int[Array, "D H W"]:
    """A number per component, the same for all its voxels; 0 outside. Corners connect.

    Every voxel takes the highest name among its neighbors, and then the name of the voxel that is
    called so, until nothing changes: names cross a component in a few rounds.
    """
    first = jnp.where(mask, jnp.arange(1, mask.size + 1, dtype=jnp.int32).reshape(mask.shape), 0)

    def spread(names: Int[Array, "D H W"]) -> Int[Array, "D H W"]:
        for axis in range(3):
            sides = [(1, 1) if each == axis else (0, 0) for each in range(3)]
            padded, length = jnp.pad(names, sides), mask.shape[axis]
            before = lax.slice_in_dim(padded, 0, length, axis=axis)
            after = lax.slice_in_dim(padded, 2, length + 2, axis=axis)
            names = jnp.maximum(names, jnp.maximum(before, after))
        names = jnp.where(mask, names, 0)
        known = jnp.concatenate([jnp.zeros(1, jnp.int32), names.ravel()])
        return known[names]

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        names, _ = state
        found = spread(names)
        return found, jnp.any(found != names)

    return lax.while_loop(lambda state: state[1], step, (first, jnp.any(mask)))[0]
