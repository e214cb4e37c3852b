"""What no loss depends on: voxels outside the scan, and which way round a patch lies.

The networks here look at one voxel at a time, so that what a voxel holds reaches the loss through
that voxel alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_every_objective import objective_of

from bhsd_jax.losses import DiceCE, consistency

ANY = {"sure": 0.0, "sure_foreground": 0.0}  # every voxel of the teacher is a label
PLAIN = {"chance": 0.0}
MASKED = [
    ("mean_teacher", {}),
    ("ict", {}),
    ("ict", {"pairs": "half"}),
    ("entropy", {}),
    ("entropy", {"voxels": "balanced"}),
    ("entropy", {"voxels": "foreground"}),
    ("entropy", {"measure": "max_square"}),
    ("cps", {}),
    ("cps", {"confidence": 0.4}),
    ("cps_cutmix", {}),
    ("w2s", {**ANY, "chance": 1.0, "holes": 0.0}),
]
COPY_PASTE = ("w2s", {**ANY, "pairing": "labeled"})
NETS = [
    {"weight": jnp.asarray([0.3, -0.8, 1.1]), "bias": jnp.asarray([0.2, 0.0, -0.1])},
    {"weight": jnp.asarray([-0.5, 0.9, 0.4]), "bias": jnp.asarray([0.0, 0.3, 0.1])},
]


def pointwise(params, image, key=None):
    return (image * params["weight"] + params["bias"],)


@pytest.fixture(scope="module")
def run(learn):
    """Of an objective: (params, batch) -> loss and its gradients in params and unlabeled voxels."""

    made = {}

    def of(name, changes):
        spec = (name, str(changes))
        if spec not in made:
            made[spec] = make(name, changes)
        return made[spec]

    def make(name, changes):
        objective = objective_of(name, **{"ramp": 0.0, "weight": 1.0, **changes})

        @jax.jit
        def graded(params, batch):
            def loss(params, free):
                learner = dataclasses.replace(learn(params, ema=NETS[1]), forward=pointwise)
                seen = dataclasses.replace(batch, unlabeled=free)
                return objective.loss(learner, seen, jax.random.key(0))[0]

            return jax.value_and_grad(loss, (0, 1))(params, batch.unlabeled)

        twins = dict(zip(objective.twins, NETS, strict=False))
        return functools.partial(graded, twins or NETS[0])

    return of


def equal(found, want):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize(("name", "changes"), [*MASKED, COPY_PASTE])
def test_voxels_outside_the_scan_have_no_say(name, changes, run, batch):
    loss = run(name, changes)
    inside = jnp.ones((2, 4, 6, 6), bool).at[0, :, :3].set(False).at[1, 0].set(False)
    part = dataclasses.replace(batch, inside=inside)
    value, (grads, felt) = loss(part)
    assert not np.any(np.asarray(felt)[~np.asarray(inside)]), "zero, not merely small"
    assert np.any(np.asarray(felt)[np.asarray(inside)])
    far = jnp.where(inside[..., None], batch.unlabeled, 50.0)
    other, (same, _) = loss(dataclasses.replace(part, unlabeled=far))
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    equal(same, grads)
    whole = loss(dataclasses.replace(batch, inside=jnp.ones_like(inside)))
    equal(whole, loss(batch))
    assert float(whole[0]) != pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize(("name", "changes"), MASKED)
def test_a_patch_beside_the_scan_leaves_supervised_training(name, changes, run, batch):
    nothing = dataclasses.replace(batch, inside=jnp.zeros((2, 4, 6, 6), bool))
    value, (grads, felt) = run(name, changes)(nothing)

    def supervised(params):
        return DiceCE()(pointwise(params, batch.image), batch.label)

    twins = name.startswith("cps")
    want = [jax.value_and_grad(supervised)(net) for net in NETS[: 1 + twins]]
    assert float(value) == pytest.approx(sum(float(part) for part, _ in want), rel=1e-6)
    equal(grads, {"a": want[0][1], "b": want[1][1]} if twins else want[0][1])
    assert not np.any(felt)


TURNS = {
    "flip D": lambda x: jnp.flip(x, 1),
    "flip H": lambda x: jnp.flip(x, 2),
    "flip W": lambda x: jnp.flip(x, 3),
    "rot90": lambda x: jnp.rot90(x, axes=(2, 3)),
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *MASKED[:-2],
        ("cps_cutmix", PLAIN),
        ("w2s", {**ANY, **PLAIN, "holes": 0.0}),
    ],
)
def test_the_loss_is_the_same_for_a_turned_batch(name, changes, run, batch):
    loss = run(name, changes)
    inside = jnp.ones((2, 4, 6, 6), bool).at[0, :, :3].set(False)
    batch = dataclasses.replace(batch, inside=inside)
    value, (grads, felt) = loss(batch)
    for turn in TURNS.values():
        found, (same, there) = loss(jax.tree.map(turn, batch))
        assert float(found) == pytest.approx(float(value), rel=1e-6)
        equal(same, grads)
        np.testing.assert_allclose(there, turn(felt), atol=1e-7)


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_a_network_that_turns_with_its_input_agrees_with_itself_exactly(turn, net, batch, key):
    answer = jax.nn.softmax(pointwise(NETS[0], batch.unlabeled)[0])
    turned = pointwise(NETS[0], turn(batch.unlabeled))[0]
    assert float(consistency(turned, turn(answer))) == 0
    # A convolution does not: what is left is what it would learn from.
    params = net.init(key, batch.image, train=False)
    answer = jax.nn.softmax(net.apply(params, batch.unlabeled, train=True)[0])
    turned = net.apply(params, turn(batch.unlabeled), train=True)[0]
    assert float(consistency(turned, turn(answer))) > 1e-6
