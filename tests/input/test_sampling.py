"""The patch draw is nnU-Net's."""

import numpy as np
import pytest

from bhsd_jax.input import sampling

BHSD = {"shape": (34, 512, 512), "cut": (20, 376, 376), "patch": (20, 320, 256)}


@pytest.mark.parametrize(
    ("batch", "forced"),
    [(2, 1), (3, 1), (4, 1), (9, 3), (12, 4), (35, 12), (51, 17), (58, 19), (366, 121)],
)
def test_forced_share_of_a_batch(batch, forced):
    rows = [sampling.is_forced(row, batch, 0.33) for row in range(batch)]
    assert sum(rows) == forced
    assert rows == sorted(rows), "the last rows are the forced ones"


@pytest.mark.parametrize(
    ("batch", "share", "forced"),
    [(3, 0.5, 1), (5, 0.5, 3), (7, 0.5, 3), (1, 0.33, 0), (4, 0.0, 0), (4, 1.0, 4)],
)
def test_rows_that_are_not_forced_are_rounded_half_to_even(batch, share, forced):
    assert sum(sampling.is_forced(row, batch, share) for row in range(batch)) == forced


def test_a_random_corner_covers_nnunets_ranges_and_no_more():
    rng = np.random.default_rng(0)
    corners = np.array([sampling.corner(rng, **BHSD) for _ in range(6000)])
    assert corners.min(0).tolist() == [0, -28, -60]
    assert corners.max(0).tolist() == [14, 164, 196]


def test_a_thin_volume_is_centered():
    rng = np.random.default_rng(0)
    cut = {"shape": (5, 64, 64), "cut": (20, 64, 64), "patch": (20, 64, 64)}
    depths = {sampling.corner(rng, **cut)[0] for _ in range(50)}
    assert depths == {-8, -7}


def test_a_forced_cut_is_centered_on_a_voxel_of_a_uniform_class():
    rng = np.random.default_rng(0)
    rare, common = np.array([[30, 400, 300]]), np.array([[10, 250, 250]] * 99)
    corners = [
        sampling.corner(rng, **BHSD, foreground=(rare, common, rare[:0])) for _ in range(400)
    ]
    assert set(corners) == {(20, 212, 112), (0, 62, 62)}, "lower corner clamped, upper not"
    share = np.mean([corner[0] == 20 for corner in corners])
    assert 0.4 < share < 0.6, "classes count, not voxels"


def test_without_foreground_a_forced_cut_is_random():
    corners = {
        sampling.corner(np.random.default_rng(i), **BHSD, foreground=(np.zeros((0, 3), int),))
        for i in range(20)
    }
    assert len(corners) == 20


@pytest.mark.parametrize("corner", [(-3, 2, 5), (0, 0, 0), (6, -9, 3), (20, 2, 2), (-9, -9, -9)])
def test_a_cut_that_reaches_outside_is_filled(corner):
    scan = np.arange(8 * 9 * 10).reshape(8, 9, 10)
    cut = (6, 7, 4)
    start, stop = sampling.inside(corner, cut, scan.shape)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    got = sampling.paste(scan[box], start, corner, cut, -1)
    padded = np.pad(scan, 30, constant_values=-1)
    want = padded[tuple(slice(c + 30, c + 30 + n) for c, n in zip(corner, cut, strict=True))]
    np.testing.assert_array_equal(got, want)
