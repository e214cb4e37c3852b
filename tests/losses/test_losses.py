"""The losses equal nnU-Net's and MONAI's, value and gradient."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax import losses
from bhsd_jax.losses import DiceCE


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def load(golden, name):
    arrays = np.load(golden / f"{name}.npz")
    return arrays, json.loads((golden / f"{name}.json").read_text())


def relative_l2(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("name", ["loss_nnunet_1", "loss_nnunet_2"])
def test_nnunet_loss_and_gradient_equal_the_reference(golden, name):
    arrays, facts = load(golden, name)
    settings = facts["settings"]
    loss = DiceCE(
        batch_dice=settings["batch_dice"],
        smooth=settings["smooth"],
        background=settings["do_bg"],
        ce_weight=float(settings["weight_ce"]),
        dice_weight=float(settings["weight_dice"]),
        ignore=settings["ignore_label"],
    )
    weights = [float(w) for w in arrays["weights"]]
    logits = [channels_last(arrays[f"logits/{i}"]) for i in range(len(weights))]
    labels = [jnp.asarray(arrays[f"target/{i}"][:, 0], jnp.int32) for i in range(len(weights))]
    value, grads = jax.jit(jax.value_and_grad(lambda x: loss.heads(x, labels, weights)))(logits)
    assert abs(value - arrays["loss"]) < 2e-6 * abs(arrays["loss"])
    for i, (head, label, weight) in enumerate(zip(logits, labels, weights, strict=True)):
        assert float(loss.dice(head, label)) == pytest.approx(arrays[f"dice_single/{i}"], rel=1e-5)
        assert float(loss.cross_entropy(head, label)) == pytest.approx(
            arrays[f"ce_single/{i}"], rel=1e-5
        )
        want = np.moveaxis(arrays[f"grad/{i}"], 1, -1)
        if weight:
            assert relative_l2(grads[i], want) < 2e-5
        else:
            assert not np.any(grads[i])


@pytest.mark.parametrize("index", range(4))
def test_monai_dice_ce_and_gradient_equal_the_reference(golden, index):
    arrays, facts = load(golden, "loss_monai_dicece_1")
    settings = facts["configs"][index]
    weight = settings.get("weight")
    loss = DiceCE(
        batch_dice=settings.get("batch", False),
        smooth=settings.get("smooth_nr", 1e-5),
        smooth_denominator=settings.get("smooth_dr", 1e-5),
        background=settings.get("include_background", True),
        squared=settings.get("squared_pred", False),
        from_one=True,
        dice_weight=settings.get("lambda_dice", 1.0),
        ce_weight=settings.get("lambda_ce", 1.0),
        class_weight=tuple(weight) if weight else None,
    )
    logits = channels_last(arrays["logits"])
    label = jnp.asarray(arrays["target"][:, 0], jnp.int32)
    value, grad = jax.jit(jax.value_and_grad(loss.single))(logits, label)
    assert float(value) == pytest.approx(arrays[f"loss/{index}"], rel=1e-5)
    assert float(loss.dice(logits, label)) == pytest.approx(arrays[f"dice/{index}"], rel=1e-5)
    assert relative_l2(grad, np.moveaxis(arrays[f"grad/{index}"], 1, -1)) < 2e-5


@pytest.mark.parametrize(
    ("batch_dice", "dice", "total"),
    [(False, -0.0543638468, 2.4888752914), (True, -0.0782394782, 2.4649996600)],
)
def test_published_numbers_of_the_sine_recipe(batch_dice, dice, total):
    shape = (2, 6, 4, 8, 8)
    logits = channels_last((3 * np.sin(0.1 * np.arange(np.prod(shape)))).reshape(shape))
    label = ((np.arange(2 * 4 * 8 * 8) // 7) % 3).reshape(2, 4, 8, 8)
    label[1] = 0
    label[1, 1:3, 2:5, 2:5] = 4
    loss = DiceCE(batch_dice=batch_dice)
    assert float(loss.dice(logits, jnp.asarray(label))) == pytest.approx(dice, abs=2e-7)
    assert float(loss.single(logits, jnp.asarray(label))) == pytest.approx(total, abs=2e-6)


def test_head_weights_halve_and_drop_the_last():
    assert losses.head_weights(1) == (1.0,)
    assert losses.head_weights(3) == pytest.approx((2 / 3, 1 / 3, 0))
    bhsd = (0.516129, 0.258065, 0.129032, 0.064516, 0.032258, 0)
    assert losses.head_weights(6) == pytest.approx(bhsd, abs=1e-6)


def test_heads_see_the_label_at_their_own_size(key):
    label = jax.random.randint(key, (2, 4, 8, 8), 0, 3)
    logits = [jax.random.normal(key, (2, 4, n, n, 3)) for n in (8, 4, 2)]
    small = label[:, :, 1::2, 1::2]  # the center (i + 0.5) * 2 of two voxels belongs to the second
    loss = DiceCE()
    want = 2 / 3 * loss.single(logits[0], label) + 1 / 3 * loss.single(logits[1], small)
    assert float(loss(logits, label)) == pytest.approx(float(want), rel=1e-6)


def test_ignored_voxels_never_matter(key):
    label = jax.random.randint(key, (1, 2, 4, 4), 0, 4)
    logits = jax.random.normal(key, (1, 2, 4, 4, 3))
    other = jnp.where((label == 3)[..., None], 50.0, logits)
    loss = DiceCE(ignore=3)
    assert float(loss.single(logits, label)) == float(loss.single(other, label))
    assert float(loss.cross_entropy(logits, jnp.full_like(label, 3))) == 0.0


def test_a_perfect_answer_costs_minus_one():
    label = jnp.arange(3).repeat(4).reshape(1, 1, 3, 4)
    logits = 1e3 * jax.nn.one_hot(label, 3)
    assert float(DiceCE().single(logits, label)) == pytest.approx(-1, abs=1e-6)


def test_uniform_logits_cost_log_k():
    label = jnp.zeros((1, 1, 2, 2), jnp.int32)
    assert float(losses.cross_entropy(jnp.zeros((1, 1, 2, 2, 6)), label)) == pytest.approx(
        np.log(6)
    )
