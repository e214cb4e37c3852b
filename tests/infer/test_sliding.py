"""The sliding window against pointwise networks, brute force and a slow NumPy reimplementation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.infer import sliding, tiles
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.train import mesh as meshes

TILE = (4, 8, 6)
# At most 8 tiles by 8 mirrored versions are summed for one voxel, in float32.
ROUNDING = 64 * float(np.finfo(np.float32).eps)
PARAMS = {"scale": np.array([1.0, -2.0, 0.5], np.float32)}


def pointwise(params, image):
    """Three classes from the one channel of the same voxel."""
    return (image * params["scale"] + jnp.sin(3 * image), image[..., :1])


def lopsided(params, image):
    """Every voxel sees its neighbors on one side, and where it lies in the tile."""
    _, d, h, w, _ = image.shape
    place = jnp.arange(d)[:, None, None] + 2 * jnp.arange(h)[:, None] - jnp.arange(w) ** 2
    shifted = jnp.pad(image, ((0, 0), (1, 0), (2, 0), (0, 1), (0, 0)))[:, :d, :h, 1:]
    mixed = image * params["scale"] + shifted[..., :1] * place[..., None]
    return (mixed + 0.1 * place[..., None],)


# Shared, so that each is compiled once.
POINTWISE = SlidingWindow(pointwise, TILE, tiles_per_call=5)
LOPSIDED = SlidingWindow(lopsided, TILE, tiles_per_call=4)


def volume(*size, channels=1, seed=0):
    return np.random.default_rng(seed).normal(size=(*size, channels)).astype(np.float32)


def slow(network, params, image, tile, step, mirror, fill):
    """nnU-Net's prediction in plain loops and float64."""
    pads = tiles.padding(image.shape[:3], tile)
    padded = np.full([n + a + b for n, (a, b) in zip(image.shape, pads, strict=False)] + [1], fill)
    inner = tuple(slice(a, a + n) for n, (a, _) in zip(image.shape, pads, strict=False))
    padded[inner] = image
    weights = tiles.gaussian(tile).astype(np.float64)
    total, weight = 0.0, np.zeros(padded.shape[:3])
    flips = [f for n in range(4) for f in itertools.combinations((0, 1, 2), n)] if mirror else [()]
    for start in itertools.product(*tiles.starts(padded.shape[:3], tile, step)):
        box = tuple(slice(s, s + k) for s, k in zip(start, tile, strict=True))
        votes = [
            np.flip(
                network(params, np.flip(padded[box], flip)[None].astype(np.float32))[0][0], flip
            )
            for flip in flips
        ]
        part = np.zeros((*weight.shape, votes[0].shape[-1]))
        part[box] = np.mean(votes, axis=0) * weights[..., None]
        total = total + part
        weight[box] += weights
    return np.moveaxis((total / weight[..., None])[inner], -1, 0)


@pytest.mark.parametrize(
    "size", [(4, 8, 6), (9, 17, 13), (2, 3, 5), (3, 20, 6), (1, 1, 1), (10, 7, 30)]
)
def test_a_pointwise_network_is_applied_exactly(size):
    image = volume(*size)
    found = POINTWISE.logits([PARAMS], image, fill=7.0)
    assert found.dtype == np.float32
    want = np.moveaxis(np.asarray(pointwise(PARAMS, image)[0]), -1, 0)
    np.testing.assert_allclose(found, want, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_array_equal(POINTWISE.labels([PARAMS], image), want.argmax(0))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("size", "step"), [((7, 19, 9), 0.5), ((3, 9, 15), 0.75)])
