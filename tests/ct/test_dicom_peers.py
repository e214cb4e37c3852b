"""Voxels and places as SimpleITK and dcm2niix read them, where they are installed."""

import math
import re
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
from dicom_files import block, write_series
from enhanced_files import write_enhanced

from bhsd_jax.ct import hu, nifti, scan
from bhsd_jax.ct.dicom import series as dicom_series

TILT = 18.0
SHORT = "1.0.20260724"  # of dcm2niix, which makes the slice step of a tilted series too short


def of_a_scanner(k, data):
    """What dcm2niix looks at: without it, a turned affine comes out that hides the tilt."""
    data.GantryDetectorTilt, data.InstanceNumber = TILT, k + 1


@pytest.fixture(params=["single files", "enhanced"])
def root(request, tmp_path):
    """A tilted series of 5 mm between slices, in either form."""
    paths = write_series(
        tmp_path / "single", block((6, 20, 16)), tilt_deg=TILT, change=of_a_scanner
    )
    if request.param == "single files":
        return tmp_path / "single"
    return write_enhanced(tmp_path / "enhanced" / "IM", paths)[0].parent


def ours(root):
    (group,) = dicom_series.find(root)
    return scan.read(group.as_series("case", uneven="refuse", unshear=False))[0]


def test_simpleitk_reads_the_same_voxels_from_the_same_place(root):
    sitk = pytest.importorskip("SimpleITK", reason="needs the package SimpleITK")
    volume = ours(root)
    if root.name == "single":
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(root))
        image = sitk.ReadImage(names)
    else:
        image = sitk.ReadImage(str(root / "IM"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.voxels[:, ::-1])
    corner = volume.affine @ (0, volume.voxels.shape[1] - 1, 0, 1)
    np.testing.assert_allclose(corner[:3], np.multiply(image.GetOrigin(), (-1, -1, 1)), atol=1e-6)


@pytest.fixture
def converted(root, tmp_path):
    """The file that dcm2niix makes of the series."""
    if shutil.which("dcm2niix") is None:
        pytest.skip("needs the program dcm2niix")
    if root.name == "enhanced":
        pytest.skip(f"dcm2niix {SHORT} states the feed for enhanced CT, not the distance")
    (tmp_path / "out").mkdir()
    command = ["dcm2niix", "-z", "n", "-b", "n", "-f", "s", "-o", str(tmp_path / "out"), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "out" / "s.nii"


def test_what_dcm2niix_makes_of_a_series_has_its_voxels_and_milliliters(root, converted):
    volume, plain = ours(root), nifti.read(converted)
    want = hu.voxel_ml(volume.affine, table_feed=False)
    assert want == pytest.approx(5 * 2 * 1.5 / 1000)
    assert hu.voxel_ml(plain.affine, table_feed=False) == pytest.approx(want, rel=1e-5)
    np.testing.assert_array_equal(plain.voxels, volume.voxels)


def test_a_slice_step_that_dcm2niix_makes_too_short_is_put_right(root, converted):
    told = subprocess.run(["dcm2niix", "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"1\.0\.\d{8}", told.stdout)
    if version is None or version[0] < SHORT:
        # 1.0.20220720 shears the rows instead: the volume of a voxel is right, its axes are not.
        pytest.skip(f"needs dcm2niix {SHORT} or newer")
    volume, plain = ours(root), nifti.read(converted)
    want = hu.voxel_ml(volume.affine, table_feed=False)
    stored = nib.load(converted).affine
    short = abs(np.linalg.det(stored[:3, :3])) / 1000
    assert short == pytest.approx(want * math.cos(math.radians(TILT)), rel=1e-5)
    np.testing.assert_allclose(np.abs(plain.affine), np.abs(volume.affine), atol=1e-3)
