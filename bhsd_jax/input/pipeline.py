"""Shards to batches with Grain: one labeled and one unlabeled stream, both a function of position.

Element i of a stream is drawn with the generator (seed, stream, i) and nothing else. So the state
of a stream is the number of batches taken, any count of threads and processes gives the same
patches, and a resumed run goes on exactly where it stopped.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from bhsd_jax.input import sampling
from bhsd_jax.input.slices import Slices
from bhsd_jax.input.turns import AS_IT_IS, Turn
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Batch
from bhsd_jax.volume import Shape


@runtime_checkable
class Reader(Protocol):
    """One opened case, a `shards.record.Reader` or `Decoded`."""

    @property
    def shape(self) -> Shape: ...

    @property
    def foreground(self) -> tuple[np.ndarray, ...]: ...

    @property
    def slice_labels(self) -> tuple[tuple[int, ...], ...] | None: ...

    @property
    def bleeding(self) -> bool | None: ...

    def patch(self, start: Shape, stop: Shape) -> tuple[np.ndarray, np.ndarray | None]: ...


@dataclass(frozen=True)
class Cut:
    """How patches are cut from scans."""

    patch: Shape  # what the network sees
    source: Shape  # what the spatial augmentation needs for it
    fill: float | tuple[float, ...]  # raw image value outside the scan, or one per channel
    foreground: float = 0.33  # share of labeled patches centered on a labeled voxel
    binary: bool = False  # all classes become 1
    masked: bool = False  # unlabeled patches say which of their voxels lie in the scan
    uniform: bool = False  # patches that need show no foreground: SSL4MIS' law, not nnU-Net's
    rot_flip: bool = False  # the scan is turned first, by a `Turn.draw`
    annotated: bool = False  # masks leave voxels out; the last list of positions is of the others
    label_type: str = "int8"  # of labels and -1; "int16" for values above 127


class Stream:
    """Element i: one patch, a dict of `image` [D H W C] and what is known of it.

    Its case is drawn with replacement (nnU-Net) or, `in_turn`, comes once in every pass over the
    cases, which may end amid a batch and loses no case. With `epoch`, a number of batches, the
    order is `sampling.two_stream`'s.

    A labeled patch has `label` [D H W], -1 outside the scan. An unlabeled one has, given
    `slices`, `slice_labels` int8 [D C], and if the cut is `masked` `inside` int8 [D H W], 1 or -1.
    """

    def __init__(
        self,
        open_case: Callable[[str], Reader],
        cases: Sequence[str],
        cut: Cut,
        *,
        batch: int,
        length: int,
        seed: tuple[int, int],
        labeled: bool,
        in_turn: bool = False,
        epoch: int = 0,
        slices: Slices | None = None,
    ):
        self.open_case, self.cases, self.cut = open_case, tuple(cases), cut
        self.batch, self.length, self.seed, self.labeled = batch, length, seed, labeled
        self.in_turn, self.epoch, self.slices = in_turn, epoch, slices

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((*self.seed, index))
        case = self.open_case(self.cases[self._case(rng, index)])
        turn = Turn.draw(rng) if self.cut.rot_flip else AS_IT_IS
        corner, source = self._box(rng, index, case, turn)
        start, stop = sampling.inside(corner, source, case.shape)
        raw, label = case.patch(start, stop)

        def whole(part: np.ndarray, fill: float | tuple[float, ...]) -> np.ndarray:
            return turn(sampling.paste(part, start, corner, source, fill))

        image = whole(raw, self.cut.fill)
        element = {"image": image if image.ndim == 4 else image[..., None]}
        if self.labeled:
            if label is None:
                raise UserError(f"{self.cases}: a labeled case has no mask in the shards")
            label = label.astype(self.cut.label_type)
            if self.cut.binary:
                label = (label > 0).astype(np.int8)
            element["label"] = whole(label, -1)
            return element
        if self.slices is not None:
            labels = case.slice_labels, case.bleeding
            rows = self.slices.rows(*labels, case.shape, corner, source)
            element["slice_labels"] = rows
        if self.cut.masked:
            element["inside"] = whole(np.ones(raw.shape[:3], np.int8), -1)
        return element

    def _case(self, rng: np.random.Generator, index: int) -> int:
        """The number of the case of element `index`."""
        count = len(self.cases)
        if self.epoch:
            return sampling.two_stream(index, self.batch, count, self.epoch, self.seed)
        if self.in_turn:
            return sampling.in_turn(index, count, self.seed)
        return int(rng.integers(count))

    def _box(
        self, rng: np.random.Generator, index: int, case: Reader, turn: Turn
    ) -> tuple[Shape, Shape]:
        """First voxel and size of what is cut from the scan as it lies on disk."""
        cut, shape = self.cut, turn.shape(case.shape)
        row = index % self.batch
        forced = self.labeled and sampling.is_forced(rng, row, self.batch, cut.foreground)
        centers = self._centers(case.foreground, forced)
        if cut.uniform and centers is None:
            corner = sampling.uniform_corner(rng, shape, cut.source, cut.patch)
        else:
            points = None if centers is None else turn.points(centers, shape)
            corner = sampling.corner(rng, shape, cut.source, cut.patch, points)
        return turn.corner(corner, cut.source, shape), turn.shape(cut.source)

    def _centers(
        self, positions: Sequence[np.ndarray], forced: bool
    ) -> Sequence[np.ndarray] | None:
        """Where the patch is to be centered; None: anywhere.

        Where masks leave voxels out, every labeled patch is centered on one that is annotated.

        Source: nnU-Net v2.8.1, `nnUNetDataLoader.get_bbox`.
        """
        if not (self.cut.annotated and self.labeled):
            return positions if forced else None
        classes = positions[:-1] if forced else ()
        return classes if any(map(len, classes)) else positions[-1:]


class Batches:
    """Endless-looking iterator of some rows of every batch; `position` counts the batches.

    Args:
        streams: Labeled patches, and unlabeled ones if there are any.
        position: The first batch.
        rows: Of each stream, which rows of its batches to read, ascending; None: all.
        threads: That read patches.
        buffer: Patches read ahead.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        position: int = 0,
        rows: Sequence[Sequence[int]] | None = None,
        threads: int = 4,
        buffer: int = 8,
    ):
        self.position = position
        wanted = rows or [range(stream.batch) for stream in streams]
        self._parts = [
            _read(stream, position, which, threads, buffer)
            for stream, which in zip(streams, wanted, strict=True)
            if stream.batch
        ]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = [next(part) for part in self._parts]
        self.position += 1
        labeled, free = parts[0], parts[1] if len(parts) > 1 else {}
        rest = (free.get(name) for name in ("image", "slice_labels", "inside"))
        return Batch(labeled["image"], labeled["label"], *rest)

    def state(self) -> dict[str, int]:
        """What a checkpoint needs."""
        return {"batches": self.position}


