"""Interpolation consistency: blends, their targets, and who is blended with whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.losses import consistency
from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.mean_teacher import MeanTeacher

FULL = InterpolationConsistency(weight=1.0, ramp=0.0, views="shared", fold=False)
HALF = dataclasses.replace(FULL, pairs="half")


@pytest.fixture
def share(monkeypatch):
    """Fixes the share of the first patch of every blend."""

    def fix(value):
        monkeypatch.setattr(mixing, "beta", lambda key, a, n: jnp.full(n, value))

    return fix


def follow(objective, learn, nets, batch, key):
    return float(objective.loss(learn(nets[0], ema=nets[1]), batch, key)[1]["consistency"])


@pytest.mark.parametrize(("value", "row"), [(1.0, 0), (0.0, 1)])
def test_a_share_of_one_or_nothing_is_a_mean_teacher_on_one_patch(
    learn, nets, batch, key, share, value, row
):
    share(value)
    one = dataclasses.replace(batch, unlabeled=batch.unlabeled[row : row + 1])
    teacher = MeanTeacher(weight=1.0, ramp=0.0, views="shared")
    want = follow(teacher, learn, nets, one, key)
    assert follow(HALF, learn, nets, batch, key) == pytest.approx(want, rel=1e-6)


def test_swapping_patches_and_shares_is_nothing_and_equal_patches_are_a_mean_teacher(
    learn, nets, batch, key, share
):
    swapped = dataclasses.replace(batch, unlabeled=batch.unlabeled[::-1])
    for value in (0.25, 0.3):
        share(value)
        want = follow(HALF, learn, nets, batch, key)
        share(1 - value)
        assert follow(HALF, learn, nets, swapped, key) == want
    same = dataclasses.replace(batch, unlabeled=jnp.stack([batch.unlabeled[0]] * 2))
    teacher = MeanTeacher(weight=1.0, ramp=0.0, views="shared")
    want = follow(teacher, learn, nets, same, key)
    for value in (0.0, 0.1, 0.5, 0.9, 1.0):
        share(value)
        assert follow(FULL, learn, nets, same, key) == pytest.approx(want, rel=1e-5)


def test_targets_are_probabilities_between_the_two_answers():
    rng = np.random.default_rng(0)
    answer = jnp.asarray(rng.normal(size=(4, 2, 3, 3, 3)), jnp.float32)
    share = jnp.asarray([0.1, 0.5, 0.9, 1.0])
    target = FULL._target(share, answer)
    np.testing.assert_allclose(target.sum(-1), 1, atol=1e-6)
    ours, theirs = jax.nn.softmax(answer), mixing.partners(jax.nn.softmax(answer))
    assert (target >= jnp.minimum(ours, theirs) - 1e-6).all()
    assert (target <= jnp.maximum(ours, theirs) + 1e-6).all()
    np.testing.assert_array_equal(target[3], ours[3])
    assert HALF._target(share[:2], answer).shape == (2, 2, 3, 3, 3)


def test_blending_logits_is_exact_for_an_affine_network_and_blending_probabilities_is_not(key):
    image = jax.random.normal(key, (2, 2, 3, 3, 1))
    logits = jnp.concatenate([0 * image, 2 * image + 0.5], -1)
    share = jnp.asarray([0.3, 0.6])
    blended = mixing.blend(share, image, mixing.partners(image))
    answer = jnp.concatenate([0 * blended, 2 * blended + 0.5], -1)
    exact = dataclasses.replace(FULL, mix="logit")._target(share, logits)
    assert float(consistency(answer, exact)) < 1e-12
    assert float(consistency(answer, FULL._target(share, logits))) > 1e-4


def test_the_teacher_gets_no_gradient(learn, nets, batch, key):
    grads = jax.jit(jax.grad(lambda ema: FULL.loss(learn(nets[0], ema=ema), batch, key)[0]))(
        nets[1]
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_folded_share_is_the_larger_one(learn, nets, batch, key, share):
    share(0.2)
    folded = follow(dataclasses.replace(FULL, fold=True), learn, nets, batch, key)
    share(0.8)
    assert folded == follow(FULL, learn, nets, batch, key)


def test_half_makes_one_blend_of_two_patches_and_an_odd_number_is_refused(learn, nets, batch, key):
    seen = []
    learner = learn(nets[0], ema=nets[1])

    def forward(params, image, key):
        seen.append(len(image))
        return learner.forward(params, image, key)

    HALF.loss(dataclasses.replace(learner, forward=forward), batch, key)
    assert seen == [2, 2, 1], "teacher, labeled, blended"
    odd = dataclasses.replace(batch, unlabeled=batch.unlabeled[:1])
    with pytest.raises(ValueError, match=r"is given 1 at once; make input\.unlabeled a multiple"):
        FULL.loss(learner, odd, key)
