"""Voxels and places as SimpleITK and dcm2niix read them, where they are installed."""

import math
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


def test_what_dcm2niix_makes_of_a_series_has_its_voxels_and_milliliters(root, tmp_path):
    if shutil.which("dcm2niix") is None:
        pytest.skip("needs the program dcm2niix")
    if root.name == "enhanced":
        pytest.skip("dcm2niix 1.0.20260724 states the feed for enhanced CT, not the distance")
    (tmp_path / "out").mkdir()
    command = ["dcm2niix", "-z", "n", "-b", "n", "-f", "s", "-o", str(tmp_path / "out"), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    volume = ours(root)
    plain = nifti.read(tmp_path / "out" / "s.nii")
    want = hu.voxel_ml(volume.affine, table_feed=False)
    assert want == pytest.approx(5 * 2 * 1.5 / 1000)
    assert hu.voxel_ml(plain.affine, table_feed=False) == pytest.approx(want, rel=1e-5)
    stored = nib.load(tmp_path / "out" / "s.nii").affine
    short = abs(np.linalg.det(stored[:3, :3])) / 1000
    assert short == pytest.approx(want * math.cos(math.radians(TILT)), rel=1e-5)
    np.testing.assert_array_equal(plain.voxels, volume.voxels)
    np.testing.assert_allclose(np.abs(plain.affine), np.abs(volume.affine), atol=1e-3)
