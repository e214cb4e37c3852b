"""Volume to and from NIfTI: the only place that knows nibabel and x-y-z order.

Hostile files are expected: sizes are checked before anything is allocated, and the gzip stream is
read to its end, because nibabel does not look at its checksum.
"""

import gzip
import io
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from bhsd_jax.volume import Volume

_MAX_BYTES = 4 * 2**30
_CHUNK = 2**22
_GEOMETRY = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip
_REVERSED = np.eye(4)[[2, 1, 0, 3]]  # (d, h, w, 1) -> (i, j, k, 1)


def case_name(path: str | Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def read(path: str | Path, *, max_bytes: int = _MAX_BYTES) -> Volume:
    """One 3D scan, scale factors applied, voxels [D H W] = the file's (k, j, i).

    Gzip is recognized by its first bytes, so a missing suffix does not matter. Integers without
    scale factors keep their type, all else is float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a readable 3D scan with a usable geometry; names the file.
    """
    path = Path(path)
    image = _parse(path, _bytes(path, max_bytes), max_bytes)
    affine = np.asarray(image.affine, np.float64)
    _require_geometry(path, image.header, affine)
    scaled = image.header.get_slope_inter() != (None, None)
    try:
        stored = np.asanyarray(image.dataobj)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: voxels cannot be read ({_line(error)})") from error
    voxels = stored if stored.dtype.kind in "iu" and not scaled else stored.astype(np.float32)
    if voxels.ndim == 4:
        voxels = voxels[..., 0]
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"{path}: has voxels that are NaN or infinite; repair or leave it out")
    return Volume(
        np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine @ _REVERSED, case_name(path)
    )


def read_label(
    path: str | Path, image: Volume, *, num_classes: int | None
) -> tuple[Volume, list[str]]:
    """A label map as uint8 on the geometry of its image, and what looked odd.

    Shapes must agree; where only the affines differ the image's counts (four scans of BHSD).

    Raises:
        ValueError: If it lies on another grid, or holds anything but 0..num_classes-1.
    """
    label = read(path)
    if label.voxels.shape != image.voxels.shape:
        raise ValueError(
            f"{path}: label lies on another grid than its image: shape "
            f"{label.voxels.shape} vs {image.voxels.shape} (D, H, W)"
        )
    values = np.unique(label.voxels)
    top = 255 if num_classes is None else num_classes - 1
    odd = [v for v in values.tolist() if v != round(v) or not 0 <= v <= top]
    if odd:
        raise ValueError(f"{path}: label values {odd[:8]}, expected whole numbers 0 to {top}")
    warnings = []
    if not np.allclose(label.affine, image.affine, atol=1e-2):
        warnings.append("label and image differ in their affine; the image's is used")
    return Volume(label.voxels.astype(np.uint8), image.affine, image.case), warnings


def write(path: str | Path, voxels: np.ndarray, like: str | Path) -> None:
    """Writes voxels [D H W] with exactly the geometry of the file `like`, and nothing else of it.

    Header texts, extensions and scale factors are not carried over: they may identify a patient.

    Raises:
        ValueError: If `like` has another shape.
    """
    like = Path(like)
    source = _parse(like, _bytes(like, _MAX_BYTES), _MAX_BYTES).header
    expected = source.get_data_shape()[2::-1]
    if expected != voxels.shape:
        raise ValueError(f"{path}: shape {voxels.shape} (D, H, W), but {like} has {expected}")
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.transpose(2, 1, 0)), None)
    for field in _GEOMETRY:
        image.header[field] = source[field]
    image.header["pixdim"][4:] = 0
    _save(image, Path(path))


def write_volume(path: str | Path, volume: Volume) -> None:
    """Writes a volume by its own affine."""
    voxels = np.ascontiguousarray(volume.voxels.transpose(2, 1, 0))
    image = nib.Nifti1Image(voxels, volume.affine @ _REVERSED)
    image.header.set_xyzt_units("mm")
    _save(image, Path(path))


def _bytes(path: Path, max_bytes: int) -> bytes:
    """The uncompressed file, read to the end of its stream."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if not raw:
        raise ValueError(f"{path}: the file is empty")
    if raw[:2] != b"\x1f\x8b":
        return _limited(path, raw, max_bytes)
    parts, total = [], 0
    try:
        with gzip.open(io.BytesIO(raw)) as stream:
            while part := stream.read(_CHUNK):
                parts.append(part)
                total += len(part)
                if total > max_bytes + 2**20:
                    break
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({_line(error)}); get it again") from error
    return _limited(path, b"".join(parts), max_bytes)


def _limited(path: Path, data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise ValueError(f"{path}: more than {max_bytes / 2**30:.1f} GiB of voxels; leave it out")
    return data


def _parse(path: Path, data: bytes, max_bytes: int) -> nib.Nifti1Image:
    """A NIfTI image whose claims about itself fit the bytes there are."""
    try:
        image = nib.Nifti1Image.from_bytes(data)
    except (ImageFileError, HeaderDataError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a NIfTI file ({_line(error)})") from error
    header = image.header
    shape, kind = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or any(n != 1 for n in shape[3:]) or len(shape) > 4:
        raise ValueError(f"{path}: shape {shape}; expected one 3D scan")
    if kind.kind not in "iuf" or kind.names:
        raise ValueError(f"{path}: voxels of type {kind}; expected integers or floats")
    claimed = int(np.prod(shape, dtype=object)) * kind.itemsize
    if claimed > min(max_bytes, len(data)):
        raise ValueError(
            f"{path}: header claims {claimed:,} bytes of voxels, the file has {len(data):,}; "
            "it is cut off or its header is wrong"
        )
    return image


def _require_geometry(path: Path, header: nib.Nifti1Header, affine: np.ndarray) -> None:
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"{path}: spacing {spacing.tolist()} mm; expected positive numbers")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: its affine is not usable: {affine.tolist()}")


def _save(image: nib.Nifti1Image, path: Path) -> None:
    """Whole or not at all; the same voxels give the same bytes."""
    image.header["descrip"] = b""
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
