"""The record of one prepared case, and reading boxes of it without decoding the rest.

A record is `[u64 little-endian header length][UTF-8 JSON header][image][label][foreground]`, the
last three being blosc2 frames whose lengths the header states.
"""

import functools
import hashlib
import json
import struct
from typing import Any

import numpy as np

from bhsd_jax.ct.prepared import Prepared
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Grid, Shape

SCHEMA = 1  # of records and index; raised whenever an old reader would misread them
_PREFIX = struct.Struct("<Q")
_BLOCK = (8, 64, 64)  # what one decode touches; 64 KiB of int16, fits the L2 cache
_CHUNK = (40, 256, 256)  # what one header lookup covers
_ARRAYS = ("image", "label", "foreground")


class Reader:
    """One record: its header, and patches decoded on demand.

    Not locked: share a reader between threads only if they take turns.
    """

    def __init__(self, record: bytes, place: str):
        self.header, frames = _split(record, place)
        self.place = place
        self.shape: Shape = tuple(self.header["shape"])
        self._image = _frame(frames["image"], place)
        self._label = _frame(frames["label"], place) if self.header["has_label"] else None
        self._foreground = frames["foreground"]

    @property
    def foreground(self) -> tuple[np.ndarray, ...]:
        """Voxel positions int32 [n 3] per list of `Prepared`; a class that is absent has n = 0."""
        return self._positions

    @functools.cached_property
    def _positions(self) -> tuple[np.ndarray, ...]:
        stacked = _frame(self._foreground, self.place)[:]
        stops = np.cumsum(self.header["foreground"])
        return tuple(np.split(stacked, stops[:-1])) if len(stops) else ()

    @property
    def slice_labels(self) -> tuple[tuple[int, ...], ...] | None:
        """As in `Prepared`."""
        rows = self.header["slice_labels"]
        return None if rows is None else tuple(tuple(row) for row in rows)

    @property
    def bleeding(self) -> bool | None:
        """As in `Prepared`."""
        return self.header["bleeding"]

    def patch(self, start: Shape, stop: Shape) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and label (None if there is none) of a box, cut off at the borders of the array.

        A box that sticks out gives a smaller patch, one that lies outside an empty one: padding is
        the caller's, who knows what air is.
        """
        box = tuple(
            slice(min(max(a, 0), n), min(max(a, b, 0), n))
            for a, b, n in zip(start, stop, self.shape, strict=True)
        )
        if any(part.start == part.stop for part in box):
            empty = tuple(part.stop - part.start for part in box)
            image = np.zeros((*empty, *self._image.shape[3:]), self._image.dtype)
            return image, None if self._label is None else np.zeros(empty, np.uint8)
        return self._image[box], None if self._label is None else self._label[box]


def pack(case: Prepared) -> tuple[dict[str, Any], bytes]:
    """Header and whole record of a case; the same case gives the same bytes."""
    arrays = {"image": case.image, "foreground": _stack(case.foreground)}
    if case.label is not None:
        arrays["label"] = case.label
    frames = {name: _compress(arrays[name]) if name in arrays else b"" for name in _ARRAYS}
    header = {
        "schema": SCHEMA,
        "case": case.case,
        "patient": case.patient,
        "split": case.split,
        "bleeding": case.bleeding,
        "slice_labels": case.slice_labels,
        "shape": list(case.image.shape[:3]),
        "dtype": str(case.image.dtype),
        "grid": case.grid.to_json(),
        "has_label": case.label is not None,
        "voxels": _count(case),
        "volume_ml": case.volume_ml,
        "foreground": [len(positions) for positions in case.foreground],
        "frames": {name: len(frame) for name, frame in frames.items()},
        "sha256": {name: _digest(array) for name, array in arrays.items()},
        "source_sha256": case.source_sha256,
    }
    if case.sorted_by:  # records of other data sets are as ever
        header["sorted_by"] = case.sorted_by
    text = json.dumps(header).encode()
    return header, b"".join((_PREFIX.pack(len(text)), text, *frames.values()))


def unpack(reader: Reader) -> Prepared:
    """Decodes a whole record and compares it with its digests.

    Raises:
        ValueError: If the record is damaged; names shard and record.
    """
    header = reader.header
    image, label = reader.patch((0, 0, 0), reader.shape)
    arrays = {"image": image, "label": label, "foreground": _stack(reader.foreground)}
    for name, digest in header["sha256"].items():
        if _digest(arrays[name]) != digest:
            raise damaged(reader.place, f"{name} does not match its digest")
    return Prepared(
        case=header["case"],
        patient=header["patient"],
        split=header["split"],
        bleeding=header["bleeding"],
        slice_labels=reader.slice_labels,
        image=image,
        label=label,
        grid=Grid.from_json(header["grid"]),
        foreground=reader.foreground,
        volume_ml=tuple(header["volume_ml"]),
        source_sha256=header["source_sha256"],
        sorted_by=header.get("sorted_by", ""),
        values=_values(header),
    )


def _values(header: dict[str, Any]) -> int:
    counted, usual = len(header["voxels"]), len(header["foreground"]) + 1
    return 0 if counted in (0, usual) else counted


def _split(record: bytes, place: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        (length,) = _PREFIX.unpack_from(record)
        start = _PREFIX.size + length
        header = json.loads(record[_PREFIX.size : start])
        schema, lengths = header["schema"], [int(header["frames"][name]) for name in _ARRAYS]
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise damaged(place, "its header cannot be read") from error
    if schema != SCHEMA:
        raise damaged(place, f"schema {schema}, this version reads {SCHEMA}")
    frames = {}
    for name, length in zip(_ARRAYS, lengths, strict=True):
        frames[name] = record[start : start + length]
        start += length
    if start != len(record):
        raise damaged(place, f"{len(record)} bytes, its header says {start}")
    return header, frames


def damaged(place: str, reason: str) -> UserError:
    """The error for a record that is not what was written."""
    return UserError(
        f"{place}: damaged ({reason}); run the verb `preprocess` again, which finds damaged shards "
        "and writes only those anew"
    )


def _compress(array: np.ndarray) -> bytes:
    import blosc2  # a second that verbs which read no shard need not wait

    chunks = blocks = None
    if array.ndim >= 3:
        chunks = tuple(map(min, array.shape, (*_CHUNK, *array.shape[3:])))
        blocks = tuple(map(min, chunks, (*_BLOCK, *array.shape[3:])))
    parameters = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=5,
        filters=[blosc2.Filter.SHUFFLE],
        typesize=array.dtype.itemsize,
        nthreads=1,
    )
    data: Any = np.ascontiguousarray(array)
    packed: Any = blosc2.asarray(data, cparams=parameters, chunks=chunks, blocks=blocks)
    return packed.to_cframe()


def _frame(frame: bytes, place: str) -> Any:
    import blosc2

    # Any: the NDArray of blosc2 types its items as arrays or unevaluated expressions.
    try:
        array = blosc2.ndarray_from_cframe(frame)
        array.schunk.dparams = blosc2.DParams(nthreads=1)  # the caller's threads read side by side
    except (RuntimeError, ValueError) as error:
        raise damaged(place, str(error)) from error
    return array


def _stack(foreground: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([*foreground, np.zeros((0, 3), np.int32)]).astype(np.int32)


def _count(case: Prepared) -> list[int]:
    if case.label is None:
        return []
    return np.bincount(
        case.label.ravel(), minlength=case.values or len(case.foreground) + 1
    ).tolist()


def _digest(array: np.ndarray | None) -> str:
    data = b"" if array is None else np.ascontiguousarray(array).data
    return hashlib.sha256(data).hexdigest()
