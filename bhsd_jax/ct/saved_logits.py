"""A first network's logits on its own voxels, kept for the second network of a cascade. NumPy only.

nnU-Net's trainer brings these to the voxels of the second network, and asks for the likeliest label
there; its predictor is given the label map instead, which has been resampled once more by then.
"""

import io
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from bhsd_jax.ct import formats, resample
from bhsd_jax.labels import Labels
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Grid

ENDING = "_logits.npz"


def beside(label_map: Path) -> Path:
    """Where the logits of a label map lie."""
    return label_map.with_name(f"{formats.stem(label_map)}{ENDING}")


def save(path: Path, logits: Float[np.ndarray, "K D H W"], grid: Grid) -> None:
    """Writes an .npz: `logits` (float32), and as JSON the `grid` they lie on.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    data = io.BytesIO()
    grid_json = np.array(json.dumps(grid.to_json()))
    np.savez_compressed(data, logits=np.asarray(logits, np.float32), grid=grid_json)
    files.write_bytes(path, data.getvalue())


def load(path: Path) -> tuple[Float[np.ndarray, "K D H W"], Grid]:
    """What `save` has written.

    Raises:
        ValueError: If the file is damaged.
        FileNotFoundError: If there is no such file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            grid = Grid.from_json(json.loads(str(stored["grid"])))
            logits = stored["logits"]
            if logits.shape[1:] != grid.shape or logits.dtype != np.float32:
                raise ValueError(f"{logits.dtype}{logits.shape} on a grid of {grid.shape}")
            return logits, grid
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy parses a damaged header as Python, which raises anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged ({reason}); predict the scan again") from error


def label_on(path: Path, grid: Grid, labels: Labels) -> UInt8[np.ndarray, "D H W"]:
    """The likeliest label, or the regions, on the voxels of a second network.

    Whether slices are resampled apart is asked of the first network's spacing alone.

    Raises:
        ValueError: If the file is damaged, or of another scan, crop or number of labels.
        FileNotFoundError: If there is no such file.

    Source: nnU-Net v2.8.1, `resample_and_save`.
    """
    logits, own = load(path)
    for what in ("native_shape", "order", "flip", "crop_start", "crop_stop"):
        theirs, ours = getattr(own, what), getattr(grid, what)
        if theirs != ours:
            raise UserError(
                f"{path}: {what} of the scan it was predicted of is {theirs}, here {ours}; both "
                "stages of a cascade prepare the same scans alike"
            )
    if len(logits) != labels.outputs:
        raise UserError(f"{path}: holds {len(logits)} classes, not {labels.outputs}")
    axis = resample.separate_axis(own.spacing_mm, own.spacing_mm)
    moved = [resample.resample_linear(one, grid.shape, axis) for one in logits]
    return labels.of_logits(np.stack(moved))
