"""One scan stored in many ways."""

import numpy as np

from bhsd_jax.volume import Volume


def stored(voxels, affine, order, flips, case="head"):
    """The same voxels at the same places, with axes in another order and some of them reversed."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        matrix[old, new] = -1 if flip else 1
        matrix[old, 3] = voxels.shape[old] - 1 if flip else 0
    moved = np.flip(voxels.transpose(order), tuple(np.flatnonzero(flips)))
    return Volume(np.ascontiguousarray(moved), affine @ matrix, case)
