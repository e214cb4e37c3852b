"""The draw of cases and of the places of patches, as pure functions of a random generator.

Source: nnU-Net 2.8.1, `nnUNetDataLoader.get_bbox` and `determine_shapes`; `two_stream` and
`uniform_corner` are SSL4MIS' (06df604, `dataloaders/brats2019.py`).
"""

from collections.abc import Sequence

import numpy as np

from bhsd_jax.volume import Shape

# Sets the generators of orders apart from those of elements; a 0 at the end of a seed changes
# nothing in NumPy.
_ORDER = 1


def is_forced(rng: np.random.Generator, row: int, batch: int, share: float) -> bool:
    """Whether this row of a batch must show foreground.

    The last rows are: with a share of 0.33 one of 2 (half, not a third), 1 of 3, 3 of 9. Where that
    is none of them, as with a share of 0.33 of a batch of 1, each is by chance, so that over many
    batches the share is kept; nothing is drawn otherwise.
    """
    free = round(batch * (1 - share))
    return bool(rng.random() < share) if free >= batch and share > 0 else row >= free


def in_turn(index: int, count: int, seed: tuple[int, ...]) -> int:
    """Which of `count` cases is element `index` where each comes once before any comes again.

    Every pass over the cases has an order of its own, a function of the seed and its number.
    """
    turn, place = divmod(index, count)
    return int(np.random.default_rng((*seed, turn, _ORDER)).permutation(count)[place])


def two_stream(index: int, batch: int, count: int, epoch: int, seed: tuple[int, ...]) -> int:
    """Which of `count` cases is element `index` of a stream, as `TwoStreamBatchSampler` has it.

    Every `epoch` batches the orders begin anew. Within an epoch the cases come in passes, each with
    an order of its own; labeled cases have only one pass, whose last incomplete batch is left out.

    Args:
        index: Of the element, from the start of the training.
        batch: Elements of this stream in a batch.
        count: Cases of this stream.
        epoch: Batches in an epoch: labeled cases // labeled patches of a batch.
        seed: Every order is a function of it, of the epoch and of the pass.
    """
    number, place = divmod(index, epoch * batch)
    turn, place = divmod(place, count)
    return int(np.random.default_rng((*seed, number, turn, _ORDER)).permutation(count)[place])


def uniform_corner(rng: np.random.Generator, shape: Shape, cut: Shape, patch: Shape) -> Shape:
    """First voxel of a cut in whose middle the patch lies, all places of the patch alike.

    If a side of the scan is not longer than the patch's, every side is padded alike at both ends,
    by three voxels more than it lacks, or less where it is longer. The very last place is left out.

    Args:
        rng: Every draw comes from it, in the order H, W, D.
        shape: Of the scan.
        cut: What is cut out.
        patch: What remains of it after augmentation.
    """
    short = any(s <= p for s, p in zip(shape, patch, strict=True))
    first = [0, 0, 0]
    for axis in (1, 2, 0):
        s, p = shape[axis], patch[axis]
        pad = max((p - s) // 2 + 3, 0) if short else 0
        begin = int(rng.integers(s + 2 * pad - p)) - pad
        first[axis] = begin - (cut[axis] // 2 - p // 2)
    d, h, w = first
    return d, h, w


def corner(
    rng: np.random.Generator,
    shape: Shape,
    cut: Shape,
    patch: Shape,
    foreground: Sequence[np.ndarray] | None = None,
) -> Shape:
    """First voxel of a cut, inside or outside the scan.

    `cut` is larger than the final `patch` by what rotation needs; the corner may lie so far outside
    that the patch just touches the scan. A volume thinner than the cut is centered.

    Args:
        rng: Every draw comes from it.
        shape: Of the scan.
        cut: What is cut out.
        patch: What remains after augmentation.
        foreground: Voxel positions per class, [n 3] each; given, the cut is centered on one of
            them: class uniform among those present, then voxel uniform. The lower corner is
            clamped, the upper is not: the voxel lies in the middle of the patch or, near the low
            faces of the scan, before it, but never outside. With no position at all the cut is
            random.
    """
    need = [max(c - p, c - s) for s, c, p in zip(shape, cut, patch, strict=True)]
    low = [-n // 2 for n in need]
    high = [s + n // 2 + n % 2 - c for s, c, n in zip(shape, cut, need, strict=True)]
    present = [positions for positions in foreground or () if len(positions)]
    if not present:
        d, h, w = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        return d, h, w
    positions = present[rng.integers(len(present))]
    center = positions[rng.integers(len(positions))]
    d, h, w = (max(int(v) - c // 2, a) for v, c, a in zip(center, cut, low, strict=True))
    return d, h, w


def paste(
    patch: np.ndarray,
    start: Shape,
    corner: Shape,
    cut: Shape,
    fill: float | tuple[float, ...],
) -> np.ndarray:
    """An array of size `cut` at `corner`, holding `patch`, which begins at `start`; else `fill`.

    Further axes of `patch`, such as that of channels, stay as they are; `fill` may have a value per
    channel.
    """
    if patch.shape[:3] == cut:
        return patch
    whole = np.full((*cut, *patch.shape[3:]), fill, patch.dtype)
    place = tuple(
        slice(s - c, s - c + n) for s, c, n in zip(start, corner, patch.shape[:3], strict=True)
    )
    whole[place] = patch
    return whole


def inside(corner: Shape, cut: Shape, shape: Shape) -> tuple[Shape, Shape]:
    """Start and stop, within the scan, of a cut that may reach outside; empty where it misses."""
    d0, h0, w0 = (min(max(c, 0), s) for c, s in zip(corner, shape, strict=True))
    d1, h1, w1 = (
        max(min(c + n, s), a) for c, n, s, a in zip(corner, cut, shape, (d0, h0, w0), strict=True)
    )
    return (d0, h0, w0), (d1, h1, w1)