class Cache:
    """Opens cases; keeps those of the first so many bytes decoded in memory."""

    def __init__(
        self,
        open_case: Callable[[str], Reader],
        load_case: Callable[[str], Reader],
        budget_bytes: int,
    ):
        self._open, self._load = open_case, load_case
        self._left = budget_bytes
        self._kept: dict[str, Reader] = {}
        self._lock = threading.Lock()

    def __call__(self, case: str) -> Reader:
        kept = self._kept.get(case)
        if kept is not None:
            return kept
        if self._left <= 0:
            return self._open(case)
        loaded = self._load(case)
        with self._lock:
            if case not in self._kept:
                self._kept[case] = loaded
                self._left -= loaded.nbytes  # pyright: ignore[reportAttributeAccessIssue]
        return self._kept[case]


@dataclass(frozen=True)
class Decoded:
    """A case in memory, read like one of the shards."""

    image: np.ndarray  # [D H W], or [D H W C]
    label: np.ndarray | None
    foreground: tuple[np.ndarray, ...]
    slice_labels: tuple[tuple[int, ...], ...] | None = None
    bleeding: bool | None = None

    @property
    def shape(self) -> Shape:
        """Size D, H, W of the scan."""
        d, h, w = self.image.shape[:3]
        return d, h, w

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)

    def patch(self, start: Shape, stop: Shape) -> tuple[np.ndarray, np.ndarray | None]:
        """A view of the box."""
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return self.image[box], None if self.label is None else self.label[box]


def _read(
    stream: Stream, position: int, rows: Sequence[int], threads: int, buffer: int
) -> Iterator[dict[str, np.ndarray]]:
    """These rows of every batch from `position` on."""
    local = len(rows)

    def element(i: int) -> dict[str, np.ndarray]:
        batch, row = divmod(i, local)
        return stream[(position + batch) * stream.batch + rows[row]]

    length = (stream.length // stream.batch - position) * local
    # The default buffer is 500 elements: gigabytes of patches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, local))
    return iter(grain.MapDataset.range(length).map(element).to_iter_dataset(options).batch(local))
