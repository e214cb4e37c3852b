"""Phantoms on disk, with file names and headers as BHSD has them."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from bhsd_jax.platform import csv_files, files

_GOLDEN_32 = 0x9E3779B1  # odd, so multiplying by it permutes the 32-bit numbers


def case_id(seed: int, group: int, index: int) -> str:
    """A name like BHSD's, patient and study in hexadecimal; unique within a seed."""
    salt = int.from_bytes(hashlib.sha256(f"patient {seed}".encode()).digest()[:4])
    patient = ((group << 28 | index) * _GOLDEN_32 + salt) % 2**32
    study = hashlib.sha256(f"study {seed} {group} {index}".encode()).hexdigest()[:10]
    return f"ID_{patient:08x}_ID_{study}"


def write_image(path: Path, hu: np.ndarray, affine: np.ndarray, *, scaled: bool) -> None:
    """Writes HU [D H W] as 16-bit integers.

    Args:
        path: Ends in `.nii.gz`.
        hu: Whole numbers; those of 16 bits unless `scaled`.
        affine: Of voxel (d, h, w, 1).
        scaled: Spread the values over all 16 bits with a slope and an intercept, as BHSD's files
            have them: HU come back with an error of at most half a slope. Else slope 1.
    """
    if not scaled:
        write(path, hu.astype(np.int16), affine, 1.0, 0.0)
        return
    low, high = float(hu.min()), float(hu.max())
    slope = max(high - low, 1.0) / 65535
    inter = low + 32768 * slope
    raw = np.rint((hu - inter) / slope).clip(-32768, 32767).astype(np.int16)
    write(path, raw, affine, slope, inter)


def write_label(path: Path, label: np.ndarray, affine: np.ndarray) -> None:
    """Writes class indices [D H W] as uint16."""
    write(path, label.astype(np.uint16), affine, 1.0, 0.0)


def write(path: Path, raw: np.ndarray, affine: np.ndarray, slope: float, inter: float) -> None:
    """Writes stored values [D H W] with a qform alone, as BHSD's files have it."""
    image = nib.Nifti1Image(raw.transpose(2, 1, 0), None)
    image.set_data_dtype(raw.dtype)
    image.header.set_xyzt_units("mm")
    image.header.set_qform(affine[:, [2, 1, 0, 3]], code=1)  # columns i, j, k
    image.header.set_sform(None, code=0)
    image.header.set_slope_inter(slope, inter)
    # No time stamp in the gzip header: equal cases are equal files.
    files.write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def official_lists(train: list[str], test: list[str], version: int) -> dict:
    """BHSD's `dataset.json`, its paths that exist nowhere included."""
    kinds = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
    return {
        "description": "generated heads in the layout of BHSD",
        "labels": {str(i): kind for i, kind in enumerate(("background", *kinds))},
        "licence": "CC0-1.0",
        "modality": {"0": "CT"},
        "name": "synthetic",
        "numTest": len(test),
        "numTraining": len(train),
        "reference": "",
        "release": str(version),
        "tensorImageSize": "3D",
        "test": [f"./imagesTs/{id}.nii.gz" for id in test],
        "training": [
            {"image": f"./imagesTr/{id}.nii.gz", "label": f"./labelsTr/{id}.nii.gz"} for id in train
        ],
    }


def write_slices(path: Path, classes: Sequence[str], rows: Mapping[str, list[list[int]]]) -> None:
    """Writes `slice_labels.csv`: per scan and slice, whether anything bleeds, then each class."""
    table = ((case, k, *values) for case in sorted(rows) for k, values in enumerate(rows[case]))
    csv_files.write_csv(path, ("case", "slice", "any", *classes), table, line_end="\n")


def write_json(path: Path, data: object) -> None:
    """Writes indented JSON."""
    files.write_text(path, json.dumps(data, indent=2) + "\n")
