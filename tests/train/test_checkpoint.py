"""Checkpoints come back bit for bit, on any devices, or say what is wrong."""

import json

import jax
import numpy as np
import pytest
from toy import make_batch, make_parts

from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints, load_networks, load_statistics, save_networks
from bhsd_jax.train.step import init_state

EXTRA = {"config": {"seed": 1, "patch": (1, 2)}, "plan": {"dataset": "toy"}}


def make_state(objective=None, seed=0):
    parts = make_parts(objective or Supervised(ema_decay=0.9))
    return jax.jit(lambda: init_state(parts, make_batch().image, jax.random.key(seed)))()


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def bits(tree):
    plain = jax.tree.map(
        lambda x: (
            jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


def test_a_state_and_its_position_come_back_bit_for_bit(tmp_path):
    state = make_state(CrossPseudoSupervision())
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    checkpoints.save(5, state, {"batches": 5}, 0.5)
    checkpoints.wait()
    restored, position = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert bits(restored) == bits(state)
    assert position == {"batches": 5}


def test_a_state_saved_on_eight_devices_is_read_on_one(tmp_path):
    state = make_state()
    mesh = meshes.make_mesh(4, 2, 1)
    spread = jax.device_put(state, meshes.state_shardings(mesh, state))
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    checkpoints.save(1, spread, {"batches": 1}, 0.5)
    checkpoints.wait()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    restored, _ = checkpoints.restore(abstract(state, one))
    checkpoints.close()
    assert bits(restored) == bits(state)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored.params)} == {one}


def test_best_and_latest_are_kept_also_after_a_restart(tmp_path):
    states = {step: make_state(seed=step) for step in (1, 2, 3, 4)}
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    for step, dice in ((1, 0.2), (2, 0.9), (3, float("nan"))):
        checkpoints.save(step, states[step], {"batches": step}, dice)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    assert checkpoints.latest() == 3
    checkpoints.save(4, states[4], {"batches": 4}, 0.3)
    checkpoints.close()
    for which, step in (("best", 2), ("last", 4), (4, 4)):
        found, params, ema = load_networks(tmp_path / "c", which)
        assert found == step
        assert bits(params) == bits(states[step].params)
        assert bits(ema) == bits(states[step].ema)


def test_a_flipped_bit_is_noticed(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    checkpoints.save(1, state, {"batches": 1}, 0.5)
    checkpoints.wait()
    digest = tmp_path / "c" / "1" / "digest" / "metadata"
    stored = json.loads(digest.read_text())
    name = next(key for key in stored if "kernel" in key and key.startswith("params"))
    stored[name] = "0" * 64
    digest.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="not what was saved"):
        load_networks(tmp_path / "c", "last")
    with pytest.raises(ValueError, match=name):
        checkpoints.restore(abstract(state))
    checkpoints.close()


def test_an_unfinished_step_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    checkpoints.save(1, make_state(), {"batches": 1}, 0.5)
    checkpoints.close()
    (tmp_path / "c" / "9").mkdir()
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    assert checkpoints.latest() == 1
    checkpoints.close()
    assert load_networks(tmp_path / "c", "last")[0] == 1


def test_another_network_is_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", **EXTRA)
    checkpoints.save(1, make_state(), {"batches": 1}, 0.5)
    checkpoints.wait()
    other = make_state(CrossPseudoSupervision())
    with pytest.raises(ValueError, match="does not fit"):
        checkpoints.restore(abstract(other))
    checkpoints.close()


def test_another_objective_is_refused_though_its_state_has_the_same_shape(tmp_path):
    state, plan = make_state(Supervised(ema_decay=0.9)), EXTRA["plan"]

    def opened(objective):
        config = {"objective": {"name": objective}}
        return Checkpoints(tmp_path / "c", config=config, plan=plan)

    first = opened("mean_teacher.MeanTeacher")
    first.save(1, state, {"batches": 1}, 0.5)
    first.close()
    other = opened("ict.InterpolationConsistency")
    with pytest.raises(ValueError, match=r"objective mean_teacher\.MeanTeacher, .* has ict\."):
        other.restore(abstract(state))
    other.close()


def test_nothing_there_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="verb `train` first"):
        load_networks(tmp_path / "none", "best")


def test_imported_weights_are_a_run(tmp_path):
    params = make_state().params
    save_networks(tmp_path / "c", params, **EXTRA)
    step, found, ema = load_networks(tmp_path / "c", "best")
    assert (step, ema) == (0, None)
    assert bits(found) == bits(params)


def test_running_statistics_come_back_with_imported_weights(tmp_path):
    params = {"kernel": np.arange(3, dtype=np.float32)}
    mean = {"norm": {"mean": np.float32([1, 2])}}
    save_networks(tmp_path / "c", params, **EXTRA, statistics={"batch_stats": mean})
    assert bits(load_networks(tmp_path / "c", "best")[1]) == bits(params)
    found = load_statistics(tmp_path / "c", 0)
    assert list(found) == ["batch_stats"]
    assert bits(found["batch_stats"]) == bits(mean)
    save_networks(tmp_path / "plain", params, **EXTRA)
    assert load_statistics(tmp_path / "plain", 0) == {}
