"""The processes of a run: how they find each other, what they share, and how they are stopped."""

import contextlib
import dataclasses
import glob
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.extend import backend

from bhsd_jax.platform import budget, cluster, machine
from bhsd_jax.platform.cluster import Place
from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.train.log import heartbeat

logger = logging.getLogger(__name__)

_HEAVY = 100  # parameters per voxel of a step's patches
_FORCED = "xla_force_host_platform_device_count"
_SILENT_S = 30  # after so long without a word a process counts as lost; JAX's default is 100
_NOBODY = "coordinator_address should be defined"  # JAX found no cluster
_UNCLEAR = ("must be defined", "should be defined")
_ADDRESS = (
    ", host:port on the machine of process 0; or, where mpi4py is installed, mesh.detect=mpi4py"
)
_ALONE = "JAX_NUM_PROCESSES=1 says that a process is to be alone, whatever its shell inherits"
_MEETING = (
    "see that all were started, that the address is one of process 0's machine which the others "
    "reach (JAX_COORDINATOR_ADDRESS), and that nobody else has its port (JAX_COORDINATOR_PORT)"
    f"; {_ALONE}"
)
_PLUGINS = {  # packages that bring an accelerator to JAX
    "jax_cuda12_plugin": "cuda",
    "jax_cuda13_plugin": "cuda",
    "jax_rocm7_plugin": "rocm",
    "libtpu": "tpu",
}


def start(place: Place, detect: str = "", *, saves: bool = False) -> None:
    """Joins the other processes of this run, where there are any.

    What `place` leaves open JAX itself detects: Cloud TPU's metadata, GKE, Kubernetes. Nothing
    happens in a run of one process.

    Args:
        place: What flags and environment say of this process (`cluster.find`).
        detect: One of JAX's ways to ask, such as "mpi4py", instead of that.
        saves: Whether SIGTERM is left to `Preemption`, as in a training; if not, it ends the
            process, as it does one that is alone.

    Raises:
        ValueError: If what is said is not enough, or does not agree; says what is missing.
    """
    if jax.distributed.is_initialized():
        return
    place = Place() if detect else place
    if place.count == 1:
        return
    if place.complete and not place.coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"{place.source}: coordinator is host:port; got {place.coordinator!r}")
    # JAX's service takes SIGTERM for itself, and tells only those who ask it.
    jax.config.update("jax_enable_preemption_service", saves)
    if _initialize(place, detect):
        logger.info("process %d of %d", jax.process_index(), jax.process_count())


def _initialize(place: Place, detect: str) -> bool:
    """Lets JAX find out the rest and join; whether there was anything to join."""
    ids = None
    if place.count is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        ids = _own_gpus(place)
    try:
        with _quiet_about_kubernetes(place), heartbeat(_waiting(place), begins=False):
            jax.distributed.initialize(
                place.coordinator or None,
                place.count,
                place.index,
                local_device_ids=ids,
                cluster_detection_method=detect or None,
                heartbeat_timeout_seconds=_SILENT_S,
                shutdown_timeout_seconds=2 * _SILENT_S,
            )
    except Exception as error:  # JAX's own, and those of the client of Kubernetes
        if place == Place() and not detect and _NOBODY in str(error):
            return False
        if reason := _why_not_joined(error, place, detect):
            raise UserError(reason) from error
        raise
    return True


def _why_not_joined(error: Exception, place: Place, detect: str) -> str:
    """What is missing, or to be looked at, where processes do not meet; "" if it is a defect."""
    first, source = str(error).strip().partition("\n")[0], place.source or f"mesh.detect {detect!r}"
    if isinstance(error, ImportError):
        return f"{source}: {first}; install it"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"{_who(place)} could not listen ({first}); {_MEETING}"
    if isinstance(error, ValueError) and any(words in first for words in _UNCLEAR):
        address = f"{_ADDRESS}; {_ALONE}" if place.several and not place.coordinator else ""
        return (
            f"{source}: not all is known of the processes of this run; say "
            f"{cluster.missing(place)}{address}"
        )
    if not place.complete and "JOB_COMPLETION_INDEX" in os.environ:
        return (
            "JAX could not ask Kubernetes which process this is "
            f"({type(error).__name__}: {first}); say {cluster.missing(place)}, or "
            "JAX_NUM_PROCESSES=1 where each pod trains for itself"
        )
    return ""


