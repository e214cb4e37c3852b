"""Cross pseudo supervision: what each twin learns from, and what never reaches it."""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bhsd_jax import losses
from bhsd_jax.build import build
from bhsd_jax.losses import DiceCE, cross_entropy
from bhsd_jax.objectives.cps import CrossPseudoSupervision, _redraw, _transposed

FULL = CrossPseudoSupervision(weight=0.7, ramp=0.0)


@pytest.fixture(scope="module")
def params(net, batch):
    return jax.jit(lambda key: FULL.init(net, batch.image, key))(jax.random.key(0))


@functools.cache
def compiled(objective, learn):
    def loss(params, batch, key):
        return objective.loss(learn(params), batch, key)[0]

    return jax.jit(jax.value_and_grad(loss))


def value_and_grad(objective, learn, params, batch, key):
    return compiled(objective, learn)(params, batch, key)


def test_the_loss_is_its_formula(net, learn, params, batch, key):
    value, _ = value_and_grad(FULL, learn, params, batch, key)
    logits = {
        twin: [
            net.apply({"params": params[twin]}, x, train=False)[0]
            for x in (batch.image, batch.unlabeled)
        ]
        for twin in "ab"
    }
    supervised = sum(DiceCE().single(logits[t][0], batch.label) for t in "ab")
    cross = cross_entropy(logits["a"][1], logits["b"][1].argmax(-1)) + cross_entropy(
        logits["b"][1], logits["a"][1].argmax(-1)
    )
    assert float(value) == pytest.approx(float(supervised + 0.7 * cross), rel=1e-5)


def test_swapping_the_twins_swaps_the_gradients(learn, params, batch, key):
    swapped = {"a": params["b"], "b": params["a"]}
    value, grads = value_and_grad(FULL, learn, params, batch, key)
    other, flipped = value_and_grad(FULL, learn, swapped, batch, key)
    assert float(value) == float(other)
    jax.tree.map(np.testing.assert_array_equal, grads, {"a": flipped["b"], "b": flipped["a"]})


def test_no_gradient_crosses_from_one_twin_to_the_other(net, learn, params, batch, key):
    def follow(params):
        guess = {t: net.apply({"params": params[t]}, batch.unlabeled, train=False)[0] for t in "ab"}
        return FULL._follow(guess["a"], guess["b"])

    grads = jax.jit(jax.grad(follow))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["b"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["a"]))


