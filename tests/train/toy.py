"""A tiny network and the parts of a step on it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from bhsd_jax.losses import DiceCE
from bhsd_jax.train.optimizer import make_optimizer, make_schedule
from bhsd_jax.train.step import Parts
from bhsd_jax.types import Batch


class Toy(nn.Module):
    """One convolution and two heads, the second at half size."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(image), 0.01)
        full = nn.Conv(self.num_classes, (1, 1, 1))(x)
        half = nn.Conv(self.num_classes, (1, 1, 1))(x[:, ::2, ::2, ::2])
        return full, half


class Merging(nn.Module):
    """A stage of a quarter of the rows, merged as transformers merge tokens."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(image), 0.01)
        b, d, h, w, c = x.shape
        merged = x.reshape(b, d, h // 4, 4, w, c).transpose(0, 1, 2, 4, 3, 5)
        merged = nn.Dense(4)(merged.reshape(b, d, h // 4, w, 4 * c))
        merged = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(merged), 0.01)
        x = jnp.concatenate([x, jnp.repeat(merged, 4, axis=2)], -1)
        return (nn.Conv(self.num_classes, (1, 1, 1))(x),)


def augment(key, batch):
    noise = 0.1 * jax.random.normal(key, batch.image.shape)
    return dataclasses.replace(batch, image=batch.image + noise, label=jnp.maximum(batch.label, 0))


def view(key, image):
    return image + 0.1 * jax.random.normal(key, image.shape)


def make_parts(objective, *, steps=20, lr=0.01, clip=12.0, quiet=False, optimizer="sgd", mesh=None):
    schedule = make_schedule("poly", lr=lr, steps=steps)
    rule = make_optimizer(optimizer, schedule, clip=clip, parts=bool(objective.twins))
    return Parts(
        model=Toy(),
        objective=objective,
        optimizer=rule,
        schedule=schedule,
        segmentation=DiceCE(),
        augment=(lambda key, batch: batch) if quiet else augment,
        view=(lambda key, image: image) if quiet else view,
        steps=steps,
        mesh=mesh,
    )


def make_batch(seed=0, *, labeled=8, unlabeled=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (4, 8, 8)
    image = jax.random.normal(keys[0], (labeled, *shape, 1))
    label = (image[..., 0] > 0.5).astype(jnp.int8) + (image[..., 0] > 1.2).astype(jnp.int8)
    free = jax.random.normal(keys[1], (unlabeled, *shape, 1)) if unlabeled else None
    return Batch(image, label, free)
