"""Raw intensities to network channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.windows import Normalization

FOREGROUND = (2.0, 56.0, 17.0, 98.0)


def test_ct_plan_clips_to_the_percentiles_then_standardizes():
    image = jnp.asarray([-1000, 2, 56, 73, 98, 3000], jnp.int16).reshape(1, 1, 6, 1)
    found = jax.jit(Normalization.from_plan("ct", FOREGROUND))(image)
    assert found.dtype == jnp.float32
    expected = np.array([-54, -54, 0, 17, 42, 42]) / 17
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)


def test_mr_plan_changes_nothing():
    image = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 1)) * 1e4
    normalize = Normalization.from_plan("mr", (0.0, 1.0, 2.0, 3.0))
    np.testing.assert_array_equal(normalize(image), image)
    assert normalize.pad_value("air") == normalize.pad_value("nnunet") == 0.0
    assert normalize.fill("air") == (0.0,)


def test_windows_become_channels_from_minus_one_to_one():
    normalize = Normalization.from_windows(((40, 80), (600, 2800)))
    image = jnp.asarray([-900, 0, 40, 80, 600, 2000, 3000], jnp.int16).reshape(1, 1, 1, 7, 1)
    found = jax.jit(normalize)(image)
    assert found.shape == (1, 1, 1, 7, 2)
    assert normalize.channels == 2
    np.testing.assert_allclose(found[..., 0].ravel(), [-1, -1, 0, 1, 1, 1, 1])
    bone = [-1, -600 / 1400, -560 / 1400, -520 / 1400, 0, 1, 1]
    np.testing.assert_allclose(found[..., 1].ravel(), bone, rtol=1e-6)


def test_the_paper_window_is_level_40_width_160():
    paper = Normalization.from_windows(((40, 160),))
    assert paper == Normalization((-40.0,), (120.0,), (40.0,), (80.0,))


def test_air_is_the_darkest_value_of_every_channel():
    normalize = Normalization.from_windows(((600, 2800), (40, 80)))
    raw = normalize.pad_value("air")
    assert raw == -800.0
    padded = jax.jit(normalize)(np.full((1, 1, 1, 1), raw, np.float32))
    darkest = jax.jit(normalize)(np.full((1, 1, 1, 1), -32768, np.int16))
    np.testing.assert_array_equal(padded, darkest)
    np.testing.assert_allclose(normalize.fill("air"), padded.ravel(), rtol=1e-6)


def test_nnunet_padding_is_zero_after_normalization():
    normalize = Normalization.from_plan("ct", FOREGROUND)
    assert normalize.pad_value("nnunet") == 56.0
    assert normalize.fill("nnunet") == (0.0,)
    np.testing.assert_allclose(normalize.fill("air"), [-54 / 17])


def test_a_constant_foreground_gives_finite_channels():
    normalize = Normalization.from_plan("ct", (10.0, 20.0, 0.0, 30.0))
    assert normalize.scale == (1e-8,)
    assert np.isfinite(jax.jit(normalize)(np.zeros((1, 1, 1, 1), np.float32))).all()


@pytest.mark.parametrize("windows", [(), ((40, 0),), ((40, 80), (40, -1)), ((40, 80, 1),)])
def test_impossible_windows_are_refused(windows):
    with pytest.raises(ValueError, match="level_hu, width_hu"):
        Normalization.from_windows(windows)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="'ct' or 'mr'"):
        Normalization.from_plan("pet", FOREGROUND)
    with pytest.raises(ValueError, match="air, nnunet"):
        Normalization.from_plan("ct", FOREGROUND).pad_value("water")
    with pytest.raises(ValueError, match="one entry per channel"):
        Normalization((0.0,), (1.0, 2.0), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="low < high"):
        Normalization((1.0,), (1.0,), (0.0,), (1.0,))
