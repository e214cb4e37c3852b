"""Every plug-in found by name keeps its contract; a new file is tested by existing."""

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from bhsd_jax.configs.backbones import BACKBONES

from bhsd_jax.assemble import data
from bhsd_jax.build import build, fitting_arguments, names
from bhsd_jax.configs import common
from bhsd_jax.datasets import folder
from bhsd_jax.losses import DiceCE
from bhsd_jax.nnunet import planner
from bhsd_jax.settings import Settings
from bhsd_jax.types import Backbone, Batch, Learner, Logits, Objective
from bhsd_jax.volume import Case


def public(package):
    """(module.Name, class) of every public class defined in the modules of `package`."""
    found = []
    for name in names(package):
        module = importlib.import_module(f"{package}.{name}")
        for label, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and not label.startswith("_"):
                found.append((f"{name}.{label}", cls))
    return found


def select(package, keep):
    chosen = [(name, cls) for name, cls in public(package) if keep(cls)]
    return pytest.mark.parametrize(("name", "cls"), chosen, ids=[name for name, _ in chosen])


def is_backbone(cls):
    """A linen module for some number of classes whose call gives logits."""
    return (
        issubclass(cls, nn.Module)
        and "num_classes" in cls.__annotations__
        and inspect.signature(cls.__call__).return_annotation == Logits
    )


models = select("bhsd_jax.models", is_backbone)
objectives = select(
    "bhsd_jax.objectives", lambda cls: hasattr(cls, "loss") and dataclasses.is_dataclass(cls)
)
intensities = select("bhsd_jax.augment", lambda cls: cls.__module__.endswith("intensity"))
datasets = select(
    "bhsd_jax.datasets", lambda cls: callable(getattr(cls, "cases", None)) and cls.__name__ != "Row"
)


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        x = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(image))
        return (nn.Conv(2, (1, 1, 1))(x),)


def learner(net, params, ema=None):
    return Learner(
        forward=lambda p, image, key: net.apply({"params": p}, image, train=True),
        view=lambda key, image: image + 0.1 * jax.random.normal(key, image.shape),
        segmentation=DiceCE(),
        params=params,
        ema=ema,
        step=jnp.asarray(5),
        steps=10,
    )


def batch_for(cls):
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (2, 4, 4, 4)
    free = jax.random.normal(keys[2], (*shape, 1)) if cls.uses_unlabeled else None
    return Batch(
        jax.random.normal(keys[0], (*shape, 1)), jax.random.randint(keys[1], shape, 0, 2), free
    )


def test_every_backbone_of_the_benchmark_is_found():
    found = {name for name, cls in public("bhsd_jax.models") if is_backbone(cls)}
    assert {backbone.name for backbone in BACKBONES.values()} <= found


def arguments_of(function):
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@models
def test_a_backbone_has_all_that_the_program_asks_for(name, cls):
    model = cls(num_classes=3)
    assert isinstance(model, Backbone)
    assert arguments_of(cls.for_plan) == arguments_of(Backbone.for_plan)
    assert arguments_of(cls.__call__) == arguments_of(Backbone.__call__)
    assert len(model.stride) == 3
    assert all(isinstance(step, int) and step > 0 for step in model.stride)
    assert model.clone(dtype=jnp.bfloat16, remat="blocks").remat == "blocks"
    open_fields = [
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    ]
    assert open_fields == ["num_classes"], "all else has a default"


@models
@pytest.mark.parametrize(
    ("spacing_mm", "patch"), [((5.0, 0.5, 0.5), (20, 64, 64)), ((1.0, 1.0, 1.0), (64, 64, 64))]
)
def test_a_backbone_made_for_a_plan_takes_its_patches(name, cls, spacing_mm, patch, key):
    network = planner.topology(spacing_mm, patch)
    model = cls.for_plan(network, patch, spacing_mm, num_classes=3)
    image = jax.ShapeDtypeStruct((1, *patch, 1), jnp.float32)
    logits, _ = jax.eval_shape(lambda x: model.init_with_output(key, x, train=True), image)
    assert logits[0].shape == (1, *patch, 3)


