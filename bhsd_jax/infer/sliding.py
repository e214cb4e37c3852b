"""Whole volumes through networks that were trained on patches."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from bhsd_jax.infer import tiles
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits, Params
from bhsd_jax.volume import Shape

Progress = Callable[[int, int], None]  # (tiles done, tiles in all), mirrored ones counted too
Box = tuple[slice, slice, slice]

_MOST_TILES = 16  # per device and call: more do not make large tiles faster
_BYTES_PER_VOXEL = 4096  # of working memory; see `tiles_that_fit`


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """Applies networks tile by tile; logits of overlapping tiles are averaged by weight.

    The network sees `tiles_per_call` tiles of one size at a time, a mirrored version being a tile
    like another; so it is compiled once, whatever the sizes of the volumes. What cuts tiles from a
    volume and adds them up is compiled once per bucket of sizes (`tiles.bucket`), which takes a
    fraction of a second. Sums are float32 and stay on the device.

    Raises:
        ValueError: If step, law or number of tiles is not possible.

    Source: nnU-Net v2 2.8.1, `nnUNetPredictor` (whose sums are float16).
    """

    forward: Callable[[Params, Array], Logits]  # (params, [B D H W C]); its first logits are used
    tile: Shape
    step: float = 0.5  # distance of neighboring tiles, as a share of the tile
    mirror: bool = True  # average over all versions mirrored along `mirror_axes`
    mirror_axes: tuple[int, ...] = (0, 1, 2)  # D, H, W
    tiles_per_call: int | None = None  # None: as many as fit
    law: str = "nnunet"  # of tile positions and weights: a key of `tiles.LAWS`
    mesh: Mesh | None = None  # the tiles of a call are spread over all its devices
    regions: bool = False  # outputs are regions, each with a probability of its own (sigmoid)

    def __post_init__(self) -> None:
        if self.law not in tiles.LAWS:
            laws = ", ".join(tiles.LAWS)
            raise ValueError(f"sliding window: no law {self.law!r}; choose from {laws}")
        if self.tiles_per_call is not None and self.tiles_per_call < 1:
            raise UserError(f"infer.tiles must be at least 1; got {self.tiles_per_call}")
        tiles.LAWS[self.law].starts(self.tile, self.tile, self.step)

    def count(self, size: Sequence[int]) -> int:
        """Tiles one network sees for a volume of size D H W, mirrored versions counted too."""
        return len(self._places(size))

    def logits(
        self,
        networks: Sequence[Params],
        image: Float[np.ndarray, "D H W C"],
        *,
        fill: float | Sequence[float] = 0.0,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, "K D H W"]:
        """Logits of every voxel, classes first, as resampling to the scan wants them.

        For several networks (twins, folds, different backbones alike) the logarithm of the mean of
        their softmax: its softmax is that mean. Of regions likewise, by sigmoid.

        Args:
            networks: Parameters, one entry per network.
            image: What `forward` takes, float32.
            fill: Image value outside a volume that is smaller than the tile; or one per channel.
            progress: Called after every call of the network.

        Raises:
            ValueError: If there is no network, or one gives NaN or infinite logits.
        """
        logits, box = self._on_device(networks, image, fill, progress)
        return np.asarray(logits)[(slice(None), *box)]

    def labels(
        self,
        networks: Sequence[Params],
        image: Float[np.ndarray, "D H W C"],
        *,
        fill: float | Sequence[float] = 0.0,
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "D H W"]:
        """The most likely class of every voxel; arguments and errors are those of `logits`."""
        logits, box = self._on_device(networks, image, fill, progress)
        return np.asarray(_most_likely(logits))[box]

    def _on_device(
        self,
        networks: Sequence[Params],
        image: np.ndarray,
        fill: float | Sequence[float],
        progress: Progress | None,
    ) -> tuple[Array, Box]:
        if not networks:
            raise ValueError("sliding window: no network to apply")
        pads = tiles.padding(image.shape[:3], self.tile)
        size = tuple(n + sum(pad) for n, pad in zip(image.shape[:3], pads, strict=True))
        d, h, w = (slice(pad[0], pad[0] + n) for n, pad in zip(image.shape[:3], pads, strict=True))
        canvas = np.full((*tiles.bucket(size, self.tile), image.shape[3]), fill, np.float32)
        canvas[d, h, w] = image
        on_device = self._replicate(canvas)
        whole, mean = self.count(size) * len(networks), None
        for index, params in enumerate(networks):
            report = partial(_report, progress, index * self.count(size), whole)
            logits = self._single(self._replicate(params), on_device, size, report)
            if len(networks) == 1:
                return logits, (d, h, w)
            mean = (_add_sigmoid if self.regions else _add_softmax)(mean, logits)
        average = _logit_mean if self.regions else _log_mean
        return average(mean, len(networks)), (d, h, w)

    def _single(
        self,
        params: Params,
        canvas: Array,
        size: Sequence[int],
        report: Callable[[int], None],
    ) -> Array:
        """Logits [K D H W] on the whole canvas; 0 where no tile lies."""
        sums, previous, done = None, None, 0
        for starts, flips, used in self._calls(size):
            votes = self._apply(params, _cut(canvas, starts, self.tile), flips)
            if sums is None:
                shapes = (votes.shape[1], *canvas.shape[:3]), canvas.shape[:3]
                sums = tuple(jnp.zeros(shape, device=self._everywhere) for shape in shapes)
            sums = _collect(sums, votes, self._weights, starts, used)
            # At most one call ahead: the queue would hold the logits of every tile in it.
            jax.block_until_ready(previous)
            previous, done = votes, done + used
            report(done)
        assert sums is not None, "every volume has a tile"
        logits, broken = _divide(*sums)
        if int(broken):
            raise UserError(
                f"sliding window: {int(broken)} logits are NaN or infinite; choose another "
                "checkpoint, or set config.precision to float32"
            )
        return logits

    def _places(self, size: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
        """First voxel and mirrored axes of everything the network is to see."""
        axes = tiles.LAWS[self.law].starts(size, self.tile, self.step)
        mirrored = self.mirror_axes if self.mirror else ()
        flips = itertools.product(*((False, True) if a in mirrored else (False,) for a in range(3)))
        return list(itertools.product(itertools.product(*axes), list(flips)))

    def _calls(self, size: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Starts [B 3], flips [B 3], how many of the B count; the rest repeats the first."""
        places = self._places(size)
        for first in range(0, len(places), self._batch):
            call = places[first : first + self._batch]
            full = call + call[:1] * (self._batch - len(call))
            starts, flips = zip(*full, strict=True)
            yield np.array(starts, np.int32), np.array(flips, bool), len(call)

    @cached_property
    def _batch(self) -> int:
        """Tiles per call, as many on every device of the mesh."""
        devices = self.mesh.size if self.mesh else 1
        wanted = self.tiles_per_call or devices * tiles_that_fit(self.tile)
        return math.ceil(wanted / devices) * devices

    @cached_property
    def _weights(self) -> Array:
        return self._replicate(tiles.LAWS[self.law].weights(self.tile))

    @cached_property
    def _apply(self) -> Callable[[Params, Array, np.ndarray], Array]:
        def apply(
            params: Params, image: Float[Array, "B D H W C"], flips: Bool[Array, "B 3"]
        ) -> Float[Array, "B K D H W"]:
            mirrored = self._spread(jax.vmap(partial(_flip, first=0))(image, flips))
            logits = self.forward(params, mirrored)[0]
            classes_first = jnp.moveaxis(logits.astype(jnp.float32), -1, 1)
            return self._gather(jax.vmap(partial(_flip, first=1))(classes_first, flips))

        return jax.jit(apply)

    def _spread(self, batch: Array) -> Array:
        if self.mesh is None:
            return batch
        places = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return lax.with_sharding_constraint(batch, places)

    def _gather(self, batch: Array) -> Array:
        everywhere = self._everywhere
        return lax.with_sharding_constraint(batch, everywhere) if everywhere else batch

    @property
    def _everywhere(self) -> NamedSharding | None:
        return NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None

    def _replicate(self, tree: Params) -> Params:
        """To the devices; what lies there already (sharded parameters, say) is left as it is."""
        place = self._everywhere
        return jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, place), tree
        )


