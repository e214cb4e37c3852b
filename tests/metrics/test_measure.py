"""Lesions of one outline: sizes and sides of shapes that are known, at any steps."""

import math

import numpy as np
import pytest

from bhsd_jax.ct import midline
from bhsd_jax.metrics import measure

CLASSES = ("background", "IPH", "SDH")
RIGHT = np.array([1.0, 0, 0, 0])  # the midline at x = 0


def affine_of(step=1.0, rows=1.0, columns=1.0):
    """D up, H to the front, W to the left; the middle of 61 columns at x = 0."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = step, rows, -columns
    affine[:3, 3], affine[3, 3] = (30 * columns, -30 * rows, 0), 1
    return affine


def slices_of(widths, rows=1.0, columns=1.0):
    widths = np.asarray(widths, float)
    places = np.concatenate([[0], np.cumsum((widths[1:] + widths[:-1]) / 2)])
    return measure.Slices(
        affine_of(1, rows, columns), places, widths, widths * rows * columns / 1000
    )


def ball(radius, widths, center=(30, 30), rows=1.0, columns=1.0):
    """A ball in the middle of the planes; [N 61 61]."""
    slices = slices_of(widths, rows, columns)
    z = slices.places - slices.places.mean()
    y, x = np.mgrid[:61, :61]
    inside = ((y - center[0]) * rows) ** 2 + ((x - center[1]) * columns) ** 2
    return inside[None] + (z**2)[:, None, None] <= radius**2, slices


@pytest.mark.parametrize("widths", [[1.0] * 51, [4.0] * 6 + [7.0] * 4])
def test_a_ball_has_its_volume_its_diameter_and_its_abc2(widths):
    mask, slices = ball(18, widths)
    (lesion,) = measure.lesions(mask.astype(np.uint8), CLASSES, slices, RIGHT)
    assert lesion.name == "IPH"
    assert lesion.ml == pytest.approx((mask.sum((1, 2)) * slices.widths_mm).sum() / 1000)
    assert lesion.diameter_mm == pytest.approx(36, abs=1.5)
    shown = np.flatnonzero(mask.any((1, 2))) + 1
    assert (lesion.first_slice, lesion.last_slice) == (shown[0], shown[-1])
    areas = mask.sum((1, 2)) / mask.sum((1, 2)).max()
    height = slices.widths_mm[areas > 0.75].sum()
    height += slices.widths_mm[(areas >= 0.25) & (areas <= 0.75)].sum() / 2
    assert lesion.abc2_ml == pytest.approx(36 * 36 * height / 2000, rel=0.07)
    np.testing.assert_allclose(lesion.center_mm[:2], (0, 0), atol=1e-9)
    assert lesion.side == "both"


def test_a_ball_at_fine_steps_fills_the_half_of_its_abc():
    """4/3 pi r^3 is A B C / 2 but for a factor of pi / 3, were C the diameter."""
    mask, slices = ball(24, [1.0] * 61)
    (lesion,) = measure.lesions(mask.astype(np.uint8), CLASSES, slices, None)
    assert lesion.ml == pytest.approx(4 / 3 * math.pi * 24**3 / 1000, rel=0.01)
    # Of a ball half the height lies above 75 % of the largest area, and most of the rest half.
    height = 48 * (0.5 + (math.sqrt(0.75) - 0.5) / 2)
    assert lesion.abc2_ml == pytest.approx(48 * 48 * height / 2000, rel=0.06)
    assert lesion.side == ""


@pytest.mark.parametrize(("rows", "columns"), [(1.0, 1.0), (0.5, 2.0)])
def test_the_diameter_is_between_outer_edges_in_millimeters(rows, columns):
    plane = np.zeros((20, 20), bool)
    plane[3:6, 4:8] = True
    want = math.hypot(3 * rows, 4 * columns)
    assert measure.diameter_mm(plane, (rows, columns)) == pytest.approx(want)
    assert measure.diameter_mm(np.zeros((4, 4), bool), (1.0, 1.0)) == 0
    random = np.random.default_rng(0).random((20, 20)) < 0.2
    corners = np.concatenate(
        [np.argwhere(random) + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    )
    corners = corners * (rows, columns)
    brute = np.linalg.norm(corners[:, None] - corners[None], axis=-1).max()
    assert measure.diameter_mm(random, (rows, columns)) == pytest.approx(brute)


def test_lesions_are_told_apart_by_class_and_touching_and_sorted_by_size():
    label = np.zeros((6, 61, 61), np.uint8)
    label[1, 5:8, 5:8] = 1  # columns run to the left: low ones are on the right
    label[2, 8, 8] = 1  # joined by a corner
    label[4:6, 40:50, 50:60] = 1
    label[1, 5:8, 8:11] = 2  # touches the first, but is of another class
    found = measure.lesions(label, CLASSES, slices_of([5.0] * 6), RIGHT)
    assert [(one.name, one.voxels, one.side) for one in found] == [
        ("IPH", 200, "left"),
        ("IPH", 10, "right"),
        ("SDH", 9, "right"),
    ]
    assert (found[1].first_slice, found[1].last_slice) == (2, 3)
    assert found[0].ml == pytest.approx(1.0)


@pytest.mark.parametrize(("yaw", "roll", "shift"), [(0, 0, 0), (12, 0, 9), (-8, 10, -14)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_midline_follows_a_head_that_is_turned_and_bent(yaw, roll, shift, order):
    """An ellipsoid of bone; a headrest of plastic and a clip of metal stay outside."""
    affine = affine_of(4.0, 2.5, 2.5)
    d, h, w = np.indices((40, 90, 80))
    world = np.stack([d, h, w, np.ones_like(d)], -1) @ affine.T
    middle = np.add((affine @ (20, 45, 40, 1))[:3], (shift, 0, 0))
    turn = np.eye(3)
    for axis, degrees in ((2, yaw), (1, roll)):
        a, b = [i for i in range(3) if i != axis]
        one = np.eye(3)
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        one[a, a], one[a, b], one[b, a], one[b, b] = c, -s, s, c
        turn = turn @ one
    x, y, z = np.moveaxis((world[..., :3] - middle) @ turn, -1, 0)
    radius = np.sqrt((x / 70) ** 2 + (y / 90) ** 2 + (z / 75) ** 2)
    voxels = np.where(radius < 1, np.where(radius > 0.9, 1000, 30), -1000)
    voxels[:, :2, 10:60] = 200
    voxels[18:20, 60:62, 2:4] = 3000
    native = np.transpose(voxels, np.argsort(order))
    plane = midline.of(native, affine[:, [*np.argsort(order), 3]])
    normal = plane[:3] / np.linalg.norm(plane[:3])
    assert math.degrees(math.acos(min(1, normal @ turn[:, 0]))) < 2.5
    assert abs(plane[:3] @ middle + plane[3]) / np.linalg.norm(plane[:3]) < 1.5
    assert plane[0] > 0


def test_what_is_no_head_has_no_midline():
    assert midline.of(np.full((9, 30, 30), -1000), affine_of(5.0)) is None
