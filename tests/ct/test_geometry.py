import itertools

import numpy as np
import pytest
from turned import stored

from bhsd_jax.ct import geometry, resample
from bhsd_jax.volume import Grid, Volume

ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((False, True), repeat=3)
]
CANONICAL = np.array([[0, 0, -2, 40], [0, -3, 0, 50], [5, 0, 0, -60], [0, 0, 0, 1.0]])


def oblique(seed):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(0.4, 6, 3)
    affine[:3, 3] = rng.normal(size=3) * 50
    return affine


def head(shape=(6, 7, 9), seed=0):
    return np.random.default_rng(seed).integers(1, 6, shape).astype(np.uint8)


def test_the_same_head_stored_in_48_ways_is_prepared_alike():
    voxels = head().astype(np.float32)
    voxels[:, 0] = 0
    voxels[..., -2:] = 0
    expected = None
    for order, flips in ORIENTATIONS:
        volume = stored(voxels, CANONICAL, order, flips)
        grid = geometry.locate(volume, spacing_mm=(5.0, 2.0, 2.5))
        image = geometry.to_grid(volume.voxels, grid, "image")
        expected = image if expected is None else expected
        np.testing.assert_array_equal(image, expected)
    assert expected is not None
    assert expected.shape == (6, 9, 6)


def test_labels_survive_the_round_trip_in_every_orientation():
    for order, flips in ORIENTATIONS:
        volume = stored(head(), CANONICAL, order, flips)
        moved = np.asarray(volume.spacing_mm)[list(geometry.canonical(volume.affine)[0])]
        grid = geometry.locate(volume, spacing_mm=tuple(moved.tolist()))
        back = geometry.label_from_grid(geometry.to_grid(volume.voxels, grid, "label"), grid)
        np.testing.assert_array_equal(back, volume.voxels)


@pytest.mark.parametrize("seed", range(20))
def test_labels_survive_the_round_trip_of_oblique_scans(seed):
    volume = Volume(head(seed=seed), oblique(seed), "x")
    order, _ = geometry.canonical(volume.affine)
    assert sorted(order) == [0, 1, 2]
    for transpose in itertools.permutations(range(3)):
        spacing = tuple(volume.spacing_mm[order[axis]] for axis in transpose)
        grid = geometry.locate(volume, spacing_mm=spacing, transpose=transpose)
        assert grid.native_spacing_mm == pytest.approx(spacing)
        back = geometry.label_from_grid(geometry.to_grid(volume.voxels, grid, "label"), grid)
        np.testing.assert_array_equal(back, volume.voxels)


def test_axes_are_assigned_together_when_two_want_the_same():
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.0, 0.65, 0.76], [0.1, 0.75, -0.64], [0.99, -0.06, 0.08]])
    order, flip = geometry.canonical(affine)
    assert (order, flip) == ((0, 1, 2), (False, True, True))


def test_prepared_axes_run_up_back_and_left():
    for order, flips in ORIENTATIONS:
        volume = stored(head(), CANONICAL, order, flips)
        grid = geometry.locate(volume, spacing_mm=(5.0, 3.0, 2.0))
        steps = np.asarray(volume.affine)[:3, list(grid.order)] * np.where(grid.flip, -1, 1)
        np.testing.assert_allclose(steps, [[0, 0, -2], [0, -3, 0], [5, 0, 0]])


@pytest.mark.parametrize("world", range(3))
def test_resampled_voxels_lie_where_the_shared_faces_put_them(world):
    affine = oblique(3)
    affine[:3, :3] *= np.array([0.9, 1.0, 1.2]) / np.linalg.norm(affine[:3, :3], axis=0)
    shape = (24, 26, 28)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    position = np.tensordot(affine[:3, :3], index, 1) + affine[:3, 3, None, None, None]
    volume = Volume(position[world].astype(np.float32), affine, "x")
    order, _ = geometry.canonical(affine)
    spacing = tuple(volume.spacing_mm[axis] * 0.8 for axis in order)
    grid = geometry.locate(volume, spacing_mm=spacing)
    image = geometry.to_grid(volume.voxels, grid, "image")
    centers = [
        start + (np.arange(n) + 0.5) * size / n - 0.5
        for start, n, size in zip(grid.crop_start, grid.shape, grid.cropped_shape, strict=True)
    ]
    native = [None, None, None]
    for prepared, axis in enumerate(grid.order):
        line = centers[prepared]
        native[axis] = (shape[axis] - 1 - line if grid.flip[prepared] else line)[
            tuple(slice(None) if i == prepared else None for i in range(3))
        ]
    expected = affine[world, 3] + sum(affine[world, axis] * native[axis] for axis in range(3))
    inner = (slice(9, -9),) * 3  # the edge bends a spline
    np.testing.assert_allclose(image[inner], expected[inner], atol=1e-3)


