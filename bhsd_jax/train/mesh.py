"""Processes, devices, and how arrays lie on them."""

import contextlib
import logging
import os
import signal
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bhsd_jax import machine
from bhsd_jax.types import Batch, Params

logger = logging.getLogger(__name__)

AXES = ("data", "model", "space")
_FORCED = "xla_force_host_platform_device_count"
_CLUSTER = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES")


def start() -> None:
    """Joins the other processes of this run, where the environment says there are any.

    On Slurm one process per node owns all GPUs of it: JAX alone would assume one process per GPU.
    """
    if not any(os.environ.get(name) for name in _CLUSTER) or jax.distributed.is_initialized():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = list(range(len(visible.split(",")))) if visible else None
    jax.distributed.initialize(local_device_ids=ids)
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def share_cores(*batches: int, most: int | None = None) -> None:
    """On CPUs, splits the cores into as many devices as share batches of these sizes evenly.

    A device runs one operation at a time, and few operations keep all cores busy; devices with
    samples of their own do. Nothing happens where devices are in use already, where
    `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS` say how many there are, or in a run of several processes.

    Args:
        batches: Samples of a step; 0 is no batch.
        most: Devices at most, for there is only so much memory.
    """
    told = jax.config.jax_num_cpu_devices >= 0  # pyright: ignore[reportAttributeAccessIssue]
    told |= _FORCED in os.environ.get("XLA_FLAGS", "")
    if told or any(os.environ.get(name) for name in _CLUSTER):
        return
    limit = min(machine.cores(), most or machine.cores())
    share = max(n for n in range(1, limit + 1) if all(count % n == 0 for count in batches))
    with contextlib.suppress(RuntimeError):  # devices are in use already
        jax.config.update("jax_num_cpu_devices", share)


def make_mesh(data: int = -1, model: int = 1, space: int = 1) -> Mesh:
    """Arranges the devices; `data` -1 takes all that `model` and `space` leave.

    Raises:
        ValueError: If the sizes do not multiply to the number of devices, or both `model` and
            `space` are used: with jax 0.10 that combination trains to other numbers.
    """
    devices = jax.devices()
    if model > 1 and space > 1:
        raise ValueError(f"mesh: model {model} and space {space}; use one of them, leave one at 1")
    if data == -1:
        data = len(devices) // (model * space)
    if data * model * space != len(devices):
        raise ValueError(
            f"mesh: data {data} x model {model} x space {space} is not the {len(devices)} devices "
            "there are; set mesh.data to -1 or choose sizes that multiply to it"
        )
    # Auto: the compiler places what lies between the annotated inputs and outputs of the step.
    return jax.make_mesh((data, model, space), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Patches over `data`, their rows (H) over `space`."""
    return NamedSharding(mesh, PartitionSpec("data", None, "space"))


def batch_shardings(mesh: Mesh, batch: Batch) -> Any:
    """Where the leaves of a batch lie: patches as in `batch_sharding`, slice labels over `data`."""
    slices = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda leaf: batch_sharding(mesh) if leaf.ndim > 3 else slices, batch)


def state_shardings(mesh: Mesh, state: Params) -> Params:
    """Every leaf split over `model` along its largest axis that divides; else replicated."""
    size = mesh.shape["model"]

    def leaf(value) -> NamedSharding:
        shape = getattr(value, "shape", ())
        fits = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not fits or jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return replicated(mesh)
        chosen = max(fits, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*([None] * chosen), "model"))

    return jax.tree.map(leaf, state)


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch from every process' own rows (NumPy leaves)."""
    return jax.tree.map(
        lambda rows, place: jax.make_array_from_process_local_data(place, np.asarray(rows)),
        batch,
        batch_shardings(mesh, batch),
    )


def require_divisible(mesh: Mesh, labeled: int, unlabeled: int, rows: int) -> None:
    """Refuses batches that do not spread evenly.

    Raises:
        ValueError: Names the field and the nearest accepted number.
    """
    share = mesh.shape["data"]
    for field, count in (("input.labeled", labeled), ("input.unlabeled", unlabeled)):
        if count % share:
            raise ValueError(
                f"{field} is {count} patches a step over {share} devices; "
                f"choose a multiple of {share}, such as {max(1, round(count / share)) * share}"
            )
    if rows % mesh.shape["space"]:
        raise ValueError(
            f"mesh.space {mesh.shape['space']} does not divide the {rows} rows of a source patch"
        )


class Preemption:
    """Notices that the machine wants the run to end, on SIGTERM, alike in every process."""

    def __init__(self):
        self.asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)

    def __call__(self, step: int) -> bool:
        """Whether to save and stop after this step; to be asked at every step."""
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
