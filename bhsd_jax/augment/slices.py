"""Slice labels through the spatial augmentation: where every slice of a patch came from.

The head's voxels are marked with the number of their slice, the marks are moved as a mask is, and
each slice of the result is looked up by the marks in it. So mirrored slices carry their labels
along, slices mixed by a rotation out of the plane lack a class only if all of them did, and a slice
of which the patch shows only a part says nothing of what is present: absence is inherited by a
part, presence is not.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# A chord c cuts about c^3 / 12 R off a disk of radius R. Of a round head of area A = pi R^2 that is
# 2.5 % where c^3 is 0.17 A^1.5; at most so much may lie beyond the rim of what is read and again
# beyond the rim of the patch, which leaves 95 %.
_CUT = 0.025 * 12 / np.sqrt(np.pi)
_FAR = 2**14  # above every slice number


def mark(head: Bool[Array, "U D H W"]) -> tuple[Int[Array, "U D H W"], Bool[Array, "U D"]]:
    """Slice number + 1 of the head's voxels, 0 elsewhere; and which slices show all their head."""
    number = jnp.arange(1, head.shape[1] + 1, dtype=jnp.int16)
    return jnp.where(head, number[None, :, None, None], 0).astype(jnp.int16), _is_whole(head)


def follow(
    marks: Int[Array, "U D H W"],
    whole: Bool[Array, "U D0"],
    rows: Int[Array, "U D0 K"],
    *,
    reach: int,
) -> Int[Array, "U D K"]:
    """Labels of the moved slices from those of the slices that were read.

    `reach` is how far from its marked slice a voxel may have taken its value: 0 where the
    augmentation keeps slices apart, else 1.
    """
    head = marks > 0
    first = jnp.where(head, marks, _FAR).min((2, 3))
    last = marks.max((2, 3))
    number = jnp.arange(1, rows.shape[1] + 1)
    near = (number >= first[..., None] - reach) & (number <= last[..., None] + reach)
    # Sums, not gathers: [U D D0] is tiny, and a batch spread over devices stays where it is.
    may_show = (near[..., None] & (rows != 0)[:, None]).any(2)
    same = (number == first[..., None]) & (first == last)[..., None]
    shows = (same[..., None] & ((rows == 1) & whole[..., None])[:, None]).any(2)
    shows &= _is_whole(head)[..., None]
    # A slice with no head in it is air.
    empty = (last == 0)[..., None]
    return jnp.where(shows, 1, jnp.where(may_show & ~empty, -1, 0)).astype(jnp.int8)


def _is_whole(head: Bool[Array, "U D H W"]) -> Bool[Array, "U D"]:
    """Whether at most 2.5 % of a round head can lie beyond the rim of the slice."""
    rows, columns = head.sum(3), head.sum(2)
    rim = jnp.stack([rows[..., 0], rows[..., -1], columns[..., 0], columns[..., -1]], -1)
    area = head.sum((2, 3)).astype(jnp.float32)
    return (rim.astype(jnp.float32) ** 3).sum(-1) <= _CUT * area**1.5