def test_weight_zero_is_two_supervised_trainings(net, learn, params, batch, key):
    off = dataclasses.replace(FULL, weight=0.0)
    _, grads = value_and_grad(off, learn, params, batch, key)

    def supervised(p):
        return DiceCE()(net.apply({"params": p}, batch.image, train=True), batch.label)

    alone = jax.jit(jax.grad(supervised))
    for twin in "ab":
        want = alone(params[twin])
        for x, y in zip(jax.tree.leaves(grads[twin]), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_every_parameter_of_both_twins_learns(learn, params, batch, key):
    _, grads = value_and_grad(FULL, learn, params, batch, key)
    assert set(grads) == {"a", "b"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_twins_begin_apart_and_equal_twins_would_stay_equal(learn, params, batch, key):
    kernels = [params[t]["Conv_0"]["kernel"] for t in "ab"]
    assert np.any(kernels[0] != kernels[1])
    same = {"a": params["a"], "b": params["a"]}
    _, grads = value_and_grad(FULL, learn, same, batch, key)
    jax.tree.map(np.testing.assert_array_equal, grads["a"], grads["b"])


def test_a_confidence_out_of_reach_silences_the_unlabeled_part(learn, params, batch, key):
    strict = dataclasses.replace(FULL, confidence=1.0)
    _, metrics = strict.loss(learn(params), batch, key)
    assert float(metrics["cross"]) == 0
    _, metrics = FULL.loss(learn(params), batch, key)
    assert float(metrics["cross"]) > 0


def test_independent_views_differ_and_shared_ones_do_not(learn, params, batch, key):
    same = {"a": params["a"], "b": params["a"]}
    shared = dataclasses.replace(FULL, views="shared")
    _, apart = FULL.loss(learn(same, noise=2.0), batch, key)
    _, together = shared.loss(learn(same, noise=2.0), batch, key)
    assert float(apart["disagree"]) > 0
    assert float(together["disagree"]) == 0


def test_each_twin_draws_its_own_dropout(net, learn, params, batch, key):
    def forward(params, image, key):
        (logits,) = net.apply({"params": params}, image, train=True)
        return (logits * jax.random.bernoulli(key, 0.5, logits.shape),)

    same = {"a": params["a"], "b": params["a"]}
    learner = dataclasses.replace(learn(same), forward=forward)
    _, metrics = FULL.loss(learner, batch, key)
    assert float(metrics["disagree"]) > 0


def test_the_weight_follows_the_ramp(learn, params, batch, key):
    slow = dataclasses.replace(FULL, ramp=1.0)
    _, metrics = slow.loss(learn(params, step=50), batch, key)
    assert float(metrics["weight"]) == pytest.approx(0.7 * np.exp(-1.25), rel=1e-5)


def test_kaiming_and_xavier_draw_the_published_spread(net, key):
    wide = dataclasses.replace(net, num_classes=600)
    image = jnp.zeros((1, 4, 4, 4, 200))
    params = CrossPseudoSupervision(twin_init="kaiming_xavier").init(wide, image, key)
    fan_in, fan_out = 200 * 27, 4 * 27
    for twin, want in (("a", 2 / fan_in), ("b", 2 / (fan_in + fan_out))):
        assert float(params[twin]["Conv_0"]["kernel"].std()) == pytest.approx(want**0.5, rel=0.03)
    for name in ("Conv_0", "Conv_1"):
        a, b = (np.ravel(params[twin][name]["kernel"]) for twin in "ab")
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1, "each twin draws for itself"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nnunet.PlainConvUNet", ("up_",)),
        ("nnunet.ResidualEncoderUNet", ("up_",)),
        ("unetr.UNETR", ("up",)),
        ("swin_unetr.SwinUNETR", ("up",)),
        ("cotr.CoTr", ("up_",)),
        ("nnformer.NNFormer", ("up_", "head_")),
    ],
)
def test_transposed_convolutions_are_known_in_every_backbone(name, words):
    model = build("bhsd_jax.models", {"name": name}, num_classes=2)
    image = jnp.zeros((1, *(getattr(model, "patch", None) or model.stride), 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))["params"]
    kernels = {
        path[:-1]
        for path, leaf in traverse_util.flatten_dict(shapes).items()
        if path[-1] == "kernel" and leaf.ndim == 5
    }
    want = {path for path in kernels if path[-1].startswith(words)}
    assert want
    assert _transposed(model, image) == want


def test_transposed_convolutions_of_ones_own_are_known_by_type_or_mark():
    class Mine(nn.Module):
        transposed: ClassVar[bool] = True

        @nn.compact
        def __call__(self, image):
            return image * self.param("kernel", nn.initializers.ones, (1, 1, 1, 1, 1))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            x = nn.ConvTranspose(1, (2, 2, 2), name="theirs")(Mine(name="mine")(image))
            return (nn.Conv(1, (3, 3, 3), name="plain")(x),)

    assert _transposed(Net(), jnp.zeros((1, 2, 2, 2, 1))) == {("mine",), ("theirs",)}


def test_redrawing_leaves_transposed_convolutions_alone(key):
    flat = {
        ("conv", "kernel"): jnp.ones((3, 3, 3, 2, 2)),
        ("up", "kernel"): jnp.ones((2, 2, 2, 2, 2)),
    }
    params = traverse_util.unflatten_dict(flat)
    found = _redraw(params, jax.nn.initializers.normal(), key, frozenset({("up",)}))
    assert (found["up"]["kernel"] == 1).all()
    assert (found["conv"]["kernel"] != 1).all()


def test_agreement_for_sure_leaves_nothing_to_learn():
    sure = 40.0 * jax.nn.one_hot(jnp.arange(60).reshape(1, 3, 4, 5) % 3, 3)
    assert float(FULL._teach((sure,), sure)) < 1e-6


