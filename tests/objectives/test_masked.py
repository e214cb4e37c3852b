"""Masked-image modeling: closed forms of the loss, the share and the shape of what is hidden."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.objectives import masked
from bhsd_jax.objectives.masked import MaskedModeling
from bhsd_jax.platform.errors import UserError


def test_the_loss_is_the_mean_square_over_hidden_voxels_of_both_streams(learn, nets, batch, key):
    """A network that answers 0 everywhere: what remains is the mean square of what was hidden."""
    nothing = jax.tree.map(jnp.zeros_like, nets[0])
    objective = MaskedModeling(block=(2, 3, 3), hidden=0.5)
    loss, metrics = objective.loss(learn(nothing), batch, key)
    labeled, unlabeled, _ = jax.random.split(key, 3)
    hidden = [
        np.asarray(masked.blocks(k, x, (2, 3, 3), 0.5))
        for k, x in ((labeled, batch.image), (unlabeled, batch.unlabeled))
    ]
    seen = [np.asarray(x)[..., 0] for x in (batch.image, batch.unlabeled)]
    want = np.concatenate([x[m] for x, m in zip(seen, hidden, strict=True)])
    assert float(loss) == pytest.approx(float((want**2).mean()), rel=1e-5)
    assert float(metrics["fill_in"]) == float(loss)


def test_hidden_voxels_are_not_seen(learn, nets, batch, key):
    """Other intensities where a patch is hidden change the target, and not what is predicted."""
    objective = MaskedModeling(block=(2, 3, 3), hidden=0.5)
    seen = []
    learner = learn(nets[0])

    def forward(params, image, key):
        seen.append(np.asarray(image))
        return learner.forward(params, image, key)

    other = dataclasses.replace(learner, forward=forward)
    mask = masked.blocks(jax.random.split(key, 3)[0], batch.image, (2, 3, 3), 0.5)[..., None]
    changed = dataclasses.replace(batch, image=jnp.where(mask, 7.0, batch.image))
    first, second = objective.loss(other, batch, key)[0], objective.loss(other, changed, key)[0]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert float(second) > float(first)


def test_blocks_are_whole_and_as_many_as_asked(key):
    mask = np.asarray(masked.blocks(key, jnp.zeros((16, 8, 12, 16, 1)), (4, 4, 4), 0.6))
    whole = mask.reshape(16, 2, 4, 3, 4, 4, 4).transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 64)
    assert set(whole.sum(1)) == {0, 64}
    assert mask.mean() == pytest.approx(0.6, abs=0.08)  # 384 blocks: 3 deviations are 0.075
    odd = masked.blocks(key, jnp.zeros((2, 5, 7, 6, 1)), (4, 4, 4), 0.6)
    assert odd.shape == (2, 5, 7, 6)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="some but not all"):
        MaskedModeling(hidden=1.0)
    with pytest.raises(UserError, match="hidden is a share of the blocks"):
        MaskedModeling(hidden=1.5)
    with pytest.raises(UserError, match="1 outputs and the image 2 channels"):
        masked.squares(jnp.zeros((1, 2, 2, 2, 1)), jnp.zeros((1, 2, 2, 2, 2)))


def test_what_is_hidden_is_learned_from_what_is_around_it(net, learn, nets, batch):
    """Of smooth images, forty steps of descent halve the error that the first network makes."""
    line = jnp.linspace(-1.0, 1.0, 6)
    smooth = jnp.broadcast_to(line[:, None] + line, (2, 4, 6, 6))[..., None]
    batch = dataclasses.replace(batch, image=smooth, unlabeled=-smooth)
    objective = MaskedModeling(block=(1, 1, 1), hidden=0.3)

    def loss(params, key):
        return objective.loss(learn(params), batch, key)[0]

    @jax.jit
    def descend(params):
        def step(params, key):
            value, slope = jax.value_and_grad(loss)(params, key)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), value

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(2), 40))[1]

    values = descend(nets[0])
    assert float(values[-5:].mean()) < 0.5 * float(values[:5].mean())
