"""Draws of Beta, boxes, partners, and slice labels of what is pasted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bhsd_jax.objectives import mixing

SHAPE = (20, 40, 32)


@pytest.mark.parametrize("a", [0.2, 0.5, 1.0])
def test_draws_follow_the_beta_distribution(key, a):
    draws = np.asarray(jax.jit(lambda key: mixing.beta(key, a, 40_000))(key))
    assert np.isfinite(draws).all()
    assert draws.min() >= 0
    assert draws.max() <= 1
    # The lower half alone: near 1 float32 has no room for the tail, 2 % of the draws at a = 0.2.
    lower = draws[draws < 0.5]
    assert len(lower) == pytest.approx(20_000, abs=400)
    # 1.95 / sqrt(n) is the 0.1 % point of the statistic.
    found = stats.kstest(lower, lambda x: 2 * stats.beta(a, a).cdf(x)).statistic
    assert found < 1.95 / np.sqrt(len(lower))
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    known = {0.2: 0.582, 0.5: 0.288, 1.0: 0.10}[a]
    assert (np.minimum(draws, 1 - draws) < 0.05).mean() == pytest.approx(known, abs=0.01)


def test_partners_are_neighbors_and_partners_of_partners_oneself():
    rows = jnp.arange(6)
    np.testing.assert_array_equal(mixing.partners(rows), [1, 0, 3, 2, 5, 4])
    np.testing.assert_array_equal(mixing.partners(mixing.partners(rows)), rows)


def test_a_box_covers_the_share_it_drew_and_lies_anywhere(key):
    masks = np.asarray(jax.jit(lambda key: mixing.boxes(key, 300, SHAPE, (0.02, 0.4)))(key))
    share = masks.mean((1, 2, 3))
    assert masks.dtype == bool
    assert share.min() > 0.02 * 0.7  # sides are rounded to voxels
    assert share.max() < 0.4 * 1.15
    assert share.mean() == pytest.approx(0.21, abs=0.03)
    for mask in masks[:20]:
        box = np.argwhere(mask)
        sides = box.max(0) - box.min(0) + 1
        assert mask.sum() == sides.prod(), "a full box"
    for others in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):
        assert masks.any(others).all(), "no slice, row or column is out of reach"


def test_several_boxes_share_the_volume_and_flip_where_they_meet(key):
    masks = np.asarray(
        jax.jit(lambda key: mixing.boxes(key, 300, SHAPE, (0.25, 0.5), number=3))(key)
    )
    share = masks.mean((1, 2, 3))
    assert share.max() < 0.5 * 1.15
    assert share.mean() == pytest.approx(_covered_by_three(300), abs=0.025)


def _covered_by_three(count):
    """Mean share of three boxes by another route: sides and places from NumPy."""
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(count):
        share, mask = rng.uniform(0.25, 0.5) / 3, np.zeros(SHAPE, bool)
        for u in rng.uniform(size=3):
            sides = np.rint(SHAPE * share ** np.array([1 / 3, 2 * u / 3, 2 * (1 - u) / 3]))
            start = [rng.integers(n - int(s) + 1) for n, s in zip(SHAPE, sides, strict=True)]
            d, h, w = (slice(a, a + int(s)) for a, s in zip(start, sides, strict=True))
            mask[d, h, w] ^= True
        total += mask.mean()
    return total / count


def test_the_chance_of_no_box(key):
    masks = jax.jit(lambda key: mixing.boxes(key, 400, SHAPE, (0.1, 0.4), chance=0.5))(key)
    assert float(masks.any((1, 2, 3)).mean()) == pytest.approx(0.5, abs=0.08)
    none = jax.jit(lambda key: mixing.boxes(key, 9, SHAPE, (0.1, 0.4), chance=0.0))(key)
    assert not none.any()


def test_the_copy_paste_cube_is_two_thirds_long(key):
    masks = np.asarray(jax.jit(lambda key: mixing.cube(key, 50, (12, 30, 24)))(key))
    np.testing.assert_allclose(masks.mean((1, 2, 3)), (2 / 3) ** 3, rtol=1e-6)
    assert pytest.approx(0.2963, abs=1e-4) == (2 / 3) ** 3


def test_patches_of_one_slice_are_mixed_within_it(key):
    flat = (1, 60, 48)
    share = np.asarray(mixing.boxes(key, 300, flat, (0.02, 0.4))).mean((1, 2, 3))
    assert share.min() > 0.01
    assert share.max() < 0.43
    assert share.mean() == pytest.approx(0.21, abs=0.02)
    cube = np.asarray(mixing.cube(key, 5, flat, 2 / 3))
    np.testing.assert_array_equal(cube.sum((1, 2, 3)), 40 * 32)


def test_pasting_images_and_maps_by_one_mask_and_its_complement(key):
    mask = mixing.cube(key, 2, (3, 6, 6))
    a, b = jax.random.normal(key, (2, 2, 3, 6, 6, 1))
    one, other = mixing.paste(mask, a, b), mixing.paste(~mask, a, b)
    np.testing.assert_array_equal(one + other, a + b)
    np.testing.assert_array_equal(mixing.paste(~mask, b, a), one)
    np.testing.assert_array_equal(mixing.paste(mask, a[..., 0], b[..., 0]), one[..., 0])
    np.testing.assert_array_equal(mixing.paste(jnp.zeros_like(mask), a, b), b)


def test_slices_of_a_paste_lack_what_both_lack_and_show_nothing_for_sure():
    mask = jnp.zeros((1, 3, 2, 2), bool).at[0, 1, 0, 0].set(True).at[0, 2].set(True)
    inside = jnp.asarray([[[0, 1], [0, 1], [0, 1]]], jnp.int8)
    outside = jnp.asarray([[[1, 0], [0, 0], [1, -1]]], jnp.int8)
    found = mixing.paste_slices(mask, inside, outside)
    np.testing.assert_array_equal(found[0], [[1, 0], [0, -1], [0, 1]])
