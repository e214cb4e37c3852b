"""Ramps and interleaving."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.models.nnunet import PlainConvUNet
from bhsd_jax.objectives.common import Ramp, forward_both, interleave, separate


def at(step, **kwargs):
    return float(Ramp(1.0, **kwargs).at(jnp.asarray(step), 30_000))


def test_the_ramp_has_its_published_values():
    want = {0: 0.0067379, 0.1: 0.0174, 0.25: 0.0601, 0.5: 0.2865, 0.75: 0.732, 0.9: 0.951, 1: 1}
    for t, value in want.items():
        assert at(int(t * 30_000), fraction=1.0) == pytest.approx(value, rel=3e-3)


def test_the_ramp_rises_with_every_step_from_a_150th_and_then_is_flat():
    rising = jax.vmap(lambda step: Ramp(1.0, 1.0).at(step, 1000))(jnp.arange(0, 1210, 10))
    assert float(rising[0]) == pytest.approx(np.exp(-5), rel=1e-6)
    assert (np.diff(rising[:101]) > 0).all()
    assert (rising[100:] == 1).all()


def test_the_ramp_stays_at_one_and_may_be_left_out():
    assert at(29_999, fraction=0.4) == 1
    assert at(0, fraction=0.0) == 1


def test_the_staircase_holds_its_value():
    values = [at(step, fraction=1.0, staircase=150) for step in (300, 301, 449)]
    assert len(set(values)) == 1
    assert at(450, fraction=1.0, staircase=150) > values[0]


def test_interleaving_is_undone():
    a, b = jnp.arange(6.0).reshape(3, 2), -jnp.arange(6.0).reshape(3, 2)
    merged = interleave(a, b)
    np.testing.assert_array_equal(merged[0], a[0])
    np.testing.assert_array_equal(merged[1], b[0])
    for got, want in zip(separate(merged), (a, b), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="3 != 2"):
        interleave(a, b[:2])


def test_one_pass_and_two_passes_agree(net, batch, learn, key):
    params = net.init(key, batch.image, train=False)["params"]
    (a,), (b,) = forward_both(learn(params), params, batch.image, batch.unlabeled, key)
    (c,), (d,) = forward_both(learn(params), params, batch.image, batch.unlabeled[:1], key)
    np.testing.assert_allclose(a, c, atol=1e-6)
    np.testing.assert_allclose(b[:1], d, atol=1e-6)


def test_norms_see_one_patch_at_a_time_however_loud_its_neighbor(batch, learn, key):
    net = PlainConvUNet(
        num_classes=2, features=(4, 8), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2
    )
    params = jax.jit(lambda: net.init(key, batch.image, train=False)["params"])()
    apply = jax.jit(lambda image: net.apply({"params": params}, image, train=True))
    learner = dataclasses.replace(learn(params), forward=lambda params, image, key: apply(image))
    quiet, loud = batch.image, 30 * batch.unlabeled
    found = forward_both(learner, params, quiet, loud, key)
    for logits, want in zip(found, (apply(quiet), apply(loud)), strict=True):
        np.testing.assert_allclose(logits[0], want[0], atol=1e-5)
