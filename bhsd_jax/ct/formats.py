"""Scans and label maps in the other formats that nnU-Net reads: .mha, .nrrd, .gipl, .tif, .png.

Read by SimpleITK (ITK's readers) and tifffile, which the extra `formats` brings; so are .mhd and
.nhdr, whose voxels lie in a second file. A 2D picture is a scan of one slice. Axes are [D, H, W] as
everywhere; where a format states no place in space, they run to S, P and L.
"""

import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8

from bhsd_jax.ct import itk_header, nifti
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.volume import Millimeters, Volume

_ITK = (*itk_header.ENDINGS, ".gipl")
_PICTURES = (".png", ".bmp")  # 2D, gray or in color
_TIFF = (".tif", ".tiff")  # 2D, or 3D with its spacing in a JSON file beside it
_ALONE = {".mhd": ".mha", ".nhdr": ".nrrd"}  # in which such a label map is one file
_PALETTE = ".bmp"  # ITK reads its grays as three colors
ENDINGS = (*_ITK, *_PICTURES, *_TIFF)
_PICTURE_MM = (999.0, 1.0, 1.0)  # nnU-Net's spacing of a picture
_SLICE_FACTOR = 999.0  # by nnU-Net, of the larger spacing of a 2D image, as its distance of slices
_COLORS = (3, 4)
_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's world is LPS


def ending(path: str | Path) -> str:
    """The ending of a file in one of these formats; "" of any other."""
    name = Path(path).name.casefold()
    return next((end for end in ENDINGS if name.endswith(end)), "")


def label_ending(path: str | Path) -> str:
    """The ending of a label map of a scan in one of these formats; none needs a second file."""
    kind = ending(path)
    return _ALONE.get(kind, kind)


def case_name(path: str | Path) -> str:
    """The file's name without that ending."""
    name = Path(path).name
    return name[: len(name) - len(ending(name))]


def stem(path: str | Path) -> str:
    """The name of a scan or label map without its ending, in NIfTI or in one of these formats."""
    return case_name(nifti.case_name(path))


def frame(path: Path) -> str:
    """What a file states of its place: "space", "spacing" alone, or "" (nothing).

    NIfTI states all of it, and so do ITK's formats, but for .mha and .nrrd of writers that leave it
    out. Only affines of one frame can be compared.

    Raises:
        Refusal: If the spacing beside a TIFF is no such.
    """
    kind = ending(path)
    if kind in _TIFF:
        return "spacing" if _tiff_spacing(path) else ""
    if kind in itk_header.ENDINGS:
        return itk_header.frame(path)
    return "" if kind in _PICTURES else "space"


def is_placed(path: Path) -> bool:
    """Whether a file's affine can be compared with others in space.

    That of .mha and .nrrd can without directions, too: as ITK reads it, it would not by chance put
    voxels where those of another file lie.

    Raises:
        Refusal: As by `frame`.
        FileNotFoundError: If there is no such file.
    """
    stated = frame(path)
    return stated == "space" or (stated != "" and ending(path) in itk_header.ENDINGS)


def states_sides(path: Path) -> bool:
    """Whether a file says which side of its scan is the patient's right; .gipl has no directions.

    Raises:
        Refusal: As by `frame`.
        FileNotFoundError: If there is no such file.
    """
    return _has_sides(path, frame(path))


def findings(path: Path, volume: Volume) -> list[Finding]:
    """What has to be said of a volume whose file does not state its place; nothing of one slice.

    Raises:
        Refusal: As by `frame`.
    """
    stated = frame(path)
    if _has_sides(path, stated) or len(volume.voxels) == 1:
        return []
    text = (
        "no position in the file: axes are taken to run to the left, the back and the top, as ITK "
        "does; right and left may be exchanged"
    )
    found = [Finding(Kind.NO_POSITION, "kept", text)]
    if not stated:
        text = "no spacing in the file: 1 mm is taken, and volumes in mL follow it"
        found.append(Finding(Kind.NO_SPACING, "kept", text))
    return found


def _has_sides(path: Path, stated: str) -> bool:
    return stated == "space" and ending(path) != ".gipl"


def parts(path: Path) -> tuple[Path, ...]:
    """The file, and the one that its voxels lie in where that is another.

    A header that cannot be read, or names no file beside it, stands for itself: reading refuses it.
    """
    if ending(path) not in itk_header.ENDINGS:
        return (path,)
    try:
        voxels = itk_header.voxel_file(path)
    except (Refusal, OSError):
        voxels = None
    return (path,) if voxels is None else (path, voxels)


