"""Calibration against closed forms and draws whose temperature is known."""

import numpy as np
import pytest

from bhsd_jax.metrics.calibration import fit_temperature, is_at_limit, measure, reliability


def drawn(temperature, count=40_000):
    """Logits that are too sharp by a factor, and labels drawn from the true probabilities."""
    random = np.random.default_rng(0)
    true = random.normal(0, 2, (count, 3))
    chances = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = (random.random(count)[:, None] > chances.cumsum(1)).sum(1)
    return true * temperature, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_them_is_found(temperature):
    logits, labels = drawn(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)
    before, after = measure(logits, labels, 1.0), measure(logits, labels, temperature)
    assert after.error < 0.01
    assert not is_at_limit(fit_temperature(logits, labels))
    if temperature != 1:
        assert before.error > 0.03
        assert before.brier > after.brier
        assert before.nll > after.nll


def test_a_temperature_that_the_voxels_do_not_bound_ends_at_a_limit():
    right, labels = drawn(1.0, 500)
    right[np.arange(500), labels] = right.max(1) + 1
    assert fit_temperature(right, labels) == pytest.approx(0.05, rel=1e-3), "never wrong"
    noise = np.random.default_rng(1).normal(0, 2, (500, 3))
    noise[np.arange(500), labels] = noise.min(1) - 1
    assert fit_temperature(noise, labels) == pytest.approx(20.0, rel=1e-3), "always wrong"
    assert is_at_limit(fit_temperature(right, labels))
    assert is_at_limit(fit_temperature(noise, labels))


def test_scores_by_hand():
    logits = np.log(np.array([[0.75, 0.25], [0.35, 0.65], [0.95, 0.05]]))
    found = measure(logits, np.array([0, 1, 1]), 1.0)
    assert found.brier == pytest.approx((2 * 0.25**2 + 2 * 0.35**2 + 2 * 0.95**2) / 3)
    assert found.nll == pytest.approx(-(np.log(0.75) + np.log(0.65) + np.log(0.05)) / 3)
    assert found.error == pytest.approx((0.25 + 0.35 + 0.95) / 3)


def test_bins_by_hand():
    found = reliability(np.array([0.0, 0.05, 0.95, 1.0]), np.array([False, True, True, True]))
    low, high = found
    assert (low.low, low.high, low.count, low.mean, low.observed) == (0, 0.1, 2, 0.025, 0.5)
    assert (high.count, high.observed) == (2, 1.0)
    with pytest.raises(ValueError, match="no voxels"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, int))
