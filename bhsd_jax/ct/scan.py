"""Scans and label maps wherever they lie: in a file, a file per channel, or a DICOM series."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from bhsd_jax.ct import channels, formats, hu, masks, nifti, series_mask, shear
from bhsd_jax.ct.dicom import seg_mask, slice_file
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.defects import Finding, Kind, Refusal, kind_of, said_of
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Channels, Image, Label, Masks, Series, Volume


def read(image: Image) -> tuple[Volume, list[Finding]]:
    """The scan as the network is to see it, and what was found on the way; its first channel.

    Raises:
        ValueError: If it is broken, or lies in no grid; names the file, or the series.
        FileNotFoundError: If there is no such file.
    """
    if isinstance(image, Channels):
        every, found = read_channels(image)
        return every[0], found
    if isinstance(image, Path) and formats.ending(image):
        volume = formats.read(image)
        return volume, formats.findings(image, volume)
    if not isinstance(image, Series):
        return nifti.read(image), nifti.repairs(image)
    volume, found = dicom_series.read(image)
    if image.unshear:
        voxels, affine = shear.unshear(volume.voxels, volume.affine, fill=hu.LOWEST_HU)
        if voxels is not volume.voxels:
            text = "unsheared: slices moved over each other, and set upright"
            found.append(Finding(Kind.UNSHEARED, "kept", text))
        volume = replace(volume, voxels=voxels, affine=affine)
    return volume, found


def read_channels(image: Image) -> tuple[tuple[Volume, ...], list[Finding]]:
    """All channels of a scan, on one grid; as `read`."""
    if not isinstance(image, Channels):
        volume, found = read(image)
        return (volume,), found
    if len(image.files) == 1:
        file = image.files[0]
        if formats.ending(file):
            every = formats.read_channels(file, image.count)
            found = formats.findings(file, every[0])
        else:
            every, found = nifti.read_channels(file, image.count), nifti.repairs(file)
    else:
        parts = [read(path) for path in image.files]
        every, found = tuple(v for v, _ in parts), [one for _, more in parts for one in more]
    placed = all(finding.kind is not Kind.NO_POSITION for finding in found)
    try:
        every, more = channels.alike(every, placed=placed)
        return every, [*found, *more]
    except Refusal as error:
        raise said_of(called(image), error) from error


def has_sides(image: Image) -> bool:
    """Whether right and left of the patient are known: a NIfTI file need not state its place.

    Raises:
        ValueError: If the scan has become unreadable.
        FileNotFoundError: If it is no longer there.
    """
    if isinstance(image, Series):
        return True
    first = files(image)[0]  # whose affine counts
    return formats.states_sides(first) if formats.ending(first) else nifti.has_sides(first)


def native(image: Image) -> Image:
    """The scan on its own voxels, which label maps lie on."""
    return replace(image, unshear=False) if isinstance(image, Series) else image


def read_native(image: Image, seen: Volume | None = None) -> Volume:
    """The scan on its own voxels; `seen`, which `read` gave of it, if it is on those already."""
    own = native(image)
    return seen if seen is not None and own == image else read(own)[0]


def read_label(
    label: Label, image: Image, volume: Volume, *, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    """The label map of `volume`, which `read` made from `image`.

    A file's must have its voxels, and is turned where their order is another; a finding says so,
    and if it lies elsewhere, as by `nifti.read_label`. A DICOM series has no voxel order that every
    tool shares, so that a mask of it, in whatever format, is turned to the series' by its affine.

    Raises:
        ValueError: If it is refused as by `nifti.read_label`, or lies off the series' grid.
        FileNotFoundError: If there is no such file.
    """
    if not isinstance(label, Masks):
        return _read_label(label, image, volume, num_classes)
    labels, found = [], []
    for path in label.files:
        one, more = _read_label(path, image, volume, None)
        named = image.name if isinstance(image, Series) else path.name
        labels.append(masks.reclass(one.voxels, label.values, num_classes, named))
        found += [finding for finding in more if finding not in found]
    made = masks.combine(labels, label.combine)
    return Volume(made, volume.affine, volume.case), found


def write(path: str | Path, label: UInt8[np.ndarray, "D H W"], like: Image) -> None:
    """Writes a label map of what `read` gave onto the scan's own voxels: as `nifti.write`.

    Nothing but geometry and voxels is written. A sheared affine is kept, which some readers
    (ITK's among them) refuse. Of a series with `own_slices` the label map has a plane for each of
    the slices, and where their steps are uneven the affine has the mean step.

    Raises:
        ValueError: If shapes differ, or the scan has become unreadable.
    """
    if not isinstance(like, Series):
        file, count = (like, 1) if isinstance(like, Path) else (like.files[0], like.count)
        if formats.ending(path):
            formats.write(Path(path), label, file)
        elif formats.ending(file):
            volume, _ = read(like)
            nifti.write_volume(path, Volume(label, volume.affine, volume.case))
        else:
            one_file = not isinstance(like, Path) and len(like.files) == 1
            nifti.write(path, label, file, count if one_file else 1)
        return
    stack = dicom_series.arrange(like)
    if like.unshear:
        places = stack.places if like.own_slices else None
        label = shear.shear_label(label, stack.affine, stack.shape, places)
    shape, affine = stack.shape, stack.affine
    if like.own_slices:
        shape, affine = stack.own_shape, stack.own_affine
    if label.shape != shape:
        raise UserError(f"{like.name}: label has shape {label.shape}, the series {shape}")
    nifti.write_volume(path, Volume(label, affine, like.name))


def called(image: Image) -> str:
    """What messages call it."""
    if isinstance(image, Channels):
        return str(image.files[0])
    return image.name if isinstance(image, Series) else str(image)


def files(place: Image | Label) -> tuple[Path, ...]:
    """What it lies in."""
    return formats.parts(place) if isinstance(place, Path) else place.files


def digest(place: Image | Label) -> bytes:
    """SHA-256 of all that decides what is read from it."""
    if isinstance(place, Path):
        return _file_digest(place)
    if isinstance(place, Channels):
        parts = (_file_digest(path) for path in place.files)
        return hashlib.sha256(b"".join((f"{place.count} channels".encode(), *parts))).digest()
    if isinstance(place, Series):
        which = f" {place.part}" if place.part else ""
        total = hashlib.sha256(f"{place.uneven} {place.unshear}{which}".encode())
    else:
        total = hashlib.sha256(f"{place.combine} {place.values}".encode())
    for part in sorted(_file_digest(path) for path in place.files):
        total.update(part)
    return total.digest()


def _file_digest(path: Path) -> bytes:
    """SHA-256 of a file; where its voxels lie in another, of the digests of both."""
    found = []
    for part in formats.parts(path):
        with part.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").digest())
    return found[0] if len(found) == 1 else hashlib.sha256(b"".join(found)).digest()


def _read_label(
    path: Path, image: Image, volume: Volume, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    if slice_file.is_dicom(path):
        return _read_seg(path, image, volume, num_classes)
    if not isinstance(image, Series):
        if formats.ending(path):
            return _read_other(path, image, volume, num_classes)
        return nifti.read_label(path, volume, num_classes=num_classes)
    return _read_on_series(path, image, volume, num_classes)


def _read_on_series(
    path: Path, image: Series, volume: Volume, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    """A label map of a series, on the voxels of an affine of its own."""
    try:
        label = _where_it_lies(path, num_classes)
    except (UserError, FileNotFoundError) as error:
        # Not chained: the original names the file, and with it perhaps the patient.
        text = str(error).replace(str(path), "its mask")
        raise Refusal(kind_of(error), f"{image.name}: {text}") from None
    stack = None
    shape, affine = volume.voxels.shape, volume.affine
    if image.unshear:
        stack = dicom_series.arrange(image)
        shape, affine = stack.shape, stack.affine
    turned = series_mask.onto(label, shape, affine)
    if turned is None:
        stack = stack or dicom_series.arrange(image)
        turned = series_mask.onto_planes(label, stack, shape)
    if turned is None:
        raise UserError(
            f"{image.name}: its mask has shape {label.voxels.shape} (D, H, W) and does not lie on "
            f"the voxels of the series, {shape}; draw it on the series itself, or on a conversion"
        )
    voxels, found = turned
    if image.unshear:
        voxels = shear.unshear_label(voxels, affine)
    return Volume(voxels, volume.affine, volume.case), found


def _read_seg(
    path: Path, image: Image, volume: Volume, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    """A DICOM SEG on the voxels of its scan; classes are the numbers of its segments."""
    try:
        if isinstance(image, Series):
            voxels, found = _on_series(path, image, volume)
        else:
            voxels, found = seg_mask.onto(path, volume.voxels.shape, volume.affine), []
        label = nifti.as_classes(voxels, num_classes)
    except Refusal as error:
        if isinstance(image, Series):
            raise said_of(image.name, error) from error
        hint = "; where slices are at uneven steps, go by the series itself, with data=dicom"
        text = f"{path}: {error}" + hint * (error.kind is Kind.MASK_GEOMETRY)
        raise Refusal(error.kind, text) from error
    return Volume(label, volume.affine, volume.case), found


def _on_series(path: Path, image: Series, volume: Volume) -> series_mask.Turned:
    stack = dicom_series.arrange(image)
    # Planes lie where the slices do, and not where an affine would have even ones.
    drawn = seg_mask.onto(path, stack.own_shape, stack.own_affine, stack.own_places)
    shape = stack.shape if image.unshear else volume.voxels.shape
    voxels, found = series_mask.on_all_planes(drawn, stack, shape)
    if image.unshear:
        voxels = shear.unshear_label(voxels, stack.affine)
    return voxels, found


def _read_other(
    path: Path, image: Image, volume: Volume, num_classes: int | None
) -> tuple[Volume, list[Finding]]:
    """A label map in a format that is not NIfTI, on the voxels of its scan."""
    made = formats.read(path)
    frame, first = formats.frame(path), files(image)[0]
    placed = formats.is_placed(path) and formats.is_placed(first)
    same = placed or (bool(frame) and frame == formats.frame(first))
    try:
        voxels, found = masks.lay(made, volume, placed=placed)
    except Refusal as error:
        raise said_of(path, error) from error
    label = _classes(path, voxels, num_classes)
    return Volume(label, volume.affine, volume.case), found if same else []


def _where_it_lies(path: Path, num_classes: int | None) -> Volume:
    """A label map on voxels and affine of its own."""
    if not formats.is_placed(path):
        text = f"{path}: states no place in space; give it as .nii.gz, .nrrd or .mha that does"
        raise Refusal(Kind.MASK_GEOMETRY, text)
    if not formats.ending(path):
        return nifti.read_label(path, nifti.read(path), num_classes=num_classes)[0]
    made = formats.read(path)
    return replace(made, voxels=_classes(path, made.voxels, num_classes))


def _classes(path: Path, voxels: np.ndarray, num_classes: int | None) -> UInt8[np.ndarray, "D H W"]:
    try:
        return nifti.as_classes(voxels, num_classes)
    except Refusal as error:
        raise said_of(path, error) from error


def ending(image: Image) -> str:
    """Of the label maps that belong to a scan: its own, in one file; of DICOM or NIfTI .nii.gz."""
    file = None if isinstance(image, Series) else files(image)[0]
    return (file and formats.label_ending(file)) or ".nii.gz"
