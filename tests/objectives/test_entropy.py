"""Entropy minimization: what the entropy is, where it pushes, and which voxels it is taken on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_every_objective import objective_of

from bhsd_jax.losses import entropy
from bhsd_jax.objectives.entropy import EntropyMinimization

FULL = EntropyMinimization(weight=0.7, ramp=0.0)


def of(*logits):
    return entropy(jnp.asarray(logits, jnp.float32).reshape(1, 1, 1, -1, len(logits[0])))


@pytest.mark.parametrize("classes", [2, 6])
def test_uniform_logits_have_all_the_entropy_and_certain_ones_none(classes):
    certain = [60.0] + [-60.0] * (classes - 1)
    value = of([3.0] * classes, certain)[0, 0, 0]
    assert float(value[0]) == pytest.approx(1.0, abs=1e-6)
    assert float(value[0]) * np.log(classes) == pytest.approx({2: 0.693147, 6: 1.791759}[classes])
    assert float(value[1]) == pytest.approx(0.0, abs=1e-6)


def test_a_shift_or_another_order_of_the_classes_changes_nothing():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    want = of(*logits)
    np.testing.assert_allclose(of(*(logits + 5)), want, atol=1e-6)
    np.testing.assert_allclose(of(*logits[:, [2, 0, 3, 1]]), want, atol=1e-6)


def test_the_gradient_has_its_closed_form_and_stays_finite():
    z = jnp.asarray([-200.0, -1.5434, -0.3, 0.0, 0.7, 1.5434, 200.0])

    def nats(z):
        pair = jnp.stack([jnp.zeros_like(z), z], -1).reshape(1, 1, 1, -1, 2)
        return entropy(pair).sum() * np.log(2)

    grad = jax.jit(jax.grad(nats))(z)
    s = 1 / (1 + np.exp(-np.asarray(z, np.float64)))
    np.testing.assert_allclose(grad, -np.asarray(z) * s * (1 - s), atol=1e-6)
    assert float(grad[3]) == 0
    assert float(jnp.abs(grad).max()) == pytest.approx(0.2239, abs=1e-4)


def test_a_step_on_free_logits_lowers_the_entropy_and_keeps_every_class():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 1, 200, 3)), jnp.float32)
    value, grad = jax.value_and_grad(lambda x: FULL._mean(x))(logits)
    moved = logits - 20.0 * grad
    assert float(FULL._mean(moved)) < float(value)
    np.testing.assert_array_equal(moved.argmax(-1), logits.argmax(-1))


def test_only_ssl4mis_counts_the_labeled_patches(net, batch, learn, key):
    params = net.init(key, batch.image, train=False)["params"]
    other = dataclasses.replace(batch, image=batch.image * 3)

    def entropies(objective):
        return [float(objective.loss(learn(params), b, key)[1]["entropy"]) for b in (batch, other)]

    a, b = entropies(objective_of("entropy", "recommended"))
    assert a == b
    c, d = entropies(objective_of("entropy", "ssl4mis"))
    assert c != d
    parts = [
        float(entropy(net.apply({"params": params}, x, train=True)[0]).mean())
        for x in (batch.image, batch.unlabeled)
    ]
    assert c == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_balanced_entropy_weighs_every_predicted_class_the_same():
    sure, unsure = [9.0, 0.0], [0.0, 0.1]  # 99 voxels of background, one of foreground
    logits = jnp.asarray([sure] * 99 + [unsure]).reshape(1, 1, 1, 100, 2)
    background, foreground = float(of(sure)[0, 0, 0, 0]), float(of(unsure)[0, 0, 0, 0])
    for voxels, want in (
        ("all", (99 * background + foreground) / 100),
        ("balanced", (background + foreground) / 2),
        ("foreground", foreground),
    ):
        found = dataclasses.replace(FULL, voxels=voxels)._mean(logits)
        assert float(found) == pytest.approx(want, rel=1e-5), voxels
    none = dataclasses.replace(FULL, voxels="foreground")._mean(logits[..., :99, :])
    assert float(none) == 0


def test_the_squares_measure_is_gentler_where_nearly_sure():
    square = dataclasses.replace(FULL, measure="max_square")
    p = np.asarray([0.5, 0.9])
    logits = jnp.asarray(np.log(np.stack([1 - p, p], -1)), jnp.float32).reshape(1, 1, 1, 2, 2)
    assert float(square._mean(logits)) == pytest.approx(float((p * (1 - p)).mean()), rel=1e-5)
