"""The patch draw is nnU-Net's."""

import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.augment.spatial import Affine, center_crop
from bhsd_jax.input import sampling
from bhsd_jax.input.pipeline import Cut, Decoded, Stream

BHSD = {"shape": (34, 512, 512), "cut": (20, 376, 376), "patch": (20, 320, 256)}


def rows_forced(batch, share):
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    rows = [sampling.is_forced(rng, row, batch, share) for row in range(batch)]
    assert rng.bit_generator.state == before, "other streams would have other draws"
    return rows


@pytest.mark.parametrize(
    ("batch", "forced"),
    [(2, 1), (3, 1), (4, 1), (9, 3), (12, 4), (35, 12), (51, 17), (58, 19), (366, 121)],
)
def test_forced_share_of_a_batch(batch, forced):
    rows = rows_forced(batch, 0.33)
    assert sum(rows) == forced
    assert rows == sorted(rows), "the last rows are the forced ones"


@pytest.mark.parametrize(
    ("batch", "share", "forced"),
    [(3, 0.5, 1), (5, 0.5, 3), (7, 0.5, 3), (1, 0.0, 0), (4, 0.0, 0), (4, 1.0, 4)],
)
def test_rows_that_are_not_forced_are_rounded_half_to_even(batch, share, forced):
    assert sum(rows_forced(batch, share)) == forced


@pytest.mark.parametrize(("batch", "share"), [(1, 0.33), (2, 0.2), (4, 0.1)])
def test_where_no_row_would_be_forced_chance_keeps_the_share(batch, share):
    rng = np.random.default_rng(0)
    forced = [sampling.is_forced(rng, row % batch, batch, share) for row in range(20_000)]
    assert np.mean(forced) == pytest.approx(share, abs=0.01)


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


@pytest.mark.parametrize("size", [2, 3, 8, 9, 14, 15])
@pytest.mark.parametrize("patch", [4, 5, 8, 9])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 6])
def test_a_forced_patch_holds_its_voxel_whichever_way_the_axes_run(size, patch, more):
    """Every voxel of a scan and of its mirror images, thinner or thicker than patch and cut."""
    shape, cut = (size, size + 1, 2 * size), (patch + more, patch, patch + more)
    rng = np.random.default_rng(0)
    for voxel in np.ndindex(*shape):
        if sum(place % 3 for place in voxel) > 2:  # a third of them, all faces among them
            continue
        for flipped in (np.array(voxel), np.array(shape) - 1 - voxel):
            lies = _in_the_patch(rng, flipped, shape, cut, (patch,) * 3)
            assert ((lies >= 0) & (lies < patch)).all(), (voxel, flipped, lies)


def _in_the_patch(rng, voxel, shape, cut, patch):
    """Where a forced cut puts its voxel in the middle of it, which remains as the patch."""
    corner = np.array(sampling.corner(rng, shape, cut, patch, (voxel[None],)))
    # As `augment.spatial.center_crop`, which the labels of the next test go through.
    return voxel - corner - (np.array(cut) // 2 - np.array(patch) // 2)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_the_patch_of_a_flipped_scan_holds_the_voxel_too(axes):
    """One voxel in a corner of the scan, through the stream and the cut of the augmentation."""
    shape, patch = (12, 17, 9), (8, 12, 8)
    label = np.zeros(shape, np.uint8)
    label[1, 2, 7] = 1
    label = np.flip(label, axes)
    scan = Decoded(np.zeros(shape, np.float32), label, (np.argwhere(label),))
    cut = Cut(patch, Affine().source_patch(patch), fill=0.0, foreground=1.0)
    stream = Stream(lambda _: scan, ["a"], cut, batch=1, length=9, seed=(0, 0), labeled=True)
    for index in range(3):
        found = center_crop(jnp.asarray(stream[index]["label"]), patch)
        assert (found == 1).sum() == 1


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
