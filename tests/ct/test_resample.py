"""nnU-Net's resampling numbers."""

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.ct import nifti_header, resample
from bhsd_jax.ct.resample import nearest_index, resampled_shape, separate_axis
from bhsd_jax.volume import Volume

OLD, NEW = (5.288, 0.6, 0.6), (5.0, 0.48828125, 0.48828125)


def golden_image():
    return (10 * np.sin(0.37 * np.arange(168))).reshape(4, 6, 7).astype(np.float32)


def test_the_published_image_numbers():
    shape, axis = resampled_shape((4, 6, 7), OLD, NEW), separate_axis(OLD, NEW)
    assert (shape, axis) == ((4, 7, 9), 0)
    out = resample.resample_image(golden_image(), shape, axis)
    assert out.sum(dtype=np.float64) == pytest.approx(13.566224, abs=2e-5)
    assert out.min() == pytest.approx(-9.938191, abs=1e-6)
    assert out.max() == pytest.approx(9.990716, abs=1e-6)
    np.testing.assert_allclose(
        out[0, 0, :5], [-0.613807, 2.011329, 5.259233, 7.658664, 9.553073], atol=1e-6
    )
    np.testing.assert_allclose(out[2, 3, :4], [-0.910733, 0.464767, 2.204306, 3.550065], atol=1e-6)


def test_the_published_label_numbers():
    label = ((np.arange(168) // 5) % 4).reshape(4, 6, 7).astype(np.uint8)
    out = resample.resample_label(label, (4, 7, 9), 0)
    assert np.bincount(out.ravel()).tolist() == [66, 73, 59, 54]
    assert out[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_slices_are_picked_as_nnunet_picks_them():
    assert nearest_index(40, 20).tolist() == list(range(1, 40, 2))
    repeated = nearest_index(28, 30)
    doubled = [i for i in range(28) if (repeated == i).sum() == 2]
    assert doubled == [7, 21]


@pytest.mark.parametrize(
    ("old", "new", "axis"),
    [
        ((5, 0.5, 0.5), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 4), 2),
        ((1, 1, 1), (1, 1, 1), None),
        ((3, 1, 1), (1, 1, 1), None),  # a ratio of exactly 3 is not thick
        ((4, 4, 1), (1, 1, 1), None),  # two coarse axes are no slices
    ],
)
def test_which_axis_is_treated_apart(old, new, axis):
    assert separate_axis(old, new) == axis


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [((3, 1, 1), None), ((2.4, 0.8, 0.8), 0), ((4, 4, 1), None)],
)
@pytest.mark.parametrize(("form", "most"), [("qform", 0), ("sform", 0.02)])
def test_a_turned_nifti_has_the_axis_of_its_pixdim(form, most, spacing, axis):
    """In float32 2.4 is more than 3 times 0.8. An sform's numbers may be too coarse to tell."""
    found = []
    for angle in np.radians(np.linspace(0, 23, 60)):
        turn = np.array(
            [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
        )
        header = nib.Nifti1Header()
        header.set_data_shape((4, 5, 6))
        affine = np.diag([1.0, 1, 1, 1])
        affine[:3, :3] = turn * np.float32(spacing[::-1]).astype(float)
        (header.set_qform if form == "qform" else header.set_sform)(affine, code=1)
        native = nifti_header.affine(header)
        volume = Volume(np.zeros((6, 5, 4), np.float32), native, "a")
        found.append(separate_axis(volume.spacing_mm, (1, 1, 1)))
    assert found[0] == axis, "along the world's axes"
    assert np.mean([one != axis for one in found]) <= most


def test_shapes_round_half_to_even_and_never_vanish():
    assert resampled_shape((5, 3, 1), (1, 1, 1), (2, 2, 9)) == (2, 2, 1)


def test_an_image_of_the_right_shape_is_untouched():
    image = golden_image()
    assert resample.resample_image(image, (4, 6, 7), 0) is image


def test_a_linear_ramp_stays_linear_inside():
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32), (6, 8, 12))
    out = resample.resample_linear(ramp, (6, 8, 24), None)
    want = (np.arange(24) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(out[3, 4, 1:-1], want[1:-1], atol=1e-5)


def test_cubic_never_leaves_the_range_of_its_source():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2, (5, 9, 9)).astype(np.float32) * 100
    for axis in (0, None):
        out = resample.resample_image(image, (7, 20, 13), axis)
        assert out.min() >= 0
        assert out.max() <= 100


def test_labels_are_never_invented():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 2, 5], (6, 9, 9)).astype(np.uint8)
    for axis in (0, None):
        out = resample.resample_label(label, (9, 14, 5), axis)
        assert set(np.unique(out)) <= {0, 2, 5}
        assert out.dtype == np.uint8


def test_a_label_far_from_any_border_is_kept():
    label = np.zeros((4, 20, 20), np.uint8)
    label[:, 10:] = 3
    out = resample.resample_label(label, (4, 40, 40), 0)
    assert (out[:, :18] == 0).all()
    assert (out[:, 22:] == 3).all()


@pytest.mark.parametrize("case", range(7))
def test_arrays_resampled_by_nnunet_are_matched(golden, case):
    """Up and down, every separate axis, none, and two coarse axes; computed by nnunetv2 2.8.1."""
    with np.load(golden / "resample_nnunet.npz") as arrays:
        known = {key.split("_", 1)[1]: arrays[key] for key in arrays if key[0] == str(case)}
    old, new = (tuple(row) for row in known["spacing"].tolist())
    shape = resampled_shape(known["voxels"].shape, old, new)
    axis = separate_axis(old, new)
    assert shape == known["image"].shape
    image = resample.resample_image(known["voxels"], shape, axis)
    linear = resample.resample_linear(known["voxels"], shape, axis)
    scale = np.abs(known["voxels"]).max()
    np.testing.assert_allclose(image / scale, known["image"] / scale, atol=1e-6)
    np.testing.assert_allclose(linear / scale, known["linear"] / scale, atol=1e-6)
    label = resample.resample_label(known["label_in"], shape, axis)
    np.testing.assert_array_equal(label, known["label"])
