"""Logits of a first network on its own voxels: kept, read, and brought to those of a second."""

import dataclasses
import json

import numpy as np
import pytest

from bhsd_jax.ct import geometry, saved_logits
from bhsd_jax.labels import Labels
from bhsd_jax.volume import Volume

CLASSES = Labels(("background", "a", "b"))
REGIONS = Labels(("background", "value_1", "b"), (("whole", (1, 2)), ("b", (2,))), (1, 2))


def grids():
    """A scan's, at a coarse and at its own spacing."""
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1.0]])
    scan = Volume(np.ones((8, 12, 10), np.int16), affine, "a")
    return [geometry.locate(scan, spacing_mm=mm) for mm in ((4.0, 2.0, 2.0), (2.0, 1.0, 1.0))]


def logits_of(grid, outputs):
    return np.random.default_rng(0).normal(size=(outputs, *grid.shape)).astype(np.float32)


def test_what_was_kept_is_read(tmp_path):
    low, _ = grids()
    logits = logits_of(low, 3)
    path = saved_logits.beside(tmp_path / "case.1.nii.gz")
    assert path.name == "case.1_logits.npz"
    saved_logits.save(path, logits, low)
    found, grid = saved_logits.load(path)
    assert (found == logits).all()
    assert grid == low


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_labels_are_those_of_the_interpolated_logits(tmp_path, labels):
    low, full = grids()
    logits = logits_of(low, labels.outputs)
    path = tmp_path / "a_logits.npz"
    saved_logits.save(path, logits, low)
    found = saved_logits.label_on(path, full, labels)
    assert found.shape == (8, 12, 10)
    # Twice as many voxels: their centers lie a quarter of a voxel beside the old ones.
    moved = np.pad(logits, [(0, 0)] + [(1, 1)] * 3, mode="edge")
    for axis in (1, 2, 3):
        n = moved.shape[axis] - 2
        here, before, after = (np.take(moved, np.arange(n) + k, axis) for k in (1, 0, 2))
        pair = np.stack([0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after], axis + 1)
        moved = pair.reshape(*here.shape[:axis], 2 * n, *here.shape[axis + 1 :])
    want = np.where(moved[1] > 0, 2, moved[0] > 0) if labels.regions else moved.argmax(0)
    assert (found == want).all()
    assert set(np.unique(found)) == {0, 1, 2}


def test_what_does_not_fit_is_refused(tmp_path):
    low, full = grids()
    path = tmp_path / "a_logits.npz"
    saved_logits.save(path, logits_of(low, 3), low)
    other = dataclasses.replace(full, crop_start=(1, 0, 0))
    with pytest.raises(ValueError, match=r"crop_start of the scan .* is \(0, 0, 0\), here \(1"):
        saved_logits.label_on(path, other, CLASSES)
    with pytest.raises(ValueError, match="holds 3 classes, not 2"):
        saved_logits.label_on(path, full, REGIONS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"damaged .*; predict the scan again"):
        saved_logits.load(path)
    np.savez(path, logits=np.zeros((3, 1, 1, 1), np.float32), grid=json.dumps(low.to_json()))
    with pytest.raises(ValueError, match=r"float32\(3, 1, 1, 1\) on a grid of \(4, 6, 5\)"):
        saved_logits.load(path)
    with pytest.raises(FileNotFoundError):
        saved_logits.load(tmp_path / "none_logits.npz")
