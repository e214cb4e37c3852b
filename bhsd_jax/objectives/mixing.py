"""Mixing patches: how much, by which mask, with which partner.

Partners are neighbors in the batch, which every device holds itself: reversing or rolling a
sharded batch would move patches between devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy import special

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Shape


def partners(rows: Array) -> Array:
    """The other of each pair of neighbors: 1, 0, 3, 2 ...

    Raises:
        ValueError: If there is an odd number of rows.
    """
    return pairs(rows)[:, ::-1].reshape(rows.shape)


def pairs(rows: Array) -> Array:
    """[U ...] -> [U/2 2 ...].

    Raises:
        ValueError: If there is an odd number of rows.
    """
    if len(rows) % 2:
        raise UserError(
            f"unlabeled patches are mixed in pairs, but the network is given {len(rows)} at once; "
            "make input.unlabeled a multiple of 2 x train.accumulate"
        )
    return rows.reshape(len(rows) // 2, 2, *rows.shape[1:])


def beta(key: PRNGKeyArray, concentration: float, count: int) -> Float[Array, " N"]:
    """Draws of Beta(a, a) by inversion of its distribution function, tabulated.

    `jax.random.beta` rejects in a loop, whose condition every device would have to ask all others.
    """
    table = jnp.asarray(_quantiles(concentration))
    place = jax.random.uniform(key, (count,)) * (len(table) - 1)
    low = jnp.floor(place).astype(jnp.int32)
    share = place - low
    return (1 - share) * table[low] + share * table[jnp.minimum(low + 1, len(table) - 1)]


@functools.cache
def _quantiles(concentration: float) -> Float[np.ndarray, " N"]:
    levels = np.linspace(0, 0.5, 4097)  # the lower half of 8193
    lower = special.betaincinv(concentration, concentration, levels)
    # Mirrored: the distribution is symmetric, and the upper half loses digits near 1.
    return np.concatenate([lower, 1 - lower[-2::-1]]).astype(np.float32)


def blend(share: Float[Array, " N"], ours: Array, theirs: Array) -> Array:
    """Share times ours plus the rest of theirs, row by row."""
    share = share.reshape(-1, *[1] * (ours.ndim - 1)).astype(ours.dtype)
    return share * ours + (1 - share) * theirs


def boxes(
    key: PRNGKeyArray,
    count: int,
    shape: Shape,
    covered: tuple[float, float],
    *,
    number: int = 1,
    chance: float = 1.0,
) -> Bool[Array, "N D H W"]:
    """Random boxes, True inside, a mask per patch; all False with probability 1 - `chance`.

    One box covers a uniformly drawn share f of the patch; its sides are powers of f, so that none
    can be longer than the patch: f^(1/3) slices, f^(2u/3) rows and f^(2(1-u)/3) columns with u
    uniform; of a single slice f^u rows and f^(1-u) columns. Several share the volume, and where two
    of them overlap the mask flips back.

    Source: French et al. 2020, arXiv:1906.01916, `BoxMaskGenerator`, in two dimensions.
    """

    def one(key: PRNGKeyArray) -> Array:
        share_key, when_key, *keys = jax.random.split(key, 2 + number)
        share = jax.random.uniform(share_key, minval=covered[0], maxval=covered[1]) / number
        mask = functools.reduce(jnp.logical_xor, (_box(key, shape, share) for key in keys))
        return mask & jax.random.bernoulli(when_key, chance)

    return jax.vmap(one)(jax.random.split(key, count))


def _box(key: PRNGKeyArray, shape: Shape, share: Array) -> Bool[Array, "D H W"]:
    aspect_key, place_key = jax.random.split(key)
    u = jax.random.uniform(aspect_key)
    slices = 0 if shape[0] == 1 else 1 / 3
    powers = jnp.stack([jnp.full((), slices), (1 - slices) * u, (1 - slices) * (1 - u)])
    whole = jnp.asarray(shape, jnp.float32)
    return _place(place_key, shape, jnp.round(whole * share**powers))


def cube(
    key: PRNGKeyArray, count: int, shape: Shape, side: float = 2 / 3
) -> Bool[Array, "N D H W"]:
    """A box of `side` of the patch along every axis, but of one voxel at least, anywhere in it.

    Source: Bai et al. 2023, arXiv:2305.00673, `context_mask`.
    """
    lengths = jnp.asarray([max(int(n * side), 1) for n in shape], jnp.float32)
    return jax.vmap(lambda key: _place(key, shape, lengths))(jax.random.split(key, count))


def _place(key: PRNGKeyArray, shape: Shape, lengths: Float[Array, " 3"]) -> Bool[Array, "D H W"]:
    room = jnp.asarray(shape, jnp.float32) - lengths
    starts = jnp.floor(jax.random.uniform(key, (3,)) * (room + 1))
    axes = [
        (jnp.arange(n) >= starts[i]) & (jnp.arange(n) < starts[i] + lengths[i])
        for i, n in enumerate(shape)
    ]
    return axes[0][:, None, None] & axes[1][:, None] & axes[2]


def paste(mask: Bool[Array, "N D H W"], inside: Array, outside: Array) -> Array:
    """`inside` where the mask is True, else `outside`; images or maps of one value per voxel."""
    return jnp.where(mask[..., None] if inside.ndim == 5 else mask, inside, outside)


def paste_partners(mask: Bool[Array, "N D H W"], rows: Any) -> Any:
    """Each patch with a piece of its neighbor where the mask is True; None stays None."""
    return jax.tree.map(lambda x: paste(mask, partners(x), x), rows)


def paste_slices(
    mask: Bool[Array, "N D H W"],
    inside: Int[Array, "N D K"],
    outside: Int[Array, "N D K"],
) -> Int[Array, "N D K"]:
    """Slice labels of pasted patches.

    A slice that shows both lacks a class if both do; whether it shows one is not known, for that
    may have been cut away.
    """
    some, all_of_it = mask.any((2, 3))[..., None], mask.all((2, 3))[..., None]
    both = jnp.where((inside == 0) & (outside == 0), 0, -1).astype(inside.dtype)
    return jnp.where(all_of_it, inside, jnp.where(some, both, outside))


def paste_partner_slices(
    mask: Bool[Array, "N D H W"], slice_labels: Int[Array, "N D K"]
) -> Int[Array, "N D K"]:
    """Slice labels of what `paste_partners` makes."""
    return paste_slices(mask, partners(slice_labels), slice_labels)


def pierce_slices(
    hole: Bool[Array, "N D H W"], slice_labels: Int[Array, "N D K"]
) -> Int[Array, "N D K"]:
    """Slice labels of patches in which nothing is seen where `hole` is True.

    Whether a slice still shows a class is not known, for all of it may have been in the hole.
    """
    pierced = hole.any((2, 3))[..., None]
    return jnp.where(pierced & (slice_labels == 1), -1, slice_labels)
