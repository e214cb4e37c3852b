"""Every network of the benchmark learns: from its short name to a train step on synthetic scans."""

import dataclasses

import jax
import jax.numpy as jnp
import plain_code
import pytest
from bhsd_jax.configs.backbones import BACKBONES

from bhsd_jax.assemble.recipe import make_recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import cps, supervised
from bhsd_jax.input.pipeline import Batches, Decoded, Stream
from bhsd_jax.train.step import make_train_step
from bhsd_jax.verbs import preprocess

STEPS = 20
QUICK = plain_code.OPTIONS  # nearly all of the time is the compiler's


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with shards; one for all networks and both objectives."""
    workdir = tmp_path_factory.mktemp("prepared")
    config = supervised.get_config("smoke")
    config.preprocess.processes = 1
    preprocess.run(config, workdir)
    return workdir


def batches_of(config, recipe, workdir):
    """What the verb `train` reads, from scans decoded once."""
    run = Run.of(config, workdir)
    shards, (roles, _) = run.shards, run.roles
    cases = {}
    for case in (*roles.train, *roles.unlabeled):
        whole = shards.load(case)
        cases[case] = Decoded(whole.image, whole.label, whole.foreground)
    parts = ((roles.train, recipe.labeled), (roles.unlabeled, recipe.unlabeled))
    streams = [
        Stream(
            cases.__getitem__,
            names,
            recipe.cut,
            batch=batch,
            length=STEPS * batch,
            seed=(config.seed, number),
            labeled=number == 0,
        )
        for number, (names, batch) in enumerate(parts)
    ]
    return Batches(streams, threads=1, buffer=2)


def recipe_of(experiment, backbone, workdir):
    config = experiment.get_config(f"smoke,backbone={backbone}")
    # Without random changes of the patches a fall of the loss is the network's.
    config.augment = {"spatial": (), "intensity": ()}
    config.split.binary = True
    config.train.steps = STEPS
    if "ramp" in config.objective:
        config.objective.ramp = 0.0  # one weight throughout: losses of all steps are comparable
    if config.optimizer.name == "adamw":
        config.optimizer.lr = 0.003  # the published 0.0001 is for 5000 epochs
    return config, make_recipe(Run.of(config, workdir))


def require_fall(config, recipe, state, workdir):
    step = jax.jit(make_train_step(recipe.parts), donate_argnums=0, compiler_options=QUICK)
    batches, losses = batches_of(config, recipe, workdir), []
    for _ in range(STEPS):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
    assert max(losses[-5:]) < min(losses[:5]), (config.name, losses)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_twenty_steps_lower_the_supervised_loss(backbone, prepared):
    config, recipe = recipe_of(supervised, backbone, prepared)
    state = jax.jit(recipe.init, compiler_options=QUICK)(jax.random.key(0))
    require_fall(config, recipe, state, prepared)


def test_twenty_steps_lower_the_loss_under_cps(prepared):
    """Of the network that compiles fastest: what CPS does is the same for all."""
    _, alone = recipe_of(supervised, "nnunet", prepared)
    init = jax.jit(alone.init, compiler_options=QUICK)
    one, other = init(jax.random.key(0)), init(jax.random.key(1))
    params = {"a": jax.tree.map(jnp.copy, one.params), "b": other.params}
    config, recipe = recipe_of(cps, "nnunet", prepared)
    # Twins put together from two draws: compiling their own initialization takes longer than
    # all steps. It is asked for the same parts.
    opt_state = jax.jit(recipe.parts.optimizer.init)(params)
    state = dataclasses.replace(other, params=params, opt_state=opt_state)
    asked = jax.eval_shape(recipe.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, asked) == jax.tree.map(jnp.shape, state)
    require_fall(config, recipe, state, prepared)
