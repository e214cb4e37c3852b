"""The log of a training says means over the steps since the line before, and waits for nothing."""

import json
from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax import settings
from bhsd_jax.assemble.validation import Validation
from bhsd_jax.input.pipeline import Batches
from bhsd_jax.train.checkpoint import Checkpoints
from bhsd_jax.train.log import Log, Means
from bhsd_jax.train.loop import Every, fit
from bhsd_jax.train.processes import Preemption
from bhsd_jax.types import Batch, TrainState
from bhsd_jax.verbs import train as train_verb

STATE = TrainState(jnp.zeros((), jnp.int32), {}, (), None, jax.random.key(0))
LOSSES = [np.float32(value) for value in (0.7, -0.1, 0.3, 1.9, -0.8, 0.33, 0.21)]


def metrics(step, loss=None):
    loss = LOSSES[step - 1] if loss is None else loss
    values = {"loss": loss, "supervised": 2 * loss, "grad_norm": step, "lr": step, "weight": step}
    return {key: jnp.float32(value) for key, value in values.items()}


def lines(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["step"]: record for record in records}


def train(log, first, last, every):
    """Steps `first` to `last` as the loop makes them."""
    actions = [log.count, Every((every,), last, log.train)]
    for step in range(first, last + 1):
        for action in actions:
            action(step, STATE, metrics(step))


def test_a_line_has_the_mean_since_the_line_before(tmp_path, caplog):
    with caplog.at_level("INFO", "bhsd_jax"):
        train(Log(tmp_path / "log", 7, 0), 1, 7, every=3)
    found = lines(tmp_path / "log")
    assert list(found) == [3, 6, 7], "the last step always has a line"
    for step, part in ((3, LOSSES[:3]), (6, LOSSES[3:6]), (7, LOSSES[6:])):
        assert found[step]["train/loss"] == pytest.approx(np.mean(np.float64(part)), abs=1e-12)
        assert found[step]["train/supervised"] == pytest.approx(2 * found[step]["train/loss"])
        assert f"step {step}/7  loss {np.mean(np.float64(part)):.4f}" in caplog.text
    assert [found[step]["train/grad_norm"] for step in (3, 6, 7)] == [2, 5, 7]


def test_what_follows_a_schedule_is_that_of_the_step(tmp_path):
    train(Log(tmp_path / "log", 6, 0), 1, 6, every=3)
    found = lines(tmp_path / "log")
    assert [(line["train/lr"], line["train/weight"]) for line in found.values()] == [(3, 3), (6, 6)]


def test_a_line_of_one_step_has_its_very_numbers(tmp_path):
    train(Log(tmp_path / "log", 7, 0), 1, 7, every=1)
    assert [line["train/loss"] for line in lines(tmp_path / "log").values()] == [
        float(loss) for loss in LOSSES
    ]


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_resumed_run_writes_the_lines_of_one_that_was_not_stopped(tmp_path, stopped):
    """Saved between two lines, the steps since the last one are in the checkpoint."""
    train(Log(tmp_path / "whole", 7, 0), 1, 7, every=3)
    log = Log(tmp_path / "parts", 7, 0)
    train(log, 1, stopped, every=3) if stopped == 3 else _until(log, stopped)
    kept = json.loads(json.dumps(log.means.state()))
    _until(log, 6, first=stopped + 1)  # goes on, is killed, and these lines are dropped
    train(Log(tmp_path / "parts", 7, stopped, means=kept), stopped + 1, 7, every=3)
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert parts.keys() == whole.keys()
    for step, line in whole.items():
        for key in ("train/loss", "train/supervised", "train/grad_norm", "train/lr"):
            assert parts[step][key] == line[key], "to the last bit"


def _until(log, last, first=1):
    """Steps of a run that means to go on after them."""
    every = Every((3,), 100, log.train)
    for step in range(first, last + 1):
        log.count(step, STATE, metrics(step))
        every(step, STATE, metrics(step))


