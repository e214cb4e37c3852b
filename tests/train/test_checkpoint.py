"""Checkpoints come back bit for bit, on any devices, or say what is wrong."""

import errno
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import make_batch, make_parts

from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.train import checkpoint_files
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints, load_networks, load_statistics, save_networks
from bhsd_jax.train.step import init_state

EXTRA = {"config": {"seed": 1, "patch": (1, 2)}, "plan": {"dataset": "toy"}}


@functools.cache
def program(objective):
    parts = make_parts(objective)
    return jax.jit(lambda key: init_state(parts, make_batch().image, key))


def make_state(objective=Supervised(ema_decay=0.9), seed=0):  # noqa: B008  (frozen)
    return program(objective)(jax.random.key(seed))


def opened(folder, **more):
    return Checkpoints(folder, **EXTRA | more)


def save(checkpoints, *steps, dice=0.5):
    for step in steps:
        checkpoints.save(step, make_state(seed=step), {"batches": step}, dice)
    checkpoints.wait()


@pytest.fixture
def three(tmp_path):
    """A folder with steps 1, 2 and 3."""
    checkpoints = opened(tmp_path / "c")
    save(checkpoints, 1, 2, 3)
    checkpoints.close()
    return tmp_path / "c"


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
    checkpoints = opened(tmp_path / "c")
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
    checkpoints = opened(tmp_path / "c")
    checkpoints.save(1, spread, {"batches": 1}, 0.5)
    checkpoints.wait()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    restored, _ = checkpoints.restore(abstract(state, one))
    checkpoints.close()
    assert bits(restored) == bits(state)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored.params)} == {one}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_three_and_the_best_are_kept_also_after_a_restart(tmp_path):
    folder = tmp_path / "c"
    checkpoints = opened(folder)
    for step, dice in ((1, 0.2), (2, 0.9), (3, float("nan"))):
        save(checkpoints, step, dice=dice)
    checkpoints.close()
    checkpoints = opened(folder)
    assert checkpoints.latest() == 3
    for step, dice in ((4, 0.3), (5, 0.4), (6, float("nan")), (7, 0.8)):
        save(checkpoints, step, dice=dice)
    checkpoints.close()
    assert names(folder) == ["2", "5", "6", "7"]
    for which, step in (("best", 2), ("last", 7), (6, 6)):
        found, params, ema = load_networks(folder, which)
        assert found == step
        assert bits(params) == bits(make_state(seed=step).params)
        assert bits(ema) == bits(make_state(seed=step).ema)


def test_a_step_validated_after_it_was_saved_can_be_the_best(tmp_path):
    folder = tmp_path / "c"
    checkpoints = opened(folder)
    save(checkpoints, 1, dice=0.5)
    save(checkpoints, 2, dice=float("nan"))
    assert checkpoints.dice() is None
    checkpoints.close()
    assert load_networks(folder, "best")[0] == 1
    again = opened(folder)
    again.rate(0.75)
    assert again.dice() == 0.75
    again.close()
    assert load_networks(folder, "best")[0] == 2
    assert opened(folder).latest() == 2, "its list is still whole"


def test_the_list_is_what_sha256sum_reads(three):
    for step in "123":
        command = ["sha256sum", "--check", "--strict", "--quiet", checkpoint_files.SUMS]
        subprocess.run(command, cwd=three / step, check=True)
    listed = (three / "3" / checkpoint_files.SUMS).read_text()
    for part in ("input.json", "config.json", "state/_METADATA", "state/manifest.ocdbt"):
        assert f"  {part}\n" in listed


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, lambda file: file.unlink()])
def test_whatever_is_wrong_with_any_file_of_the_newest_the_one_before_is_used(three, harm, caplog):
    every = sorted(path for path in (three / "3").rglob("*") if path.is_file())
    assert len(every) > 12
    for file in every:
        good, mode = file.read_bytes(), file.stat().st_mode
        harm(file)
        checkpoints = opened(three)
        caplog.clear()
        assert checkpoints.latest() == 2, file
        assert checkpoints.restore(abstract(make_state()))[1] == {"batches": 2}
        assert load_networks(three, "last")[0] == load_networks(three, "best")[0] == 2
        checkpoints.close()
        name = file.relative_to(three / "3").as_posix()
        said = re.compile(rf"{three}/3: {re.escape(name)} .*step 2 is used instead")
        assert all(said.search(message) for message in caplog.messages)
        assert len(caplog.messages) == 3
        with pytest.raises(ValueError, match=re.escape(name)):
            load_networks(three, 3)
        file.write_bytes(good)
        file.chmod(mode)
    assert opened(three).latest() == 3


def test_damaged_steps_are_set_aside_when_training_goes_on(three):
    flip(three / "2" / "input.json")
    flip(three / "3" / "input.json")
    harmed = (three / "3" / "input.json").read_bytes()
    (three / "3.damaged").mkdir()
    checkpoints = opened(three)
    assert checkpoints.latest() == 1
    assert names(three) == ["1", "2", "3", "3.damaged"], "nothing has changed yet"
    save(checkpoints, 2, 3, 4)
    checkpoints.close()
    assert names(three) == ["2", "2.damaged", "3", "3.damaged", "3.damaged-2", "4"]
    assert (three / "3.damaged-2" / "input.json").read_bytes() == harmed
    assert load_networks(three, "last")[0] == 4


