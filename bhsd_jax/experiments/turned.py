"""A copy of a data set that is turned, so that its slices are the coronal planes of the scans."""

import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

# A quarter turn about the axis from right to left: what was anterior is now superior.
_TURN = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
_FOLDERS = ("imagesTr", "labelsTr")


def write_coronal(source: Path, target: Path) -> Path:
    """Copies a folder of the Decathlon to `target` with every scan turned; returns `target`.

    The voxels stay as they are: the affines alone say another direction. What is there already
    is kept.

    Raises:
        UserError: If the folder has no `dataset.json` or no scan.
    """
    scans = {part: sorted((source / part).glob("[!.]*.nii.gz")) for part in _FOLDERS}
    if not (source / "dataset.json").is_file() or not all(scans.values()):
        raise UserError(f"{source}: no dataset.json, or no *.nii.gz in {' or '.join(_FOLDERS)}")
    for part, paths in scans.items():
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in paths:
            _copy(path, target / part / path.name)
    for path in (*source.glob("dataset.json"), *source.glob("splits_final.json")):
        shutil.copyfile(path, target / path.name)
    logger.info("%s: the scans of %s, turned", target, source)
    return target


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    image = nib.Nifti1Image.load(source)
    affine, stored = _TURN @ image.affine, image.dataobj
    assert isinstance(stored, ArrayProxy)  # of a file
    turned = nib.Nifti1Image(stored.get_unscaled(), affine, image.header)
    turned.header.set_slope_inter(stored.slope, stored.inter)
    turned.set_sform(affine, 1)
    turned.set_qform(affine, 1)
    beside = target.with_name(f".{target.name}")  # a copy that was cut short is made again
    nib.save(turned, beside)
    beside.rename(target)