def _waiting(place: Place) -> str:
    """What a process says that nobody answers: XLA ends it after five minutes, without a reason."""
    where = f" at {place.coordinator}" if place.coordinator else ""
    return f"{_who(place)} waits for the others{where}; {_MEETING}"


def _who(place: Place) -> str:
    return f"process {place.index} of {place.count}" if place.complete else "this process"


def _own_gpus(place: Place) -> list[int]:
    """Indices of this process' GPUs among those it sees.

    Where each of several processes of a machine sees one, although the machine has enough for all,
    a launcher or a wrapper has bound them: it is this process' own. So it is where nobody tells how
    many they are and the machine has more.

    Raises:
        ValueError: As `Place.gpus`.
    """
    there = len(glob.glob("/dev/nvidia[0-9]*"))
    visible = there
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:
            listed = [one.strip() for one in os.environ[name].split(",")]
            visible = len([one for one in listed if one not in ("", "-1", "NoDevFiles")])
            break
    if visible == 1 < (place.local[1] or there) <= there:
        place = dataclasses.replace(place, own_gpus=True)
    return place.gpus(visible)


@contextlib.contextmanager
def _quiet_about_kubernetes(place: Place) -> Iterator[None]:
    """JAX warns in every pod that lacks a package which only its own detection needs."""
    with warnings.catch_warnings():
        if place.complete or os.environ.get("JOB_COMPLETION_INDEX") is None:
            warnings.filterwarnings("ignore", message=r"\s*Kubernetes environment detected")
        yield


def say_devices() -> None:
    """Logs what this run computes on; where an accelerator lies idle, so that nobody misses it."""
    devices = _devices()
    kind = devices[0].device_kind
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    logger.info("%s: %d x %s%s", jax.default_backend(), len(devices), kind, processes)
    reason = _why_no_accelerator() if jax.default_backend() == "cpu" else ""
    if reason:
        line = "!" * 78
        logger.warning("\n%s\nTHIS RUNS ON THE CPU ALONE: %s\n%s", line, reason, line)


def _devices() -> list[Any]:
    """All devices of the run.

    Raises:
        UserError: If `JAX_PLATFORMS` asks for what there is none of.
    """
    wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a GPU and JAX's plugin
        if not wanted:
            raise
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        raise UserError(
            f"JAX_PLATFORMS is {wanted!r}, and JAX finds no such device here"
            f"{f' ({reason})' if reason else ''}; start on a machine that has one, with the extra "
            "`cuda` or `tpu` installed (BHSD_EXTRAS=cuda tools/env), or unset JAX_PLATFORMS to "
            "take what there is"
        ) from error


def _why_no_accelerator() -> str:
    """What keeps this run on the CPU although there is more; "" if there is not, or it was asked.

    JAX itself says one quiet word.
    """
    wanted = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME") or ""
    if wanted.partition(",")[0] == "cpu":
        return ""
    installed = [extra for name, extra in _PLUGINS.items() if importlib.util.find_spec(name)]
    if installed:
        return (
            f"JAX's plugin for {installed[0]} is installed and finds no device it can use. Look at "
            "the driver (nvidia-smi), at CUDA_VISIBLE_DEVICES, and at who else holds the device; "
            "JAX_PLATFORMS=cpu says that it is meant to be so"
        )
    # WSL2 has no device file for a GPU, but a library of Windows' driver.
    if glob.glob("/dev/nvidia[0-9]*") or glob.glob("/usr/lib/wsl/lib/libcuda.so*"):
        return (
            "this machine has an NVIDIA GPU, and JAX's plugin for it is not installed; "
            f"{explain_extra('cuda')}"
        )
    return ""