def test_a_checkpoint_of_before_begins_a_mean_of_its_own(tmp_path):
    train(Log(tmp_path / "log", 6, 4, means=None), 5, 6, every=3)
    assert lines(tmp_path / "log")[6]["train/loss"] == pytest.approx(np.mean(LOSSES[4:6]))


def test_nothing_is_fetched_between_lines(tmp_path, monkeypatch):
    """The loop queues steps on the device; a fetch would wait for each of them."""
    fetched, fetch = [], jax.device_get

    def counting(tree):
        fetched.append(tree)
        return fetch(tree)

    log = Log(tmp_path / "log", 7, 0)
    reported = iter([metrics(step) for step in range(1, 8)])
    monkeypatch.setattr(jax, "device_get", counting)
    seen = []
    fit(
        STATE,
        repeat(Batch(jnp.zeros((1, 1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1), jnp.int8))),
        lambda state, _: (state, next(reported)),
        [
            log.count,
            lambda step, *_: seen.append((step, len(fetched))),
            Every((7,), 7, log.train),
        ],
        7,
    )
    assert seen == [(step, 0) for step in range(1, 8)]
    assert 1 <= len(fetched) <= 2, "one transfer for all steps"


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_stops_and_says_since_when(tmp_path, key):
    log = Log(tmp_path / "log", 7, 0)
    train(log, 1, 3, every=3)
    broken = metrics(4) | {key: jnp.float32(np.nan)}
    log.count(4, STATE, broken)
    with pytest.raises(FloatingPointError, match="at step 4, after step 3 was finite"):
        log.train(4, STATE, broken)
    assert list(lines(tmp_path / "log")) == [3]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saved = []

    class Kept(Checkpoints):
        def save(self, step, *_):
            saved.append(step)

    class Start(Batches):
        def state(self):
            return {}

    log, asked = Log(tmp_path / "log", 900, 0), Preemption()
    asked.asked = True
    every = settings.Train(log_every=100, validate_every=900, save_every=2)
    parts = (object.__new__(of) for of in (Validation, Kept, Start))
    *_, save, stop = train_verb._actions(every, log, *parts, asked)
    save(2, STATE, metrics(2))
    broken = metrics(4) | {"grad_norm": jnp.float32(np.inf)}
    for action in (save, stop):
        with pytest.raises(FloatingPointError, match="at step 4"):
            action(4, STATE, broken)
    assert saved == [2]


@pytest.mark.parametrize(
    ("steps", "every", "step", "ahead"),
    [(10, 4, 3, 3), (10, 4, 4, 3), (10, 4, 5, 2), (10, 4, 10, 1), (8, 4, 5, 1), (8, 4, 8, 1)],
)
def test_the_time_left_has_the_validations_to_come(tmp_path, steps, every, step, ahead):
    """A line comes before the validation of its step, and the last step always has one."""
    log = Log(tmp_path / "log", steps, 0, validate_every=every)
    least = (steps - step) * 2.0
    plural = "s" * (ahead > 1)
    assert log._left(step, 2.0) == f"0:{least:02.0f} and {ahead} validation{plural}", "none timed"
    log.validated(60.0)
    assert log._left(step, 2.0) == f"{ahead}:{least:02.0f}"
    assert Log(tmp_path / "other", steps, 0)._left(step, 2.0) == f"0:{least:02.0f}"


def test_a_resumed_run_knows_how_long_its_validations_take(tmp_path):
    log = Log(tmp_path / "log", 12, 0, validate_every=4)
    for step, seconds in ((4, 30.0), (8, 90.0)):
        log.write(step, {"val/dice/mean": 0.5, "time/validation_s": seconds})
    assert Log(tmp_path / "log", 12, 6, validate_every=4)._left(7, 1.0) == "1:05"


def test_a_checkpoint_made_on_the_way_does_not_change_the_means():
    plain, saved = Means(), Means()
    for step in range(1, 8):
        for means in (plain, saved):
            means.add(metrics(step))
        saved.state()
    assert saved.take() == plain.take()
    assert plain.take() == {}