def test_what_a_person_puts_beside_the_checkpoints_stays(three):
    (three / "3-backup").mkdir()
    for name in ("old", "03", "3.orbax-checkpoint-tmp", "99"):
        (three / name).mkdir()
        (three / name / "mine").write_text("mine")
    (three / "40").write_text("a file")
    subprocess.run(["cp", "-r", three / "3", three / "50"], check=True)
    checkpoints = opened(three)
    assert checkpoints.latest() == 3
    save(checkpoints, 4, 5, 6, 7)
    checkpoints.close()
    beside = {"3-backup", "old", "03", "3.orbax-checkpoint-tmp", "99.damaged", "40", "50.damaged"}
    assert set(names(three)) == beside | {"5", "6", "7"}
    assert (three / "99.damaged" / "mine").read_text() == "mine"


def test_an_unfinished_step_is_no_checkpoint_and_goes_at_the_next_save(three):
    cut_off = three / "4.unfinished"
    (three / "3").rename(cut_off)
    checkpoints = opened(three)
    assert checkpoints.latest() == 2
    assert load_networks(three, "last")[0] == 2
    assert cut_off.is_dir()
    save(checkpoints, 4)
    checkpoints.close()
    assert names(three) == ["1", "2", "4"]


def test_what_cannot_be_deleted_is_a_warning_and_ends_no_training(three, monkeypatch, caplog):
    """Another user's folder in one that both may write to, or on NFS a file that someone reads."""
    refused = ["1.unfinished", "5.unfinished", "5.unfinished-2"]
    delete = shutil.rmtree

    def rmtree(path):
        if path.name in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / "state"))
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (three / "5.unfinished").mkdir()
    checkpoints = opened(three)
    save(checkpoints, 4, 5, 6)
    assert names(three) == ["1.unfinished", "4", "5", "5.unfinished-2", "6"]
    assert caplog.text.count(f"{three / '1'}: could not be deleted ([Errno 13]") == 1
    assert f"{three / '5.unfinished'} is in the way of a checkpoint" in caplog.text
    refused.clear()
    save(checkpoints, 7)
    checkpoints.close()
    assert names(three) == ["5", "6", "7"]
    assert opened(three).latest() == 7


def test_an_old_step_that_cannot_be_renamed_keeps_none_of_the_others(three, monkeypatch, caplog):
    rename = Path.rename

    def refuse(self, target):
        if self.name == "1":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    checkpoints = opened(three)
    save(checkpoints, 4, 5, 6)
    checkpoints.close()
    assert names(three) == ["1", "4", "5", "6"]
    assert caplog.text.count(f"{three / '1'}: could not be deleted ([Errno 1]") == 3


def test_a_run_that_has_saved_never_starts_at_0(three):
    for step in "123":
        flip(three / step / "config.json")
    says = r"step 3: config.json differs.*step 1: config.*step 4: its folder is gone.*--workdir"
    with pytest.raises(ValueError, match=says):
        opened(three, recorded=(2, 3, 4)).latest()
    with pytest.raises(ValueError, match="its folder is gone"):
        opened(three.parent / "none", recorded=(2, 3)).latest()
    assert names(three) == ["1", "2", "3"]


def test_a_run_that_has_not_saved_yet_starts_at_0(tmp_path, caplog):
    assert opened(tmp_path / "none").latest() is None
    (tmp_path / "c" / "9").mkdir(parents=True)
    assert opened(tmp_path / "c").latest() is None
    assert "c/9: SHA256SUMS is missing" in caplog.text


def test_checkpoints_of_older_versions_are_refused_in_one_sentence(three):
    for step in "123":
        (three / step / checkpoint_files.SUMS).unlink()
        (three / step / "digest").mkdir()
    for use in (opened(three).latest, lambda: load_networks(three, "best")):
        with pytest.raises(ValueError, match="saved by an older version of this program"):
            use()


def test_the_best_that_is_whole_stands_in_for_the_best(tmp_path, caplog):
    checkpoints = opened(tmp_path / "c")
    for step, dice in ((1, 0.7), (2, 0.9), (3, 0.8)):
        save(checkpoints, step, dice=dice)
    checkpoints.close()
    flip(next((tmp_path / "c" / "2" / "state" / "d").iterdir()))
    assert load_networks(tmp_path / "c", "best")[0] == 3
    assert re.search(r"c/2: state/d/\w+ differs .*step 3 is used instead", caplog.text)


def test_another_network_is_refused_in_one_line(tmp_path):
    checkpoints = opened(tmp_path / "c")
    checkpoints.save(1, make_state(), {"batches": 1}, 0.5)
    checkpoints.wait()
    other = make_state(CrossPseudoSupervision())
    with pytest.raises(
        ValueError, match=r"does not fit.*params/a/Conv_0/bias is not there"
    ) as caught:
        checkpoints.restore(abstract(other))
    assert "\n" not in str(caught.value)
    checkpoints.close()


def test_another_objective_is_refused_though_its_state_has_the_same_shape(tmp_path):
    state, plan = make_state(Supervised(ema_decay=0.9)), EXTRA["plan"]

    def of(objective):
        config = {"objective": {"name": objective}}
        return Checkpoints(tmp_path / "c", config=config, plan=plan)

    first = of("mean_teacher.MeanTeacher")
    first.save(1, state, {"batches": 1}, 0.5)
    first.close()
    other = of("ict.InterpolationConsistency")
    with pytest.raises(ValueError, match=r"objective mean_teacher\.MeanTeacher, .* has ict\."):
        other.restore(abstract(state))
    other.close()


def test_nothing_there_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="verb `train` first"):
        load_networks(tmp_path / "none", "best")


@pytest.mark.parametrize("which", ["final", "4.0", "checkpoint_best", 7])
def test_a_checkpoint_that_there_is_not_is_told_with_those_there_are(three, which):
    with pytest.raises(
        FileNotFoundError, match=rf"no checkpoint '?{which}'?; choose best, last, o"
    ):
        load_networks(three, which)


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
