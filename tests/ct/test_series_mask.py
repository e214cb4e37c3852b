"""Masks with a plane for each slice of an uneven series, in what NIfTI can say of such a stack."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from dicom_files import block, write_series

from bhsd_jax.ct import nifti, scan
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.defects import Kind
from bhsd_jax.volume import Volume

PLACES = np.array([0, 2.5, 5, 7.5, 13.5, 19.5, 25.5, 31.5])  # a thin skull base


def uneven(root, tilt=0.0):
    write_series(root, block((8, 12, 10)), places=PLACES, tilt_deg=tilt)
    (group,) = dicom_series.find(root)
    return group.as_series("case", uneven="resample", unshear=False)


def on_planes(drawn, depth):
    """Each plane has the slice's label that it is nearest to."""
    places = np.linspace(PLACES[0], PLACES[-1], depth)
    return drawn[np.abs(places[:, None] - PLACES).argmin(1)]


@pytest.mark.parametrize("tilt", [0.0, -12.0])
@pytest.mark.parametrize("unshear", [False, True])
def test_what_predict_writes_of_an_uneven_series_can_be_its_mask(tmp_path, tilt, unshear):
    series = replace(uneven(tmp_path / "dicom", tilt), unshear=unshear)
    drawn = (block((8, 12, 10))[:, ::-1] > 40).astype(np.uint8)
    own = replace(series, own_slices=True, unshear=False)
    scan.write(tmp_path / "m.nii.gz", drawn, like=own)
    volume, _ = scan.read(series)
    label, found = scan.read_label(tmp_path / "m.nii.gz", series, volume, num_classes=2)
    assert label.voxels.shape == volume.voxels.shape
    assert [one.kind for one in found] == [Kind.MASK_UNEVEN]
    want = on_planes(drawn, dicom_series.arrange(series).shape[0])
    if not (unshear and tilt):
        np.testing.assert_array_equal(label.voxels, want)
    assert label.voxels.sum() == want.sum()


@pytest.mark.parametrize(("step", "at"), [(2.5, 0), (6.0, 0), (6.0, -1), (4.5, 0)])
@pytest.mark.parametrize("upside_down", [False, True])
def test_the_step_of_a_mask_is_the_first_one_or_the_mean(tmp_path, step, at, upside_down):
    """And the place of its first or of its last slice is right."""
    series = uneven(tmp_path / "dicom")
    volume, _ = scan.read(series)
    drawn = (block((8, 12, 10))[:, ::-1] > 40).astype(np.uint8)
    affine = volume.affine.copy()
    affine[2, 0] = step
    if at:
        affine[2, 3] += 31.5 - 7 * step
    stored = drawn
    if upside_down:
        stored, affine = drawn[::-1], affine @ np.diag([-1.0, 1, 1, 1])
        affine[:3, 3] -= 7 * affine[:3, 0]
    nifti.write_volume(tmp_path / "m.nii.gz", Volume(stored, affine, ""))
    label, found = scan.read_label(tmp_path / "m.nii.gz", series, volume, num_classes=2)
    np.testing.assert_array_equal(label.voxels, on_planes(drawn, len(volume.voxels)))
    assert [one.kind for one in found] == [Kind.MASK_UNEVEN]
    affine[0, 3] += 1
    nifti.write_volume(tmp_path / "off.nii.gz", Volume(stored, affine, ""))
    with pytest.raises(ValueError, match="does not lie on the voxels of the series"):
        scan.read_label(tmp_path / "off.nii.gz", series, volume, num_classes=2)


@pytest.mark.skipif(not shutil.which("dcm2niix"), reason="needs dcm2niix")
def test_a_mask_that_is_drawn_on_what_dcm2niix_makes_lies_on_the_series(tmp_path):
    series = uneven(tmp_path / "dicom")
    command = ["dcm2niix", "-f", "made", "-o", tmp_path, tmp_path / "dicom"]
    subprocess.run(command, check=False, capture_output=True)  # 1 for a warning
    made = nifti.read(tmp_path / "made.nii")
    drawn = (made.voxels > 40).astype(np.uint8)
    nifti.write_volume(tmp_path / "m.nii.gz", Volume(drawn, made.affine, ""))
    volume, _ = scan.read(series)
    label, _ = scan.read_label(tmp_path / "m.nii.gz", series, volume, num_classes=2)
    head = (block((8, 12, 10))[:, ::-1] > 40).astype(np.uint8)
    np.testing.assert_array_equal(label.voxels, on_planes(head, len(volume.voxels)))
