"""`preset=ssl4mis` trains as SSL4MIS' own scripts do: their losses, rates and 20 of their updates.

The files were recorded by `tools/record_ssl4mis.py` from the scripts themselves (06df604) with
PyTorch 2.15, on generated volumes and a small network that both sides share.
"""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bhsd_jax.assemble import wiring
from bhsd_jax.losses import DiceCE
from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.common import Ramp
from bhsd_jax.settings import Settings
from bhsd_jax.train.optimizer import of_spec
from bhsd_jax.train.step import Parts, make_train_step
from bhsd_jax.types import Batch, TrainState

NAMES = ("suponly", "entropy", "mean_teacher", "ict", "cps")
RAMPED = NAMES[1:]
UNIT = 1 / 16
REL = 1e-5
EPS = np.finfo(np.float32).eps


class Small(nn.Module):
    """As in the tool that made the files."""

    @nn.compact
    def __call__(self, image, *, train):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3, 3))
        x = conv(4, name="first")(image)
        x = nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        x = conv(4, name="second")(nn.leaky_relu(x, 0.01))
        return (nn.Conv(2, (1, 1, 1), name="head")(nn.leaky_relu(x, 0.01)),)


SHAPES = {  # as PyTorch orders them: O I W H D, weight before bias
    "first": ((4, 1, 3, 3, 3), (4,)),
    "norm": ((4,), (4,)),
    "second": ((4, 4, 3, 3, 3), (4,)),
    "head": ((2, 4, 1, 1, 1), (2,)),
}


def tree(flat):
    """Parameters from one row of a file."""
    params, at = {}, 0
    for name, shapes in SHAPES.items():
        values = []
        for shape in shapes:
            value = flat[at : at + np.prod(shape)].reshape(shape)
            at += value.size
            # O I W H D -> D W H I O: as the patches, whose W and H are our H and W.
            values.append(np.transpose(value, (4, 2, 3, 1, 0)) if value.ndim == 5 else value)
        names = ("scale" if name == "norm" else "kernel", "bias")
        params[name] = dict(zip(names, map(jnp.asarray, values), strict=True))
    assert at == len(flat)
    return params


def ours(image):
    """N C W H D -> N D H W C, or without C."""
    moved = np.moveaxis(image, -1, -3)
    return np.moveaxis(moved, 1, -1) if moved.ndim == 5 else moved


def settings(name):
    config = importlib.import_module(f"bhsd_jax.configs.{name}").get_config("preset=ssl4mis")
    return Settings.of(config)


def recorded(golden, name):
    with np.load(golden / f"ssl4mis_{name}.npz") as file:
        return dict(file)


def parts_of(config, monkeypatch, draws):
    """The step of a config without its augmentation, and with these random draws."""
    objective = wiring.objective(config)
    schedule, optimizer = of_spec(config.optimizer, config.train.steps, parts=bool(objective.twins))
    terms = getattr(objective, "terms", None)

    def drawn(learner, batch, key):
        """The draws are looked up by the step, which only the learner knows."""
        if draws is not None and objective.__class__.__name__ == "MeanTeacher":
            table = jnp.asarray(np.stack([ours(d) for d in draws]) * UNIT, jnp.float32)
            monkeypatch.setattr(jax.random, "normal", lambda *_: table[learner.step])
        elif draws is not None:
            # Their share goes to the second patch, ours to the first.
            table = 1 - jnp.asarray(draws, jnp.float32).reshape(len(draws), 1)
            monkeypatch.setattr(mixing, "beta", lambda *_: table[learner.step])
        return terms(learner, batch, key)

    if terms is not None:
        object.__setattr__(objective, "terms", drawn)
    return Parts(
        model=Small(),
        objective=objective,
        optimizer=optax.chain(remembering(), optimizer),
        schedule=schedule,
        segmentation=DiceCE(**vars(config.loss)),
        augment=lambda key, batch: batch,
        view=lambda key, image: image,
        steps=config.train.steps,
    )


def remembering():
    """Keeps the last gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params=None: (grads, grads),
    )


def start(name, parts, rows):
    """The state that the script began with; its teacher begins as a network of its own."""
    networks = [tree(row) for row in rows]
    params = dict(zip("ab", networks, strict=True)) if name == "cps" else networks[0]
    ema = None if parts.objective.ema_decay is None else networks[1]
    opt_state = parts.optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, jax.random.key(0))


def farthest(found, want):
    """Largest relative difference of a leaf, against the largest value in it."""
    found, want = jax.tree.leaves(found), jax.tree.leaves(want)
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, want, strict=True)
    )


def distance(found, want):
    """Relative distance of all values together: the bias before a norm has no gradient at all."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    apart, size = np.sum([[((a - b) ** 2).sum(), (b**2).sum()] for a, b in pairs], axis=0)
    return float(np.sqrt(apart / size))