def tiles_that_fit(tile: Sequence[int]) -> int:
    """Tiles to give the first device at once: 1 where it does not tell its memory, as CPUs.

    Half of its free memory, at 4 kB per voxel of a tile. nnU-Net's plain U-Net with 32 channels at
    full resolution takes 3.9 kB where XLA compiles it for CPU, temporaries of convolutions
    included; transformers take more, for which the other half is there.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return min(max(free // 2 // bytes_per_tile(tile), 1), _MOST_TILES)


def bytes_per_tile(tile: Sequence[int]) -> int:
    """Working memory that one tile may take, on any device."""
    return _BYTES_PER_VOXEL * math.prod(tile)


def _report(progress: Progress | None, before: int, whole: int, done: int) -> None:
    if progress is not None:
        progress(before + done, whole)


def _flip(value: Array, flips: Bool[Array, " 3"], first: int) -> Array:
    """Mirrors the three axes from `first` on where `flips` says so."""
    for axis in range(3):
        value = jnp.where(flips[axis], jnp.flip(value, first + axis), value)
    return value


@partial(jax.jit, static_argnames="tile")
def _cut(
    canvas: Float[Array, "D H W C"], starts: Int[Array, "B 3"], tile: Shape
) -> Float[Array, "B d h w C"]:
    # One slice after the other: a batched dynamic slice becomes a gather, slow on TPU.
    size = (*tile, canvas.shape[-1])
    return lax.map(lambda start: lax.dynamic_slice(canvas, (*start, 0), size), starts)


@partial(jax.jit, donate_argnums=0)
def _collect(
    sums: tuple[Float[Array, "K D H W"], Float[Array, "D H W"]],
    votes: Float[Array, "B K d h w"],
    weights: Float[Array, "d h w"],
    starts: Int[Array, "B 3"],
    used: Int[Array, ""],
) -> tuple[Float[Array, "K D H W"], Float[Array, "D H W"]]:
    """Adds the first `used` tiles to the weighted sum of logits and the sum of weights."""

    def add(total: Array, part: Array, start: tuple) -> Array:
        old = lax.dynamic_slice(total, start, part.shape)
        return lax.dynamic_update_slice(total, old + part, start)

    def body(i, sums):
        total, weight = sums
        return add(total, votes[i] * weights, (0, *starts[i])), add(weight, weights, (*starts[i],))

    return lax.fori_loop(0, used, body, sums)


@partial(jax.jit, donate_argnums=0)
def _divide(
    total: Float[Array, "K D H W"], weight: Float[Array, "D H W"]
) -> tuple[Float[Array, "K D H W"], Int[Array, ""]]:
    """The weighted mean, and how many of its values are not finite."""
    mean = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
    return mean, jnp.sum(~jnp.isfinite(mean))


@partial(jax.jit, donate_argnums=0)
def _add_softmax(
    total: Float[Array, "K D H W"] | None, logits: Float[Array, "K D H W"]
) -> Float[Array, "K D H W"]:
    probability = jax.nn.softmax(logits, axis=0)
    return probability if total is None else total + probability


@jax.jit
def _log_mean(total: Float[Array, "K D H W"], count: Int[Array, ""]) -> Float[Array, "K D H W"]:
    return jnp.log(jnp.maximum(total / count, jnp.finfo(jnp.float32).tiny))


@partial(jax.jit, donate_argnums=0)
def _add_sigmoid(
    total: Float[Array, "R D H W"] | None, logits: Float[Array, "R D H W"]
) -> Float[Array, "R D H W"]:
    probability = jax.nn.sigmoid(logits)
    return probability if total is None else total + probability


@jax.jit
def _logit_mean(total: Float[Array, "R D H W"], count: Int[Array, ""]) -> Float[Array, "R D H W"]:
    # No farther from 0 and 1 than float32 is exact near 1: the logits stay finite.
    least = jnp.finfo(jnp.float32).eps
    mean = jnp.clip(total / count, least, 1 - least)
    return jnp.log(mean) - jnp.log1p(-mean)


@jax.jit
def _most_likely(logits: Float[Array, "K D H W"]) -> UInt8[Array, "D H W"]:
    return jnp.argmax(logits, axis=0).astype(jnp.uint8)
