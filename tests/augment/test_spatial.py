"""Affine resampling and mirroring of one patch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.augment.spatial import Affine, Mirror, affine_matrix, center_crop, resample

resample_jit = jax.jit(resample, static_argnames=("patch", "in_plane", "fill"))


def rotation(axis, angle, scale=1.0, in_plane=False):
    angles = jnp.zeros(3).at[axis].set(angle)
    factors = jnp.full(3, scale).at[0].set(1.0 if in_plane else scale)
    return affine_matrix(angles, factors)


def random_pair(shape, channels=1, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*shape, channels)).astype(np.float32)
    return jnp.asarray(image), jnp.asarray(rng.integers(-1, classes, shape), jnp.int8)


def slow_resample(image, label, matrix, patch, fill):
    """One voxel at a time: linear weights of an image and of the one-hot classes, padded."""
    source = label.shape
    moved = np.zeros((*patch, image.shape[3]))
    classes = np.zeros(patch, int)
    for voxel in np.ndindex(patch):
        offset = np.array(voxel) - (np.array(patch) - 1) / 2
        place = np.asarray(matrix, np.float64) @ offset + (np.array(source) - 1) / 2
        low, votes = np.floor(place).astype(int), {}
        for step in itertools.product((0, 1), repeat=3):
            tap = low + step
            weight = np.prod(1 - np.abs(place - tap))
            inside = all(0 <= tap[a] < source[a] for a in range(3))
            moved[voxel] += weight * (np.asarray(image)[tuple(tap)] if inside else fill)
            seen = int(label[tuple(tap)]) if inside else -1
            votes[seen] = votes.get(seen, 0) + weight
        classes[voxel] = max(votes, key=lambda name: votes[name])
    return moved, classes


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ((20, 320, 256), (20, 376, 376)),
        ((20, 256, 256), (20, 301, 301)),
        ((28, 384, 384), (28, 451, 451)),
        ((32, 512, 448), (32, 602, 602)),
        ((28, 256, 256), (28, 301, 301)),
        ((40, 320, 320), (40, 376, 376)),
        ((40, 56, 40), (73, 80, 64)),
        ((1, 512, 512), (1, 602, 602)),
        ((1, 56, 40), (1, 65, 65)),
    ],
)
def test_source_patch_follows_nnunet(patch, expected):
    assert Affine().source_patch(patch) == expected
    assert Affine(rotation_p=0.0, scale_p=0.0).source_patch(patch) == patch


def test_rotation_law_depends_on_the_patch():
    assert Affine().largest_deg((20, 320, 256)) == 180
    assert Affine().largest_deg((40, 56, 40)) == 30
    assert Affine().largest_deg((1, 320, 200)) == 15
    assert Affine().largest_deg((1, 320, 256)) == 180
    assert Affine(dummy_2d=False).largest_deg((20, 320, 256)) == 30
    assert Affine(dummy_2d=True).largest_deg((40, 56, 40)) == 180
    assert Affine(rotation_deg=10.0).largest_deg((20, 320, 256)) == 10


@pytest.mark.parametrize(
    ("axis", "plane", "turns"), [(0, (1, 2), -1), (1, (0, 2), 1), (2, (0, 1), -1)]
)
def test_a_quarter_turn_equals_rot90(axis, plane, turns):
    image, label = random_pair((6, 6, 6), channels=2)
    matrix = rotation(axis, math.pi / 2)
    moved, classes = resample_jit(image, label, matrix, (6, 6, 6), in_plane=False)
    np.testing.assert_allclose(moved, np.rot90(image, turns, plane), atol=1e-5)
    np.testing.assert_array_equal(classes, np.rot90(label, turns, plane))
    back, again = resample_jit(moved, classes, matrix.T, (6, 6, 6), in_plane=False)
    np.testing.assert_allclose(back, image, atol=1e-5)
    np.testing.assert_array_equal(again, label)


def test_an_in_plane_quarter_turn_equals_rot90_of_every_slice():
    image, label = random_pair((3, 8, 8), channels=2)
    moved, classes = resample_jit(
        image, label, rotation(0, math.pi / 2), (3, 8, 8), in_plane=True, fill=(1.0, -2.0)
    )
    np.testing.assert_allclose(moved, np.rot90(image, -1, (1, 2)), atol=1e-5)
    np.testing.assert_array_equal(classes, np.rot90(label, -1, (1, 2)))


@pytest.mark.parametrize("in_plane", [True, False])
def test_a_linear_field_is_sampled_exactly(in_plane):
    source, patch = (9, 20, 20), (3, 6, 6)
    slope = np.array([0.7, -0.3, 0.5])
    offsets = np.stack(
        np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in source], indexing="ij"), -1
    )
    image = jnp.asarray(offsets @ slope, jnp.float32)[..., None]
    angles = jnp.asarray([0.4, 0.0, 0.0] if in_plane else [0.4, -0.2, 0.3])
    factors = jnp.asarray([1.0, 1.4, 1.4] if in_plane else [1.4, 1.4, 1.4])
    matrix = affine_matrix(angles, factors)
    moved, _ = resample_jit(image, jnp.zeros(source, jnp.int8), matrix, patch, in_plane=in_plane)
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing="ij"), -1)
    expected = grid @ np.asarray(matrix, np.float64).T @ slope
    np.testing.assert_allclose(moved[..., 0], expected, atol=2e-5)


def test_scaling_up_shrinks_objects():
    label = jnp.zeros((1, 24, 24), jnp.int8).at[:, 6:18, 6:18].set(1)
    image = label[..., None].astype(jnp.float32)
    matrix = rotation(0, 0.0, scale=2.0, in_plane=True)
    _, classes = resample_jit(image, label, matrix, (1, 24, 24), in_plane=True)
    assert int((classes == 1).sum()) == 36
    assert int((classes == -1).sum()) == 24 * 24 - 12 * 12


@pytest.mark.parametrize("in_plane", [True, False])
def test_resampling_equals_a_slow_one_hot_reference(in_plane):
    source, patch = (4, 7, 8), (4, 6, 7)
    image, label = random_pair(source, channels=2, classes=3)
    angles = jnp.asarray([0.9, 0.0, 0.0] if in_plane else [0.9, 0.4, -0.3])
    factors = jnp.asarray([1.0, 1.3, 1.3] if in_plane else [1.3, 1.3, 1.3])
    matrix = affine_matrix(angles, factors)
    fill = (-3.0, 5.0)
    moved, classes = resample_jit(image, label, matrix, patch, in_plane=in_plane, fill=fill)
    slow_moved, slow_classes = slow_resample(image, label, matrix, patch, np.array(fill))
    np.testing.assert_allclose(moved, slow_moved, atol=2e-5)
    np.testing.assert_array_equal(classes, slow_classes)


@pytest.mark.parametrize(("name", "in_plane"), [("turned", False), ("in_plane", True)])
def test_resampling_equals_nnunet(golden, name, in_plane):
    """Arrays made with batchgeneratorsv2 0.3.6 on torch 2.13, padding label -1."""
    case = np.load(golden / "augment_nnunet.npz")
    image, label, moved, classes, angles, scale = (
        case[f"{name}/{part}"] for part in ("image", "label", "moved", "classes", "angles", "scale")
    )
    factors = jnp.full(3, scale).at[0].set(1.0 if in_plane else scale)
    found, found_classes = resample_jit(
        jnp.asarray(image)[..., None],
        jnp.asarray(label),
        affine_matrix(jnp.asarray(angles), factors),
        moved.shape,
        in_plane=in_plane,
    )
    np.testing.assert_allclose(found[..., 0], moved, atol=5e-5)
    np.testing.assert_array_equal(found_classes, classes)


@pytest.mark.parametrize("patch", [(2, 12, 12), (10, 12, 12)])
def test_image_and_label_move_together(patch, key):
    op = Affine(rotation_p=1.0, scale_p=1.0)
    source = op.source_patch(patch)
    # A border of background keeps class 1 from ever sharing a sample point with the outside.
    inner = jax.random.bernoulli(key, 0.5, tuple(-(-n // 3) for n in source))
    for axis in range(3):
        inner = jnp.repeat(inner, 3, axis)
    label = jnp.zeros(source, jnp.int8)
    middle = tuple(slice(1, n - 1) if n > 2 else slice(None) for n in source)
    label = label.at[middle].set(inner[tuple(slice(n) for n in source)][middle].astype(jnp.int8))
    if source[0] <= 2:
        label = label.at[:, [0, -1]].set(0).at[:, :, [0, -1]].set(0)
    run = jax.jit(lambda key: op(key, label[..., None].astype(jnp.float32), label, patch))
    for seed in range(5):
        image, moved = run(jax.random.key(seed))
        clear = np.abs(image[..., 0] - 0.5) > 1e-3
        assert clear.mean() > 0.9
        np.testing.assert_array_equal((np.asarray(moved) == 1)[clear], (image[..., 0] > 0.5)[clear])
        assert 0 < int((moved == 1).sum()) < moved.size


def test_labels_stay_labels(key):
    label = jnp.asarray([0, 3, 5], jnp.int8)[jax.random.randint(key, (4, 20, 20), 0, 3)]
    op = Affine(rotation_p=1.0, scale_p=1.0)
    run = jax.jit(lambda key: op(key, jnp.zeros((4, 20, 20, 1)), label, (4, 16, 16))[1])
    for seed in range(4):
        moved = run(jax.random.key(seed))
        assert moved.dtype == jnp.int8
        assert {0, 3, 5} <= set(np.unique(moved)) <= {-1, 0, 3, 5}


def test_padding_in_the_source_keeps_its_own_vote():
    # Sampled at the middle of four voxels less a little: class 2 has about 0.5 of the weight,
    # background and padding 0.25 each. Counted together these would tie with it, or win.
    label = jnp.asarray([[[2, 0], [-1, 2]]], jnp.int8)
    matrix = jnp.eye(3)
    moved = resample_jit(jnp.zeros((1, 2, 2, 1)), label, matrix, (1, 1, 1), in_plane=True)[1]
    assert int(moved[0, 0, 0]) == 2
    # Two voxels wide, at 0.6 beyond the last: padding has 0.6 of the weight, and is not background.
    wide = jnp.asarray([[[0, 3]]], jnp.int8)
    shifted = resample_jit(jnp.zeros((1, 1, 2, 1)), wide, matrix * 2.2, (1, 1, 2), in_plane=True)[1]
    np.testing.assert_array_equal(shifted[0, 0], [-1, -1])
    kept = resample_jit(jnp.zeros((1, 1, 2, 1)), wide, matrix * 1.8, (1, 1, 2), in_plane=True)[1]
    np.testing.assert_array_equal(kept[0, 0], [0, 3])


def test_without_a_draw_the_patch_is_the_center_crop_bit_for_bit():
    image, label = random_pair((3, 9, 10))
    op = Affine(rotation_p=1e-7, scale_p=0.0)
    moved, classes = jax.jit(lambda key: op(key, image, label, (3, 6, 7)))(jax.random.key(1))
    np.testing.assert_array_equal(moved, image[:, 1:7, 2:9])
    np.testing.assert_array_equal(classes, label[:, 1:7, 2:9])


def test_center_crop_starts_where_nnunet_does():
    flat = jnp.arange(376 * 376).reshape(1, 376, 376)
    assert int(center_crop(flat, (1, 320, 256))[0, 0, 0]) == 28 * 376 + 60


def test_rotation_and_scale_are_independent_and_uniform():
    op, patch, draws = Affine(), (20, 320, 256), 4000
    fires, matrices = jax.jit(jax.vmap(lambda key: op.draw(key, patch)))(
        jax.random.split(jax.random.key(5), draws)
    )
    scale = np.sqrt(np.linalg.det(np.asarray(matrices, np.float64)))
    scaled, rotated = np.abs(scale - 1) > 1e-5, np.abs(matrices[:, 1, 2]) > 1e-6
    np.testing.assert_array_equal(fires, scaled | rotated)
    for events, p in ((scaled, 0.2), (rotated, 0.2), (scaled & rotated, 0.04)):
        assert abs(events.mean() - p) < 5 * math.sqrt(p * (1 - p) / draws)
    drawn = scale[scaled]
    assert 0.7 <= drawn.min() < 0.72 < 1.38 < drawn.max() <= 1.4
    # The mean of U(0.7, 1.4) is 1.05; nnU-Net's older two-sided law would have 1.025.
    assert abs(drawn.mean() - 1.05) < 5 * 0.202 / math.sqrt(len(drawn))
    angle = np.degrees(np.arctan2(matrices[:, 2, 1], matrices[:, 1, 1]))[rotated]
    assert angle.min() < -170
    assert angle.max() > 170
    assert abs(angle.mean()) < 5 * 104 / math.sqrt(len(angle))
    np.testing.assert_array_equal(matrices[:, 0], np.tile([1, 0, 0], (draws, 1)))


def test_three_axis_rotations_stay_within_thirty_degrees():
    op = Affine(rotation_p=1.0, scale_p=0.0)
    keys = jax.random.split(jax.random.key(5), 500)
    _, matrices = jax.jit(jax.vmap(lambda key: op.draw(key, (40, 56, 40))))(keys)
    identity = np.asarray(matrices) @ np.asarray(matrices).transpose(0, 2, 1)
    np.testing.assert_allclose(identity, np.tile(np.eye(3), (500, 1, 1)), atol=1e-5)
    about_h = np.degrees(np.arcsin(-matrices[:, 2, 0]))
    assert -30 <= about_h.min() < -28
    assert 28 < about_h.max() <= 30


def test_mirror_flips_each_axis_half_the_time_and_both_arrays():
    label = jnp.arange(8).reshape(2, 2, 2)
    image = label[..., None].astype(jnp.float32)
    keys = jax.random.split(jax.random.key(2), 2000)
    moved, classes = jax.jit(jax.vmap(lambda key: Mirror(0.5)(key, image, label)))(keys)
    np.testing.assert_array_equal(moved[..., 0], classes)
    counts = np.bincount(np.asarray(classes)[:, 0, 0, 0], minlength=8)
    assert np.abs(counts / 2000 - 1 / 8).max() < 5 * math.sqrt(7 / 64 / 2000)


def test_mirror_leaves_other_axes_alone_and_undoes_itself(key):
    image, label = random_pair((2, 3, 4))
    for axis in range(3):
        mirror = jax.jit(Mirror(1.0, axes=(axis,)))
        moved, classes = mirror(key, image, label)
        np.testing.assert_array_equal(moved, np.flip(image, axis))
        np.testing.assert_array_equal(classes, np.flip(label, axis))
        for found, want in zip(mirror(key, moved, classes), (image, label), strict=True):
            np.testing.assert_array_equal(found, want)
    assert Mirror(0.0)(key, image, label)[0] is image


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(rotation_p=1.5),
        lambda: Affine(scale=(1.4, 0.7)),
        lambda: Affine(scale=(0.0, 0.7)),
        lambda: Affine(dummy_2d="sometimes"),
        lambda: Mirror(-0.1),
        lambda: Mirror(axes=(3,)),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"^(Affine|Mirror): "):
        make()