def test_it_agrees_with_plain_loops(mirror, size, step):
    image = volume(*size)
    window = SlidingWindow(lopsided, TILE, step=step, mirror=mirror, tiles_per_call=3)
    want = slow(lopsided, PARAMS, image, TILE, step, mirror, fill=-2.0)
    found = window.logits([PARAMS], image, fill=-2.0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


def test_a_convolution_is_seamless_where_a_tile_holds_all_it_sees():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 1, 2)).astype(np.float32)

    def convolve(params, image):
        axes = ("NDHWC", "DHWIO", "NDHWC")
        return (jax.lax.conv_general_dilated(image, params, (1, 1, 1), "SAME", None, None, axes),)

    image = volume(5, 8, 12)
    tile = (5, 8, 8)  # overlaps along W only: there the seam is at voxels 4 and 7
    found = SlidingWindow(convolve, tile, mirror=False).logits([kernel], image)
    whole = np.moveaxis(np.asarray(convolve(kernel, image[None])[0][0]), -1, 0)
    np.testing.assert_allclose(found[..., :4], whole[..., :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[..., 8:], whole[..., 8:], rtol=1e-5, atol=1e-5)
    at_the_edge = np.abs(found - whole)[..., [4, 7]].max()
    assert at_the_edge > 1e-3, "the edge of a tile is zero padded, which must show"
    assert at_the_edge < 0.01 * np.abs(whole).max(), "but the weights make it small"


def test_mirroring_makes_a_lopsided_network_commute_with_flips():
    image = volume(4, 8, 6)  # one tile, so that tile positions cannot differ
    found = LOPSIDED.logits([PARAMS], image)
    for axis in range(3):
        turned = LOPSIDED.logits([PARAMS], np.flip(image, axis).copy())
        np.testing.assert_allclose(np.flip(turned, axis + 1), found, rtol=1e-5, atol=2e-5)


def test_only_the_named_axes_are_mirrored():
    image = volume(4, 8, 6)
    window = SlidingWindow(lopsided, TILE, mirror_axes=(1,), tiles_per_call=2)
    assert window.count((4, 8, 6)) == 2
    plain = SlidingWindow(lopsided, TILE, mirror=False, tiles_per_call=2)
    turned = plain.logits([PARAMS], np.flip(image, 1).copy())
    want = (plain.logits([PARAMS], image) + np.flip(turned, 2)) / 2
    np.testing.assert_allclose(window.logits([PARAMS], image), want, rtol=1e-5, atol=2e-5)


def test_tiles_per_call_and_devices_do_not_change_the_result():
    image = volume(7, 19, 9)
    want = SlidingWindow(lopsided, TILE, tiles_per_call=1).logits([PARAMS], image)
    three = meshes.make_mesh(devices=jax.local_devices()[:3])
    meshed = ((3, meshes.make_mesh()), (None, three))
    for count, mesh in ((7, None), (64, None), (None, None), *meshed):
        window = SlidingWindow(lopsided, TILE, tiles_per_call=count, mesh=mesh)
        np.testing.assert_allclose(
            window.logits([PARAMS], image), want, rtol=1e-6, atol=1e-6, err_msg=f"{count}, {mesh}"
        )


def test_parameters_may_lie_on_all_devices_already():
    image = volume(5, 9, 9)
    spread = jax.device_put(PARAMS, meshes.replicated(meshes.make_mesh()))
    want = POINTWISE.logits([PARAMS], image)
    np.testing.assert_array_equal(POINTWISE.logits([spread], image), want)


def test_the_network_is_compiled_once_for_volumes_of_any_size():
    traced = []

    def counting(params, image):
        traced.append(image.shape)
        return pointwise(params, image)

    window = SlidingWindow(counting, TILE, tiles_per_call=4)
    for size in ((4, 8, 6), (9, 17, 13), (2, 3, 5), (10, 30, 8)):
        window.labels([PARAMS], volume(*size))
    assert traced == [(4, *TILE, 1)]


def test_nothing_is_compiled_for_volumes_that_only_have_another_depth(caplog):
    window = SlidingWindow(pointwise, (12, 8, 6), mirror=False)

    def compiled(*size):
        caplog.clear()
        with jax.log_compiles():
            window.labels([PARAMS], volume(*size))
            window.logits([PARAMS] * 2, volume(*size))
        return [text for text in caplog.messages if "Finished XLA compilation" in text]

    assert compiled(30, 9, 7)
    assert not [text for depth in (7, 13, 16, 21, 40) for text in compiled(depth, 9, 7)]
    assert compiled(30, 11, 7)


def test_a_larger_bucket_gives_the_same_result(monkeypatch):
    image = volume(7, 19, 9)
    want = LOPSIDED.logits([PARAMS], image)
    monkeypatch.setattr(tiles, "bucket", lambda size, tile: (16, 40, 32))
    np.testing.assert_array_equal(LOPSIDED.logits([PARAMS], image), want)
    monkeypatch.setattr(tiles, "bucket", lambda size, tile: tuple(size))
    np.testing.assert_array_equal(LOPSIDED.logits([PARAMS], image), want)


def test_an_ensemble_averages_softmax():
    image = volume(5, 9, 9)
    others = [PARAMS, {"scale": np.array([-1.0, 4.0, 0.0], np.float32)}]
    each = [jax.nn.softmax(POINTWISE.logits([params], image), axis=0) for params in others]
    found = POINTWISE.logits(others, image)
    np.testing.assert_allclose(np.exp(found), (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(found).sum(0), 1, rtol=1e-5)
    assert (POINTWISE.labels(others, image) == found.argmax(0)).all()


def test_an_ensemble_of_equals_is_the_one_network():
    image = volume(5, 9, 9)
    one, two = (POINTWISE.logits([PARAMS] * count, image) for count in (1, 2))
    np.testing.assert_allclose(jax.nn.softmax(two, 0), jax.nn.softmax(one, 0), atol=1e-6)
    np.testing.assert_array_equal(
        POINTWISE.labels([PARAMS] * 2, image), POINTWISE.labels([PARAMS], image)
    )


def test_the_order_of_twins_does_not_matter():
    image = volume(5, 9, 9)
    twins = [PARAMS, {"scale": np.array([-1.0, 4.0, 0.0], np.float32)}]
    one_way, other_way = POINTWISE.logits(twins, image), POINTWISE.logits(twins[::-1], image)
    np.testing.assert_allclose(one_way, other_way, atol=1e-6)
    assert not np.allclose(one_way, POINTWISE.logits(twins[:1] * 2, image), atol=0.1)


def test_channels_have_their_own_fill():
    def peek(params, image):
        return (jnp.broadcast_to(image.mean(axis=(1, 2, 3), keepdims=True), image.shape),)

    image = np.zeros((2, 8, 6, 2), np.float32)
    found = SlidingWindow(peek, TILE).logits([{}], image, fill=(1.0, -3.0))
    np.testing.assert_allclose(found[:, 0, 0, 0], (0.5, -1.5), rtol=1e-6)


def test_monais_law_places_tiles_elsewhere_but_agrees_on_pointwise_networks():
    image = volume(7, 19, 9)
    window = SlidingWindow(pointwise, TILE, law="monai")
    want = np.moveaxis(np.asarray(pointwise(PARAMS, image)[0]), -1, 0)
    np.testing.assert_allclose(window.logits([PARAMS], image), want, rtol=ROUNDING, atol=ROUNDING)
    other = SlidingWindow(lopsided, TILE, law="monai").logits([PARAMS], image)
    assert np.abs(other - LOPSIDED.logits([PARAMS], image)).max() > 0.1


def test_progress_counts_tiles_mirrors_and_networks():
    image = volume(5, 9, 9)
    calls = []
    POINTWISE.labels(
        [PARAMS, PARAMS], image, progress=lambda done, total: calls.append((done, total))
    )
    expected = 2 * 2 * 2 * 2 * 8  # tiles along D, H, W; networks; mirrors
    assert POINTWISE.count((5, 9, 9)) * 2 == expected
    assert calls[-1] == (expected, expected)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    image = volume(5, 9, 9)
    image[4, 8, 8] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        POINTWISE.logits([PARAMS], image)


@pytest.mark.parametrize(
    ("free", "want"), [(None, 1), (0, 1), (7 * 2**30, 1), (2**40, 16), (10 * 2**32, 10)]
)
def test_tiles_per_call_follow_the_free_memory(monkeypatch, free, want):
    class Device:
        def memory_stats(self):
            return None if free is None else {"bytes_limit": 5 + free, "bytes_in_use": 5}

    monkeypatch.setattr(sliding.jax, "local_devices", lambda: [Device()])
    # 2^19 voxels at 4 kB are 2 GiB, to be had twice.
    assert sliding.tiles_that_fit((32, 128, 128)) == want


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="nnunet, monai"):
        SlidingWindow(pointwise, TILE, law="dense")
    with pytest.raises(ValueError, match=r"infer\.step"):
        SlidingWindow(pointwise, TILE, step=0.0)
    with pytest.raises(ValueError, match=r"infer\.tiles"):
        SlidingWindow(pointwise, TILE, tiles_per_call=0)
    with pytest.raises(ValueError, match="no network"):
        POINTWISE.labels([], volume(4, 8, 6))


def test_a_long_volume_is_added_up_slab_by_slab(monkeypatch):
    image = volume(31, 9, 8)
    held = []
    zeros = sliding.slabs.zeros
    monkeypatch.setattr(sliding.slabs, "zeros", lambda *a: held.append(a[:2]) or zeros(*a))
    want = slow(lopsided, PARAMS, image, TILE, 0.5, mirror=True, fill=0.0)
    for count in (1, 5):  # with 5, tiles of neighboring slabs go through the network together
        window = SlidingWindow(lopsided, TILE, tiles_per_call=count)
        found = window.logits([PARAMS], image)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)
        np.testing.assert_array_equal(window.labels([PARAMS], image), found.argmax(0))
    assert {shape[0] for _, shape in held} == {TILE[0]}


