"""Logits of several networks to those of all of them together, and to a label map; on devices."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


@jax.jit
def mean(logits: Sequence[Float[Array, "K D H W"]]) -> Float[Array, "K D H W"]:
    """The mean of the logits themselves."""
    return sum(logits[1:], logits[0]) / len(logits)


@jax.jit
def log_mean(logits: Sequence[Float[Array, "K D H W"]]) -> Float[Array, "K D H W"]:
    """The logarithm of the mean of their softmax; of one network what it gives."""
    if len(logits) == 1:
        return logits[0]
    probability = [jax.nn.softmax(one, axis=0) for one in logits]
    mean = sum(probability[1:], probability[0]) / len(probability)
    return jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))


@jax.jit
def logit_mean(logits: Sequence[Float[Array, "R D H W"]]) -> Float[Array, "R D H W"]:
    """The logit of the mean of their sigmoid; of one network what it gives."""
    if len(logits) == 1:
        return logits[0]
    probability = [jax.nn.sigmoid(one) for one in logits]
    mean = sum(probability[1:], probability[0]) / len(probability)
    # Kept as far from 0 and 1 as float32's step at 1, so that the logits stay finite.
    least = jnp.finfo(jnp.float32).eps
    mean = jnp.clip(mean, least, 1 - least)
    return jnp.log(mean) - jnp.log1p(-mean)


@partial(jax.jit, static_argnames="values")
def written(logits: Float[Array, "R D H W"], values: tuple[int, ...]) -> UInt8[Array, "D H W"]:
    """The value of the last region that is likelier than not; 0 where none is."""
    label = jnp.zeros(logits.shape[1:], jnp.uint8)
    for one, value in zip(logits, values, strict=True):
        label = jnp.where(one > 0, jnp.uint8(value), label)
    return label


@jax.jit
def most_likely(logits: Float[Array, "K D H W"]) -> UInt8[Array, "D H W"]:
    """The class of the largest logit."""
    return jnp.argmax(logits, axis=0).astype(jnp.uint8)
