"""Series with headers that a DICOM SEG can refer to, and such SEG."""

import numpy as np
from dicom_files import write_series
from enhanced_files import write_enhanced

from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.volume import HEMORRHAGE

SHAPE = (9, 20, 18)  # slices, rows, columns
UNEVEN = np.cumsum([0, 4, 4, 4, 4, 1.1, 7, 7, 7])
FRAME = "1.2.3.9"
MAKER = segmentation.Maker("supervised on made up")
KINDS = ["plain", "tilted", "uneven", "tilted, uneven", "enhanced", "enhanced, tilted, uneven"]


def complete(k, data):
    """What headers of a real scanner have besides."""
    data.FrameOfReferenceUID, data.SeriesNumber = FRAME, 3
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20260102", "1200", "7", ""
    data.PatientSex = "O"
    if k % 2:  # a type 2 attribute: it may be empty
        data.SliceThickness = 5


def label_of(shape=SHAPE, seed=0):
    """Every class somewhere, one of them nowhere; [slice, row, column] of the files."""
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:11, 2:9] = 2
    label[4:7, 5:8, 4:13] = 3
    label[0, 15:18, 1:4] = 5
    label[8, 1:3, 14:17] = 1
    noise = np.random.default_rng(seed).random(shape) < 0.02
    return np.where(noise, np.uint8(1), label)


def make(folder, kind="plain", change=complete, series="1.2.3.5"):
    tilt = 18.5 if "tilted" in kind else 0.0
    places = UNEVEN if "uneven" in kind else None
    source = folder.parent / "plain" if "enhanced" in kind else folder
    paths = write_series(
        source, np.full(SHAPE, 30), tilt_deg=tilt, places=places, change=change, series=series
    )
    if "enhanced" in kind:
        order = [4, 0, 8, 2, 1, 7, 3, 6, 5]  # frames in any order
        paths = write_enhanced(folder / "one.dcm", [paths[k] for k in order])
    return paths


def series_of(folder):
    (case,) = dicom_cases.scans(folder, uneven="refuse", unshear=False)
    return case.image


def write(folder, path, label, classes=HEMORRHAGE, **options):
    """Writes the SEG of the only series of a folder."""
    settings = {"kind": "binary", "maker": MAKER} | options
    segmentation.write(path, series_of(folder), label[:, ::-1], classes, **settings)
    return path
