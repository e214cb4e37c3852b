"""What validation in the loop tells the checkpoints, and who else may be in a run's folder."""

import errno
import fcntl
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from bhsd_jax import settings
from bhsd_jax.assemble.run import Run
from bhsd_jax.assemble.validation import Validation
from bhsd_jax.configs import common
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.labels import Labels
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import checkpoint_files as disk
from bhsd_jax.train.checkpoint import Checkpoints
from bhsd_jax.train.loop import Interrupted
from bhsd_jax.types import TrainState
from bhsd_jax.verbs import train


def test_only_a_step_that_was_validated_itself_is_saved_with_a_dice():
    validation = object.__new__(Validation)  # the rest of it is a whole run
    assert math.isnan(validation.dice_at(0))
    validation.newest = (40, 0.75)
    assert validation.dice_at(40) == 0.75
    assert math.isnan(validation.dice_at(50))


@pytest.mark.parametrize("ignore", [None, 3])
def test_a_stray_voxel_of_a_class_in_no_mask_does_not_rank_checkpoints(ignore):
    """Its Dice is 0 with such a voxel and not defined without, whatever else was learned."""
    masks = {"x": np.array([[[0, 1, 1, 0]]], np.uint8), "y": np.array([[[1, 1, 0, 0]]], np.uint8)}
    answers = {"worse": [[[0, 1, 0, 0]]], "better": [[[0, 1, 1, 2]]]}

    class Answering:
        def labels(self, networks, image, **how):
            return np.array(answers[networks[0]], np.uint8)

        def logits(self, networks, image, **how):
            return np.moveaxis(np.eye(3)[answers[networks[0]]], -1, 0)

    def scan(case):
        return SimpleNamespace(channels_last=np.zeros((1, 1, 4, 1)), label=masks[case])

    written = {}
    log = SimpleNamespace(
        validated=lambda seconds: None, write=lambda step, found: written.update(found)
    )
    validation = object.__new__(Validation)  # the rest of it is a whole run
    vars(validation).update(
        window=Answering(),
        deployable=lambda params, ema: params,
        twins=(),
        normalize=lambda image: image,
        fill=(0.0,),
        shards=SimpleNamespace(load=scan),
        cases=("x", "y"),
        labels=Labels(("background", "IPH", "EDH"), ignore=ignore),
        binary=False,
        log=log,
        asked=lambda: False,
        newest=(0, math.nan),
    )
    dice = {}
    for name in answers:
        state = TrainState(jnp.zeros((), jnp.int32), {name: name}, (), None, jax.random.key(0))
        validation(1, state, {})
        dice[name] = validation.dice_at(1)
        assert written["val/dice/mean"] == written["val/dice/IPH"] == dice[name]
    assert dice == pytest.approx({"worse": 2 / 3, "better": 3 / 4})
    assert written["val/dice/EDH"] == 0


def test_a_stop_is_heeded_while_a_scan_is_in_the_networks(caplog):
    """Of a large scan on few cores it took minutes, and a machine that is taken away gives one."""
    asked_for, tiles = [], []

    def forward(params, image):
        return (jnp.concatenate([image, -image], axis=-1),)

    def asked():
        asked_for.append(True)
        return len(asked_for) > 3  # once before the scan, then after every tile

    class Counting(SlidingWindow):
        def _answers(self, *of):
            for one in super()._answers(*of):
                tiles.append(one)
                yield one

    validation = object.__new__(Validation)  # the rest of it is a whole run
    vars(validation).update(
        window=Counting(forward, (2, 2, 2), mirror=False, tiles_per_call=1),
        deployable=lambda params, ema: {"student": params},
        twins=(),
        normalize=lambda image: image,
        fill=(0.0,),
        shards=SimpleNamespace(
            load=lambda case: SimpleNamespace(
                channels_last=np.ones((2, 2, 40, 1), np.float32), label=np.ones((2, 2, 40), int)
            )
        ),
        cases=("x",),
        labels=Labels(("background", "IPH")),
        binary=False,
        log=None,  # nothing may be written
        asked=asked,
        newest=(0, math.nan),
    )
    state = TrainState(jnp.zeros((), jnp.int32), {}, (), None, jax.random.key(0))
    validation(1, state, {})
    assert len(tiles) == 3 < validation.window.count((2, 2, 40))
    assert "validation of step 1 is left undone: asked to stop" in caplog.text
    assert math.isnan(validation.dice_at(1))


@pytest.mark.parametrize("asked", [False, True])
def test_a_last_step_that_is_validated_after_a_stop_may_be_stopped_again(asked):
    rated = []

    class Unrated(Checkpoints):
        def dice(self):
            return None

        def rate(self, dice):
            rated.append(dice)

    class Late(Validation):
        def __call__(self, step, *_):
            self.newest = (-1, math.nan) if asked else (step, 0.5)

    late, checkpoints = object.__new__(Late), object.__new__(Unrated)
    late.cases, late.asked = ("a",), lambda: asked
    state = TrainState(jnp.zeros((), jnp.int32), {}, (), None, jax.random.key(0))
    every = settings.Train(steps=40, validate_every=20, save_every=20, log_every=20)
    if asked:
        with pytest.raises(Interrupted, match="step 40 is saved"):
            train._catch_up(every, 40, state, late, checkpoints)
    else:
        train._catch_up(every, 40, state, late, checkpoints)
        assert rated == [0.5]


def test_a_training_that_is_longer_already_than_asked_for_is_left_as_it_is(tmp_path):
    """It was said to have been trained for fewer steps, and config.json said so too."""
    folder = tmp_path / "checkpoints"
    disk.make_room(folder, 5)
    disk.finish(folder, 5, None, {"config": {}, "plan": {}})
    config = common.get_config("smoke")
    config.train.steps = 3
    with pytest.raises(UserError, match=r"5 steps are trained and saved, .*steps is 3; set 5 or"):
        train._open_run(Run.of(config, tmp_path, tiny_run.PLAN))


def test_a_run_keeps_nothing_of_who_was_which_process(tmp_path, monkeypatch):
    joined, kept = [], []

    def stop(config, *_):
        kept.append(config.mesh)
        raise UserError("enough")

    monkeypatch.setattr(train.parts, "join", lambda config, **_: joined.append(config.mesh))
    monkeypatch.setattr(train.Plan, "load", lambda folder: tiny_run.PLAN)
    monkeypatch.setattr(train.Run, "of", stop)
    config = common.get_config("smoke")
    config.mesh.update(space=2, coordinator="a:1", num_processes=2, process_id=1, detect="mpi4py")
    with pytest.raises(UserError, match="enough"):
        train.run(config, tmp_path)
    assert joined == [settings.Mesh(-1, 1, 2, 1, "a:1", 2, 1, "mpi4py")]
    assert kept == [settings.Mesh(space=2)]


def test_a_folder_that_has_a_trainer_is_refused_and_one_that_knows_no_locks_is_not(
    tmp_path, monkeypatch, caplog
):
    with (
        train._alone(tmp_path),
        pytest.raises(ValueError, match=r"another process trains.*remove \.lock"),
        train._alone(tmp_path),
    ):
        pass

    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with train._alone(tmp_path):
        pass
    assert "this file system has no locks (Function not implemented)" in caplog.text
