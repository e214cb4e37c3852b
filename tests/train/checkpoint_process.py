"""A process that saves and is killed, or that saves together with others; not a test itself."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints
from bhsd_jax.types import TrainState

EXTRA = {"config": {"seed": 1}, "plan": {"dataset": "made up"}}


def make_state(count=64):
    """That many numbers that do not compress."""
    kernel = np.random.default_rng(count).random((count // 8, 8), np.float32)
    moments = ({"kernel": -kernel}, jnp.int32(3))
    return TrainState(jnp.int32(3), {"kernel": kernel}, moments, None, jax.random.key(count))


def large(folder):
    """Saves step 1, then a second one of 128 MB, which takes long enough to be killed in."""
    checkpoints = Checkpoints(folder, **EXTRA)
    checkpoints.save(1, make_state(), {"batches": 1}, 0.5)
    checkpoints.wait()
    checkpoints.save(2, make_state(2**24), {"batches": 2}, 0.5)
    checkpoints.wait()
    raise AssertionError("was to be killed")


def shared(folder, index, count, port):
    """Saves in several processes, then finds damage; prints what each of them decides."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    plain = make_state()
    mesh = meshes.make_mesh(1, 4)
    spread = meshes.state_shardings(mesh, plain)
    drawn = jax.jit(make_state, out_shardings=meshes.replicated(mesh))()
    state = jax.jit(lambda state: state, out_shardings=spread)(drawn)
    assert not state.params["kernel"].is_fully_addressable
    assert not state.params["kernel"].is_fully_replicated
    checkpoints = Checkpoints(folder, **EXTRA)
    for step in (1, 2):
        checkpoints.save(step, state, {"batches": step}, 0.5)
    checkpoints.close()
    if index == "0":
        (folder / "2" / "input.json").write_text("{}")
    again = Checkpoints(folder, **EXTRA, recorded=[1, 2])
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, spread
    )
    restored, position = again.restore(abstract)
    for shard in restored.params["kernel"].addressable_shards:
        assert (np.asarray(shard.data) == plain.params["kernel"][shard.index]).all()
    sys.stdout.write(f"restored {position['batches']}\n")
    again.save(2, restored, {"batches": 2}, 0.5)
    again.close()
    if index == "0":
        for step in "12":
            (folder / step).rename(folder / f"{step}-backup")
    try:
        Checkpoints(folder, **EXTRA, recorded=[1, 2]).latest()
    except ValueError as error:
        sys.stdout.write(f"refused {error}\n")


if __name__ == "__main__":
    name, folder, *rest = sys.argv[1:]
    {"large": large, "shared": shared}[name](Path(folder), *rest)
