"""What holds for every objective that has an unlabeled part."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.build import build
from bhsd_jax.losses import DiceCE
from bhsd_jax.objectives.slice_loss import SliceTerms, WithSliceLoss

TERM = {  # what the unlabeled part of each is called in the log
    "cps": "cross",
    "cps_cutmix": "cross",
    "entropy": "entropy",
    "ict": "consistency",
    "mean_teacher": "consistency",
    "w2s": "follow",
}
NAMES = tuple(TERM)
ROWS = [
    (name, preset)
    for name in NAMES
    for preset in importlib.import_module(f"bhsd_jax.configs.{name}").PRESETS
]


def objective_of(name, preset="recommended", **changes):
    config = importlib.import_module(f"bhsd_jax.configs.{name}").get_config(f"preset={preset}")
    return build("bhsd_jax.objectives", {**config.objective.to_dict(), **changes})


@functools.cache
def supervised(net):
    def loss(params, image, label):
        return DiceCE()(net.apply({"params": params}, image, train=True), label)

    return jax.jit(jax.grad(loss))


def start(objective, net, batch, key):
    params = objective.init(net, batch.image, key)
    return params, None if objective.ema_decay is None else jax.tree.map(lambda x: 0.9 * x, params)


@pytest.mark.parametrize(("name", "preset"), ROWS)
def test_a_ramped_weight_times_its_term_is_added_to_the_supervised_loss(
    name, preset, net, learn, batch, key
):
    sure_of_all = {"sure": 0.0, "sure_foreground": 0.0} if name == "w2s" else {}
    objective = objective_of(name, preset, **sure_of_all)
    params, ema = start(objective, net, batch, key)
    value, found = objective.loss(learn(params, step=20, ema=ema, noise=0.3), batch, key)
    term, weight = found[TERM[name]], found["weight"]
    assert float(term) > 0
    assert float(value) == pytest.approx(float(found["supervised"] + weight * term), rel=1e-6)
    length = objective.ramp_steps or 100 * objective.ramp
    risen = 20 // objective.staircase * objective.staircase / length
    want = objective.weight * np.exp(-5 * (1 - min(risen, 1)) ** 2)
    assert float(weight) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("staircase", 0, 1), ("staircase", -150, 1), ("ramp_steps", -1, 0)],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_ramp_that_never_rises_is_refused(name, field, value, least):
    message = rf"objective\.{field} counts steps, {least} or more; got {value}"
    with pytest.raises(ValueError, match=message):
        objective_of(name, **{field: value})
    with pytest.raises(ValueError, match=r"ramp .* 0\.\.1; got 40"):
        objective_of(name, ramp=40.0)


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_below_0_is_refused(name, weight):
    """Networks would learn to contradict each other."""
    with pytest.raises(ValueError, match=r"objective\.weight is 0 or more; got"):
        objective_of(name, weight=weight)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("cps", {"deep": "no"}, "deep must be True or False; got 'no'"),
        ("cps", {"confidence": None}, "confidence must be a number; got None"),
        ("cps", {"weight": "0,5"}, "weight must be a number"),
        ("ict", {"fold": "off"}, "fold must be True or False"),
        ("ict", {"beta": float("nan")}, "beta is the a of Beta"),
        ("mean_teacher", {"ema_decay": "high"}, "ema_decay must be a number or None"),
        ("mean_teacher", {"noise": -0.1}, "noise is 0 or more"),
        ("mean_teacher", {"noise_clip": -0.2}, "noise_clip is 0 or more"),
        ("cps_cutmix", {"number": 0}, "number is 1 or more"),
        ("cps_cutmix", {"covered": 0.3}, r"covered must be \(a number, a number\); got 0.3"),
        ("cps_cutmix", {"covered": (0.5, 0.25)}, "covered is a range of shares, low to high"),
        ("w2s", {"hole": (0.02, 10.0)}, "hole is a range of shares"),
        ("entropy", {"epsilon": -1e-6}, "epsilon is 0 or more"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(name, own, message):
    with pytest.raises(ValueError, match=message):
        objective_of(name, **own)


def test_whole_numbers_may_come_as_floats_and_truths_as_numbers():
    objective = objective_of("cps", ramp_steps=1e3, deep=1)
    assert (objective.ramp_steps, objective.deep) == (1000, True)
    members = build("bhsd_jax.objectives", {"name": "ensemble.Ensemble", "members": "a,b"}).twins
    assert members == ("a", "b"), "and no network called by a comma"
    with pytest.raises(ValueError, match=r"members must be \(text, \.\.\.\); got 3"):
        build("bhsd_jax.objectives", {"name": "ensemble.Ensemble", "members": 3})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("entropy", {"patches": "all", "voxels": "all", "measure": "entropy", "ema_decay": None}),
        ("mean_teacher", {"ema_decay": 0.99, "ema_t0": 0, "noise": 0.1, "noise_clip": 0.2}),
        ("mean_teacher", {"views": "shared", "tested": "student", "deep": False}),
        ("ict", {"ema_decay": 0.99, "ema_t0": 0, "beta": 0.2, "fold": False, "pairs": "half"}),
        ("ict", {"mix": "prob", "views": "shared", "tested": "student", "deep": False}),
        ("cps", {"twin_init": "kaiming_xavier", "views": "shared", "confidence": 0.0}),
        ("cps", {"ema_decay": None, "deep": False}),
    ],
)
def test_the_preset_of_the_paper_has_the_constants_of_ssl4mis(name, own):
    objective = objective_of(name, "ssl4mis")
    want = {"weight": 0.1, "ramp_steps": 200 * 150, "staircase": 150, **own}
    assert {field: getattr(objective, field) for field in want} == want


@pytest.mark.parametrize(("name", "preset"), [row for row in ROWS if row[0] != "cps"])
def test_weight_zero_is_supervised_training(name, preset, net, learn, batch, key):
    objective = objective_of(name, preset, weight=0.0)
    params, ema = start(objective, net, batch, key)

    def loss(params):
        return objective.loss(learn(params, step=50, ema=ema, noise=0.3), batch, key)[0]

    grads = jax.jit(jax.grad(loss))(params)
    alone = functools.partial(supervised(net), image=batch.image, label=batch.label)
    want = {t: alone(params[t]) for t in objective.twins} if objective.twins else alone(params)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("name", ["cps", "entropy", "mean_teacher"])
def test_with_every_term_off_slice_labels_do_not_change_the_program(name, net, learn, batch, key):
    """Bit for bit, then. The others also mix the labels, which nothing reads."""
    objective = objective_of(name)
    params, ema = start(objective, net, batch, key)
    absent = dataclasses.replace(batch, slice_labels=jnp.zeros((2, 4, 2), jnp.int8))

    def program(batch):
        def loss(params):
            return objective.loss(learn(params, ema=ema, noise=0.3), batch, key)

        return str(jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(params))

    assert program(absent) == program(batch)


@pytest.mark.parametrize("name", NAMES)
def test_with_every_term_off_slice_labels_change_no_bit(name, net, learn, batch, key):
    objective = objective_of(name)
    params, ema = start(objective, net, batch, key)
    absent = dataclasses.replace(batch, slice_labels=jnp.zeros((2, 4, 2), jnp.int8))

    def graded(batch, objective):
        def loss(params):
            return objective.loss(learn(params, ema=ema, noise=0.3), batch, key)[0]

        return jax.tree.leaves(jax.value_and_grad(loss)(params))

    plain = graded(batch, objective)
    off = graded(absent, WithSliceLoss(objective, SliceTerms()))
    for x, y in zip(plain, off, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", [*NAMES, "supervised"])
def test_every_objective_gates_its_teachers_and_offers_its_students(name, net, learn, batch, key):
    if name == "supervised":
        objective = build("bhsd_jax.objectives", {"name": "supervised.WeaklySupervised"})
    else:
        objective = objective_of(name)
    params, ema = start(objective, net, batch, key)
    batch = dataclasses.replace(batch, slice_labels=jnp.zeros((2, 4, 2), jnp.int8))
    gated, offered = [], []

    def gate(logits):
        gated.append(logits.shape)
        return logits

    def both(params):
        plain = learn(params, ema=ema)
        terms = objective.terms(dataclasses.replace(plain, gate=gate), batch, key)
        assert terms.mixed(batch.slice_labels).shape == (2, 4, 2)
        offered.extend(x.shape for x in terms.students)
        more = WithSliceLoss(objective, SliceTerms(neg_sup=1.0))
        return objective.loss(plain, batch, key), more.loss(plain, batch, key)

    (_, without), (_, found) = jax.eval_shape(both, params)
    assert set(found) - set(without) == {"weak/known", "weak/neg_sup"}
    networks = max(1, len(objective.twins))
    assert offered == [(2, 4, 6, 6, 3)] * networks
    assert gated == [(2, 4, 6, 6, 3)] * (0 if name == "supervised" else networks)


@pytest.mark.parametrize("name", ["cps", "mean_teacher"])
def test_slice_labels_of_which_nothing_is_known_are_the_identity(name, net, learn, batch, key):
    objective = objective_of(name)
    params, ema = start(objective, net, batch, key)
    unknown = dataclasses.replace(batch, slice_labels=jnp.full((2, 4, 2), -1, jnp.int8))
    terms = SliceTerms(gate_pseudo=True, neg_sup=1.0, mil=0.1, size=0.01, start=0.0)

    @jax.jit
    def both(params):
        def loss(params, batch, objective):
            return objective.loss(learn(params, ema=ema, noise=0.3), batch, key)[0]

        grad = jax.value_and_grad(loss)
        more = WithSliceLoss(objective, terms)
        return grad(params, batch, objective), grad(params, unknown, more)

    (want, grads), (value, found) = both(params)
    assert float(value) == pytest.approx(float(want), abs=6e-8)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(x, y, atol=6e-8)


def test_one_step_down_lowers_every_term_on_negative_slices(net, learn, batch, key):
    objective = objective_of("cps")
    params, _ = start(objective, net, batch, key)
    absent = dataclasses.replace(batch, slice_labels=jnp.zeros((2, 4, 2), jnp.int8))
    terms = SliceTerms(gate_pseudo=True, neg_sup=1.0, mil=0.1, size=0.01, start=0.0)

    def loss(params):
        return WithSliceLoss(objective, terms).loss(learn(params), absent, key)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, before), grads = step(params)
    (_, after), _ = step(jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))
    assert float(before["weak/known"]) == 1
    for term in ("neg_sup", "mil", "size"):
        assert 0 < float(after[f"weak/{term}"]) < float(before[f"weak/{term}"]), term
