"""Mean teacher: who learns, from what, on which input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.configs import mean_teacher
from bhsd_jax.losses import consistency
from bhsd_jax.objectives.mean_teacher import MeanTeacher, bounded_noise

FULL = MeanTeacher(weight=1.0, ramp=0.0, views="shared")


def test_the_teacher_gets_no_gradient_at_all(learn, nets, batch, key):
    grads = jax.jit(jax.grad(lambda ema: FULL.loss(learn(nets[0], ema=ema), batch, key)[0]))(
        nets[1]
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_student_that_is_its_teacher_has_nothing_to_follow(learn, nets, batch, key):
    def loss(params):
        return FULL.loss(learn(params, ema=nets[0]), batch, key)[1]["consistency"]

    value, grads = jax.jit(jax.value_and_grad(loss))(nets[0])
    assert float(value) < 1e-15
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-8


def test_the_loss_is_its_formula(net, learn, nets, batch, key):
    _, metrics = FULL.loss(learn(nets[0], ema=nets[1]), batch, key)
    p, q = (jax.nn.softmax(net.apply({"params": n}, batch.unlabeled, train=True)[0]) for n in nets)
    assert float(metrics["consistency"]) == pytest.approx(float(((p - q) ** 2).mean()), rel=1e-5)


def test_consistency_lies_in_0_to_1_is_symmetric_and_has_its_gradient():
    z = jnp.asarray([-2.0, 0.4, 3.0])
    q = jnp.asarray([0.9, 0.2, 0.5])

    def pair(p):
        return jnp.stack([1 - p, p], -1).reshape(1, 1, 1, -1, 2)

    def loss(z, q):
        return 3 * consistency(jnp.stack([0 * z, z], -1).reshape(1, 1, 1, -1, 2), pair(q))

    p = jax.nn.sigmoid(z)
    np.testing.assert_allclose(jax.grad(loss)(z, q), 2 * (p - q) * p * (1 - p), atol=1e-6)
    swapped = loss(jnp.log(q / (1 - q)), p)
    assert float(loss(z, q)) == pytest.approx(float(swapped), rel=1e-5)
    far = consistency(jnp.asarray([60.0, -60.0]).reshape(1, 1, 1, 1, 2), pair(jnp.ones(1)))
    assert float(far) == pytest.approx(1.0)


def test_no_voxel_costs_more_than_one(key):
    a, b = 20 * jax.random.normal(key, (2, 300, 1, 1, 1, 1, 2))
    each = jax.vmap(consistency)(a, jax.nn.softmax(b))
    assert (each >= 0).all()
    assert (each <= 1).all()
    assert (each > 0.5).any()


def test_the_noise_is_clipped_and_only_the_teacher_sees_it(net, learn, nets, batch, key):
    noise = bounded_noise(key, jnp.zeros(200_000), 0.1, 0.2)
    assert float(jnp.abs(noise).max()) == pytest.approx(0.2)
    assert float(noise.std()) == pytest.approx(0.0959, abs=5e-4)
    assert float((jnp.abs(noise) >= 0.2).mean()) == pytest.approx(0.0455, abs=2e-3)

    seen = []
    learner = learn(nets[0], ema=nets[1])

    def forward(params, image, key):
        seen.append(image)
        return learner.forward(params, image, key)

    noisy = dataclasses.replace(FULL, noise=0.1)
    noisy.loss(dataclasses.replace(learner, forward=forward), batch, key)
    teacher, student = seen
    np.testing.assert_array_equal(student[1::2], batch.unlabeled)
    off = np.abs(np.asarray(teacher - batch.unlabeled))
    assert 0 < off.max() <= 0.2 + 1e-6


def test_by_default_the_student_sees_a_strong_view_and_the_teacher_the_plain_patch(
    learn, nets, batch, key
):
    seen = []
    learner = learn(nets[0], ema=nets[1], noise=1.0)

    def forward(params, image, key):
        seen.append(image)
        return learner.forward(params, image, key)

    MeanTeacher().loss(dataclasses.replace(learner, forward=forward), batch, key)
    teacher, student = seen
    np.testing.assert_array_equal(teacher, batch.unlabeled)
    assert float(jnp.abs(student[1::2] - batch.unlabeled).max()) > 0.5


@pytest.mark.parametrize(("preset", "first"), [("recommended", "teacher"), ("ssl4mis", "student")])
def test_the_preset_says_which_network_is_tested(preset, first):
    spec = mean_teacher.get_config(f"preset={preset}").objective.to_dict()
    spec.pop("name")
    assert next(iter(MeanTeacher(**spec).deployable(1, 2))) == first
    assert set(MeanTeacher(**spec).deployable(1, 2)) == {"teacher", "student"}


def test_a_mean_teacher_without_a_decay_is_refused():
    with pytest.raises(ValueError, match="mean_teacher: ema_decay"):
        MeanTeacher(ema_decay=None)
    with pytest.raises(ValueError, match="mean_teacher: ema_t0 counts updates"):
        MeanTeacher(ema_t0=-1)
