"""Learning rates and updates against nnU-Net's numbers and PyTorch's rule written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.optimizer import clip_each, make_optimizer, make_schedule, of_spec


def test_the_poly_schedule_gives_nnunets_rates():
    rate = make_schedule("poly", lr=0.01, steps=250_000, hold=250)
    epochs = {
        0: 0.01,
        1: 0.0099910,
        50: 0.00954885,
        500: 0.00535887,
        990: 1.58489e-4,
        999: 1.99526e-5,
    }
    for epoch, want in epochs.items():
        for step in (250 * epoch, 250 * epoch + 249):
            assert float(rate(step)) == pytest.approx(want, rel=2e-5)


def test_warm_up_rises_to_the_rate_and_cosine_ends_at_zero():
    rate = make_schedule("cosine", lr=1.0, steps=110, warmup=10)
    rising = [float(rate(i)) for i in range(11)]
    np.testing.assert_allclose(rising, [*(np.arange(1, 11) / 11), 1.0], rtol=1e-6)
    assert float(rate(60)) == pytest.approx(0.5)
    assert float(rate(110)) == pytest.approx(0, abs=1e-7)


def test_warmup_cosine_gives_monais_rates():
    """The rule of its scheduler written out; one step is an epoch."""
    epochs, warmup = 5000, 50
    rate = make_schedule("warmup_cosine", lr=1e-4, steps=epochs, warmup=0.01)
    for epoch in (0, 1, 25, 48, 49, 50, 51, 1000, 2525, 4999):
        cosine = 0.5 * (1 + np.cos(np.pi * (epoch - warmup) / (epochs - warmup)))
        want = 1e-4 * (epoch / (warmup - 1) if epoch < warmup else cosine)
        assert float(rate(epoch)) == pytest.approx(
            want, rel=1e-4, abs=1e-11
        )  # float32 near 1 + cos
    held = make_schedule("warmup_cosine", lr=1.0, steps=300, warmup=90, hold=30)
    assert [float(held(i)) for i in (0, 29, 30, 60, 90)] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "poly", "hold": 25},
        {"schedule": "poly_left", "lag": 1},
        {"schedule": "cosine", "warmup": 0.13},
        {"schedule": "warmup_cosine", "warmup": 40, "hold": 10},
        {"schedule": "constant"},
    ],
)
def test_a_length_known_only_at_run_time_gives_the_rates_of_one_known_before(fields):
    @jax.jit
    def rates(steps, at):
        return make_schedule(lr=0.01, steps=steps, **fields)(at)

    for steps in (150, 1000):
        at = jnp.arange(steps + 5)
        want = jax.jit(make_schedule(lr=0.01, steps=steps, **fields))(at)
        np.testing.assert_allclose(rates(steps, at), want, rtol=1e-6, atol=1e-9)


def test_adamw_is_pytorchs():
    rng = np.random.default_rng(0)
    want, grads = rng.normal(size=5), rng.normal(size=(6, 5))
    tx = make_optimizer("adamw", lambda step: 0.1, momentum=0.9, weight_decay=0.3, clip=None)
    params = jnp.asarray(want, jnp.float32)
    state, first, second = tx.init(params), np.zeros(5), np.zeros(5)
    for i, grad in enumerate(grads, start=1):
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state, params)
        params = params + updates
        want = want - 0.1 * 0.3 * want  # decoupled, before the step
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        want = want - 0.1 * (first / (1 - 0.9**i)) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
    np.testing.assert_allclose(params, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_pytorchs(nesterov):
    rng = np.random.default_rng(0)
    start = rng.normal(size=5).astype(np.float32)
    grads = rng.normal(size=(6, 5)).astype(np.float32)
    tx = make_optimizer("sgd", lambda step: 0.1, nesterov=nesterov, weight_decay=0.03, clip=None)
    params, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    want, velocity = start.astype(np.float64), np.zeros(5)
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad), state, params)
        params = params + updates
        pull = grad + 0.03 * want
        velocity = 0.99 * velocity + pull
        want = want - 0.1 * (pull + 0.99 * velocity if nesterov else velocity)
    np.testing.assert_allclose(params, want, rtol=1e-4)


def test_each_twin_is_clipped_by_its_own_norm():
    grads = {"a": jnp.array([30.0, 40.0]), "b": jnp.array([0.3, 0.4])}
    together, _ = clip_each(1.0).update(grads, None)
    apart, _ = clip_each(1.0, parts=True).update(grads, None)
    assert float(jnp.linalg.norm(together["b"])) < 0.011
    np.testing.assert_allclose(apart["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(apart["b"], grads["b"])


def test_a_zero_gradient_stays_zero():
    clipped, _ = clip_each(1.0).update(jnp.zeros(3), None)
    np.testing.assert_array_equal(clipped, 0)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="sgd, adam, adamw, muon; got 'lion'"):
        make_optimizer("lion", lambda step: 0.1)
    with pytest.raises(ValueError, match="poly, cosine, warmup_cosine, constant"):
        make_schedule("step", lr=0.1, steps=5)
    with pytest.raises(ValueError, match="warmup is 9 of 5"):
        make_schedule("poly", lr=0.1, steps=5, warmup=9)


def test_a_rate_that_is_held_for_no_step_is_refused():
    """By 0 it would be divided, which XLA does without a word."""
    with pytest.raises(ValueError, match=r"optimizer\.hold counts steps, 1 or more; got 0"):
        make_schedule("poly", lr=0.1, steps=5, hold=0)
    with pytest.raises(ValueError, match=r"optimizer\.lag counts steps, 0 or more; got -1"):
        make_schedule("poly", lr=0.1, steps=5, lag=-1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "clip",
            0,
            "clip is the largest gradient norm, above 0, or None, which clips nothing; got 0",
        ),
        ("clip", -1.0, r"clip is .*got -1\.0"),
        ("momentum", 1.0, r"momentum is 0 or more and below 1; got 1\.0"),
        ("beta2", -0.9, r"beta2 is 0 or more and below 1; got -0\.9"),
        ("weight_decay", -1e-4, r"weight_decay is 0 or more; got -0\.0001"),
    ],
)
def test_numbers_that_would_undo_the_training_are_refused(name, value, words):
    """A clip of 0, "off" elsewhere, trained nothing without a word; -1 turned all gradients."""
    with pytest.raises(ValueError, match=f"optimizer.{words}"):
        make_optimizer("adamw", lambda step: 0.1, **{name: value})


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.lr is 0 or more; got -0\.1"):
        make_schedule("poly", lr=-0.1, steps=5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"schedule": None}, r"config.optimizer: no schedule; whoever replaces the whole group"),
        (
            {"betas": (0.9, 0.99)},
            r"unknown betas; it takes name, schedule, momentum, nesterov, bet",
        ),
        ({"lr": -0.01}, r"optimizer\.lr is 0 or more; got -0\.01"),
        ({"lr": "0.01"}, r"optimizer\.lr is a number; got '0\.01'"),
    ],
)
def test_what_a_config_says_wrong_of_the_optimizer_is_told(fields, said):
    spec = {"name": "sgd", "lr": 0.01, "schedule": "poly", "clip": 12.0}
    of_spec(spec, 10)
    with pytest.raises(UserError, match=said):
        of_spec(spec | fields, 10)
