"""The step: what it changes, what it never touches, and that devices do not matter."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy import make_batch, make_parts

from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.cps_cutmix import CrossPseudoSupervisionCutMix
from bhsd_jax.objectives.entropy import EntropyMinimization
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.mean_teacher import MeanTeacher
from bhsd_jax.objectives.slice_loss import SliceTerms, WithSliceLoss
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.objectives.w2s import WeakToStrong
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.step import init_state, make_train_step, moving_average


def start(parts, batch, key):
    return jax.jit(lambda: init_state(parts, batch.image, key))()


@pytest.mark.parametrize("objective", [Supervised(), CrossPseudoSupervision(ramp=0.0)])
def test_twenty_steps_lower_the_loss(objective, key):
    parts, batch = make_parts(objective, lr=0.05), make_batch()
    state, step = start(parts, batch, key), jax.jit(make_train_step(parts), donate_argnums=0)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["supervised"]))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 20
    assert step._cache_size() == 1, "one compilation for all steps"


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_two_runs_are_equal_bit_for_bit_and_so_are_twins_that_began_alike(key):
    parts, batch = make_parts(CrossPseudoSupervision(views="shared", ramp=0.0)), make_batch()
    step, began = jax.jit(make_train_step(parts)), start(parts, batch, key)
    a, _ = step(began, batch)
    b, _ = step(began, batch)
    assert equal(a.params, b.params)
    assert not equal(a.params["a"], a.params["b"])
    alike = dataclasses.replace(began, params=dict.fromkeys("ab", began.params["a"]))
    for _ in range(3):
        alike, _ = step(alike, batch)
    assert equal(alike.params["a"], alike.params["b"])
    assert not equal(alike.params["a"], began.params["a"])


@dataclasses.dataclass(frozen=True)
class Drawn(Supervised):
    """Logs the image it is given, and a number drawn with its key, also squared."""

    def loss(self, learner, batch, key):
        total = sum(leaf.sum() for leaf in jax.tree.leaves(learner.params))
        number = jax.random.uniform(key)
        return total, {"image": batch.image.mean(), "number": number, "square": number**2}


def test_every_step_gives_augmentation_and_loss_keys_of_their_own(key):
    def draw(key, batch):
        return dataclasses.replace(batch, image=jax.random.uniform(key))

    parts, batch = dataclasses.replace(make_parts(Drawn()), augment=draw), make_batch()
    state, step, seen = start(parts, batch, key), jax.jit(make_train_step(parts)), []
    for _ in range(3):
        state, metrics = step(state, batch)
        seen += [float(metrics["image"]), float(metrics["number"])]
    assert len(set(seen)) == 6


def test_every_part_of_a_batch_has_a_key_of_its_own(key):
    """The mean of squares exceeds the square of the mean where not all numbers are one."""
    parts, batch = dataclasses.replace(make_parts(Drawn()), accumulate=4), make_batch()
    _, metrics = jax.jit(make_train_step(parts))(start(parts, batch, key), batch)
    assert float(metrics["square"]) > float(metrics["number"]) ** 2 + 1e-3


def test_the_average_is_the_mean_of_all_networks_until_the_decay_takes_over():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(30, 4)).astype(np.float32)
    ema = jnp.full(4, 1e6)  # the first update forgets it
    for t, params in enumerate(seen):
        ema = moving_average(ema, jnp.asarray(params), 0.9, jnp.asarray(t))
        if t < 10:
            np.testing.assert_allclose(ema, seen[: t + 1].mean(0), rtol=1e-5, atol=1e-6)
    fade = 0.9 ** np.arange(20)[::-1]  # of the 20 networks since
    want = 0.9**20 * seen[:10].mean(0) + 0.1 * fade @ seen[10:]
    np.testing.assert_allclose(ema, want, rtol=1e-4, atol=1e-6)


def test_the_average_and_a_debiased_one_differ_on_the_way_and_meet_in_the_end():
    seen = np.random.default_rng(0).normal(size=(400, 4))
    ema, moment, gaps = jnp.zeros(4), np.zeros(4), []
    move = jax.jit(lambda ema, params, step: moving_average(ema, params, 0.9, step))
    for t, params in enumerate(seen):
        ema = move(ema, jnp.asarray(params, jnp.float32), jnp.asarray(t))
        moment = 0.9 * moment + 0.1 * params
        gaps.append(np.abs(ema - moment / (1 - 0.9 ** (t + 1))).max())
    assert gaps[0] < 1e-6
    assert max(gaps[1:21]) > 1e-2
    assert max(gaps[-50:]) < 1e-5


def test_the_average_lies_where_the_network_lies():
    rows = NamedSharding(meshes.make_mesh(), PartitionSpec("data"))
    old, new = (jax.device_put(jnp.full(16, value), rows) for value in (1.0, 2.0))
    moved = jax.jit(lambda *trees: moving_average(*trees, 0.9, jnp.asarray(50)))(old, new)
    assert moved.sharding.is_equivalent_to(rows, 1)
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved, 1.1, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_average_without_memory_is_the_network_and_one_that_never_forgets_its_mean(decay):
    seen = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    ema = jnp.full(4, -7.0)
    for t, params in enumerate(seen):
        ema = moving_average(ema, jnp.asarray(params), decay, jnp.asarray(t))
        want = seen[: t + 1].mean(0) if decay else params
        np.testing.assert_allclose(ema, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t0", "counts"), [(1, 1), (3, 3)])
def test_a_later_beginning_keeps_the_initial_value_in_the_mean(t0, counts):
    """With 1 it is the mean of the initial value and all later ones: the authors' rule."""
    first, *seen = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    ema = jnp.asarray(first)
    for t, params in enumerate(seen):
        ema = moving_average(ema, jnp.asarray(params), 0.99, jnp.asarray(t), t0)
        want = (counts * first + sum(seen[: t + 1])) / (counts + t + 1)
        np.testing.assert_allclose(ema, want, rtol=1e-5, atol=1e-6)


