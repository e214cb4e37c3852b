"""A tiny network as an objective sees it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from bhsd_jax.losses import DiceCE
from bhsd_jax.types import Batch, Learner


class Net(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.leaky_relu(nn.Conv(4, (3, 3, 3), name="Conv_0")(image), 0.01)
        return (nn.Conv(self.num_classes, (1, 1, 1), name="Conv_1")(x),)


@pytest.fixture(scope="session")
def net():
    return Net()


@pytest.fixture(scope="session")
def batch():
    keys = jax.random.split(jax.random.key(5), 3)
    shape = (2, 4, 6, 6)
    return Batch(
        image=jax.random.normal(keys[0], (*shape, 1)),
        label=jax.random.randint(keys[1], shape, 0, 3),
        unlabeled=jax.random.normal(keys[2], (*shape, 1)),
    )


@pytest.fixture(scope="session")
def nets(net, batch):
    """Parameters of two networks."""
    init = jax.jit(lambda key: net.init(key, batch.image, train=False)["params"])
    return [init(key) for key in jax.random.split(jax.random.key(0))]


@pytest.fixture(scope="session")
def learn(net):
    """(params, step, ema) -> Learner with additive noise as intensity view."""

    def make(params, step=0, ema=None, noise=0.0):
        return Learner(
            forward=lambda p, image, key: net.apply({"params": p}, image, train=True),
            view=lambda key, image: image + noise * jax.random.normal(key, image.shape),
            segmentation=DiceCE(),
            params=params,
            ema=ema,
            step=jnp.asarray(step),
            steps=100,
        )

    return make
