"""Whole trainings of seconds: a bright blob, 4 scans with masks, 16 without, 12 to be tested on."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bhsd_jax.losses import DiceCE
from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.entropy import EntropyMinimization
from bhsd_jax.objectives.mean_teacher import MeanTeacher
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.train.optimizer import make_optimizer, make_schedule
from bhsd_jax.train.step import Parts, init_state, make_train_step
from bhsd_jax.types import Batch

SIDE, LABELED, UNLABELED, TESTED, STEPS = 8, 4, 16, 12, 120


class Small(nn.Module):
    """Two stages of width 4 and 8."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, image, *, train):
        fine = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(image))
        coarse = nn.leaky_relu(nn.Conv(8, (3, 3, 3), (2, 2, 2))(fine))
        for axis in (1, 2, 3):
            coarse = jnp.repeat(coarse, 2, axis)
        both = nn.leaky_relu(nn.Conv(4, (1, 1, 1))(jnp.concatenate([fine, coarse], -1)))
        return (nn.Conv(self.num_classes, (1, 1, 1))(both),)


def phantoms():
    """Images and masks: a ball of 2 % of the voxels, half hidden in noise."""
    rng = np.random.default_rng(0)
    count = LABELED + UNLABELED + TESTED
    centers = rng.uniform(1.5, SIDE - 2.5, (count, 3, 1, 1, 1))
    far = ((np.indices((SIDE,) * 3)[None] - centers) ** 2).sum(1)
    mask = far <= rng.uniform(1.3, 1.7, (count, 1, 1, 1)) ** 2
    image = rng.normal(size=mask.shape) * 0.8 + 3.1 * mask
    return image[..., None].astype(np.float32), mask.astype(np.int8)


def noisy(key, image):
    return image + 0.5 * jax.random.normal(key, image.shape)


@functools.cache
def train(objective, dice_weight=1.0):
    """Every network after every step, by name."""
    return training(objective)(jax.random.key(0), dice_weight)


@functools.cache
def training(objective):
    """(key, weight of Dice) -> networks; compiling takes ten times as long as training."""
    image, mask = phantoms()
    rng = np.random.default_rng(1)
    known = rng.integers(LABELED, size=(STEPS, 2))
    free = rng.integers(LABELED, LABELED + UNLABELED, size=(STEPS, 2))
    batches = Batch(
        jnp.asarray(image[known]),
        jnp.asarray(mask[known]),
        jnp.asarray(image[free]) if objective.uses_unlabeled else None,
    )
    schedule = make_schedule("constant", lr=0.03, steps=STEPS)
    loss = DiceCE(batch_dice=True)

    @jax.jit
    def run(key, dice_weight):
        def segmentation(logits, label):
            head = logits[0]
            return loss.cross_entropy(head, label) + dice_weight * loss.dice(head, label)

        parts = Parts(
            model=Small(),
            objective=objective,
            optimizer=make_optimizer("adam", schedule, parts=bool(objective.twins)),
            schedule=schedule,
            segmentation=segmentation,
            augment=lambda key, batch: dataclasses.replace(batch, image=noisy(key, batch.image)),
            view=noisy,
            steps=STEPS,
        )
        step = make_train_step(parts)

        def go(state, batch):
            state, _ = step(state, batch)
            return state, objective.deployable(state.params, state.ema)

        return lax.scan(go, init_state(parts, batches.image[0], key), batches)[1]

    return run


@jax.jit
def _blob(networks, image):
    apply = functools.partial(Small().apply, train=False)
    return jax.vmap(lambda params: nn.softmax(apply({"params": params}, image)[0])[..., 1])(
        networks
    )


def blob(networks, last):
    """Probability of blob in the tested scans after each of the last steps, and their masks."""
    image, mask = (part[-TESTED:] for part in phantoms())
    late = jax.tree.map(lambda leaf: leaf[-last:], networks)
    return np.asarray(_blob(late, image)), mask


def dice(networks, last):
    """Mean Dice of the tested scans after each of the last steps."""
    (prob, mask), axes = blob(networks, last), (-3, -2, -1)
    guess = prob > 0.5
    overlap = (guess & mask).sum(axes)
    return (2 * overlap / (guess.sum(axes) + mask.sum(axes))).mean(-1)


pytestmark = pytest.mark.usefixtures("full_compilation")
SUPERVISED = Supervised()
CPS = CrossPseudoSupervision(weight=0.5, ramp=0.4)


def test_supervised_training_finds_the_blob():
    assert dice(train(SUPERVISED)["student"], 10).mean() > 0.55


def test_cross_pseudo_supervision_is_not_worse():
    alone = dice(train(SUPERVISED)["student"], 10).mean()
    assert dice(train(CPS)["a"], 10).mean() >= alone - 0.05


def test_much_entropy_minimization_ends_in_background():
    """The sign: certainty about a rare class is certainty that it is not there.

    Beside cross entropy alone; Dice holds some of the blob for longer.
    """
    sure = train(EntropyMinimization(weight=10.0, ramp=0.0), dice_weight=0.0)["student"]
    prob, mask = blob(sure, 10)
    assert prob.max() < 0.5
    assert prob.mean() < 0.1 * mask.mean()
    plain, _ = blob(train(SUPERVISED, dice_weight=0.0)["student"], 10)
    assert 0.5 * mask.mean() < plain.mean() < 1.5 * mask.mean()


def test_the_teacher_is_steadier_than_its_student():
    networks = train(MeanTeacher(weight=2.0, ema_decay=0.9))
    teacher, student = (dice(networks[name], 30) for name in ("teacher", "student"))
    assert teacher.var() < student.var()
    assert teacher.mean() > 0.5