def test_late_enough_a_beginning_is_a_constant_decay():
    ema = moving_average(jnp.ones(2), jnp.zeros(2), 0.9, jnp.asarray(0), 10)
    np.testing.assert_allclose(ema, 0.9, rtol=1e-6)


def test_the_step_follows_the_objectives_rule(key):
    batch = make_batch()
    forgets, keeps = (make_parts(Supervised(ema_decay=0.99, ema_t0=t0)) for t0 in (0, 1))
    began = start(forgets, batch, key)
    done, _ = jax.jit(make_train_step(forgets))(began, batch)
    assert equal(done.ema, done.params)
    done, _ = jax.jit(make_train_step(keeps))(began, batch)
    half = jax.tree.map(lambda old, new: (old + new) / 2, began.params, done.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), done.ema, half)


def test_the_average_moves_in_float32_where_bfloat16_would_stand_still():
    """2000 updates of decay 0.999 from 1 toward 1.5, the warm-up over: 1.5 - 0.5 * 0.999^2000."""

    @functools.partial(jax.jit, static_argnums=0)
    def follow(kind):
        def move(i, ema):
            target = jnp.full((), 1.5, kind)
            return moving_average(ema, target, 0.999, 100_000 + i).astype(kind)

        return jax.lax.fori_loop(0, 2000, move, jnp.ones((), kind))

    assert follow(jnp.float32).dtype == jnp.float32
    assert float(follow(jnp.float32)) == pytest.approx(1.4324, abs=1e-4)
    assert float(follow(jnp.bfloat16)) == 1


class AveragedTwins(CrossPseudoSupervision):
    """An objective of one's own that keeps an average of both."""

    ema_decay = 0.99


@pytest.mark.parametrize("objective", [Supervised(ema_decay=0.99), AveragedTwins()])
def test_no_two_leaves_of_the_initial_state_share_a_buffer(objective, key):
    """Not compiled: a compiled function gives every output a buffer of its own."""
    parts, batch = make_parts(objective), make_batch()
    state = init_state(parts, batch.image, key)
    assert state.ema is not None
    plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(plain)]
    assert len(set(pointers)) == len(pointers)
    if not objective.twins:
        jax.jit(make_train_step(parts), donate_argnums=0)(state, batch)


EVERY_TERM = SliceTerms(True, neg_sup=1.0, mil=0.1, size=0.01)


@pytest.mark.parametrize(
    ("objective", "terms", "groups"),
    [
        (Supervised(), None, 1),
        (CrossPseudoSupervision(), None, 1),
        (CrossPseudoSupervisionCutMix(), None, 1),
        (EntropyMinimization(), None, 1),
        (MeanTeacher(noise=0.1), None, 1),
        (InterpolationConsistency(), None, 1),
        # How many voxels count must be known everywhere before the gradient.
        (WeakToStrong(), None, 2),
        (CrossPseudoSupervision(), EVERY_TERM, 2),
    ],
    ids=["supervised", "cps", "cps_cutmix", "entropy", "mean_teacher", "ict", "w2s", "slices"],
)
def test_data_parallel_steps_only_reduce(objective, terms, groups, key, full_compilation):
    """One all-reduce, of gradients and metrics together; two patches a device, so pairs stay."""
    whole = objective if terms is None else WithSliceLoss(objective, terms)
    parts = make_parts(whole, quiet=True)
    batch = make_batch(labeled=16, unlabeled=16 if objective.uses_unlabeled else 0)
    if terms is not None:
        batch = dataclasses.replace(batch, slice_labels=jnp.zeros((16, 4, 2), jnp.int8))
    mesh = meshes.make_mesh()
    state = jax.eval_shape(lambda: init_state(parts, batch.image, key))
    compiled = (
        jax.jit(
            make_train_step(parts),
            in_shardings=(meshes.replicated(mesh), meshes.batch_shardings(mesh, batch)),
            out_shardings=(meshes.replicated(mesh), meshes.replicated(mesh)),
        )
        .lower(state, batch)
        .compile()
    )
    text = compiled.as_text()
    assert "num_partitions=8" in text
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert other not in text
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == groups


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda loss: loss, "loss must return a pair, one number and a dictionary of numbers"),
        (lambda loss: (jnp.stack([loss, loss]), {}), r"got \[\(2,\)\]"),
        (lambda loss: (loss, {"map": jnp.zeros((4, 4))}), r"got \['map \(4, 4\)'\]"),
    ],
)
def test_an_objective_of_ones_own_whose_loss_is_no_number_is_refused(returned, said, key):
    class Odd(Supervised):
        def loss(self, learner, batch, key):
            return returned(super().loss(learner, batch, key)[0])

    parts, batch = make_parts(Odd()), make_batch()
    state = jax.eval_shape(lambda: init_state(parts, batch.image, key))
    with pytest.raises(UserError, match=said):
        jax.eval_shape(make_train_step(parts), state, batch)
