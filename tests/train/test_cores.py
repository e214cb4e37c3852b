"""Cores of a CPU as devices that share a batch, or the tiles of a prediction."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from bhsd_jax.assemble import devices
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.infer.sliding import bytes_per_tile

TILE, LARGER = (4, 16, 16), (8, 32, 32)  # D H W

_SHARE = """
from bhsd_jax.platform import machine
machine.cores = lambda: {cores}
from bhsd_jax.train import processes
split = processes.share_cores({arguments})
import jax
print(jax.device_count())
print(split, processes.share_cores(5), jax.device_count())
"""


@pytest.mark.parametrize(
    ("cores", "arguments", "environment", "devices"),
    [
        (4, "8, 6", {}, 2),
        (4, "8, 0", {}, 4),
        (4, "7", {}, 1),
        (4, "4", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (4, "4", {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
        (4, "4", {"SLURM_STEP_NODELIST": "node[1-2]"}, 4),  # alone, in a job of two nodes
    ],
)
def test_every_core_is_a_device_where_the_batch_allows(cores, arguments, environment, devices):
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", _SHARE.format(cores=cores, arguments=arguments)],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    split = not {"JAX_NUM_CPU_DEVICES", "XLA_FLAGS"} & environment.keys()
    # Devices in use stay as they are.
    assert done.stdout.split() == [str(devices), str(split), "False", str(devices)]


_TRAINING = """
import sys
from pathlib import Path
from bhsd_jax.platform import machine
machine.cores = lambda: 4
sys.path[:0] = {folders!r}
from test_recipe import PLAN, config_of
from bhsd_jax.configs import cps
from bhsd_jax.assemble import recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.train import processes
config = config_of(cps, labeled=4, unlabeled=4)
config.mesh.twins = {twins}
run = Run.of(config, Path("run"), PLAN)
processes._HEAVY = {heavy}
recipe.share_cores(run)
import jax
state = jax.eval_shape(recipe.make_recipe(run).init, jax.random.key(0))
voxels = 8 * 4 * 16 * 16
share = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / voxels
print(jax.device_count(), share, int(jax.config.read("jax_cpu_enable_async_dispatch")))
"""


def test_cores_that_would_mostly_update_copies_of_the_state_are_one_device():
    tests = Path(__file__).parents[1]
    folders = [str(tests / "verbs"), str(tests)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def train(heavy: float, twins: int = 1) -> tuple[int, float, bool]:
        code = _TRAINING.format(folders=folders, heavy=heavy, twins=twins)
        words = [sys.executable, "-c", code]
        text = subprocess.check_output(words, env=environment | {"JAX_PLATFORMS": "cpu"}, text=True)
        devices, share, ahead = text.split()
        return int(devices), float(share), bool(int(ahead))

    devices, share, ahead = train(heavy=100)
    assert (devices, 0 < share < 100, ahead) == (4, True, True)
    assert train(share * 1.001)[0] == 4
    # Then a step begins only when the working memory of the last one is given back.
    assert train(share * 0.999)[::2] == (1, False)


@pytest.mark.parametrize(
    ("patch", "room", "tiles", "want"),
    [
        (TILE, (9, TILE), None, (8, 8)),
        (TILE, (3, TILE), None, (3, 3)),
        (LARGER, (9, TILE), None, (1, 1)),  # although devices were made for another run
        (LARGER, (3, LARGER), None, (3, 3)),
        (TILE, (3, TILE), 4, (2, 4)),  # as many tiles as are asked for, shared evenly
        (TILE, (0.5, TILE), None, (1, 1)),
    ],
)
def test_no_more_devices_than_have_memory_for_a_tile_predict(patch, room, tiles, want, monkeypatch):
    count, tile = room
    working = []
    monkeypatch.setattr(devices.machine, "memory", lambda: int(2 * count * bytes_per_tile(tile)))
    monkeypatch.setattr(devices.allocator, "mind_memory", working.append)
    config = common.get_config()
    config.infer.tiles = tiles
    config.input.patch = patch
    run = Run.of(config, Path("run"), tiny_run.PLAN)
    window = devices.make_predictor(run, []).window
    used = window.mesh.size if window.mesh else 1
    assert (used, window._batch) == want
    assert working == [used * bytes_per_tile(patch)]