def test_a_program_that_computes_in_64_bits_gets_the_same_labels():
    image = volume(6, 9, 9)
    want = POINTWISE.labels([PARAMS], image)
    with jax.enable_x64(True):
        found = SlidingWindow(pointwise, TILE).labels([PARAMS], image)
    np.testing.assert_array_equal(found, want)


def test_scans_may_be_given_as_they_are_stored():
    image = np.random.default_rng(3).integers(-1000, 1000, (9, 9, 8, 1), np.int16)
    want = POINTWISE.logits([PARAMS], image.astype(np.float32))
    np.testing.assert_array_equal(POINTWISE.logits([PARAMS], image), want)


def summed(params, image):
    """Two classes from the sums over 3 x 3 x 3 voxels, which are not there at the border."""
    del params
    total = jax.lax.reduce_window(image, 0.0, jax.lax.add, (1, 3, 3, 3, 1), (1,) * 5, "VALID")
    return (jnp.concatenate([total, -total], axis=-1),)


def test_tiles_with_a_margin_side_by_side_are_the_whole_volume():
    window = SlidingWindow(
        summed, TILE, mirror=False, law="adjacent", margin=(1, 1, 1), tiles_per_call=2
    )
    image = volume(9, 8, 13)
    padded = jnp.pad(image, ((1, 1), (1, 1), (1, 1), (0, 0)), mode="edge")
    want = np.moveaxis(np.asarray(summed({}, padded[None])[0][0]), -1, 0)
    np.testing.assert_allclose(window.logits([{}], image, fill=99.0), want, atol=1e-4)
    assert window.count((12, 8, 18)) == 9


