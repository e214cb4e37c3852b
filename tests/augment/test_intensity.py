"""Changes of value, each against a closed form, a slow loop or nnU-Net's own output."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from bhsd_jax.augment.intensity import (
    Brightness,
    Contrast,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    LowResolution,
    blur_axis,
    coarse_matrix,
    two_sided,
)

OPS = [
    partial(GaussianNoise, std=(0.05, 0.1)),
    GaussianBlur,
    Brightness,
    Contrast,
    partial(LowResolution, zoom=(0.5, 0.5), dummy_2d=False),
    partial(Gamma, invert=True),
    Gamma,
]


def name(make):
    return getattr(make, "func", make).__name__


@pytest.fixture
def image():
    return jax.random.normal(jax.random.key(7), (4, 6, 5, 2))


@pytest.mark.parametrize("make", OPS, ids=name)
def test_probability_zero_is_the_identity_bit_for_bit(make, key, image):
    np.testing.assert_array_equal(jax.jit(make(p=0.0))(key, image), image)


@pytest.mark.parametrize("make", OPS, ids=name)
def test_a_constant_patch_stays_finite_and_float32(make, key):
    for level in (0.0, -3.5):
        out = jax.jit(make(p=1.0))(key, jnp.full((4, 6, 6, 1), level))
        assert out.shape == (4, 6, 6, 1)
        assert out.dtype == jnp.float32
        assert np.isfinite(out).all()


@pytest.mark.parametrize("make", OPS, ids=name)
def test_a_channel_changes_as_often_as_p_says(make):
    draws, p = 2000, 0.3
    image = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
    keys = jax.random.split(jax.random.key(2), draws)
    out = jax.jit(jax.vmap(make(p=p), in_axes=(0, None)))(keys, image)
    changed = np.asarray((out != image).any((1, 2, 3)))  # [draws C]
    tolerance = 5 * math.sqrt(p * (1 - p) / draws)
    np.testing.assert_allclose(changed.mean(0), p, atol=tolerance)
    # Blur and low resolution choose the patch with 0.6, then each channel with 0.5.
    both = 0.15 if name(make) in ("GaussianBlur", "LowResolution") else p
    np.testing.assert_allclose(changed.all(1).mean(), both, atol=tolerance)


@pytest.mark.parametrize("make", [GaussianBlur, Contrast, Gamma], ids=name)
def test_mirroring_commutes(make, key, image):
    flip = partial(jnp.flip, axis=2)
    change = jax.jit(make(p=1.0))
    np.testing.assert_allclose(change(key, flip(image)), flip(change(key, image)), atol=1e-5)


def test_noise_has_the_drawn_standard_deviation_in_every_channel(key):
    out = jax.jit(GaussianNoise(1.0, (0.2, 0.2)))(key, jnp.full((10, 40, 40, 2), 3.0))
    for channel in range(2):
        assert abs(float(out[..., channel].std()) - 0.2) < 5 * 0.2 / math.sqrt(2 * 16000)
        assert abs(float(out[..., channel].mean()) - 3.0) < 5 * 0.2 / math.sqrt(16000)
    assert abs(np.corrcoef(out[..., 0].ravel(), out[..., 1].ravel())[0, 1]) < 5 / math.sqrt(16000)


@pytest.mark.parametrize(
    ("sigma", "taps"), [(0.5, 3), (0.583, 3), (0.584, 5), (0.916, 5), (0.917, 7)]
)
def test_blur_of_a_point_is_a_kernel_of_the_right_length(sigma, taps):
    line = jnp.zeros((1, 21, 1, 1)).at[0, 10].set(1.0)
    out = np.asarray(blur_axis(line, jnp.asarray([sigma]), 1, 3)).ravel()
    x = np.arange(taps) - taps // 2
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    np.testing.assert_allclose(
        out[10 - taps // 2 : 11 + taps // 2], kernel / kernel.sum(), rtol=1e-5
    )
    assert np.count_nonzero(out) == taps
    np.testing.assert_allclose(out.sum(), 1.0, rtol=1e-6)


def test_blur_equals_scipy_with_the_same_taps(key, image):
    out = jax.jit(GaussianBlur(1.0, (0.8, 0.8)))(key, image)
    expected = np.asarray(image)
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / 0.8) ** 2)
    for axis in range(3):
        expected = scipy.ndimage.correlate1d(expected, kernel / kernel.sum(), axis, mode="mirror")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_blur_draws_a_width_per_axis_and_channel():
    point = jnp.zeros((9, 9, 9, 2)).at[4, 4, 4].set(1.0)
    out = np.asarray(jax.jit(GaussianBlur(1.0))(jax.random.key(3), point))
    widths = [out.sum(tuple({0, 1, 2} - {axis}))[4, c] for axis in range(3) for c in range(2)]
    assert len(set(np.round(widths, 4))) == 6


def test_blur_accepts_a_single_slice(key):
    image = jax.random.normal(key, (1, 8, 8, 1))
    out = jax.jit(GaussianBlur(1.0, (0.8, 0.8)))(key, image)
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / 0.8) ** 2)
    expected = np.asarray(image)
    for axis in (1, 2):
        expected = scipy.ndimage.correlate1d(expected, kernel / kernel.sum(), axis, mode="mirror")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_brightness_multiplies_each_channel(key, image):
    out = jax.jit(Brightness(1.0, (1.25, 1.25)))(key, image)
    np.testing.assert_allclose(out, image * 1.25, rtol=1e-6)
    ratio = np.asarray(jax.jit(Brightness(1.0))(key, image) / image)
    assert np.ptp(ratio, axis=(0, 1, 2)).max() < 1e-6
    assert abs(ratio[0, 0, 0, 0] - ratio[0, 0, 0, 1]) > 1e-4


def test_contrast_stretches_about_the_mean_and_keeps_the_range(key):
    image = jnp.asarray([0.0, 4.0, 5.0, 6.0, 10.0]).reshape(1, 1, 5, 1)
    wider = jax.jit(Contrast(1.0, (1.5, 1.5)))(key, image)
    np.testing.assert_allclose(wider.ravel(), [0, 3.5, 5, 6.5, 10], rtol=1e-6)
    narrower = jax.jit(Contrast(1.0, (0.5, 0.5)))(key, image)
    np.testing.assert_allclose(narrower.ravel(), [2.5, 4.5, 5, 5.5, 7.5], rtol=1e-6)


@pytest.mark.parametrize("invert", [True, False])
def test_gamma_one_changes_nothing(invert, key, image):
    out = jax.jit(Gamma(1.0, (1.0, 1.0), invert))(key, image)
    np.testing.assert_allclose(out, image, atol=1e-5)


@pytest.mark.parametrize("invert", [True, False])
def test_gamma_restores_mean_and_deviation_and_keeps_the_order(invert, key, image):
    out = np.asarray(jax.jit(Gamma(1.0, (1.5, 1.5), invert))(key, image))
    np.testing.assert_allclose(out.mean((0, 1, 2)), image.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), image.std((0, 1, 2)), rtol=1e-5)
    for c in range(2):
        order = np.argsort(np.asarray(image)[..., c], axis=None)
        assert (np.diff(out[..., c].ravel()[order]) >= 0).all()


def test_two_sided_factors_are_below_one_half_the_time():
    keys = jax.random.split(jax.random.key(4), 4000)
    factors = np.asarray(jax.vmap(lambda key: two_sided(key, (0.7, 1.5), 1))(keys)).ravel()
    below = factors[factors < 1]
    assert abs(len(below) / 4000 - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert abs(below.mean() - 0.85) < 5 * 0.0866 / math.sqrt(len(below))
    assert abs(factors[factors > 1].mean() - 1.25) < 5 * 0.1443 / math.sqrt(4000 - len(below))
    assert 0.7 <= factors.min() < factors.max() <= 1.5
    one_side = np.asarray(jax.vmap(lambda key: two_sided(key, (0.5, 0.8), 1))(keys))
    assert 0.5 <= one_side.min() < 0.51 < 0.79 < one_side.max() <= 0.8


def slow_coarse(line, kept):
    """Nearest down, linear up, centers aligned at halves: one voxel at a time."""
    n = len(line)
    small = [line[int((2 * j + 1) * n // (2 * kept))] for j in range(kept)]
    out = []
    for i in range(n):
        place = max((i + 0.5) * kept / n - 0.5, 0.0)
        low = int(place)
        high = min(low + 1, kept - 1)
        out.append(small[low] * (1 - place + low) + small[high] * (place - low))
    return np.array(out)


@pytest.mark.parametrize(("size", "kept"), [(20, 10), (20, 13), (21, 11), (7, 7), (5, 1), (32, 24)])
def test_coarse_matrix_equals_a_slow_reference(size, kept):
    line = np.random.default_rng(kept).normal(size=size).astype(np.float32)
    matrix = np.asarray(coarse_matrix(size, jnp.asarray(kept)))
    np.testing.assert_allclose(matrix @ line, slow_coarse(line, kept), atol=1e-5)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-6)


def test_low_resolution_leaves_d_alone_in_thin_patches(key):
    thin = jax.random.normal(key, (4, 16, 16, 1))
    out = jax.jit(LowResolution(1.0, (0.5, 0.5)))(key, thin)
    expected = np.asarray(thin)
    for axis in (1, 2):
        expected = np.apply_along_axis(slow_coarse, axis, expected, 8)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    deep = jax.random.normal(key, (6, 16, 16, 1))
    out = jax.jit(LowResolution(1.0, (0.5, 0.5)))(key, deep)
    expected = np.asarray(deep)
    for axis, kept in ((0, 3), (1, 8), (2, 8)):
        expected = np.apply_along_axis(slow_coarse, axis, expected, kept)
    np.testing.assert_allclose(out, expected, atol=1e-5)


MAKERS = {
    "blur": lambda v: GaussianBlur(1.0, (v, v)),
    "contrast": lambda v: Contrast(1.0, (v, v)),
    "gamma": lambda v: Gamma(1.0, (v, v)),
    "gamma_inverted": lambda v: Gamma(1.0, (v, v), invert=True),
    "low_resolution": lambda v: LowResolution(1.0, (v, v), dummy_2d=False),
    "low_resolution_in_plane": lambda v: LowResolution(1.0, (v, v), dummy_2d=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_each_operation_equals_nnunet(golden, key, kind):
    """Arrays made with batchgeneratorsv2 0.3.6 on torch 2.13 at fixed parameters."""
    case = np.load(golden / "augment_nnunet.npz")
    image = jnp.asarray(case["image"])[..., None]
    values = [entry for entry in case.files if entry.startswith(kind + "/")]
    assert len(values) >= 2
    for entry in values:
        out = jax.jit(MAKERS[kind](float(entry.split("/")[1])))(key, image)
        np.testing.assert_allclose(out[..., 0], case[entry], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianNoise(2.0),
        lambda: GaussianNoise(std=(0.1, 0.0)),
        lambda: GaussianBlur(sigma=(0.0, 1.0)),
        lambda: Brightness(factor=(-0.5, 1.0)),
        lambda: LowResolution(zoom=(0.5, 1.5)),
        lambda: Gamma(p=-1.0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"^\w+: (p|std|sigma|factor|zoom) must "):
        make()
