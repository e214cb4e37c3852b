"""Whole volumes through networks that were trained on patches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from bhsd_jax.infer import tiles
from bhsd_jax.types import Logits, Params
from bhsd_jax.volume import Shape

Progress = Callable[[int, int], None]  # (tiles done, tiles in all), mirrored ones counted too

_MOST_TILES = 16  # per device and call; more do not make a large tile faster
_BYTES_PER_VOXEL = 2048  # of working memory; see `tiles_that_fit`


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """Applies networks tile by tile; the logits of overlapping tiles are averaged by weight.

    The network sees tiles of one size, `tiles_per_call` at a time, mirrored versions being tiles
    like others; so it is compiled once, whatever the volumes' sizes. What cuts tiles out of a
    volume and adds them up is compiled per bucket of sizes, in a fraction of a second. Sums are
    float32 and stay on the device.

    Raises:
        ValueError: If the step is not in (0, 1] or the law is not known.

    Source: nnU-Net v2 2.8.1, `nnUNetPredictor` (whose sums are float16).
    """

    forward: Callable[[Params, Array], Logits]  # [B D H W C]; the first of its logits is used
    tile: Shape
    step: float = 0.5  # distance of neighboring tiles, as a share of the tile
    mirror: bool = True  # average over all 8 mirrored versions
    tiles_per_call: int | None = None  # None: as many as fit, 1 on CPU
    law: str = "nnunet"  # of tile positions and weights, a key of `tiles.LAWS`
    mesh: Mesh | None = None  # spreads the tiles of a call over all its devices

    def __post_init__(self) -> None:
        if self.law not in tiles.LAWS:
            raise ValueError(f"sliding window: no law {self.law!r}; choose from {', '.join(tiles.LAWS)}")
        if self.tiles_per_call is not None and self.tiles_per_call < 1:
            raise ValueError(f"infer.tiles must be at least 1; got {self.tiles_per_call}")
        tiles.LAWS[self.law].starts(self.tile, self.tile, self.step)

    def count(self, size: Sequence[int]) -> int:
        """Tiles one network sees for a volume of this size, mirrored versions counted too."""
        padded = [max(n, k) for n, k in zip(size, self.tile, strict=True)]
        found = tiles.LAWS[self.law].starts(padded, self.tile, self.step)
        return math.prod(map(len, found)) * len(self._flips)

    def logits(
        self,
        networks: Sequence[Params],
        image: Float[np.ndarray, "D H W C"],
        *,
        fill: float = 0.0,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "K D H W"]:
        """Float32 logits of every voxel, classes first.

        Several networks: the logarithm of the mean of their softmax. It is the same rule for twins,
        folds and different backbones, and its softmax is the mean.

        Args:
            fill: Image value outside the volume, where it is smaller than the tile.

        Raises:
            ValueError: If the network gives infinite numbers or NaN.
        """
        found, box = self._on_canvas(networks, image, fill, progress)
        return np.asarray(found)[(slice(None), *box)]

    def labels(
        self,
        networks: Sequence[Params],
        image: Float[np.ndarray, "D H W C"],
        *,
        fill: float = 0.0,
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "D H W"]:
        """The most likely class of every voxel; takes what `logits` takes."""
        found, box = self._on_canvas(networks, image, fill, progress)
        return np.asarray(_most_likely(found))[box]

    def _on_canvas(
        self,
        networks: Sequence[Params],
        image: np.ndarray,
        fill: float,
        progress: Progress | None,
    ) -> tuple[Array, tuple[slice, ...]]:
        size = image.shape[:3]
        pads = tiles.padding(size, self.tile)
        padded = tuple(n + before + after for n, (before, after) in zip(size, pads, strict=True))
        canvas = np.full((*tiles.bucket(padded, self.tile), image.shape[3]), fill, np.float32)
        box = tuple(slice(before, before + n) for n, (before, _) in zip(size, pads, strict=True))
        canvas[box] = image
        on_device = self._replicate(canvas)
        total = self.count(size) * len(networks)
        mean = None
        for index, params in enumerate(networks):
            done = index * self.count(size)
            found = self._one(self._replicate(params), on_device, padded, progress, done, total)
            if len(networks) > 1:
                found = _probability(found)
                mean = found if mean is None else _add(mean, found)
            else:
                return found, box
        return _log_mean(mean, len(networks)), box

    def _one(
        self,
        params: Params,
        canvas: Array,
        padded: tuple[int, ...],
        progress: Progress | None,
        done: int,
        total: int,
    ) -> Array:
        sums, previous = None, None
        for starts, flips, count in self._calls(padded):
            votes = self._apply(params, _cut(canvas, starts, self.tile), flips)
            if sums is None:
                sums = self._zeros(votes.shape[1], canvas.shape[:3])
            sums = self._collect(sums, votes, starts, count)
            # One call ahead and no more: the queue would hold the logits of every tile in it.
            jax.block_until_ready(previous)
            previous = votes
            done += count
            if progress is not None:
                progress(done, total)
        found, broken = _divide(*sums)
        if int(broken):
            raise ValueError(
                f"sliding window: the network's output is infinite or NaN in {int(broken)} places; "
                "choose another checkpoint, or set config.precision to float32"
            )
        return found