def is_picture(path: Path) -> bool:
    """Whether a file is in a format of pictures, and nothing beside it says that it is a volume."""
    if ending(path) not in (*_PICTURES, *_TIFF):
        return False
    try:
        return not frame(path)
    except Refusal:  # a JSON file of something else
        return True


def read_channels(path: Path, channels: int = 1) -> tuple[Volume, ...]:
    """One scan of so many channels: a fourth axis, or colors.

    Raises:
        Refusal: If the file is damaged, has other axes or channels, or holds what is no number.
        UserError: If a library is missing; names the extra.
        FileNotFoundError: If there is no such file.

    Source: nnU-Net v2.8.1, `SimpleITKIO`, `NaturalImage2DIO`, `Tiff3DIO`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    kind = ending(path)
    voxels, affine = _read_tiff(path) if kind in _TIFF else _read_itk(path, kind)
    if voxels.ndim == 3:
        voxels = voxels[None]
    if voxels.ndim != 4 or len(voxels) != channels:
        raise Refusal(
            Kind.AXES,
            f"{path}: expected {channels} channel{'s' if channels > 1 else ''} of D, H, W; got "
            f"{voxels.shape}",
        )
    if voxels.dtype.kind not in "iuf" or min(voxels.shape) == 0:
        raise Refusal(Kind.NO_NUMBERS, f"{path}: holds {voxels.dtype}{voxels.shape}")
    if voxels.dtype.kind == "f":
        voxels = voxels.astype(np.float32)
        if not np.isfinite(voxels).all():
            text = f"{path}: holds voxels that are not finite numbers; {nifti.NOT_FINITE_REMEDY}"
            raise Refusal(Kind.NOT_FINITE, text)
    return tuple(Volume(np.ascontiguousarray(one), affine, case_name(path)) for one in voxels)


def read(path: Path) -> Volume:
    """One scan of one channel; as `read_channels`."""
    return read_channels(path)[0]


def write(path: Path, label: UInt8[np.ndarray, "D H W"], like: Path) -> None:
    """Writes a label map in the format of its own ending, at the place of the scan `like`.

    Raises:
        UserError: If the shapes differ, or the format cannot hold the label map.
        Refusal: As by `read_channels`.
        faults.WriteError: If the system says no, such as on a full disk.
    """
    kind = ending(path)
    if kind in _TIFF:
        tifffile = _library("tifffile", path)
        spacing = _tiff_spacing(like) or (1.0, 1.0, 1.0)
        flat = label[0] if len(label) == 1 and not _tiff_spacing(like) else label
        _save(path, lambda place: tifffile.imwrite(place, flat, compression="zlib"))
        if flat is label:
            files.write_json(path.with_suffix(".json"), {"spacing": list(spacing)})
        return
    itk = _library("SimpleITK", path)
    if kind in _PICTURES:
        if len(label) != 1:
            raise UserError(f"{path}: a picture holds one slice; got {label.shape}")
        _save(path, lambda place: itk.WriteImage(itk.GetImageFromArray(label[0]), str(place)))
        return
    source = _image(itk, like)
    flat = label[0] if source.GetDimension() == 2 else label
    made = itk.GetImageFromArray(flat)
    if source.GetDimension() == 4:
        size = [*source.GetSize()[:3], 0]
        source = itk.Extract(source, size, [0, 0, 0, 0])
    made.CopyInformation(source)
    _save(path, lambda place: itk.WriteImage(made, str(place), True))


def planar_place(path: Path) -> dict[str, tuple[float, ...]] | None:
    """ITK's spacing, origin and direction of a file of two axes that has them; None of another."""
    if ending(path) not in _ITK:
        return None
    image = _image(_library("SimpleITK", path), path)
    if image.GetDimension() != 2:
        return None
    names = ("spacing", "origin", "direction")
    values = image.GetSpacing(), image.GetOrigin(), image.GetDirection()
    return {name: tuple(value) for name, value in zip(names, values, strict=True)}


def _read_itk(path: Path, kind: str) -> tuple[Num[np.ndarray, "..."], Float[np.ndarray, "4 4"]]:
    itk = _library("SimpleITK", path)
    image = _image(itk, path)
    voxels = itk.GetArrayFromImage(image)
    if kind == ".png" and _is_of_one_bit(path):
        voxels = voxels // 255  # ITK makes 255 of the file's 1
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
        if kind == _PALETTE and (voxels == voxels[:1]).all():
            voxels = voxels[0]
    if image.GetDimension() == 2:
        voxels = voxels[..., None, :, :]
        spacing = image.GetSpacing()
        apart = _SLICE_FACTOR * max(spacing)
        if kind in _PICTURES:
            return voxels, _upright(_PICTURE_MM)
        return voxels, _upright((apart, spacing[1], spacing[0]))
    return voxels, _affine(image)


