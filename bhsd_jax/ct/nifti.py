"""Volume to and from NIfTI; the only place that knows nibabel and its x-y-z order."""

import contextlib
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped, UInt8
from nibabel.nifti1 import Nifti1Header
from nibabel.spatialimages import HeaderDataError

from bhsd_jax.ct import masks, nifti_header
from bhsd_jax.defects import Finding, Kind, Refusal, said_of
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Volume

MAX_BYTES = 4 * 2**30
NOT_FINITE_REMEDY = (
    "outside a registered scan? Set them to air, -1000 HU, or to 0 in MR and in masks"
)
_SUFFIX = re.compile(r"(\.nii)?(\.gz)?$", re.IGNORECASE)
_CHUNK = 2**20
_SLACK = 2**20  # bytes after the voxels that are still taken for padding
_DEFLATE_RATIO = 1032  # no gzip stream unpacks to more than this many times its size
_INTEGER = 1e-4  # scaled labels may miss their integer by this
_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def case_name(path: str | Path) -> str:
    """The file's name without .nii or .nii.gz, in small letters or in capitals."""
    return _SUFFIX.sub("", Path(path).name)


def read(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Volume:
    """Reads one scan; .nii or .nii.gz, told apart by content, in one file.

    Scale factors are applied: scaled and floating-point voxels come as float32, others keep their
    integer type. Axes are [D, H, W] = the file's (k, j, i), and the affine fits that order. The
    case is the file's name without suffix. Nothing of the header is believed before it is checked
    against `max_bytes` and the size of the file, and a gzip stream is read to its checksum.

    Raises:
        Refusal: If the file is not NIfTI, damaged, too large, not 3D, not numbers, not finite,
            or lies nowhere in space; names the file.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    with _naming(path):
        header, voxels = _load(path, max_bytes)
        affine = nifti_header.affine(header)
    return Volume(voxels=voxels, affine=affine, case=case_name(path))


def read_channels(path: str | Path, channels: int) -> tuple[Volume, ...]:
    """Reads one scan whose fourth axis is that of its channels: a volume for each, as by `read`.

    Raises:
        Refusal: As by `read`; or if it has another number of channels.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    with _naming(path):
        header, voxels = _load(path, MAX_BYTES, channels)
        affine = nifti_header.affine(header)
    return tuple(Volume(voxels=one, affine=affine, case=case_name(path)) for one in voxels)


def read_label(
    path: str | Path, image: Volume, *, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    """Reads the label map of `image` as uint8, on the geometry and under the name of `image`.

    A mask whose affine puts it on the voxels of the image, in another order, is turned. Else shapes
    must agree; affines need not, since masks in circulation have lost theirs: that only adds a
    finding to the list. `num_classes` None allows 0..255. Whole numbers that were saved as
    integers behind a scale factor come back up to half the factor off, and are rounded.

    Raises:
        Refusal: If the file is refused as by `read`, its shape differs, or a value is not an
            integer in 0..num_classes-1; lists the values.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    found = []
    with _naming(path):
        header, voxels = _load(path, MAX_BYTES)
        voxels, lies = _lay(header, voxels, image)
        off = nifti_header.rounding(header)
        label = _as_classes(voxels, 256 if num_classes is None else num_classes, max(off, _INTEGER))
        if off and (most := float(np.abs(voxels - label).max())) > _INTEGER:
            text = f"mask values up to {most:.2g} off whole numbers by their scale factor; rounded"
            found.append(Finding(Kind.MASK_ROUNDED, "repaired", text))
    return Volume(voxels=label, affine=image.affine, case=image.case), [*found, *lies]


def _lay(
    header: Nifti1Header, voxels: np.ndarray, image: Volume
) -> tuple[np.ndarray, list[Finding]]:
    """The voxels of a label map in the order of its image's; an affine that is none says nothing.

    Raises:
        Refusal: If they are others.
    """
    try:
        label = Volume(voxels, nifti_header.affine(header), "")
    except (ValueError, HeaderDataError) as error:
        masks.require_shape(voxels, image)
        text = f"label geometry is unusable ({error}); the image's is taken"
        return voxels, [Finding(Kind.MASK_GEOMETRY, "repaired", text)]
    return masks.lay(label, image, placed=nifti_header.has_position(header))


def remarks(image: object, label: object) -> list[Finding]:
    """Oddities of the headers of a scan and its mask that reading has coped with.

    Nothing of what is no NIfTI file.
    """
    found = []
    for path in (image, label):
        if not isinstance(path, Path):
            continue
        try:
            with _naming(path), _stream(path) as (stream, _):
                header = nifti_header.parse(stream)
        except (UserError, FileNotFoundError):
            continue
        found += nifti_header.remarks(header, is_label=path is label)
    return found


def has_sides(path: Path) -> bool:
    """Whether a file says which side of its scan is the patient's right, and does not in two ways.

    Raises:
        Refusal: If the file is no NIfTI; names it.
    """
    with _naming(path), _stream(path) as (stream, _):
        return nifti_header.has_sides(nifti_header.parse(stream))


def repairs(path: Path) -> list[Finding]:
    """What `read` has changed of a file's geometry, or taken without or against its header.

    Raises:
        Refusal: If the file is no NIfTI; names it.
    """
    with _naming(path), _stream(path) as (stream, _):
        return nifti_header.repairs(nifti_header.parse(stream))


def write(
    path: str | Path, voxels: Num[np.ndarray, "D H W"], like: str | Path, channels: int = 1
) -> None:
    """Writes `voxels`, in the native order of the scan file `like`, onto the grid of that file.

    All geometry fields are copied bit for bit, so that any reader places both alike; nothing else
    is: no text, no extension, no scale factors. Gzip by suffix, without a time stamp: equal input
    gives equal bytes. `channels` are those along the fourth axis of `like`. The file appears whole
    or not at all; missing folders are made.

    Raises:
        ValueError: If the shapes differ, `like` is no NIfTI, or NIfTI cannot hold the type.
        FileNotFoundError: If there is no `like`.
    """
    like = Path(like)
    with _naming(like), _stream(like) as (stream, _):
        source = nifti_header.parse(stream)
        shape = nifti_header.shape(source, channels)
    if voxels.shape != shape:
        raise UserError(f"{path}: voxels have shape {voxels.shape}, but {like} has {shape}")
    header = type(source)(endianness="<")
    geometry: dict[str, Any] = {field: source[field] for field in _GEOMETRY}
    _save(Path(path), header, geometry, voxels)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Writes a volume with its affine as sform (float32 in the file); otherwise as `write`.

    Raises:
        ValueError: If NIfTI cannot hold the type or the shape.
    """
    _save(Path(path), Nifti1Header(endianness="<"), _sform(volume.affine), volume.voxels)


def to_bytes(volume: Volume) -> bytes:
    """The file that `write_volume` writes under a name that ends with .nii.gz.

    Raises:
        ValueError: If NIfTI cannot hold the type or the shape.
    """
    header = Nifti1Header(endianness="<")
    voxels = _fit(Path(volume.case), header, _sform(volume.affine), volume.voxels)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 4, packed, mtime=0) as out:
        _pour(out, header, voxels)
    return packed.getvalue()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what readers throw at broken files into a refusal that names the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise Refusal(Kind.UNREADABLE, f"{path}: is not a file; a NIfTI scan is one file")
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        text = f"{path}: damaged gzip stream ({error}); fetch it again"
        raise Refusal(Kind.FILE_GZIP, text) from error
    except (ValueError, HeaderDataError) as error:
        raise said_of(path, error) from error


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[tuple[BufferedIOBase, int]]:
    """The unpacked bytes, and an upper bound of how many there can be."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise Refusal(Kind.FILE_EMPTY, "the file is empty")
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file, size
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked, size * _DEFLATE_RATIO


def _load(path: Path, max_bytes: int, channels: int = 1) -> tuple[Nifti1Header, np.ndarray]:
    """Header and voxels: [D H W], or [C D H W] of several channels."""
    with _stream(path) as (stream, room):
        header = nifti_header.parse(stream)
        shape: tuple[int, ...] = nifti_header.shape(header, channels)
        shape = (channels, *shape) if channels > 1 else shape
        dtype = nifti_header.voxel_type(header)
        offset = nifti_header.offset(header)
        wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if offset + wanted > max_bytes:
            text = f"header claims {wanted} bytes of voxels {shape}; the limit is {max_bytes}"
            raise Refusal(Kind.FILE_CLAIMS, text)
        if offset + wanted > room:
            text = f"truncated: header claims {wanted} bytes of voxels {shape}"
            raise Refusal(Kind.FILE_TRUNCATED, text)
        _skip(stream, offset - int(header["sizeof_hdr"]))
        raw = np.empty(wanted, np.uint8)
        _fill(stream, raw.data)
        _finish(stream)
    return header, _scaled(raw.view(dtype).reshape(shape), header)


def _skip(stream: BufferedIOBase, count: int) -> None:
    while count > 0:
        got = len(stream.read(min(count, _CHUNK)))
        if not got:
            raise Refusal(Kind.FILE_TRUNCATED, "truncated before the first voxel")
        count -= got


def _fill(stream: BufferedIOBase, target: memoryview) -> None:
    done = 0
    while done < len(target):
        got = stream.readinto(target[done : done + _CHUNK])
        if not got:
            text = f"truncated: {done} of {len(target)} bytes of voxels"
            raise Refusal(Kind.FILE_TRUNCATED, text)
        done += got


def _finish(stream: BufferedIOBase) -> None:
    """Reads to the end, where gzip compares its checksum."""
    extra = 0
    while got := len(stream.read(_CHUNK)):
        extra += got
        if extra > _SLACK:
            text = f"goes on for more than {_SLACK} bytes after the last voxel"
            raise Refusal(Kind.FILE_LONGER, text)


def _scaled(voxels: np.ndarray, header: Nifti1Header) -> np.ndarray:
    slope, inter = nifti_header.scale(header)
    if voxels.dtype.kind in "iu" and (slope, inter) == (1.0, 0.0):
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    scaled = np.empty(voxels.shape, np.float32)
    broken = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for plane, out in zip(voxels, scaled, strict=True):  # float64, but one plane at a time
            out[...] = plane.astype(np.float64) * slope + inter
            broken += out.size - int(np.count_nonzero(np.isfinite(out)))
    if broken:
        text = f"{broken} of {voxels.size} voxels are not finite numbers; {NOT_FINITE_REMEDY}"
        raise Refusal(Kind.NOT_FINITE, text)
    return scaled


def as_classes(voxels: np.ndarray, num_classes: int | None) -> UInt8[np.ndarray, "_ _ _"]:
    """Whole numbers in 0..num_classes-1 (None: 0..255), as uint8.

    Raises:
        Refusal: If a value is none; lists the values.
    """
    return _as_classes(voxels, 256 if num_classes is None else num_classes, _INTEGER)


def _as_classes(voxels: np.ndarray, num_classes: int, off: float) -> UInt8[np.ndarray, "_ _ _"]:
    """Whole numbers; `off` is how far a voxel of floating point may lie from one."""
    top = min(num_classes, 256) - 1
    bad = (voxels < 0) | (voxels > top)
    if voxels.dtype.kind == "f":
        bad = (voxels < -off) | (voxels > top + off)
        bad |= np.abs(voxels - np.rint(voxels)) > off
        voxels = np.where(bad, voxels, np.rint(voxels))
    if bad.any():
        values = np.unique(voxels[bad])
        shown = ", ".join(f"{value:g}" for value in values[:10].tolist())
        more = f" and {len(values) - 10} more" if len(values) > 10 else ""
        text = f"label values must be integers in 0..{top}; got {shown}{more}{_advice(values)}"
        raise Refusal(Kind.MASK_VALUES, text)
    return voxels.astype(np.uint8)


def _advice(values: np.ndarray) -> str:
    """What is to be done about values that are no classes; "" where they do not say."""
    if values.tolist() == [255]:
        return "; where 255 stands for 1, set data.labels=binary of data=folder, or write 1"
    if (values != np.rint(values)).any():
        return "; interpolated? Resample label maps by nearest neighbor"
    return ""


def _sform(affine: np.ndarray) -> dict[str, Any]:
    """Header fields of an affine of [D, H, W]."""
    affine = affine[:, [2, 1, 0, 3]]
    pixdim = np.ones(8)
    pixdim[1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    rows = {f"srow_{axis}": row for axis, row in zip("xyz", affine, strict=False)}
    return {"pixdim": pixdim, "xyzt_units": 2, "sform_code": 1, **rows}


def _save(
    path: Path, header: Nifti1Header, geometry: dict[str, Any], voxels: Shaped[np.ndarray, "..."]
) -> None:
    voxels = _fit(path, header, geometry, voxels)
    with contextlib.ExitStack() as stack:
        out = file = stack.enter_context(stack.enter_context(files.replacing(path)).open("wb"))
        if path.name.endswith(".gz"):
            out = stack.enter_context(gzip.GzipFile("", "wb", 4, file, mtime=0))
        _pour(out, header, voxels)


def _fit(
    path: Path, header: Nifti1Header, geometry: dict[str, Any], voxels: Shaped[np.ndarray, "..."]
) -> np.ndarray:
    """Makes the header that of the voxels; returns them as the file holds them."""
    voxels = np.ascontiguousarray(voxels, np.uint8 if voxels.dtype == bool else None)
    voxels = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)
    try:
        header.set_data_dtype(voxels.dtype)
        header.set_data_shape(voxels.shape[::-1])
    except HeaderDataError as error:
        raise UserError(f"{path}: NIfTI cannot hold {voxels.dtype}{voxels.shape}") from error
    for field, value in geometry.items():
        header[field] = value
    header["vox_offset"] = nifti_header.first_offset(header)
    header["scl_slope"], header["scl_inter"] = 1, 0  # NaN, nibabel's default, breaks other readers
    return voxels


def _pour(out: Any, header: Nifti1Header, voxels: np.ndarray) -> None:
    out.write(header.binaryblock.ljust(nifti_header.first_offset(header), b"\0"))
    out.write(voxels.data.cast("B"))
