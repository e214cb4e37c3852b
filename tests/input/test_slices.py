"""Slice labels as tables, and cut with the patch."""

import dataclasses

import numpy as np
import pytest
from test_pipeline import CUT, SCANS, stream

from bhsd_jax.input.slices import Slices
from bhsd_jax.volume import SOME

MANY = Slices(classes=2, margin=0)
ROWS = ((0, 0), (0, 1), (0, 0), (-1, 0), (0, 0), (0, 0))


def test_a_scan_without_bleeding_lacks_everything_and_one_that_bleeds_says_nothing():
    np.testing.assert_array_equal(MANY.table(None, False, 3), np.zeros((3, 2)))
    np.testing.assert_array_equal(MANY.table(ROWS, False, 6), np.zeros((6, 2)))
    for bleeding in (True, None):
        np.testing.assert_array_equal(MANY.table(None, bleeding, 3), np.full((3, 2), -1))
    np.testing.assert_array_equal(MANY.table(ROWS, True, 6), ROWS)


def test_the_neighbors_of_a_bleed_are_not_trusted_to_lack_it():
    near = dataclasses.replace(MANY, margin=1).table(ROWS, True, 6)
    np.testing.assert_array_equal(near[:, 1], [-1, 1, -1, 0, 0, 0])
    np.testing.assert_array_equal(near[:, 0], [0, 0, 0, -1, 0, 0])
    far = dataclasses.replace(MANY, margin=3).table(ROWS, True, 6)
    np.testing.assert_array_equal(far[:, 1], [-1, 1, -1, -1, -1, 0])
    with pytest.raises(ValueError, match=r"slice_loss\.margin"):
        Slices(2, margin=-1)


def test_a_binary_slice_shows_any_class_and_lacks_all():
    table = dataclasses.replace(MANY, binary=True).table(ROWS, None, 6)
    np.testing.assert_array_equal(table, [[0], [1], [0], [-1], [0], [0]])


def test_any_bleeding_is_known_of_a_binary_slice_and_of_no_class_of_several():
    rows = ((0, 0), (SOME, SOME), (SOME, 0), (0, 0))
    table = dataclasses.replace(MANY, binary=True).table(rows, None, 4)
    np.testing.assert_array_equal(table, [[0], [1], [1], [0]])
    np.testing.assert_array_equal(MANY.table(rows, None, 4), [[0, 0], [-1, -1], [-1, 0], [0, 0]])
    near = dataclasses.replace(MANY, margin=1).table(rows, None, 4)
    np.testing.assert_array_equal(near, [[-1, -1], [-1, -1], [-1, -1], [-1, 0]])


def test_rows_are_cut_where_the_image_is_and_air_lies_beyond():
    rows = MANY.rows(ROWS, None, (6, 9, 9), (-2, 0, 0), (5, 4, 4))
    np.testing.assert_array_equal(rows, [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0]])
    rows = MANY.rows(ROWS, None, (6, 9, 9), (3, 0, 0), (4, 4, 4))
    np.testing.assert_array_equal(rows, [[-1, 0], [0, 0], [0, 0], [0, 0]])


def test_the_unlabeled_stream_delivers_the_rows_of_its_patches():
    """Every slice of these scans is a constant that says which row belongs to it."""
    scans = {}
    for i, (name, scan) in enumerate(SCANS.items()):
        depth = len(scan.image)
        level = np.arange(depth, dtype=np.int16)[:, None, None] + 100 * i
        labels = tuple((k % 2, -(k % 3 == 0)) for k in range(depth))
        image = np.broadcast_to(level, scan.image.shape)
        scans[name] = dataclasses.replace(scan, image=image, slice_labels=labels)
    free = stream(labeled=False)
    free.open_case, free.slices = scans.__getitem__, MANY
    for i in range(40):
        element = free[i]
        assert element["slice_labels"].shape == (4, 2)
        for image, row in zip(element["image"], element["slice_labels"], strict=True):
            level = int(image.max())
            if level == CUT.fill:
                np.testing.assert_array_equal(row, [0, 0])
            else:
                k = level % 100
                np.testing.assert_array_equal(row, [k % 2, -(k % 3 == 0)])
    assert set(stream(labeled=False)[0]) == {"image"}
    labeled = stream()
    labeled.slices = MANY
    assert set(labeled[0]) == {"image", "label"}
