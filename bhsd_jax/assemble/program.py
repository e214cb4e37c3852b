"""The train step as a compiled program: what it costs, and how fast it can be."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.recipe import Recipe
from bhsd_jax.platform import allocator, budget, files
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.log import heartbeat
from bhsd_jax.train.speed import Speed, Timed, peak_flops
from bhsd_jax.train.step import TrainStep, make_train_step
from bhsd_jax.types import Batch, Metrics, TrainState

logger = logging.getLogger(__name__)


def build_step(
    recipe: Recipe, state: TrainState, mesh: Mesh, workdir: Path
) -> tuple[TrainStep, float]:
    """Compiles the train step ahead of time; returns it and its FLOP per device.

    The length of the training goes in as a number: the compiled program, which the compilation
    cache keeps, is the same for every length. What it costs is in the log before step 1, and in
    `cost.json` of the run folder.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    batches = meshes.batch_shardings(mesh, recipe.abstract_batch())
    length = jax.device_put(np.int32(recipe.parts.steps), meshes.replicated(mesh))
    step = jax.jit(
        of_any_length(recipe),
        in_shardings=(shardings, batches, length.sharding),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
        compiler_options=wiring.compiler_options(recipe.parts.model),
    )
    begun = time.monotonic()
    with heartbeat("compiling the train step"):
        compiled = step.lower(state, recipe.abstract_batch(), length).compile()
    seconds = time.monotonic() - begun
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    working, devices = getattr(memory, "temp_size_in_bytes", 0), len(mesh.local_devices)
    kind = mesh.devices.flat[0].device_kind
    _require_memory(memory, mesh)
    if jax.default_backend() == "cpu":
        allocator.settle(working, devices)
    logger.info(
        "compiled in %.0f s on %d %s; %.3g GFLOP a step, %.2f GB of temporaries",
        seconds,
        mesh.size,
        kind,
        cost.get("flops", float("nan")) / 1e9,
        getattr(memory, "temp_size_in_bytes", float("nan")) / 1e9,
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    logger.info("%s parameters to train", f"{parameters:,}")
    if jax.process_index() == 0:
        known = {
            "devices": mesh.size,
            "device": kind,
            "parameters": parameters,
            "flops_per_device": cost.get("flops"),
            "compile_s": seconds,
        }
        files.write_json(workdir / "cost.json", known)  # of one step; read where runs are compared
    return lambda state, batch: compiled(state, batch, length), cost.get("flops", float("nan"))


def of_any_length(recipe: Recipe) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch, steps of the whole training) -> what the train step returns."""

    def train_step(state: TrainState, batch: Batch, steps: Array) -> tuple[TrainState, Metrics]:
        return make_train_step(recipe.parts_over(steps))(state, batch)

    return train_step


def _require_memory(memory: Any, mesh: Mesh) -> None:
    """Refuses a step that no device of this process can hold, before it is tried."""
    # The new state takes the place of the old one, so that outputs need no memory of their own.
    needed = getattr(memory, "argument_size_in_bytes", 0) + getattr(memory, "temp_size_in_bytes", 0)
    if jax.default_backend() == "cpu":
        needed, available = needed * len(mesh.local_devices), None
    else:
        available = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)
    budget.require_memory(
        needed,
        "the train step",
        budget.TRAIN_WITH_LESS,
        available,
    )


def speed(recipe: Recipe, mesh: Mesh, batches: Timed, flops: float) -> Speed:
    """What the log needs to report patches per second and the share of the peak FLOP rate."""
    device = mesh.devices.flat[0]
    peak = peak_flops(device.device_kind)
    patches = recipe.labeled + recipe.unlabeled
    return Speed(batches, patches, flops * mesh.size, peak and peak * mesh.size)
