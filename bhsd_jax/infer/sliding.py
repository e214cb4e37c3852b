"""Whole volumes through networks that were trained on patches."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Float32, Num, UInt8

from bhsd_jax.infer import answers, slabs, tiles
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits, Params
from bhsd_jax.volume import Shape

Progress = Callable[[int, int], None]  # (tiles done, tiles in all), mirrored ones counted too
Box = tuple[slice, slice, slice]
COMBINED = ("probabilities", "logits")

_MOST_TILES = 16  # per device and call: more do not make large tiles faster
_BYTES_PER_VOXEL = 4096  # of working memory; see `tiles_that_fit`


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """Applies networks tile by tile; logits of overlapping tiles are averaged by weight.

    The network sees `tiles_per_call` tiles of one size at a time, a mirrored version being a tile
    like another; so it is compiled once, whatever the sizes of the volumes. What adds tiles up is
    compiled in a fraction of a second, once per bucket of sizes in the plane (`tiles.bucket`), of
    any depth. Sums are float32; of a long volume only as many rows are held as a tile has.

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
    margin: Shape = (0, 0, 0)  # voxels around a tile that `forward` takes and gives no logits of
    # Given if a voxel depends on the margin around it alone. Then multiples of the unit are tiles
    # too, and a volume that ends early in its last tiles gets shorter ones.
    unit: Shape | None = None
    combine: str = "probabilities"  # of several networks the mean of these, or of their "logits"
    mesh: Mesh | None = None  # the tiles of a call are spread over all its devices
    regions: tuple[int, ...] = ()  # outputs are regions (sigmoid): the value each writes in turn
    options: Mapping[str, bool] = field(default_factory=dict)  # of the compiler, for `forward`

    def __post_init__(self) -> None:
        if self.law not in tiles.LAWS:
            laws = ", ".join(tiles.LAWS)
            raise ValueError(f"sliding window: no law {self.law!r}; choose from {laws}")
        if self.tiles_per_call is not None and self.tiles_per_call < 1:
            raise UserError(f"infer.tiles must be at least 1; got {self.tiles_per_call}")
        if self.combine not in COMBINED:
            raise UserError(
                f"predict.combine: no {self.combine!r}; choose from {', '.join(COMBINED)}"
            )
        tiles.LAWS[self.law].starts(self.tile, self.tile, self.step)

    def count(self, size: Sequence[int]) -> int:
        """Tiles one network sees for a volume of size D H W, mirrored versions counted too."""
        return len(self._fitted(size)._places(size))

    def compile(self, params: Params, channels: int) -> None:
        """Compiles the network ahead of the first volume, unless its size decides on the tile."""
        if self.unit is None:
            blank = np.zeros((self._batch, *self._seen, channels), np.float32)
            batch = jax.device_put(blank, self._spread)
            flips = np.zeros((self._batch, 3), bool)
            self._apply.lower(self._replicate(params), batch, flips).compile()

    def logits(
        self,
        networks: Sequence[Params],
        image: Num[np.ndarray, "D H W C"],
        *,
        fill: float | Sequence[float] = 0.0,
        progress: Progress | None = None,
    ) -> Float32[np.ndarray, "K D H W"]:
        """Logits of every voxel, classes first, as resampling to the scan wants them.

        For several networks (twins, folds, different backbones alike) the logarithm of the mean of
        their softmax, whose softmax is that mean; or, as nnU-Net has it for folds, the mean of
        their logits. Of regions it is the same of their sigmoid.

        Args:
            networks: Parameters, one entry per network.
            image: What `forward` takes, of any type of number; it sees float32.
            fill: Image value outside a volume that is smaller than the tile; or one per channel.
            progress: Called after every call of the network.

        Raises:
            ValueError: If there is no network, or one gives NaN or infinite logits.
        """
        found, window = np.empty((0,), np.float32), self._fitted(image.shape[:3])
        for rows, logits in window._in_rows(networks, image, fill, progress, lambda value: value):
            if not found.size:
                found = np.empty((len(logits), *image.shape[:3]), np.float32)
            found[:, rows] = logits
        return found

    def labels(
        self,
        networks: Sequence[Params],
        image: Num[np.ndarray, "D H W C"],
        *,
        fill: float | Sequence[float] = 0.0,
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "D H W"]:
        """The most likely class of every voxel; arguments and errors are those of `logits`.

        Of regions those of a probability above one half, later ones over earlier ones. Logits of
        the whole volume are held nowhere.
        """
        found = np.empty(image.shape[:3], np.uint8)
        finish = (
            partial(answers.written, values=self.regions) if self.regions else answers.most_likely
        )
        window = self._fitted(image.shape[:3])
        for rows, label in window._in_rows(networks, image, fill, progress, finish):
            found[rows] = label
        return found

    def _fitted(self, size: Sequence[int]) -> "SlidingWindow":
        """The window with the tile for a volume of that size; compiled once for every such tile."""
        if self.unit is None:
            return self
        tile = tiles.shortened(size, self.tile, self.unit)
        return self._of_tile.setdefault(tile, replace(self, tile=tile))

    @cached_property
    def _of_tile(self) -> "dict[Shape, SlidingWindow]":
        return {self.tile: self}

    def _in_rows(
        self,
        networks: Sequence[Params],
        image: np.ndarray,
        fill: float | Sequence[float],
        progress: Progress | None,
        finish: Callable[[Array], Array],
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of the volume and `finish(logits)` of them, [... d H W], one slab after another."""
        if not networks:
            raise ValueError("sliding window: no network to apply")
        pads = tiles.LAWS[self.law].padding(image.shape[:3], self.tile)
        size = tuple(n + sum(pad) for n, pad in zip(image.shape[:3], pads, strict=True))
        d, h, w = (slice(pad[0], pad[0] + n) for n, pad in zip(image.shape[:3], pads, strict=True))
        count = _Count(progress, self.count(size) * len(networks))
        canvas = self._canvas(image, fill, size, pads)
        slabs = [self._slabs(self._replicate(p), canvas, size, count.add) for p in networks]
        # A slab goes to the host while the next one is computed.
        waiting = None
        for parts in zip(*slabs, strict=True):
            logits = [logits for _, logits, _ in parts]
            broken = sum(n for *_, n in parts)
            ready, waiting = waiting, (parts[0][0], finish(self._mean(logits)), broken)
            if ready:
                yield _to_host(*ready, (d, h, w))
        assert waiting, "every volume has a tile"
        yield _to_host(*waiting, (d, h, w))

    def _mean(self, logits: Sequence[Array]) -> Array:
        if self.combine == "logits":
            return answers.mean(logits)
        return answers.logit_mean(logits) if self.regions else answers.log_mean(logits)

    def _canvas(
        self,
        image: np.ndarray,
        fill: float | Sequence[float],
        size: Sequence[int],
        pads: tiles.Pads,
    ) -> np.ndarray:
        """The image with what tiles and margins reach beyond it; itself, if that is nothing."""
        whole = [n + 2 * m for n, m in zip(size, self.margin, strict=True)]
        before = [pad[0] + m for pad, m in zip(pads, self.margin, strict=True)]
        if tuple(whole) == image.shape[:3]:
            return image
        if tiles.LAWS[self.law].edge:
            counts = zip(before, whole, image.shape[:3], strict=True)
            around = [(first, total - first - n) for first, total, n in counts]
            return np.pad(image, [*around, (0, 0)], mode="edge")
        canvas = np.full((*whole, image.shape[3]), fill, np.float32)
        d, h, w = (slice(a, a + n) for a, n in zip(before, image.shape[:3], strict=True))
        canvas[d, h, w] = image
        return canvas

    def _slabs(
        self,
        params: Params,
        canvas: np.ndarray,
        size: Sequence[int],
        report: Callable[[int], None],
    ) -> Iterator[tuple[slice, Array, Array]]:
        """Rows that are complete, logits [K d H W] from there on, how many are not finite."""
        sums, top = None, 0
        for starts, used, answer in self._answers(params, canvas, size):
            votes = jax.device_put(answer, self._home)
            if sums is None:
                _, h, w = tiles.bucket(size, self.tile)
                sums = slabs.zeros(votes.shape[1], (self.tile[0], h, w), self._home)
            first = 0
            while first < used:
                begun = int(starts[first, 0])
                if begun > top:
                    yield slice(top, begun), *slabs.mean(sums, begun - top)
                    sums, top = slabs.advance(sums, begun - top), begun
                last = first + int((starts[first:used, 0] == top).sum())
                sums = slabs.add(sums, votes, self._weights, starts[:, 1:], first, last)
                first = last
            report(used)
        assert sums is not None, "every volume has a tile"
        yield slice(top, size[0]), *slabs.mean(sums, size[0] - top)

    def _answers(
        self, params: Params, canvas: np.ndarray, size: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, int, Array]]:
        """Starts of every call, how many count, and what the network makes of its tiles.

        While one answer is added up the next call is computed, but no two calls at once, which
        would take twice the memory.
        """
        ready = None
        for starts, flips, used in self._calls(size):
            batch = jax.device_put(_cut(canvas, starts, self._seen), self._spread)
            jax.block_until_ready(ready)
            before, ready = ready, (starts, used, self._apply(params, batch, flips))
            if before:
                yield before
        assert ready, "every volume has a tile"
        yield ready

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

    @property
    def _seen(self) -> Shape:
        """Voxels of a tile with its margin."""
        d, h, w = (n + 2 * m for n, m in zip(self.tile, self.margin, strict=True))
        return d, h, w

    @cached_property
    def _batch(self) -> int:
        """Tiles per call, as many on every device of the mesh."""
        devices = self.mesh.size if self.mesh else 1
        wanted = self.tiles_per_call or devices * tiles_that_fit(self._seen)
        return math.ceil(wanted / devices) * devices

    @cached_property
    def _weights(self) -> Array:
        return jax.device_put(tiles.LAWS[self.law].weights(self.tile), self._home)

    @cached_property
    def _apply(self) -> Wrapped:  # (params, image [B D H W C], flips [B 3]) -> logits
        mirrors = self.mirror and bool(self.mirror_axes)

        def turned(value: Array, flips: Bool[Array, "B 3"], first: int) -> Array:
            return jax.vmap(partial(_flip, first=first))(value, flips) if mirrors else value

        def apply(
            params: Params, image: Float[Array, "B D H W C"], flips: Bool[Array, "B 3"]
        ) -> Float[Array, "B K d h w"]:
            logits = self.forward(params, turned(image, flips, 0))[0]
            classes_first = jnp.moveaxis(logits.astype(jnp.float32), -1, 1)
            return turned(classes_first, flips, 1)

        return jax.jit(apply, out_shardings=self._spread, compiler_options=dict(self.options))

    @cached_property
    def _spread(self) -> Sharding | None:
        """The devices that the tiles of a call are spread over; None: those of the parameters."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    @cached_property
    def _home(self) -> Sharding:
        """The one device on which tiles are added up; on several the sums would be copies."""
        own = self.mesh.local_devices if self.mesh else jax.local_devices()
        return SingleDeviceSharding(own[0])

    def _replicate(self, tree: Params) -> Params:
        """Copies parameters to all devices; what lies on devices already stays as it is."""
        place = NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None
        return jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, place), tree
        )


