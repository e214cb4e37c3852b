"""Weak-to-strong and CPS with CutMix: pasted labels, sure voxels, copy-paste weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.losses import cross_entropy, soft_dice
from bhsd_jax.objectives import mixing, w2s
from bhsd_jax.objectives.common import separate
from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.cps_cutmix import CrossPseudoSupervisionCutMix
from bhsd_jax.objectives.w2s import WeakToStrong

PLAIN = WeakToStrong(weight=1.0, ramp=0.0, chance=0.0, holes=0.0, sure=0.0, sure_foreground=0.0)
PASTE = WeakToStrong(weight=1.0, ramp=0.0, pairing="labeled")


def logits(net, params, image):
    return net.apply({"params": params}, image, train=True)[0]


def test_without_a_box_it_is_pseudo_labels_of_the_teacher(net, learn, nets, batch, key):
    _, metrics = PLAIN.loss(learn(nets[0], ema=nets[1]), batch, key)
    student, teacher = (logits(net, n, batch.unlabeled) for n in nets)
    guess = teacher.argmax(-1)
    want = cross_entropy(student, guess) + 1 - soft_dice(student, guess, batch=True).mean()
    assert float(metrics["follow"]) == pytest.approx(float(want), rel=1e-5)
    assert float(metrics["sure"]) == 1


def test_image_and_labels_are_pasted_by_one_mask(net, learn, nets, batch, key, monkeypatch):
    mask = jnp.zeros((2, 4, 6, 6), bool).at[:, 1:3, 2:5, 1:4].set(True)
    monkeypatch.setattr(mixing, "boxes", lambda *a, chance: mask & (chance == 1.0))
    pasted = dataclasses.replace(PLAIN, chance=1.0)
    _, metrics = pasted.loss(learn(nets[0], ema=nets[1]), batch, key)
    image = jnp.where(mask[..., None], batch.unlabeled[::-1], batch.unlabeled)
    teacher = logits(net, nets[1], batch.unlabeled).argmax(-1)
    guess = jnp.where(mask, teacher[::-1], teacher)
    student = logits(net, nets[0], image)
    want = cross_entropy(student, guess) + 1 - soft_dice(student, guess, batch=True).mean()
    assert float(metrics["follow"]) == pytest.approx(float(want), rel=1e-5)


def test_a_hole_is_of_the_mean_intensity_of_its_patch(learn, nets, batch, key, monkeypatch):
    """On CT 0 is the mean of the lesions."""
    mask, seen = jnp.zeros((2, 4, 6, 6), bool).at[:, 1:3, 2:5, 1:4].set(True), []
    monkeypatch.setattr(mixing, "boxes", lambda *a, chance: mask & (chance == 1.0))
    learner = learn(nets[0], ema=nets[1])

    def forward(params, image, key):
        seen.append(image)
        return learner.forward(params, image, key)

    shifted = batch.unlabeled + jnp.asarray([3.0, -5.0]).reshape(2, 1, 1, 1, 1)
    pierced = dataclasses.replace(PLAIN, holes=1.0)
    given = dataclasses.replace(batch, unlabeled=shifted)
    pierced.loss(dataclasses.replace(learner, forward=forward), given, key)
    student, plain = np.asarray(separate(seen[1])[1]), np.asarray(shifted)
    for patch, was, hole in zip(student, plain, np.asarray(mask), strict=True):
        np.testing.assert_allclose(patch[hole], was.mean(), rtol=1e-5)
        np.testing.assert_array_equal(patch[~hole], was[~hole])


def test_of_a_slice_with_a_hole_it_is_not_known_what_it_shows(learn, nets, batch, key, monkeypatch):
    """The lesion that its label is about may have been in the hole."""
    mask = jnp.zeros((2, 4, 6, 6), bool).at[0, 1:3, 2:5, 1:4].set(True)
    monkeypatch.setattr(mixing, "boxes", lambda *a, chance: mask & (chance == 1.0))
    rows = jnp.asarray(np.resize([1, 0, -1], (2, 4, 2)), jnp.int8)
    want = np.array(rows)
    want[0, 1:3] = np.where(want[0, 1:3] == 1, -1, want[0, 1:3])
    pierced = dataclasses.replace(PLAIN, holes=1.0)
    found = pierced.terms(learn(nets[0], ema=nets[1]), batch, key).mixed(rows)
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, want)
    assert (want != rows).any()


def test_foreground_has_its_own_threshold_and_nobody_sure_is_no_loss(learn, nets, batch, key):
    p = np.asarray([0.94, 0.96, 0.31, 0.25])
    pair = jnp.asarray(np.log(np.stack([p, 1 - p], -1)), jnp.float32)
    np.testing.assert_array_equal(WeakToStrong()._is_sure(pair), [False, True, False, False])
    lower = WeakToStrong(sure_foreground=0.7)
    np.testing.assert_array_equal(lower._is_sure(pair), [False, True, False, True])

    never = dataclasses.replace(PLAIN, sure=1.0, sure_foreground=1.0)

    def follow(params):
        return never.loss(learn(params, ema=nets[1]), batch, key)[1]["follow"]

    grads = jax.jit(jax.grad(follow))(nets[0])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("objective", [PLAIN, PASTE], ids=["boxes", "copy-paste"])
def test_the_teacher_gets_no_gradient(objective, learn, nets, batch, key):
    def loss(ema):
        return objective.loss(learn(nets[0], ema=ema), batch, key)[0]

    grads = jax.jit(jax.grad(loss))(nets[1])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_copy_paste_counts_pseudo_labels_half(net, learn, nets, batch, key, monkeypatch):
    mask = jnp.zeros((2, 4, 6, 6), bool).at[:, :2, 1:5, 1:5].set(True)
    monkeypatch.setattr(mixing, "cube", lambda *a: mask)
    _, metrics = PASTE.loss(learn(nets[0], ema=nets[1]), batch, key)
    guess = logits(net, nets[1], batch.unlabeled).argmax(-1)
    want = 0.0
    for true in (mask, ~mask):
        image = jnp.where(true[..., None], batch.image, batch.unlabeled)
        answer = logits(net, nets[0], image)
        for label, valid, weight in ((batch.label, true, 1.0), (guess, ~true, 0.5)):
            dice = soft_dice(answer, label, valid=valid, batch=True).mean()
            want += weight * (cross_entropy(answer, label, valid) + 1 - dice) / 2
    assert float(metrics["follow"]) == pytest.approx(float(want), rel=1e-5)
    few = dataclasses.replace(batch, unlabeled=batch.unlabeled[:1])
    with pytest.raises(ValueError, match="as many unlabeled as labeled"):
        PASTE.loss(learn(nets[0], ema=nets[1]), few, key)


def test_cps_without_a_box_is_cps_on_plain_patches(learn, nets, batch, key):
    both = {"a": nets[0], "b": nets[1]}
    cutmix = CrossPseudoSupervisionCutMix(weight=0.7, ramp=0.0, chance=0.0)
    plain = CrossPseudoSupervision(weight=0.7, ramp=0.0)
    losses = jax.jit(lambda p, b: [one.loss(learn(p), b, key)[0] for one in (cutmix, plain)])
    value, want = losses(both, batch)
    assert float(value) == pytest.approx(float(want), rel=1e-6)


def test_a_threshold_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="sure_foreground"):
        w2s.WeakToStrong(sure_foreground=70)
    with pytest.raises(ValueError, match="pairing is one of unlabeled, labeled"):
        w2s.WeakToStrong(pairing="roll")
