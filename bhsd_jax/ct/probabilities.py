"""Class probabilities of a scan with what a reader of the file needs. NumPy only."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bhsd_jax.ct import formats
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

AXES = ("class", "k", "j", "i")
"""Of the array in a file: i, j, k are the voxel axes of the scan's NIfTI file, i the fastest."""


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Probabilities of all classes, or of all regions, on the scan's own voxels."""

    values: Float[np.ndarray, "K I J K3"]  # class, then the scan's axes in nibabel's order
    classes: tuple[str, ...]  # by index, background first; or names of the regions
    affine: Float[np.ndarray, "4 4"]  # voxel (i, j, k, 1) -> world (x, y, z, 1) in mm, RAS+

    def save(self, path: str | Path) -> None:
        """Writes an .npz: `probabilities` (float16), `classes`, `axes` (`AXES`) and `affine`.

        Raises:
            faults.WriteError: If the system says no, such as on a full disk.
        """
        data = io.BytesIO()
        np.savez_compressed(
            data,
            probabilities=np.transpose(self.values, (0, 3, 2, 1)).astype(np.float16),
            classes=np.array(self.classes),
            axes=np.array(AXES),
            affine=np.asarray(self.affine, np.float64),
        )
        files.write_bytes(path, data.getvalue())


def beside(label_map: Path) -> Path:
    """Where the probabilities of a label map lie."""
    return label_map.with_name(f"{formats.stem(label_map)}_probabilities.npz")


def load(path: str | Path) -> Probabilities:
    """Reads what `Probabilities.save` has written; values are float16.

    Raises:
        ValueError: If it is damaged, or an older version wrote it without classes and affine.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy parses a damaged header as Python, which raises anything
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if missing := {"probabilities", "classes", "axes", "affine"} - found.keys():
        raise UserError(f"{path}: holds no {sorted(missing)[0]}; predict the scan again")
    values, axes = found["probabilities"], tuple(found["axes"].tolist())
    if values.dtype != np.float16 or values.ndim != 4 or axes != AXES:
        raise UserError(
            f"{path}: holds {values.dtype}{values.shape} with axes {', '.join(map(str, axes))}, "
            f"not float16 of axes {', '.join(AXES)}"
        )
    classes = tuple(found["classes"].tolist())
    return Probabilities(np.transpose(values, (0, 3, 2, 1)), classes, found["affine"])