def batches(name, file):
    unlabeled = name != "suponly"
    for image, label in zip(file["image"], file["label"], strict=True):
        image = jnp.asarray(ours(image) * UNIT, jnp.float32)
        yield Batch(image[:2], jnp.asarray(ours(label[:2])), image[2:] if unlabeled else None)


def logged(file):
    """What the script and we log, by our names; CPS logs its networks one by one."""
    logs = {key[4:]: value for key, value in file.items() if key.startswith("log/")}
    twins = [logs.pop(f"model{i}_loss", 0) for i in (1, 2)]
    total = logs.get("total_loss", sum(twins))
    term = {"consistency": logs["consistency_loss"]} if "consistency_loss" in logs else {}
    weight = {"weight": logs["consistency_weight"]} if "consistency_weight" in logs else {}
    return {"loss": total, "lr": file["rates"], **term, **weight}


@pytest.mark.parametrize("name", NAMES)
def test_twenty_updates_are_those_of_the_script(golden, monkeypatch, name):
    file = recorded(golden, name)
    parts = parts_of(settings(name), monkeypatch, file.get("draws"))
    state, logs = start(name, parts, file["start"]), logged(file)
    step = jax.jit(make_train_step(parts))
    for update, batch in enumerate(batches(name, file)):
        state, metrics = step(state, batch)
        metrics["consistency"] = metrics.get("consistency", metrics.get("entropy"))
        for key, want in logs.items():
            # A square of small differences of probabilities has only their digits.
            floor = 2 * np.sqrt(want[update]) * EPS if key == "consistency" else 0
            near = pytest.approx(want[update], rel=REL, abs=floor)
            assert float(metrics[key]) == near, (key, update)
        if update + 1 not in file["kept"]:
            continue
        at = list(file["kept"]).index(update + 1)
        networks, grads = [state.params], [state.opt_state[0]]
        if name == "cps":
            networks, grads = ([each[0][twin] for twin in "ab"] for each in (networks, grads))
        for network, grad, want, slope in zip(
            networks, grads, file["params"][at], file["grads"][at], strict=True
        ):
            assert farthest(network, tree(want)) < REL
            assert distance(grad, tree(slope)) < REL
        if "teacher" in file:
            assert farthest(state.ema, tree(file["teacher"][at])) < REL


@pytest.mark.parametrize("name", NAMES)
def test_the_rates_of_a_whole_training_are_the_scripts_to_its_last_step(golden, name):
    """CPS sets its rate with the number of the next step, the others with that of the last."""
    want = recorded(golden, "schedules")[f"lr/{name}"]
    config = settings(name)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=len(want)))
    schedule, _ = of_spec(config.optimizer, config.train.steps, parts=False)
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(len(want)))
    np.testing.assert_allclose(rates, want, rtol=REL)
    assert (want[0] == want[1]) == (name != "cps")


@pytest.mark.parametrize("name", RAMPED)
def test_the_weights_are_the_scripts_however_long_the_training(golden, name):
    file, objective = recorded(golden, "schedules"), wiring.objective(settings(name))
    for steps in (30_000, 250_000, 4):
        found = jax.jit(jax.vmap(lambda step, n=steps: Ramp.of(objective).at(step, n)))(
            jnp.asarray(file["step"])
        )
        np.testing.assert_allclose(found, file[f"weight/{name}"], rtol=REL)


@pytest.mark.parametrize("name", RAMPED)
def test_half_way_the_unlabeled_term_weighs_0_0287_and_not_0_0012(golden, name):
    """0.0012 is what a ramp over nnU-Net's 250,000 steps would give."""
    config = settings(name)
    assert config.train.steps == 30_000
    weight = float(Ramp.of(wiring.objective(config)).at(jnp.asarray(15_000), config.train.steps))
    assert weight == pytest.approx(0.1 * np.exp(-5 * 0.5**2), rel=REL)
    file = recorded(golden, "schedules")
    place = list(file["step"]).index(15_000)
    assert weight == pytest.approx(file[f"weight/{name}"][place], rel=REL)
    assert weight == pytest.approx(0.0287, abs=5e-5)
