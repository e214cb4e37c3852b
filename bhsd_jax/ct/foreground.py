"""Where training patches may be centered."""

import math

import numpy as np

SEED = 1234  # nnU-Net's, for intensity samples and foreground lists alike


def foreground_positions(label: np.ndarray | None, num_classes: int) -> tuple[np.ndarray, ...]:
    """Where patches may be centered: per foreground class, int32 [n 3] voxel positions.

    Of n voxels, the larger of min(10 000, n) and 1 % of n (rounded up) are drawn without
    replacement, and kept in reading order. A class that is absent has an empty list.
    """
    empty = np.zeros((0, 3), np.int32)
    if label is None:
        return (empty,) * (num_classes - 1)
    positions = []
    for index in range(1, num_classes):
        flat = np.flatnonzero(label == index)
        keep = max(min(10_000, flat.size), math.ceil(0.01 * flat.size))
        chosen = np.random.default_rng(SEED).choice(flat, keep, replace=False)
        where = np.unravel_index(np.sort(chosen), label.shape)
        positions.append(np.stack(where, axis=1).astype(np.int32))
    return tuple(positions)
