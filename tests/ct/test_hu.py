import itertools
import math

import numpy as np
import pytest

from bhsd_jax.ct import hu
from bhsd_jax.defects import Kind, Refusal, texts


def rotation(axis, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = c
    matrix[a, b], matrix[b, a] = -s, s
    return matrix


def affine(matrix, spacing=(5.0, 0.5, 0.5)):
    """Columns D, H, W running up, to the front, to the left, then turned by `matrix`."""
    made = np.eye(4)
    made[:3, :3] = matrix @ np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0.0]]) @ np.diag(spacing)
    return made


def test_a_sound_scan_is_untouched():
    voxels = np.array([-1024, -1000, 0, 40, 3071], np.int16).reshape(1, 1, 5)
    repaired, done = hu.repair(voxels)
    assert (repaired.dtype, done) == (np.float32, [])
    np.testing.assert_array_equal(repaired, voxels)


def test_each_known_defect_is_undone_and_named():
    truth = np.array([-1000, -999, -90, -5, 35, 70, 1200, 3000], np.float32).reshape(2, 2, 2)
    scan = np.tile(np.where(truth < 0, truth + 4096, truth), (2, 1, 1)).astype(np.float32)
    scan[0, 0, 0] = 3096
    repaired, done = hu.repair(scan)
    np.testing.assert_array_equal(repaired, np.tile(truth, (2, 1, 1)))
    assert [finding.kind for finding in done] == [Kind.OVERFLOW]
    assert "12-bit" in done[0].text


def test_air_behind_scale_factors_comes_back_as_air():
    slope = 4095 / 65535
    stored = np.array([3096, 3096, 3096, 3097, 35, 70, 1200, 3000])
    scan = (np.rint(stored / slope) * slope).astype(np.float32).reshape(2, 2, 2)
    assert scan.min() >= 0
    assert scan.ravel()[0] < 3096  # a little below: 3095.98 modulo 4096 is no air
    repaired, _ = hu.repair(scan)
    expected = [-1000, -1000, -1000, -999, 35, 70, 1200, 3000]
    np.testing.assert_array_equal(repaired.ravel(), expected)


def test_wraps_are_undone_before_clipping():
    scan = np.array([-33000, -3024, -2048, 31000, 50, 60], np.float32).reshape(1, 2, 3)
    before = scan.copy()
    repaired, done = hu.repair(scan)
    np.testing.assert_array_equal(repaired.ravel(), [3071, -1024, -1024, 3071, 50, 60])
    assert [line.split()[0] for line in texts(done)] == ["16-bit", "clipped"]
    assert "2 voxels below, 2 above" in texts(done)[1]
    assert [finding.kind for finding in done] == [Kind.WRAP, Kind.PADDING, Kind.METAL]
    assert {finding.done for finding in done} == {"repaired"}
    np.testing.assert_array_equal(scan, before)


@pytest.mark.parametrize("clip", [True, False])
def test_padding_at_the_lowest_value_of_16_bits_is_no_metal_that_wrapped(clip):
    scan = np.full((2, 4, 4), -32768, np.int16)
    scan[:, 1:3, 1:3] = [[40, -32768], [-30000, -1000]]
    repaired, done = hu.repair(scan, clip=clip)
    expected = np.full((2, 4, 4), -1024.0)
    expected[:, 1:3, 1:3] = [[40, -1024], [3071 if clip else 35536, -1000]]
    np.testing.assert_array_equal(repaired, expected)
    assert "padding of -32768 set to -1024 HU in 26 voxels" in texts(done)
    assert "16-bit wrap undone in 2 voxels" in texts(done)
    scan[0, 0, 0] = 0  # not all corners: it may be metal
    repaired, done = hu.repair(scan, clip=clip)
    assert repaired[0, 0, 1] == (3071 if clip else 32768)
    assert Kind.PADDING not in [finding.kind for finding in done]


@pytest.mark.parametrize("far", [-1.1e5, 1.1e5])
def test_values_that_no_defect_explains_are_no_hu(far):
    scan = np.array([-1000, 0, 40, far], np.float32).reshape(1, 2, 2)
    with pytest.raises(Refusal, match=r"no HU: values .*look at the scale factors") as caught:
        hu.repair(scan)
    assert caught.value.kind is Kind.NO_HU


def test_bright_scans_with_air_are_no_overflow():
    scan = np.array([-1000, 2000, 2000, 2000], np.float32).reshape(1, 2, 2)
    np.testing.assert_array_equal(hu.repair(scan)[0], scan)


@pytest.mark.parametrize("tilt", [-29.0, -7.5, 0.0, 14.0, 26.0])
def test_tilt_is_found_in_every_order_and_direction_of_axes(tilt):
    tilted = affine(rotation(0, tilt))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turned = tilted.copy()
            turned[:3, :3] = tilted[:3, list(order)] * signs
            assert hu.tilt_deg(turned) == pytest.approx(tilt, abs=1e-9)


def test_tilt_follows_the_formula_of_the_header():
    # Columns i, j, k of a real kind of file: left, front, up, turned about x.
    stored = rotation(0, 18.5) @ np.diag([-1.0, 1, 1])
    made = np.eye(4)
    made[:3, :3] = stored[:, ::-1]
    expected = math.degrees(math.atan2(stored[2, 1], stored[1, 1]))
    assert hu.tilt_deg(made) == pytest.approx(expected)
    assert expected == pytest.approx(18.5)


def test_a_sheared_affine_is_true_and_has_no_tilt():
    sheared = affine(rotation(0, 18.0))
    sheared[:3, 0] = [0, 0, 5 / math.cos(math.radians(18))]
    assert hu.tilt_deg(sheared) == 0
    assert hu.voxel_ml(sheared, table_feed=True) == pytest.approx(5 * 0.5 * 0.5 / 1000)
    assert not hu.tilt_findings(sheared, table_feed=False)


def test_other_rotations_are_no_tilt():
    assert hu.tilt_deg(affine(rotation(2, 10.0))) == 0
    assert hu.tilt_deg(affine(rotation(0, 15.0) @ rotation(1, 8.0))) == 0


def test_milliliters_use_the_distance_of_slices_where_the_step_is_the_tables_feed():
    step = 5.0 / math.cos(math.radians(20))
    tilted = affine(rotation(0, 20.0), (step, 0.5, 0.5))
    assert hu.voxel_ml(tilted, table_feed=True) == pytest.approx(1.25e-3)
    assert hu.voxel_ml(tilted, table_feed=False) == pytest.approx(step * 0.25 / 1000)
    for feed in (True, False):
        assert hu.voxel_ml(affine(np.eye(3)), table_feed=feed) == pytest.approx(1.25e-3)
        assert not hu.tilt_findings(affine(np.eye(3)), table_feed=feed)
    said = [
        finding for feed in (True, False) for finding in hu.tilt_findings(tilted, table_feed=feed)
    ]
    assert [(finding.kind, finding.done) for finding in said] == [
        (Kind.TILT_AMBIGUOUS, "kept"),
    ]
    assert "mL are 6.4 % too big" in said[0].text