def test_the_box_of_non_zero_voxels_is_cropped():
    voxels = np.zeros((8, 9, 10), np.float32)
    voxels[2, 3, 4] = voxels[5, 6, 8] = -1
    grid = geometry.locate(Volume(voxels, CANONICAL, "x"), spacing_mm=(5.0, 3.0, 2.0))
    assert (grid.crop_start, grid.crop_stop, grid.shape) == ((2, 3, 4), (6, 7, 9), (4, 4, 5))


def test_an_empty_scan_is_kept_whole():
    volume = Volume(np.zeros((4, 5, 6), np.float32), CANONICAL, "x")
    for crop_hu in (None, -200.0):
        empty = Volume(volume.voxels - (1000 if crop_hu else 0), CANONICAL, "x")
        grid = geometry.locate(empty, spacing_mm=(5.0, 3.0, 2.0), crop_hu=crop_hu)
        assert grid.cropped_shape == (4, 5, 6)


def test_the_largest_component_is_cropped_with_five_millimeters_around():
    voxels = np.full((10, 30, 40), -1000.0, np.float32)
    voxels[3:8, 8:20, 10:25] = 40
    voxels[5, 12, 12] = -500  # a cavity
    voxels[:, 29, :] = 100  # the table
    volume = Volume(voxels, CANONICAL, "x")
    grid = geometry.locate(volume, spacing_mm=(5.0, 3.0, 2.0), crop_hu=-200.0)
    assert grid.crop_start == (2, 6, 7)
    assert grid.crop_stop == (9, 22, 28)


def test_outside_the_crop_is_background():
    voxels = np.zeros((6, 8, 9), np.float32)
    voxels[2:5, 2:6, 3:8] = 7
    grid = geometry.locate(Volume(voxels, CANONICAL, "x"), spacing_mm=(5.0, 1.0, 1.0))
    inside = voxels > 0
    label = geometry.label_from_grid(np.full(grid.shape, 3, np.uint8), grid)
    np.testing.assert_array_equal(label, np.where(inside, 3, 0))
    logits = np.zeros((4, *grid.shape), np.float32)
    logits[2] = 1
    np.testing.assert_array_equal(geometry.argmax_from_grid(logits, grid), np.where(inside, 2, 0))
    prob = geometry.probabilities_from_grid(logits, grid)
    np.testing.assert_allclose(prob[0], np.where(inside, 1 / (3 + np.e), 1), rtol=1e-6)
    np.testing.assert_allclose(prob[2], inside * np.e / (3 + np.e), rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_arg_max_over_all_classes_comes_back_exactly(seed):
    volume = Volume(head(seed=seed), oblique(seed), "x")
    order, _ = geometry.canonical(volume.affine)
    spacing = tuple(volume.spacing_mm[axis] for axis in order)
    grid = geometry.locate(volume, spacing_mm=spacing)
    prepared = geometry.to_grid(volume.voxels, grid, "label")
    logits = 4 * np.eye(6, dtype=np.float32)[prepared].transpose(3, 0, 1, 2)
    before = logits.copy()
    np.testing.assert_array_equal(geometry.argmax_from_grid(logits, grid), volume.voxels)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("spacing", [(5.0, 1.3, 3.1), (2.0, 4.0, 1.0), (3.0, 3.0, 2.0)])
def test_arg_max_agrees_with_stacking_all_classes(spacing):
    voxels = head((6, 9, 10)).astype(np.float32)
    voxels[0] = 0
    volume = stored(voxels, CANONICAL, (2, 0, 1), (True, False, True))
    grid = geometry.locate(volume, spacing_mm=spacing)
    logits = np.random.default_rng(1).normal(size=(5, *grid.shape)).astype(np.float32)
    whole = geometry.probabilities_from_grid(logits, grid)
    box = volume.voxels != 0
    got = geometry.argmax_from_grid(logits, grid)
    np.testing.assert_array_equal(got[box], whole.argmax(0)[box])
    assert not got[~box].any()


def test_ties_between_classes_go_to_the_lower_one():
    volume = Volume(head(), CANONICAL, "x")
    grid = geometry.locate(volume, spacing_mm=(5.0, 3.0, 2.0))
    logits = np.ones((3, *grid.shape), np.float32)
    logits[0] = 0
    assert (geometry.argmax_from_grid(logits, grid) == 1).all()


def test_thick_slices_are_picked_and_never_blended():
    voxels = np.zeros((4, 8, 8), np.float32) + np.arange(1, 5, dtype=np.float32)[:, None, None]
    volume = Volume(voxels, np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]] * [8, 1, 1, 1], "x")
    grid = geometry.locate(volume, spacing_mm=(4.0, 0.5, 0.5))
    image = geometry.to_grid(voxels, grid, "image")
    assert image.shape == (8, 16, 16)
    np.testing.assert_allclose(image[:, 3, 3], [1, 1, 2, 2, 3, 3, 4, 4], rtol=1e-6)