def share_cores(*batches: int) -> bool:
    """On CPUs, splits the cores into as many devices as share batches of these sizes evenly.

    A device runs one operation at a time, and few operations keep all cores busy; devices with
    samples of their own do. Nothing happens where devices are in use already, where
    `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS` say how many there are, or in a run of several processes.

    Args:
        batches: Samples of a step; 0 is no batch.

    Returns:
        Whether CPUs, where they are what computes, were split here.

    Raises:
        UserError: If `JAX_PLATFORMS` asks for devices of which there is none.
    """
    split = _split_cores(batches)
    _devices()
    return split


def _split_cores(batches: Sequence[int]) -> bool:
    told = jax.config.jax_num_cpu_devices >= 0  # pyright: ignore[reportAttributeAccessIssue]
    told |= _FORCED in os.environ.get("XLA_FLAGS", "")
    if told or jax.distributed.is_initialized():
        return False
    counts = range(1, machine.cores() + 1)
    share = max(n for n in counts if all(count % n == 0 for count in batches))
    try:
        jax.config.update("jax_num_cpu_devices", share)
    except RuntimeError:  # devices are in use already
        return False
    return True


def unite_cores(parameters: int, voxels: int) -> None:
    """Where cores were split and one device is better, makes them one again; before any array is.

    Cores with patches of their own finish a step sooner, but each holds and updates the state.
    Where that is most of the work, one device takes less memory and no more time; all cores serve
    it. Measured on two cores, a step on two devices and on one: UNETR of 32 x 96 x 96 (157
    parameters per voxel) in bfloat16 1.06 s, 3.6 GB and 1.10 s, 2.2 GB; Swin-UNETR (27 per voxel)
    in float32 6.5 s, 3.2 GB and 11.5 s, 5.2 GB.

    Args:
        parameters: Of all networks that are trained.
        voxels: Of all patches of a step.
    """
    if parameters > _HEAVY * voxels:
        backend.clear_backends()
        jax.config.update("jax_num_cpu_devices", 1)
        # Else a step begins while the working memory of the last one is still held, and the process
        # grows by it: 5.2 GB in place of 3.4 for that UNETR in float32.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turns the failure of a collective operation into one line: another process is gone.

    Raises:
        ValueError: Instead of what the collective operation that missed it said; also where a
            device of this process has no memory left, which says what to do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        this = f"process {jax.process_index()} of {jax.process_count()}"
        if full := budget.explain_exhausted(error):
            raise UserError(f"{this}: {full}") from error
        raise UserError(
            f"{this}: {str(error).splitlines()[0]}; most likely another process has ended, look at "
            "its words. The last checkpoint is untouched: start the same command again to go on"
        ) from error


class Preemption:
    """Notices that the machine wants the run to end, alike in every process.

    SIGTERM is what Slurm, Kubernetes and most others send, SIGUSR1 what Slurm users choose, SIGINT
    what a person types; a second SIGINT ends the run at once. SIGHUP comes when a terminal closes;
    under `nohup` it stays without effect. One process that is told tells the others: JAX's service
    picks a call that all of them are still to make.
    """

    def __init__(self):
        self.asked = False
        self._told, self._calls = False, 0
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "Preemption":
        signals = [signal.SIGINT, signal.SIGUSR1]  # SIGTERM belongs to JAX's service, if it runs
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self._before = {
            number: signal.signal(number, self._note)
            for number in ((*signals, signal.SIGTERM) if self._alone else signals)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether to save and stop; every process must ask equally often."""
        self._calls += 1
        if not self.asked:
            self.asked = self._told if self._alone else self._agreed()
        return self.asked

    def _agreed(self) -> bool:
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._told and signum == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(signum).name
        # `os.write` and no logging: the handler may interrupt the log in the middle of a line.
        # The reader may be gone already, since Ctrl-C ends `| tee log` as well.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{name}: saving after this step\n".encode())
        self._told = True
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
