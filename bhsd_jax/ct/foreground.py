"""Where training patches may be centered."""

import math

import numpy as np

from bhsd_jax.labels import Labels

SEED = 1234  # nnU-Net's, for intensity samples and foreground lists alike


def foreground_positions(label: np.ndarray | None, num_classes: int) -> tuple[np.ndarray, ...]:
    """Where patches may be centered: per foreground class, int32 [n 3] voxel positions.

    Of n voxels, the larger of min(10 000, n) and 1 % of n (rounded up) are drawn without
    replacement, and kept in reading order. A class that is absent has an empty list.
    """
    empty = np.zeros((0, 3), np.int32)
    if label is None:
        return (empty,) * (num_classes - 1)
    return tuple(_positions(label == index) for index in range(1, num_classes))


def target_positions(label: np.ndarray | None, labels: Labels) -> tuple[np.ndarray, ...]:
    """The same per class or region; where not all is annotated, a last list is of what is."""
    masks = len(labels.targets) + (labels.ignore is not None)
    if label is None:
        return (np.zeros((0, 3), np.int32),) * masks
    positions = [_positions(mask) for mask in labels.masks(label)]
    if labels.ignore is not None:
        positions.append(_positions(labels.annotated(label)))
    return tuple(positions)


def _positions(mask: np.ndarray) -> np.ndarray:
    flat = np.flatnonzero(mask)
    keep = max(min(10_000, flat.size), math.ceil(0.01 * flat.size))
    chosen = np.random.default_rng(SEED).choice(flat, keep, replace=False)
    where = np.unravel_index(np.sort(chosen), mask.shape)
    return np.stack(where, axis=1).astype(np.int32)