def test_a_grid_survives_json():
    grid = geometry.locate(Volume(head(), oblique(1), "x"), spacing_mm=(2.0, 1.0, 1.5))
    assert Grid.from_json(grid.to_json()) == grid


def test_arrays_of_another_shape_are_refused():
    grid = geometry.locate(Volume(head(), CANONICAL, "x"), spacing_mm=(5.0, 3.0, 2.0))
    with pytest.raises(ValueError, match="native shape"):
        geometry.to_grid(head((5, 5, 5)), grid, "image")
    with pytest.raises(ValueError, match="prepared shape"):
        geometry.label_from_grid(head((5, 5, 5)), grid)
    with pytest.raises(ValueError, match="'mask'"):
        geometry.to_grid(head(), grid, "mask")
    with pytest.raises(ValueError, match="permutation"):
        geometry.locate(
            Volume(head(), CANONICAL, "x"), spacing_mm=(1.0, 1.0, 1.0), transpose=(0, 0, 1)
        )


def test_a_scan_that_would_become_larger_than_any_is_refused():
    volume = Volume(head().astype(np.float32), CANONICAL @ np.diag([1, 1e3, 1e3, 1]), "huge")
    with pytest.raises(ValueError, match=r"huge: .* more than fit; look at the spacing"):
        geometry.locate(volume, spacing_mm=(5.0, 0.5, 0.5))


def test_axes_go_by_their_letters():
    assert geometry.canonical(CANONICAL) == geometry.canonical(CANONICAL, "SPL")
    assert geometry.canonical(CANONICAL, "RAS") == ((2, 1, 0), (True, True, False))
    assert geometry.canonical(CANONICAL, "SAR") == ((0, 1, 2), (False, True, True))
    assert geometry.canonical(CANONICAL, "file") == ((0, 1, 2), (False, False, False))
    for wrong in ("SPP", "RAL", "S", "native"):
        with pytest.raises(ValueError, match="one each of R/L, A/P, S/I"):
            geometry.canonical(CANONICAL, wrong)


def test_the_way_back_keeps_apart_the_axis_that_is_coarse_for_the_network():
    """As nnU-Net: the spacing that is left decides, the scan's on the way there, ours back."""
    voxels = np.random.default_rng(0).normal(size=(24, 6, 20)).astype(np.float32)
    matrix = np.eye(4)
    matrix[:3] = CANONICAL[:3]
    matrix[:3, :3] = (CANONICAL[:3, :3] / np.linalg.norm(CANONICAL[:3, :3], axis=0)) * (1, 5, 1)
    grid = geometry.locate(Volume(voxels, matrix, "x"), spacing_mm=(5.0, 1.0, 1.0))
    forward = geometry.to_grid(voxels, grid, "image")
    np.testing.assert_array_equal(forward, resample.resample_image(voxels, grid.shape, 1))
    logits = np.random.default_rng(1).normal(size=(3, *grid.shape)).astype(np.float32)
    back = np.stack([resample.resample_linear(one, (24, 6, 20), 0) for one in logits])
    np.testing.assert_array_equal(geometry.argmax_from_grid(logits, grid), back.argmax(0))
    want = np.exp(back) / np.exp(back).sum(0)
    np.testing.assert_allclose(geometry.probabilities_from_grid(logits, grid), want, rtol=1e-5)


@pytest.mark.parametrize("spacing", [(5.0, 1.3, 3.1), (5.0, 0.7, 0.9), (2.0, 4.0, 1.0), (3, 3, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_classes_are_brought_back_only_where_they_win_and_the_arg_max_is_that_of_all(
    spacing, seed, monkeypatch
):
    """Classes here win in a few planes, in none, or by the last bit; ties are background's."""
    random = np.random.default_rng(seed)
    volume = Volume(head((9, 14, 12)).astype(np.float32), CANONICAL, "x")
    grid = geometry.locate(volume, spacing_mm=tuple(map(float, spacing)))
    axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
    first = random.normal(size=grid.shape).astype(np.float32)
    logits = np.stack([first, first, first - 1, np.nextafter(first, -np.inf), first - 1])
    where = random.random(grid.shape) < 0.02
    logits[1][where] += 1
    logits[3][where] = np.nextafter(first[where], np.inf)
    logits[4, :2] += 2
    whole = np.stack([resample.resample_linear(one, grid.cropped_shape, axis) for one in logits])
    zoomed, zoom = [], resample._zoom

    def count(array, *rest):
        zoomed.append(array.size)
        return zoom(array, *rest)

    monkeypatch.setattr(resample, "_zoom", count)
    found = geometry.native_box(geometry.argmax_from_grid(logits, grid), grid)
    np.testing.assert_array_equal(found, whole.argmax(0))
    assert len(np.unique(found)) > 1
    assert sum(zoomed) <= 4 * first.size, "class 2 wins nowhere"
