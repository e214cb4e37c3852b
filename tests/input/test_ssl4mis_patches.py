"""Patches and their order are those that SSL4MIS' own classes give for the same random draws.

The file was recorded by `tools/record_ssl4mis.py` from SSL4MIS 06df604.
"""

import numpy as np
import pytest

from bhsd_jax.input import sampling
from bhsd_jax.input.pipeline import Cut, Decoded, Stream
from bhsd_jax.input.turns import Turn


class Scripted(np.random.Generator):
    """A generator whose draws are given as shares of their range."""

    def __init__(self, shares):
        super().__init__(np.random.PCG64(0))
        self.shares, self.ranges = list(shares), []

    def integers(self, count):
        self.ranges.append(count)
        return int(self.shares[len(self.ranges) - 1] * count)


@pytest.fixture(scope="module")
def file():
    with np.load("tests/golden/ssl4mis_patches.npz") as arrays:
        return dict(arrays)


def ours(array):
    """W H D -> D H W of ours: their first axis is our H, as both are turned in their plane."""
    return np.moveaxis(array, -1, 0)


def test_turn_and_crop_are_their_random_rot_flip_and_random_crop(monkeypatch, file):
    """Of scans larger than the patch, smaller, as large, and of patches that are not square."""
    cut = Cut(patch=(4, 8, 6), source=(4, 8, 6), fill=0, uniform=True, rot_flip=True)
    assert len(file["patch"]) == 32
    for shape, shares, ranges, patch in zip(
        *(file[name] for name in ("shape", "shares", "ranges", "patch")), strict=True
    ):
        rng = Scripted(shares)
        monkeypatch.setattr(np.random, "default_rng", lambda _, rng=rng: rng)
        voxels = ours(np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape))
        scan = Decoded(voxels, None, ())
        stream = Stream(
            lambda _, scan=scan: scan,
            ["a"],
            cut,
            batch=1,
            length=1,
            seed=(0, 1),
            labeled=False,
        )
        monkeypatch.setattr(stream, "_case", lambda *_: 0)
        np.testing.assert_array_equal(stream[0]["image"][..., 0], ours(patch))
        assert rng.ranges == ranges.tolist()


def test_the_order_of_cases_is_that_of_their_two_stream_batch_sampler(file):
    labeled, unlabeled, epoch = 7, 5, 7 // 2
    for number, batch in enumerate(file["batches"]):
        for row in range(2):
            index = 2 * number + row
            first = sampling.two_stream(index, 2, labeled, epoch, (7, 0))
            other = sampling.two_stream(index, 2, unlabeled, epoch, (7, 1))
            assert [first, labeled + other] == [batch[row], batch[2 + row]]


def test_a_forced_patch_of_a_turned_scan_holds_its_voxel():
    voxels, label = np.zeros((3, 20, 30), np.int16), np.zeros((3, 20, 30), np.int8)
    place = (1, 4, 25)
    voxels[place], label[place] = 100, 1
    scan = Decoded(voxels, label, (np.array([place]),))
    cut = Cut(patch=(3, 9, 5), source=(3, 9, 5), fill=0, foreground=1.0, rot_flip=True)
    stream = Stream(lambda _: scan, ["a"], cut, batch=1, length=40, seed=(0, 0), labeled=True)
    seen = {Turn.draw(np.random.default_rng((0, 0, i))) for i in range(40)}
    assert len(seen) == 4, "mirror images alone"
    for element in map(stream.__getitem__, range(40)):
        assert element["image"].shape == (3, 9, 5, 1)
        assert element["label"].max() == 1
        np.testing.assert_array_equal(element["image"][..., 0] == 100, element["label"] == 1)


def test_a_turn_is_numpys_rotation_and_mirror():
    scan = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    for quarters in range(4):
        for axis in (0, 1):
            turn = Turn.draw(Scripted([quarters / 4, axis / 2]))
            want = np.flip(np.rot90(scan, quarters, axes=(1, 2)), axis + 1)
            np.testing.assert_array_equal(turn(scan), want)
            assert turn.shape(scan.shape) == want.shape
            (points,) = turn.points([np.argwhere(scan == 11)], want.shape)
            np.testing.assert_array_equal(points, np.argwhere(want == 11))
