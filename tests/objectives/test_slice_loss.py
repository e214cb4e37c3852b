"""Slice labels: the gate and the four terms against their formulas."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.losses import DiceCE, cross_entropy
from bhsd_jax.objectives import slice_loss
from bhsd_jax.objectives.common import Terms
from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.slice_loss import SliceTerms, WithSliceLoss
from bhsd_jax.objectives.supervised import Supervised, WeaklySupervised
from bhsd_jax.objectives.w2s import WeakToStrong

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(2, 3, 4, 5, 3)), jnp.float32)
UNKNOWN = jnp.full((2, 3, 2), -1, jnp.int8)
ABSENT, SHOWN = UNKNOWN * 0, UNKNOWN * 0 + 1


def prob(logits):
    return np.asarray(jax.nn.softmax(logits), np.float64)


@pytest.mark.parametrize("rows", [UNKNOWN, SHOWN])
def test_a_gate_with_nothing_ruled_out_is_the_identity(rows):
    np.testing.assert_array_equal(slice_loss.gate(LOGITS, rows), LOGITS)


def test_the_gate_renormalizes_over_what_may_be():
    rows = UNKNOWN.at[0, 1, 0].set(0).at[1, 2].set(0)
    gated = prob(slice_loss.gate(LOGITS, rows))
    np.testing.assert_allclose(gated.sum(-1), 1, atol=1e-6)
    keep = np.ones((2, 3, 1, 1, 3))
    keep[0, 1, ..., 1] = keep[1, 2, ..., 1:] = 0
    want = prob(LOGITS) * keep
    np.testing.assert_allclose(gated, want / want.sum(-1, keepdims=True), atol=1e-6)
    winner = np.asarray(slice_loss.gate(LOGITS, rows).argmax(-1))
    assert not (winner[0, 1] == 1).any()
    assert not winner[1, 2].any(), "all absent is background everywhere"


def test_negatives_are_cross_entropy_with_an_empty_mask():
    empty = jnp.zeros(LOGITS.shape[:-1], jnp.int32)
    value, grad = jax.jit(jax.value_and_grad(slice_loss.negatives))(LOGITS, ABSENT)
    want, target = jax.jit(jax.value_and_grad(cross_entropy))(LOGITS, empty)
    supervised = DiceCE(dice_weight=0.0)([LOGITS], empty)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert float(value) == pytest.approx(float(supervised), rel=1e-6)
    np.testing.assert_allclose(grad, target, atol=1e-7)


def test_negatives_speak_only_of_slices_that_lack_something():
    graded = jax.jit(jax.grad(slice_loss.negatives))
    assert float(slice_loss.negatives(LOGITS, UNKNOWN)) == 0
    assert not np.any(graded(LOGITS, SHOWN))
    rows = UNKNOWN.at[0, 1, 0].set(0).at[1, 2].set(0)
    grad = graded(LOGITS, rows)
    assert np.abs(grad).max((2, 3, 4)).astype(bool).tolist() == [[0, 1, 0], [0, 0, 1]]
    p = prob(LOGITS)
    nats = np.concatenate([-np.log(1 - p[0, 1, ..., 1]), -np.log(p[1, 2, ..., 0])])
    assert float(slice_loss.negatives(LOGITS, rows)) == pytest.approx(nats.mean(), rel=1e-5)
    volume = np.concatenate([p[0, 1, ..., 1], 1 - p[1, 2, ..., 0]]).mean()
    assert float(slice_loss.negatives(LOGITS, rows, "volume")) == pytest.approx(volume, rel=1e-5)


def test_pooling_lies_between_mean_and_maximum_and_rises_with_its_sharpness():
    margin = LOGITS[..., :2]
    pooled = [np.asarray(slice_loss.pool(margin, r)) for r in (1e-3, 0.5, 5.0, 50.0, 1e3)]
    for low, high in itertools.pairwise(pooled):
        assert (low < high).all()
    for each in pooled:
        assert (each >= margin.mean((2, 3)) - 1e-4).all()
        assert (each <= margin.max((2, 3)) + 1e-6).all()
    np.testing.assert_allclose(pooled[0], margin.mean((2, 3)), atol=2e-3)
    np.testing.assert_allclose(pooled[-1], margin.max((2, 3)), atol=1e-2)
    shuffled = margin.reshape(2, 3, 20, 2)[:, :, RNG.permutation(20)].reshape(margin.shape)
    np.testing.assert_allclose(slice_loss.pool(shuffled, 5.0), pooled[2], atol=1e-6)


def test_presence_pulls_the_top_voxels_up_and_pushes_an_empty_slice_down():
    z = jnp.asarray(RNG.normal(size=(1, 1, 4, 4)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def graded(z, rows):
        return slice_loss.presence(jnp.stack([0 * z, z], -1), rows, sharpness=5.0, least=2.0)

    def loss(z, rows):
        return graded(z, rows)[0]

    up = np.asarray(graded(z, jnp.ones((1, 1, 1), jnp.int8))[1])
    down = np.asarray(graded(z, jnp.zeros((1, 1, 1), jnp.int8))[1])
    assert (up < 0).all()
    assert up.argmin() == np.asarray(z).argmax()
    assert (down > 0).all()
    assert float(loss(z, jnp.full((1, 1, 1), -1, jnp.int8))) == 0
    score = np.log(np.exp(5 * np.asarray(z, np.float64)).sum() / 2) / 5
    assert float(loss(z, jnp.ones((1, 1, 1), jnp.int8))) == pytest.approx(
        np.log1p(np.exp(-score)), rel=1e-5
    )


def test_as_many_voxels_as_the_least_lesion_at_margin_zero_are_undecided():
    z = jnp.full((1, 1, 5, 5), -40.0).at[0, 0, 0, :3].set(0.0)
    logits = jnp.stack([0 * z, z], -1)
    for label in (0, 1):
        loss = slice_loss.presence(logits, jnp.full((1, 1, 1), label, jnp.int8), least=3.0)
        assert float(loss) == pytest.approx(np.log(2), rel=1e-5)


def test_a_size_within_its_bounds_costs_nothing_and_outside_its_square():
    p = prob(LOGITS)[..., 1:].sum((2, 3))  # soft areas, all between 3 and 20 voxels
    assert p.min() > 3
    assert float(slice_loss.sizes(LOGITS, SHOWN, least=1.0)) == 0
    assert float(slice_loss.sizes(LOGITS, UNKNOWN)) == 0
    short = slice_loss.sizes(LOGITS, SHOWN, least=15.0)
    assert float(short) == pytest.approx((np.maximum(0, 15 - p) ** 2 / 20).mean(), rel=1e-4)
    assert float(slice_loss.sizes(LOGITS, ABSENT)) == pytest.approx((p**2 / 20).mean(), rel=1e-4)
    rows = ABSENT.at[:, :, 1].set(-1)
    assert float(slice_loss.sizes(LOGITS, rows)) == pytest.approx(
        (p[..., 0] ** 2 / 20).mean(), rel=1e-4
    )


@pytest.mark.parametrize("t", [1.5, 5.0, 40.0])
def test_the_log_barrier_is_smooth_at_its_seam_and_hardens_with_t(t):
    value_and_slope = jax.value_and_grad(slice_loss.log_barrier)
    edge = -1 / t**2
    value, slope = value_and_slope(edge, t)
    assert float(value) == pytest.approx(2 * np.log(t) / t, rel=1e-4)
    assert float(slope) == pytest.approx(t, rel=1e-4)
    beyond, steep = value_and_slope(edge * (1 - 1e-3), t)
    assert float(beyond) == pytest.approx(float(value), abs=2e-3 / t)
    assert float(steep) == pytest.approx(t, rel=1e-4)
    assert abs(float(slice_loss.log_barrier(jnp.asarray(-0.5), 1e3))) < 1e-3
    assert float(slice_loss.log_barrier(jnp.asarray(0.5), 1e3)) > 100


def test_the_barrier_holds_both_bounds_and_stays_finite_where_they_fail():
    graded = jax.jit(jax.value_and_grad(slice_loss.sizes), static_argnums=(2, 3))
    for rows in (SHOWN, ABSENT):
        value, grad = graded(LOGITS, rows, 30.0, 5.0)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
    # What shows too little is pushed up, what shows anything where there is nothing down.
    assert float(graded(LOGITS, SHOWN, 30.0, 5.0)[1][..., 0].sum()) > 0
    assert float(graded(LOGITS, ABSENT, 30.0, 5.0)[1][..., 0].sum()) < 0


def test_terms_are_weighted_summed_over_networks_and_begin_when_told(learn):
    learner = learn(None, step=20)
    terms = SliceTerms(neg_sup=2.0, mil=0.5, size=0.1, start=0.3)
    loss, metrics = terms(learner, ABSENT, LOGITS, LOGITS)
    assert float(loss) == pytest.approx(4 * float(slice_loss.negatives(LOGITS, ABSENT)), rel=1e-6)
    assert set(metrics) == {"weak/known", "weak/neg_sup", "weak/mil", "weak/size"}
    later, _ = terms(dataclasses.replace(learner, step=jnp.asarray(30)), ABSENT, LOGITS)
    want = (
        2 * slice_loss.negatives(LOGITS, ABSENT)
        + 0.5 * slice_loss.presence(LOGITS, ABSENT)
        + 0.1 * slice_loss.sizes(LOGITS, ABSENT)
    )
    assert float(later) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("on", [False, True])
def test_pseudo_labels_are_gated_by_the_slice_labels_of_the_batch_if_wanted(on, learn, batch, key):
    gated = []

    class Gating(WeaklySupervised):
        def terms(self, learner, batch, key):
            gated.append(learner.gate(LOGITS))
            return Terms(jnp.ones(()))

    objective = WithSliceLoss(Gating(), SliceTerms(gate_pseudo=on, neg_sup=1.0))
    rows = jnp.asarray(ABSENT)
    labeled = dataclasses.replace(batch, slice_labels=rows)
    loss, metrics = objective.loss(learn(None), labeled, key)
    np.testing.assert_array_equal(gated[0], slice_loss.gate(LOGITS, rows) if on else LOGITS)
    assert float(loss) == 1
    assert set(metrics) == {"supervised"}, "without logits there is nothing to add"
    objective.loss(learn(None), batch, key)
    np.testing.assert_array_equal(gated[1], LOGITS)


def test_all_but_the_loss_is_that_of_the_objective_inside():
    inner = CrossPseudoSupervision()
    objective = WithSliceLoss(inner, SliceTerms(neg_sup=1.0))
    for name in ("twins", "uses_unlabeled", "ema_decay", "ema_t0"):
        assert getattr(objective, name) == getattr(inner, name)
    params = {"a": 1, "b": 2}
    assert objective.deployable(params, None) == inner.deployable(params, None)


def test_an_objective_of_ones_own_that_has_no_terms_is_refused():
    class Own(Supervised):
        uses_unlabeled = True

    with pytest.raises(ValueError, match="objective Own has no `terms`"):
        WithSliceLoss(Own(), SliceTerms(neg_sup=1.0))


def test_losses_that_copy_paste_has_no_predictions_for_are_refused():
    paste = WeakToStrong(pairing="labeled")
    with pytest.raises(ValueError, match="neg_sup, mil and size have nothing to speak of"):
        WithSliceLoss(paste, SliceTerms(neg_sup=1.0))
    WithSliceLoss(paste, SliceTerms(gate_pseudo=True))
    WithSliceLoss(WeakToStrong(), SliceTerms(neg_sup=1.0))


def test_a_gate_on_logits_that_are_blended_is_refused():
    """The class that one patch lacks would be lost where the other shows it."""
    gated, blended = SliceTerms(gate_pseudo=True), InterpolationConsistency(mix="logit")
    with pytest.raises(ValueError, match="choose mix=prob, or set gate_pseudo to False"):
        WithSliceLoss(blended, gated)
    WithSliceLoss(InterpolationConsistency(), gated)
    WithSliceLoss(blended, SliceTerms(neg_sup=1.0))


def test_whether_anything_is_on_and_wrong_settings():
    assert not SliceTerms().active
    assert SliceTerms(gate_pseudo=True).active
    assert SliceTerms(size=0.01).active
    for wrong, message in (
        ({"neg_sup": -1.0}, r"slice_loss\.neg_sup"),
        ({"lesion_voxels": 0.0}, r"slice_loss\.lesion_voxels"),
        ({"barrier": (0.0, 1.1)}, r"slice_loss\.barrier is a t and its growth"),
        ({"sizes": "none"}, r"slice_loss\.sizes is one of penalty, barrier"),
    ):
        with pytest.raises(ValueError, match=message):
            SliceTerms(**wrong)
