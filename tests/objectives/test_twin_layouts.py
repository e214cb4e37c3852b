"""Twins one after the other, stacked, scanned, or on devices of their own: the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from bhsd_jax.losses import DiceCE, cross_entropy
from bhsd_jax.objectives.cps import CrossPseudoSupervision

WEIGHT = 0.7


@pytest.fixture(scope="module")
def twins(net, batch):
    objective = CrossPseudoSupervision(weight=WEIGHT, ramp=0.0)
    return objective, objective.init(net, batch.image, jax.random.key(0))


@pytest.fixture
def want(twins, learn, batch, key):
    """Loss and gradients of the product, which applies the twins one after the other."""
    objective, params = twins
    return jax.jit(jax.value_and_grad(lambda p: objective.loss(learn(p), batch, key)[0]))(params)


def stack(params):
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), params["a"], params["b"])


def own_loss(net, params, batch, answer):
    """What one twin minimizes, given the other's hard answer."""
    (labeled,) = net.apply({"params": params}, batch.image, train=True)
    (guess,) = net.apply({"params": params}, batch.unlabeled, train=True)
    return DiceCE()((labeled,), batch.label) + WEIGHT * cross_entropy(guess, answer)


def answer(net, params, batch):
    return net.apply({"params": params}, batch.unlabeled, train=True)[0].argmax(-1)


def stacked(net, both, batch):
    answers = jax.vmap(lambda params: answer(net, params, batch))(both)
    return jax.vmap(lambda p, other: own_loss(net, p, batch, other))(both, answers[::-1]).sum()


def scanned(net, both, batch):
    answers = lax.map(lambda params: answer(net, params, batch), lax.stop_gradient(both))

    def add(total, twin):
        params, other = twin
        return total + own_loss(net, params, batch, other), None

    return lax.scan(add, jnp.zeros(()), (both, answers[::-1]))[0]


def compare(found, want, tolerance):
    value, grads = found
    assert float(value) == pytest.approx(float(want[0]), abs=tolerance)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(stack(want[1])), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance)


@pytest.mark.parametrize("layout", [stacked, scanned])
def test_stacked_and_scanned_twins_learn_the_same(layout, net, twins, batch, want):
    found = jax.jit(jax.value_and_grad(lambda both: layout(net, both, batch)))(stack(twins[1]))
    compare(found, want, 1e-4)


def test_twins_on_two_devices_exchange_answers_alone(net, twins, batch, want):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("twin",))
    mine, whole = PartitionSpec("twin"), PartitionSpec()

    def one(params, batch):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        sent = answer(net, params, batch).astype(jnp.uint8)
        other = lax.ppermute(sent, "twin", [(0, 1), (1, 0)]).astype(jnp.int32)
        value, grads = jax.value_and_grad(lambda p: own_loss(net, p, batch, other))(params)
        return lax.psum(value, "twin"), jax.tree.map(lambda leaf: leaf[None], grads)

    spread = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(mine, whole), out_specs=(whole, mine)))
    compare(spread(stack(twins[1]), batch), want, 1e-6)
    text = spread.lower(stack(twins[1]), batch).compile().as_text()
    assert "u8[" in text.split("collective-permute(")[0].splitlines()[-1]
