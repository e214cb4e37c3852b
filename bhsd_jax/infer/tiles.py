"""Where tiles lie on a volume, and how much each of their voxels counts. NumPy only.

Three laws are in use: nnU-Net's spreads tiles evenly and centers the weights on voxel size // 2;
MONAI's keeps a fixed interval, pushes the last tile back inside, and centers on (size - 1) / 2;
BLAST-CT's lays them side by side from the first voxel on, over the end of the volume, and all
voxels count alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike
from scipy import ndimage

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Shape

Starts = tuple[tuple[int, ...], ...]  # per axis, ascending


def starts(size: Sequence[int], tile: Sequence[int], step: float) -> Starts:
    """First voxel of every tile along each axis, evenly spread, by nnU-Net's law.

    Neighbors are at most `step` of a tile apart; fractions are rounded half to even. An axis no
    longer than its tile has the one start 0: the caller pads.

    Raises:
        ValueError: If the step is not in (0, 1].

    Source: nnU-Net v2 2.8.1, `compute_steps_for_sliding_window`.
    """
    _require_step(step)
    return tuple(_even(n, k, step) for n, k in zip(size, tile, strict=True))


def gaussian(
    tile: Sequence[int],
    sigma_scale: float = 1 / 8,
    value_max: float = 10.0,
    dtype: DTypeLike = np.float32,
) -> np.ndarray:
    """Weights [D H W] of a tile's voxels: a bell around voxel size // 2, `value_max` at its top.

    The bell is cut at four sigma. Weights that are 0 in `dtype` become the smallest that is not,
    so that a corner only one tile covers still has a prediction.

    Source: nnU-Net v2 2.8.1, `compute_gaussian` (whose predictor asks for float16).
    """
    weights = np.ones((), np.float64)
    for size in tile:
        impulse = np.zeros(size)
        impulse[size // 2] = 1
        profile = ndimage.gaussian_filter1d(impulse, size * sigma_scale, mode="constant")
        weights = weights[..., None] * profile
    weights = (weights * (value_max / weights.max())).astype(dtype)
    return np.where(weights == 0, weights[weights > 0].min(), weights)


def monai_interval(size: Sequence[int], tile: Sequence[int], overlap: float) -> tuple[int, ...]:
    """Distance of neighboring tiles along each axis, by MONAI's law; `overlap` is 1 - step.

    Source: MONAI 1.6.1, `inferers.utils._get_scan_interval`.
    """
    return tuple(
        k if k == n else max(int(k * (1 - overlap)), 1) for n, k in zip(size, tile, strict=True)
    )


def monai_starts(size: Sequence[int], tile: Sequence[int], step: float) -> Starts:
    """First voxel of every tile along each axis, by MONAI's law; its overlap is 1 - `step`.

    Raises:
        ValueError: If the step is not in (0, 1].

    Source: MONAI 1.6.1, `data.utils.dense_patch_slices`.
    """
    _require_step(step)
    intervals = monai_interval(size, tile, 1 - step)
    return tuple(_regular(n, k, i) for n, k, i in zip(size, tile, intervals, strict=True))


def monai_gaussian(tile: Sequence[int], sigma_scale: float = 1 / 8) -> np.ndarray:
    """Weights float32 [D H W]: a bell around (size - 1) / 2 of height 1, never below 0.001.

    Source: MONAI 1.6.1, `compute_importance_map` in mode "gaussian".
    """
    weights = np.ones((), np.float64)
    for size in tile:
        place = np.arange(size) - (size - 1) / 2
        weights = weights[..., None] * np.exp(-0.5 * (place / (sigma_scale * size)) ** 2)
    return np.maximum(weights, max(weights.min(), 1e-3)).astype(np.float32)


def adjacent_starts(size: Sequence[int], tile: Sequence[int], step: float) -> Starts:
    """First voxel of every tile along each axis, by BLAST-CT's law; `step` means nothing to it.

    Source: biomedia-mira/blast-ct ccfa6ef, `FullImageToOverlappingPatchesNiftiDataset` (which has
    a tile more where a volume ends with one).
    """
    _require_step(step)
    return tuple(tuple(range(0, n, k)) for n, k in zip(size, tile, strict=True))


def equal(tile: Sequence[int]) -> np.ndarray:
    """Weights float32 [D H W] of 1."""
    return np.ones(tuple(tile), np.float32)


Pads = tuple[tuple[int, int], ...]  # voxels to add before and after each axis


def padding(size: Sequence[int], tile: Sequence[int]) -> Pads:
    """What each axis lacks to reach the tile; the odd one goes after."""
    missing = [max(k - n, 0) for n, k in zip(size, tile, strict=True)]
    return tuple((n // 2, n - n // 2) for n in missing)


def padding_after(size: Sequence[int], tile: Sequence[int]) -> Pads:
    """What each axis lacks to a whole number of tiles, all after it."""
    return tuple((0, -n % k) for n, k in zip(size, tile, strict=True))


def shortened(size: Sequence[int], tile: Sequence[int], unit: Sequence[int]) -> Shape:
    """The smallest tile, a multiple of `unit`, of which no more are needed than of `tile`.

    For tiles side by side that bring all their context along: what they give does not depend on
    their size, and what lies beyond the volume is computed for nothing.
    """
    counts = (math.ceil(n / k) for n, k in zip(size, tile, strict=True))
    d, h, w = (
        min(math.ceil(n / count / u) * u, k)
        for n, k, u, count in zip(size, tile, unit, counts, strict=True)
    )
    return d, h, w


@dataclass(frozen=True)
class Law:
    """One way to lay tiles and to weigh them."""

    starts: Callable[[Sequence[int], Sequence[int], float], Starts]
    weights: Callable[[Sequence[int]], np.ndarray]  # float32 [D H W]
    padding: Callable[[Sequence[int], Sequence[int]], Pads] = padding
    edge: bool = False  # outside, the outermost voxels go on; else there is the fill value


LAWS = {
    "nnunet": Law(starts, gaussian),
    "monai": Law(monai_starts, monai_gaussian),
    "adjacent": Law(adjacent_starts, equal, padding_after, edge=True),
}


def bucket(size: Sequence[int], tile: Sequence[int]) -> Shape:
    """The size rounded up to a multiple of a quarter tile, at least the tile.

    Arrays of few different sizes mean few compilations; the price is some unused memory.
    """
    d, h, w = (
        k + math.ceil(max(n - k, 0) / unit) * unit
        for n, k, unit in ((n, k, max(k // 4, 1)) for n, k in zip(size, tile, strict=True))
    )
    return d, h, w


def _even(size: int, tile: int, step: float) -> tuple[int, ...]:
    if tile == 1:  # slice by slice: none needs a second answer
        return tuple(range(size))
    slack = max(size - tile, 0)
    count = math.ceil(slack / (tile * step)) + 1
    gap = slack / max(count - 1, 1)
    return tuple(round(gap * i) for i in range(count))


def _regular(size: int, tile: int, interval: int) -> tuple[int, ...]:
    last = max(size - tile, 0)
    return tuple(min(i * interval, last) for i in range(math.ceil(last / interval) + 1))


def _require_step(step: float) -> None:
    if not 0 < step <= 1:
        raise UserError(f"infer.step is a share of the tile and lies in (0, 1]; got {step}")
