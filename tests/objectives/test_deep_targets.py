"""What coarser heads are taught on unlabeled patches: local averages of soft targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax import losses
from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.common import follow_target
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.mean_teacher import MeanTeacher

SIZES = [(4, 6, 6), (4, 3, 3), (2, 1, 1)]


@pytest.fixture
def heads(key):
    """Logits of three heads; the middle one is coarser in the plane, the last everywhere."""
    keys = jax.random.split(key, len(SIZES))
    return tuple(jax.random.normal(k, (2, *size, 3)) for k, size in zip(keys, SIZES, strict=True))


@pytest.fixture
def target():
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(7), (2, *SIZES[0], 3)))


def test_averages_are_probabilities_and_keep_the_mean(target):
    for size in SIZES:
        found = losses.average_target(target, size)
        assert found.shape == (2, *size, 3)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(found.mean((1, 2, 3)), target.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_array_equal(losses.average_target(target, SIZES[0]), target)
    middle = losses.average_target(target, SIZES[1])
    np.testing.assert_allclose(middle[0, 1, 2, 0], target[0, 1, 4:, :2].mean((0, 1)), atol=1e-6)


def test_averaging_and_blending_may_change_places(target):
    share, size = jnp.asarray([0.3, 0.9]), SIZES[1]
    blended = losses.average_target(mixing.blend(share, target, target[::-1]), size)
    average = losses.average_target(target, size)
    np.testing.assert_allclose(blended, mixing.blend(share, average, average[::-1]), atol=1e-6)


def test_one_head_or_all_by_their_weights(heads, target):
    each = [
        losses.consistency(head, losses.average_target(target, size))
        for head, size in zip(heads, SIZES, strict=True)
    ]
    assert float(follow_target(heads, target, None, deep=False)) == float(each[0])
    assert float(follow_target(heads[:2], target, None, deep=True)) == float(each[0]), (
        "the coarsest of several has no weight"
    )
    want = 2 / 3 * each[0] + 1 / 3 * each[1]
    assert float(follow_target(heads, target, None, deep=True)) == pytest.approx(float(want))


def test_a_coarse_voxel_counts_if_all_it_covers_counts(heads, target):
    valid = jnp.ones((2, *SIZES[0]), bool).at[:, 0, 0, 0].set(False).at[1, 3].set(False)
    coarse = losses.all_valid(valid, SIZES[1])
    want = jnp.ones((2, *SIZES[1]), bool).at[:, 0, 0, 0].set(False).at[1, 3].set(False)
    np.testing.assert_array_equal(coarse, want)

    grads = jax.grad(lambda x: follow_target((heads[0], x, heads[2]), target, valid, True))(
        heads[1]
    )
    np.testing.assert_array_equal(jnp.abs(grads).sum(-1) > 0, want)


@pytest.mark.parametrize(
    "objective",
    [
        MeanTeacher(weight=1.0, ramp=0.0, views="shared"),
        InterpolationConsistency(weight=1.0, ramp=0.0, views="shared"),
    ],
    ids=["mean_teacher", "ict"],
)
def test_the_switch_teaches_the_coarser_heads(objective, heads, batch, learn, key):
    def loss(objective, coarse):
        """Consistency of a network whose middle head, for student and teacher, is `coarse`."""

        def forward(params, image, key):
            found = (heads[0], coarse, heads[2])
            return tuple(jnp.resize(x, (len(image), *x.shape[1:])) for x in found)

        learner = dataclasses.replace(learn({}, ema={}), forward=forward)
        return objective.loss(learner, batch, key)[1]["consistency"]

    deep = dataclasses.replace(objective, deep=True)
    assert np.any(jax.grad(lambda x: loss(deep, x))(heads[1]))
    assert not np.any(jax.grad(lambda x: loss(objective, x))(heads[1]))