@models
def test_fields_of_the_config_come_before_the_plans(name, cls):
    network = planner.topology((5.0, 0.5, 0.5), (20, 64, 64))
    own = cls(num_classes=3)
    given = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(cls)
        if field.name not in ("parent", "name")
    }
    if "patch" in given:
        given["patch"] = own.stride
    made = cls.for_plan(network, (20, 64, 64), (5.0, 0.5, 0.5), **given)
    assert made == cls(**given)


@models
def test_a_model_gives_float32_logits_full_resolution_first(name, cls, key):
    """For any number of patches: in an export it is a symbol."""
    model = cls(num_classes=6)
    patch = getattr(model, "patch", None) or model.stride
    image = jnp.zeros((1, *patch, 1))
    variables = jax.eval_shape(lambda: model.init(key, image, train=False))
    assert set(variables) == {"params"}, "no mutable collections"
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *patch, 1), jnp.float32)
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    assert isinstance(logits, tuple)
    assert logits[0].shape == (batch, *patch, 6)
    assert all(head.dtype == jnp.float32 for head in logits)
    sizes = [np.prod(head.shape[1:4]) for head in logits]
    assert sizes == sorted(sizes, reverse=True)


@models
def test_a_model_computes_in_bfloat16_on_float32_parameters(name, cls, key):
    model = cls(num_classes=2, dtype=jnp.bfloat16)
    patch = getattr(model, "patch", None) or model.stride
    image = jnp.zeros((1, *patch, 1))
    variables = jax.eval_shape(lambda: model.init(key, image, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(lambda v: model.apply(v, image, train=False), variables)
    assert {head.dtype for head in logits} == {jnp.dtype("float32")}


@models
def test_a_patch_that_does_not_fit_is_refused_with_one_that_does(name, cls, key):
    model = cls(num_classes=2)
    patch = getattr(model, "patch", None) or model.stride
    image = jnp.zeros((1, *(n + 1 for n in patch), 1))
    with pytest.raises(ValueError, match=r"\d+"):
        jax.eval_shape(lambda: model.init(key, image, train=False))


@objectives
def test_an_objective_is_reproducible_and_teaches_every_parameter(name, cls, key):
    objective, net, batch = cls(), Net(), batch_for(cls)
    assert isinstance(objective, Objective)
    params = objective.init(net, batch.image, key)
    ema = None if objective.ema_decay is None else jax.tree.map(jnp.copy, params)

    @jax.jit
    def run(params, ema):
        def loss(params):
            return objective.loss(learner(net, params, ema), batch, key)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, metrics), grads = run(params, ema)
    (again, _), _ = run(params, ema)
    assert float(value) == float(again)
    assert np.isfinite(value)
    assert all(np.shape(metric) == () for metric in metrics.values())
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads)), "a parameter never learns"


@objectives
def test_an_objective_that_can_keep_an_average_refuses_one_that_is_none(name, cls):
    fields = {field.name for field in dataclasses.fields(cls)}
    for wrong in ({"ema_decay": 1.5}, {"ema_decay": 0.9, "ema_t0": -1}, {"tested": "studnet"}):
        if wrong.keys() <= fields:
            with pytest.raises(ValueError, match=next(reversed(wrong))):
                cls(**wrong)


@objectives
def test_an_objective_deploys_single_networks_that_run(name, cls, key):
    objective, net, batch = cls(), Net(), batch_for(cls)
    params = objective.init(net, batch.image, key)
    for network in objective.deployable(params, None).values():
        logits = jax.eval_shape(
            lambda p: net.apply({"params": p}, batch.image, train=False), network
        )
        assert logits[0].shape == (2, 4, 4, 4, 2)


@intensities
def test_an_intensity_change_keeps_shape_and_type_and_is_nothing_at_p_zero(name, cls, key):
    image = jax.random.normal(key, (3, 6, 6, 2))
    kwargs = {"p": 1.0} | ({"invert": False} if name.endswith("Gamma") else {})
    changed = jax.jit(cls(**kwargs))(key, image)
    assert changed.shape == image.shape
    assert changed.dtype == image.dtype
    assert np.isfinite(changed).all()
    kept = jax.jit(cls(**(kwargs | {"p": 0.0})))(key, image)
    np.testing.assert_array_equal(kept, image)


