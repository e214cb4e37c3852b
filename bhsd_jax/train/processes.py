"""The processes of a run: how they find each other, what they share, and how they are stopped."""

import contextlib
import logging
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from bhsd_jax import machine

logger = logging.getLogger(__name__)

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
