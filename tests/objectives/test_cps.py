"""Cross pseudo supervision: what each twin learns from, and what never reaches it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bhsd_jax.build import build
from bhsd_jax.losses import DiceCE, cross_entropy
from bhsd_jax.objectives.cps import CrossPseudoSupervision, _redraw, _transposed

FULL = CrossPseudoSupervision(weight=0.7, ramp=0.0)


@pytest.fixture
def params(net, batch, key):
    return FULL.init(net, batch.image, key)


def value_and_grad(objective, learn, params, batch, key, **kwargs):
    def loss(params):
        return objective.loss(learn(params, **kwargs), batch, key)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


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
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    for x, y in zip(jax.tree.leaves(grads["a"]), jax.tree.leaves(flipped["b"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


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

    for twin in "ab":
        want = jax.jit(jax.grad(supervised))(params[twin])
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
    for x, y in zip(jax.tree.leaves(grads["a"]), jax.tree.leaves(grads["b"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7)


def test_a_confidence_out_of_reach_silences_the_unlabeled_part(learn, params, batch, key):
    strict = dataclasses.replace(FULL, confidence=1.1)
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nnunet.PlainConvUNet", ("up_",)),
        ("unetr.UNETR", ("up",)),
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


def test_redrawing_leaves_transposed_convolutions_alone(key):
    flat = {
        ("conv", "kernel"): jnp.ones((3, 3, 3, 2, 2)),
        ("up", "kernel"): jnp.ones((2, 2, 2, 2, 2)),
    }
    params = traverse_util.unflatten_dict(flat)
    found = _redraw(params, jax.nn.initializers.normal(), key, frozenset({("up",)}))
    assert (found["up"]["kernel"] == 1).all()
    assert (found["conv"]["kernel"] != 1).all()


def test_deep_pseudo_labels_weigh_the_heads_as_masks_do(key):
    full = jax.random.normal(key, (1, 4, 8, 8, 3))
    half = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 3))
    last = jnp.zeros((1, 1, 2, 2, 3))
    teacher = jax.random.normal(jax.random.key(2), full.shape)
    heads, label = (full, half, last), teacher.argmax(-1)
    found = dataclasses.replace(FULL, deep=True)._teach(heads, teacher)
    want = DiceCE(dice_weight=0.0)(heads, label)
    assert float(found) == pytest.approx(float(want), rel=1e-6)
    assert float(FULL._teach(heads, teacher)) == float(cross_entropy(full, label))


def test_wrong_settings_name_the_field():
    with pytest.raises(ValueError, match=r"ramp .* 0\.\.1"):
        CrossPseudoSupervision(ramp=40.0)
    with pytest.raises(ValueError, match="views is one of independent, shared"):
        CrossPseudoSupervision(views="none")