@datasets
def test_a_dataset_says_what_it_holds(name, cls, tmp_path):
    fields = {field.name for field in dataclasses.fields(cls)}
    assert "root" in fields
    with pytest.raises((FileNotFoundError, ValueError), match=r"\S"):
        list(cls(root=str(tmp_path / "nothing")).cases())


def test_a_dataset_needs_a_root_only_if_it_takes_one(tmp_path, monkeypatch):
    """As `data=<module>.<Class>` gives it: with a root that is empty."""

    class Listed:
        name, classes, modality, license = "listed", ("background", "bleed"), "ct", ""

        def cases(self):
            yield Case("a", "a", tmp_path / "a.nii.gz", None, "unlabeled")

    class Rooted(Listed):
        def __init__(self, root):
            self.root = root

    monkeypatch.setattr(folder, "Listed", Listed, raising=False)
    monkeypatch.setattr(folder, "Rooted", Rooted, raising=False)

    def made(word, root=""):
        config = common.get_config(f"data=folder.{word}")
        config.data.root = root
        return data.data_set(Settings.of(config), tmp_path)

    assert [case.id for case in made("Listed").cases()] == ["a"]
    assert made("Rooted", "x").root == "x"
    with pytest.raises(ValueError, match=r"config\.data\.root is empty; say where folder\.Rooted"):
        made("Rooted")
    with pytest.raises(ValueError, match="Listed: unknown root"):
        made("Listed", "x")


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"modules are .*supervised"):
        build("bhsd_jax.objectives", {"name": "nothing.Here"})
    with pytest.raises(ValueError, match=r"it has .*Supervised"):
        build("bhsd_jax.objectives", {"name": "supervised.Nothing"})
    with pytest.raises(ValueError, match=r"unknown weigth; it takes .*weight"):
        build("bhsd_jax.objectives", {"name": "cps.CrossPseudoSupervision", "weigth": 1.0})


@pytest.mark.parametrize(
    ("annotation", "default", "value"),
    [
        (int, None, None),
        (int, 0.5, 0.25),
        (bool | float, True, 0),
        (int | float, 1, 1.0),
        (tuple[str, ...] | str, "", "one"),
        (tuple[int], (3, 3, 3), (5, 5, 5)),
        (typing.Tuple, (), (1, 2)),  # noqa: UP006
        (typing.Sequence, (), [1, 2]),
        ("the width of the first level", 8, 16),
        ("NotImported | None", None, "a"),
        ([int], [1], [1, 2]),
        ({"a": "dictionary"}, None, 3),
        (Literal["same", "valid"], "same", "valid"),
        (Callable[[Any], Any], None, "relu"),
        (np.ndarray, None, (1.0, 2.0)),
        (np.float32, 0, 0.5),
        (inspect.Parameter.empty, 0, "anything"),
    ],
)
def test_arguments_of_ones_own_are_taken_however_they_are_annotated(annotation, default, value):
    """What the type in a signature says, it says; what it does not, is not refused nor changed."""

    def made(x=default, **more):
        return x

    made.__annotations__ = {} if annotation is inspect.Parameter.empty else {"x": annotation}
    taken = fitting_arguments("own.made", made, {"x": value, "y": 1})
    assert (taken, type(taken["x"])) == ({"x": value, "y": 1}, type(value))


def test_what_a_class_keeps_says_nothing_of_arguments_that_are_called_the_same():
    class Scans:
        files: tuple[str, ...]

        def __init__(self, files: str = "*.nii.gz", *rest, fold: int = 0):
            self.files = (files, *rest)

    assert fitting_arguments("own.Scans", Scans, {"files": "a,b"}) == {"files": "a,b"}
    with pytest.raises(ValueError, match=r"own\.Scans: fold must be a whole number; got 'no'"):
        fitting_arguments("own.Scans", Scans, {"fold": "no"})
