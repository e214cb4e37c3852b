"""A network of one's own needs a file in `models/` and a call, nothing else."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import bhsd_jax.models
from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.recipe import make_recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import cps, supervised
from bhsd_jax.models.cost import cost
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.step import make_train_step
from tools import model_table

PLAN = dataclasses.replace(model_table.head_ct_plan(), foreground=(15.0, 54.0, 20.0, 92.0))
FILE = """
import flax.linen as nn
import jax.numpy as jnp


class Bare(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, image, *, train):
        return (nn.Dense(self.num_classes)(image),)


class Told(Bare):
    patch: tuple = ()
    dtype: type = jnp.float32
    remat: str = "none"
    kernels: tuple = ()


class Planned(Bare):
    depth: int = 1
    width: float = 0.0
    patch: tuple = ()

    @classmethod
    def for_plan(cls, network, patch, spacing_mm, /, **fields):
        return cls(**{"depth": len(network.features), "width": spacing_mm[2], **fields})


def small(num_classes):
    return Bare(num_classes)


class Alone(Bare):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(self.num_classes)(image)


class Coarse(Bare):
    @nn.compact
    def __call__(self, image, *, train):
        return (nn.Conv(self.num_classes, (3, 3, 3), strides=2)(image),)


class First(Bare):
    @nn.compact
    def __call__(self, image, *, train):
        return (jnp.moveaxis(nn.Dense(self.num_classes)(image), -1, 1),)


class Normed(Bare):
    @nn.compact
    def __call__(self, image, *, train):
        return (nn.BatchNorm(not train)(nn.Dense(self.num_classes)(image)),)


class Half(Bare):
    @nn.compact
    def __call__(self, image, *, train):
        return (nn.Dense(self.num_classes, dtype=jnp.bfloat16)(image),)


class Untold(Bare):
    def __call__(self, image):
        return (image,)
"""


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(FILE)
    monkeypatch.setattr(bhsd_jax.models, "__path__", [*bhsd_jax.models.__path__, str(tmp_path)])
    yield
    sys.modules.pop("bhsd_jax.models.own", None)


def built(name, experiment=supervised, **fields):
    config = experiment.get_config(f"backbone=own.{name}")
    config.model.update(fields)
    config.precision, config.train.remat = "bfloat16", "blocks"
    run = Run.of(config, Path("run"), PLAN)
    return run, wiring.model(run)


@pytest.mark.parametrize("experiment", [supervised, cps])
@pytest.mark.parametrize("name", ["Bare", "Told", "Planned", "small"])
def test_it_is_trained(name, experiment):
    run, model = built(name, experiment)
    assert model.num_classes == (2 if run.config.split.binary else len(PLAN.classes))
    recipe = make_recipe(run)
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    _, metrics = jax.eval_shape(make_train_step(recipe.parts), state, recipe.abstract_batch())
    assert metrics["loss"].shape == ()
    assert cost(model, (1, *PLAN.network.patch, 1)).heads == 1


def test_without_for_plan_it_is_given_what_it_has_a_name_for():
    _, model = built("Told")
    assert (model.patch, model.dtype, model.remat) == (PLAN.network.patch, jnp.bfloat16, "blocks")
    assert model.kernels == (), "a topology is for those that ask for it"
    _, model = built("Told", patch=(4, 4, 4), remat="none")
    assert (model.patch, model.remat) == ((4, 4, 4), "none"), "the config comes first"


def test_with_for_plan_it_takes_what_it_wants_and_nothing_else():
    _, model = built("Planned")
    assert (model.depth, model.width) == (len(PLAN.network.features), PLAN.spacing_mm[2])
    assert model.patch == ()
    _, model = built("Planned", depth=5, patch=(4, 4, 4))
    assert (model.depth, model.patch) == (5, (4, 4, 4)), "the config comes first"


@pytest.mark.parametrize("name", ["Bare", "Planned", "small"])
def test_an_argument_it_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=rf"models.own.{name}: unknown wide; it takes .*num_clas"):
        built(name, wide=3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Alone", r"own.Alone: returns \(1, .*it must return a tuple whose first entry is logits"),
        ("Coarse", r"own.Coarse: returns \[\(1, .*one voxel for each of the image"),
        ("First", r"own.First: returns \[\(1, 6, .*channels last"),
        ("Normed", r"own.Normed: keeps batch_stats beside its parameters"),
        ("Untold", r"own.Untold: its __call__ has no argument `train`"),
    ],
)
def test_a_network_that_answers_otherwise_is_refused_before_it_is_trained(name, said):
    def require():
        run, model = built(name)
        wiring.require_output(model, run.patch, 1)

    with pytest.raises(UserError, match=said):
        require()


def test_one_that_answers_as_it_should_is_not_refused():
    run, model = built("Bare")
    wiring.require_output(model, run.patch, 1)


def test_whatever_type_it_answers_in_the_loss_sees_float32():
    seen = []

    class Seen(Supervised):
        def loss(self, learner, batch, key):
            seen.extend(learner.forward(learner.params, batch.image, key))
            return super().loss(learner, batch, key)

    recipe = make_recipe(built("Half")[0])
    parts = dataclasses.replace(recipe.parts, objective=Seen())
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    jax.eval_shape(make_train_step(parts), state, recipe.abstract_batch())
    assert [logits.dtype for logits in seen] == [jnp.float32]
