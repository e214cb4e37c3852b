"""Grids whose first voxel centers coincide, as BLAST-CT resamples scans with SimpleITK."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_run

from bhsd_jax.ct import centers, geometry, prepare
from bhsd_jax.volume import Volume

NEW = (1.0, 1.0, 1.0)
UPRIGHT = np.array([[0, 0, -2, 9], [0, -0.8, 0, 4], [2.5, 0, 0, -3], [0, 0, 0, 1.0]])  # S, P, L
# Rows and columns run the other way: to anterior and to the right.
TURNED = np.array([[0, 0, 2, 9], [0, 0.8, 0, 4], [2.5, 0, 0, -3], [0, 0, 0, 1.0]])


def scan(dtype=np.float32, affine=UPRIGHT):
    voxels = np.random.default_rng(2).normal(20, 90, (5, 9, 7)).astype(dtype)
    return Volume(voxels, affine, "a")


def grid_of(volume):
    return geometry.locate(volume, spacing_mm=NEW, law=geometry.CENTERS)


def test_the_grid_begins_at_the_first_center_and_ends_at_the_last():
    grid = grid_of(scan())
    # 4 x 2.5, 8 x 0.8 and 6 x 2 mm between the outermost centers.
    assert grid.shape == (11, 7, 13)
    assert grid.crop_start == (0, 0, 0)
    assert grid.crop_stop == (5, 9, 7)


def test_intensities_are_linear_between_centers():
    d, h, w = np.meshgrid(np.arange(5.0), np.arange(9.0), np.arange(7.0), indexing="ij")
    ramp = Volume((30 * d - 7 * h + 4 * w).astype(np.float32), UPRIGHT, "a")
    found = geometry.to_grid(ramp.voxels, grid_of(ramp), "image")
    d, h, w = np.meshgrid(np.arange(11), np.arange(7), np.arange(13), indexing="ij")
    np.testing.assert_allclose(found, 30 * d / 2.5 - 7 * h / 0.8 + 4 * w / 2, atol=1e-4)


def test_integers_lose_their_fraction():
    voxels = np.zeros((1, 1, 3), np.int16)
    voxels[0, 0] = (0, 3, -4)
    found = centers.to_centers(voxels, (1, 1, 5), (1, 1, 2), (1, 1, 1), (False,) * 3)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[0, 0], [0, 1, 3, 0, -4])  # 1.5 and -0.5 in between


def test_a_reversed_axis_begins_one_voxel_outside():
    """As in BLAST-CT, whose new origin is off by one voxel: the lowest comes in, one row goes."""
    voxels = np.arange(1, 6, dtype=np.int16).reshape(1, 5, 1)
    found = centers.to_centers(voxels, (1, 5, 1), NEW, NEW, (False, True, False))
    np.testing.assert_array_equal(found.ravel(), [1, 1, 2, 3, 4])
    back = centers.from_centers(found, (1, 5, 1), NEW, NEW, (False, True, False))
    np.testing.assert_array_equal(back.ravel(), [1, 2, 3, 4, 0])


@pytest.mark.parametrize("affine", [UPRIGHT, TURNED])
def test_labels_come_back_by_the_nearest_voxel(affine):
    label = Volume(np.random.default_rng(0).integers(0, 4, (5, 9, 7)).astype(np.uint8), affine, "a")
    grid = geometry.locate(label, spacing_mm=(0.5, 0.2, 0.4), law=geometry.CENTERS)
    fine = geometry.to_grid(label.voxels, grid, "label")
    logits = 9.0 * (np.arange(4)[:, None, None, None] == fine)
    found = geometry.argmax_from_grid(logits.astype(np.float32), grid)
    want = label.voxels.copy()
    if affine is TURNED:  # the first of each reversed axis is beyond the grid
        want[:, 0], want[:, :, 0] = 0, 0
    np.testing.assert_array_equal(found, want)
    chances = geometry.probabilities_from_grid(logits.astype(np.float32), grid)
    np.testing.assert_array_equal(chances.argmax(0), want)
    np.testing.assert_allclose(chances.sum(0), 1, rtol=1e-6)


@pytest.mark.parametrize("affine", [UPRIGHT, TURNED])
def test_the_same_as_simpleitk(affine):
    """BLAST-CT's two steps, on floats: SimpleITK itself puts integers off by one in the first."""
    sitk = pytest.importorskip("SimpleITK", reason="needs the package SimpleITK")
    volume = scan(affine=affine)
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing((2.0, 0.8, 2.5))
    flips = [1.0 if affine is UPRIGHT else -1.0] * 2
    image.SetDirection((flips[0], 0, 0, 0, flips[1], 0, 0, 0, 1))
    lowest = float(volume.voxels.min())
    turned = sitk.Image(image.GetSize(), image.GetPixelID())
    turned.SetSpacing(image.GetSpacing())
    if affine is TURNED:
        turned.SetOrigin((-7 * 2.0, -9 * 0.8, 0))
    upright = sitk.Resample(image, turned, sitk.Transform(), sitk.sitkLinear, lowest)
    grid = grid_of(volume)
    fine = sitk.Image(grid.shape[::-1], image.GetPixelID())
    fine.SetOrigin(upright.GetOrigin())
    want = sitk.Resample(upright, fine, sitk.Transform(), sitk.sitkLinear, lowest)
    found = geometry.to_grid(volume.voxels, grid, "image")
    np.testing.assert_allclose(found, sitk.GetArrayFromImage(want), atol=1e-3)
    label = np.random.default_rng(0).integers(0, 4, grid.shape).astype(np.uint8)
    marked = sitk.GetImageFromArray(label)
    marked.CopyInformation(fine)
    back = sitk.Resample(marked, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    logits = 9.0 * (np.arange(4)[:, None, None, None] == label)
    ours = geometry.argmax_from_grid(logits.astype(np.float32), grid)
    np.testing.assert_array_equal(ours, sitk.GetArrayFromImage(back))


# Axes of the file (x, y, z) along left, posterior and superior, as signed columns.
LAYOUTS = {
    "upright": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "to anterior": ((1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "to anterior and right, downward": ((-1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_integers_are_those_of_simpleitk_to_the_last_bit(layout, seed):
    """Both steps with the fraction lost in each, and the 1 HU that rounding takes in the first."""
    sitk = pytest.importorskip("SimpleITK", reason="needs the package SimpleITK")
    random = np.random.default_rng(seed)
    voxels = random.integers(-1500, 2000, (9, 23, 31)).astype(np.int16)
    spacing = np.float32(random.choice([0.4, 0.488281, 0.957, 2.5, 5.627], 3)).astype(float)
    origin = np.float32(random.normal(0, 150, 3)).astype(float)
    turn = np.array(LAYOUTS[layout], float).T
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    image.SetDirection(turn.ravel().tolist())
    behind = abs(turn).argmax(1)
    size, extent = np.array(image.GetSize())[behind], np.array(image.GetSize()) * spacing
    upright = sitk.Image(size.tolist(), image.GetPixelID())
    upright.SetSpacing(spacing[behind].tolist())
    upright.SetOrigin((origin + np.minimum(turn, 0) @ extent).tolist())
    lowest = float(voxels.min())
    upright = sitk.Resample(image, upright, sitk.Transform(), sitk.sitkLinear, lowest)
    to_ras = np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = (to_ras @ turn @ np.diag(spacing))[:, ::-1]
    affine[:3, 3] = to_ras @ origin
    scan = Volume(voxels, affine, "a")
    grid = grid_of(scan)
    fine = sitk.Image(grid.shape[::-1], image.GetPixelID())
    fine.SetOrigin(upright.GetOrigin())
    want = sitk.Resample(upright, fine, sitk.Transform(), sitk.sitkLinear, lowest)
    found = geometry.to_grid(voxels, grid, "image")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(want))


@pytest.mark.parametrize(
    ("kind", "metal"), [(np.int16, 9000), (np.float32, 9000), (np.float32, 9000.5)]
)
def test_neither_padding_nor_metal_is_clipped(kind, metal):
    """BLAST-CT does not clip: between padding and skin other limits would give other values.

    Whole numbers are integers, in whatever type they come, and lose their fraction.
    """
    voxels = np.full((4, 16, 16), -2000, kind)
    voxels[:, 2:-2, 2:-2] = -1000
    voxels[:, 4:-4, 4:-4] = 35
    voxels[2, 8, 8] = metal
    affine = np.array([[0, 0, -1, 9], [0, -1, 0, 4], [2, 0, 0, -3], [0, 0, 0, 1.0]])
    plan = replace(tiny_run.PLAN, law=geometry.CENTERS, spacing_mm=NEW, axes="SPL")
    image, _, found = prepare.prepare_volume(Volume(voxels, affine, "a"), plan)
    assert image.dtype == (np.int32 if metal == 9000 else np.float32)
    assert (image.min(), image.max()) == (-2000, metal)
    assert image[3, 8, 8, 0] == (4517 if metal == 9000 else 4517.75)
    assert not found