def test_tiles_are_shortened_where_a_volume_ends_early_in_the_last_ones():
    seen = []

    def forward(params, image):
        seen.append(image.shape[1:4])
        return summed(params, image)

    margin = {"mirror": False, "law": "adjacent", "margin": (1, 1, 1), "tiles_per_call": 1}
    window = SlidingWindow(forward, (6, 8, 8), unit=(3, 4, 2), **margin)
    sizes = [(3, 8, 9), (2, 7, 10), (13, 20, 8), (6, 8, 8)]
    for size in sizes:
        image = volume(*size)
        padded = jnp.pad(image, ((1, 1), (1, 1), (1, 1), (0, 0)), mode="edge")
        want = np.moveaxis(np.asarray(summed({}, padded[None])[0][0]), -1, 0)
        np.testing.assert_allclose(window.logits([{}], image), want, atol=1e-4)
    # Of 9 or 10 columns the two tiles need 6, of 20 rows the three tiles 8; compiled once each.
    assert seen == [(5, 10, 8), (8, 10, 10)]
    assert [window.count(size) for size in sizes] == [2, 2, 9, 1]


def test_of_several_networks_the_mean_of_logits_or_of_probabilities():
    image, others = volume(4, 8, 6), {"scale": np.array([3.0, 0.0, -1.0], np.float32)}
    one, two = (np.moveaxis(np.asarray(pointwise(p, image)[0]), -1, 0) for p in (PARAMS, others))
    plain = {"mirror": False, "tiles_per_call": 1}
    window = SlidingWindow(pointwise, TILE, combine="logits", **plain)
    found = window.logits([PARAMS, others], image)
    np.testing.assert_allclose(found, (one + two) / 2, rtol=1e-5, atol=1e-6)
    window = SlidingWindow(pointwise, TILE, **plain)
    found = jax.nn.softmax(window.logits([PARAMS, others], image), axis=0)
    want = (jax.nn.softmax(one, axis=0) + jax.nn.softmax(two, axis=0)) / 2
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no 'votes'; choose from probabilities, logits"):
        SlidingWindow(pointwise, TILE, combine="votes")