@dataclass
class _Count:
    """Tiles that the networks have seen."""

    progress: Progress | None
    whole: int
    done: int = 0

    def add(self, tiles: int) -> None:
        self.done += tiles
        if self.progress is not None:
            self.progress(self.done, self.whole)


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


def _cut(canvas: np.ndarray, starts: np.ndarray, tile: Shape) -> Float32[np.ndarray, "B d h w C"]:
    boxes = (tuple(slice(s, s + k) for s, k in zip(one, tile, strict=True)) for one in starts)
    return np.stack([canvas[box] for box in boxes]).astype(np.float32, copy=False)


def _to_host(
    complete: slice, value: Array, broken: Array | int, box: Box
) -> tuple[slice, np.ndarray]:
    """The rows of the volume that a slab holds, and their values [... d h w].

    Raises:
        UserError: If logits are not finite.
    """
    if int(broken):
        raise UserError(
            f"sliding window: {int(broken)} logits are NaN or infinite; choose another "
            "checkpoint, or set config.precision to float32"
        )
    d, h, w = box
    begin = max(complete.start, d.start)
    end = max(begin, min(complete.stop, d.stop))
    rows = slice(begin - d.start, end - d.start)
    return rows, np.asarray(value)[..., begin - complete.start : end - complete.start, h, w]


def _flip(value: Array, flips: Bool[Array, " 3"], first: int) -> Array:
    """Mirrors the three axes from `first` on where `flips` says so."""
    for axis in range(3):
        value = jnp.where(flips[axis], jnp.flip(value, first + axis), value)
    return value
