"""A training that begins with the network another run deploys."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.assemble.beginning import begin_with
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Train
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.types import TrainState


def network(value):
    return {
        "encoder_0": {"kernel": np.full((2, 3), value, np.float32)},
        "head_0": {"kernel": np.full((3, 2), value, np.float32)},
    }


def drawn(params, ema):
    return TrainState(jnp.zeros((), jnp.int32), params, (), ema, jax.random.key(0))


@pytest.fixture
def trained(tmp_path):
    """A run of CPS, of which network a is deployed."""
    config = {"objective": {"name": "cps.CrossPseudoSupervision"}}
    params = {"a": network(1.0), "b": network(2.0)}
    save_networks(tmp_path / "checkpoints", params, config=config, plan={})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_network_and_average_begin_with_what_the_run_deploys(trained, caplog):
    caplog.set_level("INFO")
    state = begin_with(Train(weights=str(trained)), drawn(network(0.0), network(0.0)))
    for params in (state.params, state.ema):
        assert params["encoder_0"]["kernel"].min() == 1
        assert params["head_0"]["kernel"].max() == 0
    assert "1 of 2 parameter arrays are taken; drawn: head_0/kernel" in caplog.text
    whole = dataclasses.replace(Train(), weights=str(trained), weights_leave=())
    state = begin_with(whole, drawn(network(0.0), None))
    assert state.params["head_0"]["kernel"].min() == 1
    assert state.ema is None


def test_twins_begin_with_one_network_and_heads_of_their_own(trained):
    state = begin_with(
        Train(weights=str(trained)),
        drawn({"a": network(5.0), "b": network(6.0)}, None),
        ("a", "b"),
    )
    assert [state.params[t]["encoder_0"]["kernel"][0, 0] for t in "ab"] == [1, 1]
    assert [state.params[t]["head_0"]["kernel"][0, 0] for t in "ab"] == [5, 6]


def test_nothing_asked_changes_nothing_and_no_run_is_refused(tmp_path):
    state = drawn(network(0.0), None)
    assert begin_with(Train(), state) is state
    with pytest.raises(UserError, match=r"config\.json is not there; name the folder of a trained"):
        begin_with(Train(weights=str(tmp_path)), state)
