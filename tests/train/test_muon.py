"""Muon: its steps by hand, on which arrays, and that devices and interruptions change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import make_batch, make_parts

from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints
from bhsd_jax.train.optimizer import make_optimizer
from bhsd_jax.train.step import init_state, make_train_step

LR, BETA, BETA2, DECAY = 0.1, 0.95, 0.99, 0.3


def muon(**fields):
    rate = lambda step: LR / (1 + step)  # noqa: E731
    given = {"momentum": BETA, "beta2": BETA2, "weight_decay": DECAY, "clip": None} | fields
    return make_optimizer("muon", rate, **given)


def orthogonal(matrix):
    """Five rounds of Newton and Schulz with the constants of Jordan et al. 2024."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_kernels_move_by_muon_and_all_else_by_adam(nesterov):
    """Float64 beside optax: a convolution, its bias, a 2D table of positions that is no kernel."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 1, 2, 5), "bias": (5,), "table": (4, 3)}
    want = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"conv": want})
    tx = muon(nesterov=nesterov)
    state, update = tx.init(params), jax.jit(tx.update)
    first = {name: np.zeros(shape) for name, shape in shapes.items()}
    second = {name: np.zeros(shape) for name, shape in shapes.items()}
    for i in range(1, 5):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"conv": grads})
        updates, state = update(given, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        rate = LR / i
        for name, grad in grads.items():
            beta = BETA if name == "kernel" else 0.9
            first[name] = beta * first[name] + (1 - beta) * grad
            ahead = first[name] / (1 - beta**i)
            if nesterov:
                ahead = beta * first[name] / (1 - beta ** (i + 1))
                ahead += (1 - beta) * grad / (1 - beta**i)
            if name == "kernel":
                step = orthogonal(ahead.reshape(18, 5).T).T.reshape(grad.shape)
                want[name] -= rate * (0.2 * np.sqrt(18) * step + DECAY * want[name])
            else:
                second[name] = BETA2 * second[name] + (1 - BETA2) * grad**2
                want[name] -= rate * ahead / (np.sqrt(second[name] / (1 - BETA2**i)) + 1e-8)
    for name, value in want.items():
        np.testing.assert_allclose(params["conv"][name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_gradient_of_any_length_moves_a_kernel_as_far_in_every_direction():
    grads = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 8))}
    tx = muon(weight_decay=0.0)
    for length in (1e-3, 1e3):
        updates, _ = jax.jit(tx.update)({"kernel": length * grads["kernel"]}, tx.init(grads), grads)
        lengths = np.linalg.svd(updates["kernel"].reshape(108, 8), compute_uv=False)
        spread = lengths / (LR * 0.2 * np.sqrt(108))
        assert 0.65 < spread.min() < spread.max() < 1.25  # where the constants leave them


def trained(parts, state, batches, **places):
    step = jax.jit(make_train_step(parts), **places)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def start(objective, batch):
    parts = make_parts(objective, optimizer="muon")
    return jax.jit(lambda: init_state(parts, batch.image, jax.random.key(0)))()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)], ids=str)
def test_eight_devices_train_as_one(sizes):
    objective = Supervised()
    batches = [make_batch(seed, unlabeled=0) for seed in range(3)]
    parts, began = make_parts(objective, optimizer="muon"), start(objective, batches[0])
    want, _ = trained(parts, began, batches)
    mesh = meshes.make_mesh(*sizes)
    places = meshes.state_shardings(mesh, began)
    found, _ = trained(
        make_parts(objective, optimizer="muon", mesh=mesh),
        jax.device_put(began, places),
        [meshes.to_devices(batch, mesh) for batch in batches],
        in_shardings=(places, meshes.batch_shardings(mesh, batches[0])),
        out_shardings=(places, meshes.replicated(mesh)),
    )
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_resumed_training_ends_bit_for_bit_where_the_other_does(tmp_path):
    objective = CrossPseudoSupervision(ramp=0.0)
    batches = [make_batch(seed) for seed in range(4)]
    parts, began = make_parts(objective, optimizer="muon"), start(objective, batches[0])
    step = jax.jit(make_train_step(parts))
    halfway, _ = step(step(began, batches[0])[0], batches[1])
    checkpoints = Checkpoints(tmp_path / "c", config={}, plan={})
    checkpoints.save(2, halfway, {"batches": 2}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), halfway)
    )
    checkpoints.close()
    ends = [step(step(state, batches[2])[0], batches[3])[0] for state in (halfway, restored)]
    for a, b in zip(*(jax.tree.leaves((end.params, end.opt_state)) for end in ends), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert int(ends[1].step) == 4