def _is_of_one_bit(path: Path) -> bool:
    """Whether a PNG file is gray and holds 0 and 1, as its header says."""
    with path.open("rb") as file:
        return file.read(26)[24:] == b"\x01\x00"  # bits of a sample, kind of its color


def _affine(image: Any) -> Float[np.ndarray, "4 4"]:
    """(d, h, w, 1) to RAS+ mm, of an image of three axes or four."""
    axes = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3]
    columns = _TO_RAS @ direction * np.abs(np.array(image.GetSpacing()[:3]))
    affine = np.eye(4)
    affine[:3, :3] = columns[:, ::-1]
    affine[:3, 3] = _TO_RAS @ np.array(image.GetOrigin()[:3])
    return affine


def _upright(spacing_mm: Sequence[float]) -> Float[np.ndarray, "4 4"]:
    d, h, w = spacing_mm
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = d, -h, -w, 1
    return affine


def _read_tiff(path: Path) -> tuple[Num[np.ndarray, "..."], Float[np.ndarray, "4 4"]]:
    tifffile = _library("tifffile", path)
    try:
        voxels = tifffile.imread(path)
    except Exception as error:  # a parser of its own, which raises anything
        # LZW, JPEG and others are the codecs', and so is Zstandard before Python 3.14.
        if isinstance(error, ImportError) or "imagecodecs" in str(error):
            text = f"{path}: its compression {_missing('imagecodecs')}"
            raise Refusal(Kind.COMPRESSED, text) from error
        if "COMPRESSION" in str(error):
            text = f"{path}: its compression is not read ({error}); save it without, or by zlib"
            raise Refusal(Kind.COMPRESSED, text) from error
        raise Refusal(Kind.UNREADABLE, f"{path}: damaged ({error}); fetch it again") from error
    if voxels.dtype == bool:
        voxels = voxels.astype(np.uint8)
    if voxels.ndim == 2:
        return voxels[None], _upright(_PICTURE_MM)
    if voxels.ndim == 3 and voxels.shape[-1] in _COLORS:
        return np.moveaxis(voxels, -1, 0)[:, None], _upright(_PICTURE_MM)
    return voxels, _upright(_tiff_spacing(path) or (1.0, 1.0, 1.0))


def _tiff_spacing(path: Path) -> Millimeters | None:
    """D, H, W from `<case>.json` beside a scan or its label map; None if there is none.

    Raises:
        Refusal: If the file is there, but says something else.
    """
    stem = case_name(path)
    short = stem[:-5] if stem[-5:-4] == "_" and stem[-4:].isdigit() else stem
    beside = next((p for n in (stem, short) if (p := path.with_name(f"{n}.json")).is_file()), None)
    if beside is None:
        return None
    try:
        d, h, w = (float(value) for value in json.loads(beside.read_text())["spacing"])
        if not all(0 < value < np.inf for value in (d, h, w)):
            raise ValueError(f"got {d, h, w}")
    except (ValueError, TypeError, KeyError) as error:
        text = f'{beside}: expected {{"spacing": [d, h, w]}} in mm, all positive ({error})'
        raise Refusal(Kind.SPACING, text) from error
    return d, h, w


def _image(itk: Any, path: Path) -> Any:
    voxels = itk_header.voxel_file(path) if ending(path) in itk_header.ENDINGS else None
    if voxels is not None and not voxels.is_file():
        text = f"{path}: its voxels lie in {voxels.name}, which is not beside it; fetch that too"
        raise Refusal(Kind.FILE_MISSING, text)
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        return itk.ReadImage(str(path))
    except RuntimeError as error:
        with path.open("rb") as file:
            other = files.stand_in(file.read(64))
        lines = str(error).strip().splitlines()
        last = other or (lines[-1].strip() if lines else "no reason given")
        if last.endswith("No such file or directory"):  # what MetaImage says, though there is one
            last = "damaged, or cut off in a transfer; fetch it again"
        raise Refusal(Kind.UNREADABLE, f"{path}: cannot be read ({last})") from error


def _save(path: Path, write: Any) -> None:
    """By a library that writes files only: into a folder of its own, then in place as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / f"label{ending(path)}"
        write(place)
        files.write_bytes(path, place.read_bytes())


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{path}: {_missing(name)}") from error


def _missing(name: str) -> str:
    return f"needs {name}; {explain_extra('formats')}"
