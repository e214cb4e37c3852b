"""Phantoms on disk, with file names and headers as BHSD has them."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from bhsd_jax.datasets.phantom_scanner import Scan

_GOLDEN_32 = 0x9E3779B1  # odd, so multiplying by it permutes the 32-bit numbers


def case_id(seed: int, group: int, index: int) -> str:
    """A name like BHSD's, patient and study in hexadecimal; unique within a seed."""
    salt = int.from_bytes(hashlib.sha256(f"patient {seed}".encode()).digest()[:4])
    patient = ((group << 28 | index) * _GOLDEN_32 + salt) % 2**32
    study = hashlib.sha256(f"study {seed} {group} {index}".encode()).hexdigest()[:10]
    return f"ID_{patient:08x}_ID_{study}"


def write_image(path: Path, hu: np.ndarray, scan: Scan, *, scaled: bool) -> None:
    """Writes HU [D H W] as 16-bit integers.

    Args:
        path: Ends in `.nii.gz`.
        hu: int16.
        scan: For the affine; the one BHSD would store.
        scaled: Spread the values over all 16 bits with a slope and an intercept, as BHSD's files
            have them: HU come back with an error of at most half a slope. Else slope 1.
    """
    if not scaled:
        _write(path, hu, scan, 1.0, 0.0)
        return
    low, high = float(hu.min()), float(hu.max())
    slope = max(high - low, 1.0) / 65535
    inter = low + 32768 * slope
    raw = np.rint((hu - inter) / slope).clip(-32768, 32767).astype(np.int16)
    _write(path, raw, scan, slope, inter)


def write_label(path: Path, label: np.ndarray, scan: Scan) -> None:
    """Writes class indices [D H W] as uint16."""
    _write(path, label.astype(np.uint16), scan, 1.0, 0.0)


def write_json(path: Path, data: object) -> None:
    """Writes indented JSON."""
    replace(path, (json.dumps(data, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, with all folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write(path: Path, raw: np.ndarray, scan: Scan, slope: float, inter: float) -> None:
    affine = scan.stored_affine[:, [2, 1, 0, 3]]  # columns i, j, k
    image = nib.Nifti1Image(raw.transpose(2, 1, 0), None)
    image.set_data_dtype(raw.dtype)
    image.header.set_xyzt_units("mm")
    image.header.set_qform(affine, code=1)
    image.header.set_sform(None, code=0)
    image.header.set_slope_inter(slope, inter)
    # No time stamp in the gzip header: equal cases are equal files.
    replace(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
