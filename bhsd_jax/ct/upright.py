"""A scan and its label map for readers that know only right angles and even steps.

ITK, and with it Slicer, ITK-SNAP and nnU-Net's reader, refuses a NIfTI whose affine is sheared, as
that of a tilted gantry is, and no NIfTI can hold uneven steps. The pair written here has neither:
slices are interpolated to even steps and moved over each other, every voxel stays at its place in
the patient, and the affine is the sform with code 1, without a qform that a reader might prefer.

Source: ITK 5.4, `itkNiftiImageIO.cxx`, which accepts a sform whose axes' cosines are below 1e-4.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from bhsd_jax.ct import formats, nifti, scan, shear
from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.labels import Labels
from bhsd_jax.volume import Grid, Image, Series, Volume

FOLDER = "upright"
_RIGHT_ANGLE = 5e-5  # cosine between two axes; half of what ITK takes
_ROUNDED = 1e-3  # cosine between rows and columns whose directions were rounded in a header


def pair(target: Path) -> tuple[Path, Path]:
    """Where the scan and the label map go that belong to the exact label map at `target`."""
    name = formats.stem(target)
    folder = target.parent / FOLDER
    return folder / f"{name}_scan.nii.gz", folder / f"{name}_labels.nii.gz"


def is_needed(own: OwnSlices) -> bool:
    """Whether the exact label map is one that such readers refuse, or misplace.

    False where the rows and columns of a slice are far from a right angle, as in no CT: moving
    slices does not mend that.
    """
    unit = own.affine[:3, :3] / np.linalg.norm(own.affine[:3, :3], axis=0)
    cosines = np.abs(unit.T @ unit - np.eye(3))
    return bool(cosines[1, 2] <= _ROUNDED and (cosines.max() > _RIGHT_ANGLE or not own.is_even))


def write(
    target: Path,
    image: Image,
    own: OwnSlices,
    exact: UInt8[np.ndarray, "N H W"],
    logits: Float[np.ndarray, "K _ _ _"],
    grid: Grid,
    labels: Labels | None = None,
    finish: Callable[[np.ndarray], np.ndarray] = lambda label: label,
    seen: Volume | None = None,
) -> None:
    """Writes the pair beside the exact label map, which belongs at `target`.

    `own` are the scan's slices, and the logits lie on the grid of what was read of them; `labels`
    say what they mean, `finish` is what was done to the likeliest to make the exact label map, and
    `seen` is what `scan.read` gave of the scan, if it was read already.

    Raises:
        ValueError: If the scan has become unreadable, or the shapes do not fit.
        faults.WriteError: If the system says no, such as on a full disk.
    """
    label = exact if own.is_even else finish(own.even_label(logits, grid, labels))
    volume = scan.read_native(image, seen)
    if label.shape == own.read_shape:  # else it was moved already, before the network saw it
        label = shear.move_label(label, own.read_affine)
    voxels = _moved(volume.voxels, own.read_affine, hounsfield=isinstance(image, Series))
    affine = shear.moved_affine(own.read_affine, own.read_shape)
    for path, array in zip(pair(target), (voxels, label), strict=True):
        nifti.write_volume(path, Volume(array, affine, ""))


def _moved(voxels: np.ndarray, affine: Float[np.ndarray, "4 4"], *, hounsfield: bool) -> np.ndarray:
    """In the type of the scan; interpolated HU are whole numbers again."""
    moved = shear.move_image(voxels, affine, fill=float(voxels.min()))
    whole = np.dtype(np.int16) if hounsfield else voxels.dtype
    if whole.kind not in "iu":
        return moved
    limits = np.iinfo(whole)
    return np.clip(np.rint(moved), limits.min, limits.max).astype(whole)
