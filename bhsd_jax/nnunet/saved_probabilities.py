"""Probabilities as nnU-Net saves them beside a label map, for its programs: `<case>.npz`, `.pkl`.

The array `probabilities` is float32 [class or region, then the axes of the scan as nnU-Net's
readers have them]; the pickle says where the scan lies. `nnUNetv2_ensemble` reads both.

Source: nnU-Net v2.8.1, `export_prediction_from_logits`, `SimpleITKIO`, `NibabelIO`, `Tiff3DIO`.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bhsd_jax.ct import formats, scan
from bhsd_jax.platform import files
from bhsd_jax.volume import Grid, Image, Series, column_lengths

_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def pair(target: Path) -> tuple[Path, Path]:
    """Paths of the two files that belong to the label map at `target`."""
    stem = formats.stem(target)
    return target.with_name(f"{stem}.npz"), target.with_name(f"{stem}.pkl")


def write(
    target: Path, image: Image, grid: Grid, probabilities: Float[np.ndarray, "K D H W"]
) -> None:
    """Writes both beside the label map at `target`.

    Raises:
        ValueError: If the scan has become unreadable.
        faults.WriteError: If the system says no, such as on a full disk.
    """
    array, place = pair(target)
    data = io.BytesIO()
    np.savez_compressed(data, probabilities=probabilities.astype(np.float32))
    files.write_bytes(array, data.getvalue())
    files.write_bytes(place, pickle.dumps(properties(image, grid)))


def is_whole(target: Path, shape: tuple[int, ...]) -> bool:
    """Whether both are there, and the array can be read and has this shape."""
    array, place = pair(target)
    if not (array.is_file() and place.is_file()):
        return False
    try:
        with array.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["probabilities"].shape == shape
    except Exception:  # NumPy parses a damaged header as Python, which raises anything
        return False


def properties(image: Image, grid: Grid) -> dict[str, Any]:
    """What nnU-Net's reader and preprocessor note of a scan, in plain types and one array."""
    affine = np.asarray(grid.native_affine)
    spacing = column_lengths(affine)
    # ITK counts x first, and its world runs to L, P, S.
    columns = _TO_LPS @ (affine[:3, :3] / spacing)[:, ::-1]
    itk = {
        "spacing": tuple(spacing[::-1].tolist()),
        "origin": tuple((_TO_LPS @ affine[:3, 3]).tolist()),
        "direction": tuple(columns.ravel().tolist()),
    }
    return {
        "sitk_stuff": _planar(image) or itk,
        "nibabel_stuff": {"original_affine": affine[:, [2, 1, 0, 3]]},
        "spacing": spacing.tolist(),
        "shape_before_cropping": tuple(grid.native_shape[axis] for axis in grid.order),
        "bbox_used_for_cropping": _box(grid),
        "shape_after_cropping_and_before_resampling": grid.cropped_shape,
    }


def _planar(image: Image) -> dict[str, Any] | None:
    """Place of a scan that is a picture of two axes; None of any other scan."""
    if isinstance(image, Series):
        return None
    return formats.planar_place(scan.files(image)[0])


def _box(grid: Grid) -> list[list[int]]:
    """First voxel and end of the crop along the prepared axes, in the direction of the file."""
    ends = zip(grid.crop_start, grid.crop_stop, grid.flip, grid.order, strict=True)
    sizes = grid.native_shape
    return [
        [sizes[axis] - stop, sizes[axis] - start] if flip else [start, stop]
        for start, stop, flip, axis in ends
    ]
