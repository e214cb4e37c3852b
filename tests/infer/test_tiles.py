"""Tile positions and weights against nnU-Net, MONAI and hand-computed numbers."""

import itertools
import json

import numpy as np
import pytest

from bhsd_jax.infer import tiles


@pytest.fixture
def reference(golden):
    """What nnU-Net 2.8.1 and MONAI 1.6.1 give."""
    listed = json.loads((golden / "sliding_window_1.json").read_text())
    return listed, np.load(golden / "sliding_window_1.npz")


def test_starts_are_those_of_nnunet(reference):
    for case in reference[0]["nnunet_steps"]:
        found = tiles.starts(case["image"], case["tile"], case["step"])
        assert [list(axis) for axis in found] == case["steps"]


@pytest.mark.parametrize(
    ("slices", "want"),
    [
        (24, (0, 4)),
        (30, (0, 10)),
        (33, (0, 6, 13)),
        (34, (0, 7, 14)),
        (42, (0, 7, 15, 22)),
        (46, (0, 9, 17, 26)),
        (20, (0,)),
        (7, (0,)),
    ],
)
def test_starts_along_slices_of_a_head(slices, want):
    assert tiles.starts((slices, 512, 512), (20, 320, 256), 0.5) == (
        want,
        (0, 96, 192),
        (0, 128, 256),
    )


def test_halves_are_rounded_to_even():
    assert tiles.starts((7,), (4,), 0.5) == ((0, 2, 3),), "1.5 -> 2"
    assert tiles.starts((9,), (4,), 0.5) == ((0, 2, 3, 5),)
    assert tiles.starts((15,), (10,), 0.25) == ((0, 2, 5),), "2.5 -> 2"


@pytest.mark.parametrize("law", ["nnunet", "monai"])
@pytest.mark.parametrize("step", [0.25, 0.5, 0.7, 1.0])
def test_tiles_cover_every_voxel_and_stay_inside(law, step):
    for size in range(1, 60):
        for tile in (4, 9, 20):
            (found,) = tiles.LAWS[law].starts((size,), (tile,), step)
            covered = np.zeros(max(size, tile), int)
            for start in found:
                covered[start : start + tile] += 1
            assert covered.min() >= 1
            assert found[-1] + tile == max(size, tile)
            assert len(set(found)) == len(found)
            assert all(b - a < tile * step + 1 for a, b in itertools.pairwise(found))


def test_tiles_side_by_side_go_over_the_end():
    law = tiles.LAWS["adjacent"]
    assert law.starts((7, 8, 1), (4, 4, 4), 1.0) == ((0, 4), (0, 4), (0,))
    assert law.padding((7, 8, 1), (4, 4, 4)) == ((0, 1), (0, 0), (0, 3))
    np.testing.assert_array_equal(law.weights((2, 3, 1)), np.ones((2, 3, 1)))


def test_a_step_outside_0_to_1_is_refused():
    for step in (0.0, -0.5, 1.01):
        with pytest.raises(ValueError, match=r"infer\.step"):
            tiles.starts((10,), (5,), step)
        with pytest.raises(ValueError, match=r"infer\.step"):
            tiles.monai_starts((10,), (5,), step)


def test_weights_are_those_of_nnunet(reference):
    listed, arrays = reference
    for name, size in ((f"gaussian_fp32/{i}", tile) for i, tile in enumerate(listed["tiles"])):
        found = tiles.gaussian(size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, arrays[name], rtol=1e-6)


def test_weights_of_height_one_and_in_half_precision_are_those_of_nnunet(reference):
    listed, arrays = reference
    size = listed["tiles"][1]
    unit = tiles.gaussian(size, value_max=1.0)
    np.testing.assert_allclose(unit, arrays["gaussian_unit_fp32/1"], rtol=1e-6)
    half = tiles.gaussian(size, dtype=np.float16)
    np.testing.assert_array_equal(half, arrays["gaussian_fp16/1"])


def test_weights_of_the_head_plan_have_the_published_values():
    found = tiles.gaussian((20, 320, 256))
    want = [0.00335, 0.01534, 0.05976, 0.19841, 0.56135, 1.35335, 2.78037, 4.86752, 7.26149]
    np.testing.assert_allclose(found[:9, 160, 128], want, atol=6e-6)
    assert found.max() == 10
    np.testing.assert_allclose(found[0, 0, 0], 3.775e-10, rtol=2e-4)
    np.testing.assert_allclose(found[-1, -1, -1], 2.160e-9, rtol=3e-4)
    np.testing.assert_allclose(found.mean(dtype=np.float64), 0.307547, rtol=2e-6)


def test_no_weight_is_zero_where_the_bell_is_cut():
    found = tiles.gaussian((9, 4, 50), sigma_scale=0.03)
    assert found.min() > 0
    assert (found == found.min()).mean() > 0.5


def test_positions_and_interval_are_those_of_monai(reference):
    for case in reference[0]["monai_scan"]:
        interval = tiles.monai_interval(case["image"], case["roi"], case["overlap"])
        assert list(interval) == case["scan_interval"]
        axes = tiles.monai_starts(case["image"], case["roi"], 1 - case["overlap"])
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        assert grid.tolist() == [[int(n) for n in place] for place in case["starts"]]


def test_weights_are_those_of_monai(reference):
    listed, arrays = reference
    for i, size in enumerate(listed["tiles"]):
        found = tiles.monai_gaussian(size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, arrays[f"monai_gaussian/{i}"], rtol=2e-6)


def test_padding_puts_the_odd_voxel_after():
    assert tiles.padding((5, 8, 9), (8, 8, 8)) == ((1, 2), (0, 0), (0, 0))


def test_buckets_are_few_and_barely_larger():
    tile = (20, 320, 256)
    sizes = [(d, h, 450) for d in range(20, 47) for h in range(389, 718)]
    found = [tiles.bucket(size, tile) for size in sizes]
    assert len(set(found)) <= 7 * 6
    for size, bucket in zip(sizes, found, strict=True):
        assert all(0 <= b - s < k // 4 for b, s, k in zip(bucket, size, tile, strict=True))
    assert tiles.bucket((3, 1, 5), (4, 2, 8)) == (4, 2, 8)