def test_the_gradient_is_the_answer_minus_the_others_hard_one_and_nothing_for_the_other(key):
    mine, other = jax.random.normal(key, (2, 1, 2, 3, 4, 3))
    grad, back = jax.jit(jax.grad(FULL._follow, (0, 1)))(mine, other)
    hard = jax.nn.one_hot(other.argmax(-1), 3)
    np.testing.assert_allclose(24 * grad, jax.nn.softmax(mine) - hard, atol=1e-6)
    assert not np.any(back)
    # The arg-max alone stops it too.
    unstopped = jax.grad(lambda other: cross_entropy(mine, other.argmax(-1)))(other)
    assert not np.any(unstopped)


def test_a_pseudo_label_is_one_class_and_no_distribution(key, monkeypatch):
    taught = []

    def spy(logits, label, valid=None):
        taught.append(label)
        return cross_entropy(logits, label, valid)

    monkeypatch.setattr(losses, "cross_entropy", spy)
    mine, other = jax.random.normal(key, (2, 1, 2, 3, 4, 3))
    FULL._teach((mine,), other)
    (label,) = taught
    assert jnp.issubdtype(label.dtype, jnp.integer)
    np.testing.assert_array_equal(label, np.argmax(other, -1))


def test_with_two_heads_deep_is_the_full_resolution_alone(key):
    heads = tuple(jax.random.normal(key, (1, n, n, n, 3)) for n in (4, 2))
    deep = dataclasses.replace(FULL, deep=True)
    assert float(deep._teach(heads, -heads[0])) == float(FULL._teach(heads, -heads[0]))


def test_a_confidence_of_zero_changes_nothing(key):
    heads = (jax.random.normal(key, (1, 4, 4, 4, 3)),)
    always = dataclasses.replace(FULL, confidence=1e-9)
    want = float(FULL._teach(heads, -heads[0]))
    assert float(always._teach(heads, -heads[0])) == pytest.approx(want, rel=1e-6)


def test_the_twin_that_teaches_must_be_sure_not_the_one_that_learns():
    """Of four voxels the teacher is sure of one; the learner knows nothing, which costs log 3."""
    unsure = jnp.zeros((1, 1, 1, 4, 3))
    sure = unsure.at[0, 0, 0, 2, 1].set(9.0)
    strict = dataclasses.replace(FULL, confidence=0.95)
    assert float(strict._teach((unsure,), sure)) == pytest.approx(np.log(3), rel=1e-6)
    assert float(strict._teach((sure,), unsure)) == 0


def test_deep_pseudo_labels_weigh_the_heads_as_masks_do(key):
    full = jax.random.normal(key, (1, 4, 8, 8, 3))
    half = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 3))
    last = jnp.zeros((1, 1, 2, 2, 3))
    teacher = jax.random.normal(jax.random.key(2), full.shape)
    heads, label = (full, half, last), teacher.argmax(-1)
    found = dataclasses.replace(FULL, deep=True)._teach(heads, teacher)
    want = DiceCE(dice_weight=0.0)(heads, label)
    assert float(found) == float(want)
    assert float(FULL._teach(heads, teacher)) == float(cross_entropy(full, label))


@pytest.mark.parametrize(
    "name", ["cps.CrossPseudoSupervision", "cps_cutmix.CrossPseudoSupervisionCutMix"]
)
def test_an_average_that_nothing_would_use_is_refused(name):
    with pytest.raises(ValueError, match="unknown ema_decay; it takes weight"):
        build("bhsd_jax.objectives", {"name": name, "ema_decay": 0.99})


def test_wrong_settings_name_the_field():
    with pytest.raises(ValueError, match=r"ramp .* 0\.\.1"):
        CrossPseudoSupervision(ramp=40.0)
    with pytest.raises(ValueError, match="views is one of independent, shared"):
        CrossPseudoSupervision(views="none")
    with pytest.raises(ValueError, match=r"confidence is a probability and lies in 0\.\.1; got 95"):
        CrossPseudoSupervision(confidence=95)
