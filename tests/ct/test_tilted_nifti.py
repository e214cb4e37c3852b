"""What converters make of a tilted series, and the volume of a voxel that comes out of it."""

import math

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.ct import hu, nifti, prepare, scan
from bhsd_jax.datasets.folder import Folder
from bhsd_jax.defects import Kind
from bhsd_jax.volume import Case

TILT, FEED, PIXEL = 18.0, 5.0, 1.0
DISTANCE = FEED * math.cos(math.radians(TILT))
TRUE_ML = DISTANCE * PIXEL**2 / 1000  # 4.755 mm3, however it is stored


def columns():
    """Of the slices: along their rows, along their columns, across them; unit vectors."""
    cos, sin = math.cos(math.radians(TILT)), math.sin(math.radians(TILT))
    return np.array([-1.0, 0, 0]), np.array([0, cos, sin]), np.array([0, -sin, cos])


def matrix(step, slope=(0.0, 0.0)):
    across, down, up = columns()
    made = np.eye(4)
    made[:3, :3] = np.stack([across * PIXEL, down * PIXEL, step], axis=1)
    made[:3, 1] += slope[0] * up
    made[:3, 0] += slope[1] * up
    return made


TABLE = np.array([0.0, 0, 1])
UPRIGHT = matrix(columns()[2] * DISTANCE)
PLAIN = matrix(TABLE * DISTANCE)  # dcm2niix: the table's direction, the distance's length
SHEARED = matrix(TABLE * FEED)  # the truth


def store(path, sform, qform=None):
    image = nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), sform)
    image.header.set_sform(sform, 1)
    if qform is not None:
        image.header.set_qform(qform, 1)
    nib.save(image, path)
    return path


def case_of(path, **options):
    return Case("a", "a", path, None, "train", **options)


def facts(path, **options):
    return prepare.fingerprint_case(
        case_of(path, **options), num_classes=2, modality="ct", crop_hu=None
    )


def voxel_ml(path, *, table_feed=False):
    return hu.voxel_ml(nifti.read(path).affine, table_feed=table_feed)


def test_the_slice_step_of_dcm2niixs_plain_file_is_lengthened(tmp_path):
    path = store(tmp_path / "plain.nii", PLAIN, UPRIGHT)
    assert abs(np.linalg.det(nib.load(path).affine)) == pytest.approx(4.523, abs=1e-3)
    assert voxel_ml(path) == pytest.approx(TRUE_ML, rel=1e-6)
    np.testing.assert_allclose(nifti.read(path).affine[:, [2, 1, 0, 3]], SHEARED, atol=1e-5, rtol=0)
    found = facts(path).findings
    assert [(f.kind, f.done) for f in found if f.kind is not Kind.NO_AIR] == [
        (Kind.SHEAR_SHORT, "repaired")
    ]
    assert "slice step 4.755 mm, in truth 5.000" in " ".join(f.text for f in found)


def test_a_label_map_on_that_file_has_its_geometry_bit_for_bit(tmp_path):
    path = store(tmp_path / "plain.nii", PLAIN, UPRIGHT)
    nifti.write(tmp_path / "label.nii", np.zeros((4, 5, 6), np.uint8), like=path)
    written = nib.load(tmp_path / "label.nii")
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    label, found = nifti.read_label(tmp_path / "label.nii", nifti.read(path), num_classes=2)
    np.testing.assert_array_equal(label.affine, nifti.read(path).affine)
    assert not found


@pytest.mark.parametrize(
    ("sform", "qform"),
    [
        (SHEARED, None),
        (SHEARED, UPRIGHT),
        (UPRIGHT, UPRIGHT),  # `_Tilt_1`
        (PLAIN, None),  # nothing says that it is too short
        (PLAIN, matrix(columns()[2] * DISTANCE, slope=(0.1, 0.0))),
        (PLAIN, matrix(columns()[2] * FEED)),
    ],
)
def test_no_other_affine_is_changed(tmp_path, sform, qform):
    path = store(tmp_path / "a.nii", sform, qform)
    np.testing.assert_allclose(nifti.read(path).affine[:, [2, 1, 0, 3]], sform, atol=1e-5)
    assert Kind.SHEAR_SHORT not in {finding.kind for finding in facts(path).findings}


@pytest.mark.parametrize("table_feed", [True, False])
def test_an_upright_turned_affine_is_right_or_the_feeds_as_the_data_set_says(tmp_path, table_feed):
    step = FEED if table_feed else DISTANCE  # BHSD's; dcm2niix's `_Tilt_1`, or a reformat
    path = store(tmp_path / "a.nii", matrix(columns()[2] * step))
    assert voxel_ml(path, table_feed=table_feed) == pytest.approx(TRUE_ML, rel=1e-5)
    found = facts(path, table_feed=table_feed)
    assert found.tilt_corrected == table_feed
    kinds = {finding.kind for finding in found.findings}
    assert (Kind.TILT_AMBIGUOUS in kinds) != table_feed


def test_a_folder_of_ones_own_says_nothing_of_the_tables_feed(tmp_path):
    (tmp_path / "images").mkdir()
    store(tmp_path / "images" / "a.nii", UPRIGHT)
    (case,) = Folder(tmp_path).cases()
    assert not case.table_feed


def test_whoever_reads_the_scan_is_told_what_was_lengthened(tmp_path):
    path = store(tmp_path / "plain.nii", PLAIN, UPRIGHT)
    assert "slice step 4.755 mm, in truth 5.000" in " ".join(
        finding.text for finding in scan.read(path)[1]
    )
