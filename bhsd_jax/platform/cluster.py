"""Which of how many processes this is, as flags and environment tell; without JAX."""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bhsd_jax.platform.errors import UserError

TRY_AGAIN = 75  # exit code of a training that was asked to stop and has saved (EX_TEMPFAIL)
_FLAGS = ("coordinator", "num_processes", "process_id")
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORTS = 61440, 4096  # first of the ephemeral ports that jobs share out, and how many


@dataclass(frozen=True)
class Place:
    """The place of one process in a run of several; fields that nothing has told are None or ""."""

    coordinator: str = ""  # host:port where process 0 listens
    count: int | None = None
    index: int | None = None  # 0 .. count - 1
    local: tuple[int, int] = (0, 1)  # which of how many on this machine
    own_gpus: bool = False  # the visible GPUs are this process' alone, not this machine's
    source: str = ""  # who said so, for a reader

    @property
    def complete(self) -> bool:
        """Whether coordinator, count and index are all known, so that the process can join."""
        return bool(self.coordinator) and self.count is not None and self.index is not None

    @property
    def several(self) -> bool:
        """Whether the run has more than one process."""
        return (self.count or 1) > 1

    def gpus(self, visible: int) -> list[int]:
        """Indices of this process' share of the GPUs that are visible on its machine.

        Raises:
            ValueError: If the processes of this machine cannot have equally many.
        """
        index, processes = (0, 1) if self.own_gpus else self.local
        if visible % processes:
            raise UserError(
                f"{self.source}: {visible} GPUs over {processes} processes of one machine; start "
                "one process a machine, or as many as divide the GPUs, or say which are whose in "
                "JAX_LOCAL_DEVICE_IDS"
            )
        share = visible // processes
        return list(range(index * share, (index + 1) * share))


def find(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """The place of this process; an empty one where neither flags nor environment tell.

    Flags come before JAX's variables, and these before what Slurm or Open MPI say. Clusters that
    only JAX itself can ask (Cloud TPU, Kubernetes) are not looked at.

    Args:
        coordinator: host:port of process 0, or "".
        num_processes: How many there are.
        process_id: Which this one is.
        environment: The variables.

    Raises:
        ValueError: If a value is not a whole number, or two of them do not agree.
    """
    words = [environment.get(name, "") for name in _JAX]
    count = num_processes if num_processes is not None else _number(_JAX[1], words[1])
    index = process_id if process_id is not None else _number(_JAX[2], words[2])
    told = Place(coordinator or words[0], count, index, source="mesh and JAX_* variables")
    # A shell of Slurm's, or `mpirun -n 1`, is a task that others may be started from. Of two that
    # have started several, Open MPI is the inner one: its variables come from `mpirun` alone.
    launchers = [place for place in (_open_mpi(environment), _slurm(environment)) if place]
    batch = max(launchers, key=lambda place: place.several, default=Place())
    _require_agreement(told, batch)
    if told == Place(source=told.source):
        return batch
    # A single task that starts others by itself is not one of them.
    base = batch if batch.several or not told.complete else Place()
    found = replace(
        base,
        coordinator=told.coordinator or base.coordinator,
        count=base.count if told.count is None else told.count,
        index=base.index if told.index is None else told.index,
        source=f"{told.source} on {base.source}" if base.source else told.source,
    )
    if found.count is not None and not 0 <= (found.index or 0) < found.count:
        raise UserError(
            f"{found.source}: process {found.index} of {found.count}; they count from 0"
        )
    return found


def may_be_one_of_several() -> bool:
    """Whether only JAX itself could tell that this machine is one of several (Kubernetes, TPU)."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or bool(importlib.util.find_spec("libtpu"))


def missing(place: Place) -> str:
    """The flags and environment variables that would complete `place`, for an error message."""
    said = (place.coordinator, place.count, place.index)
    names = zip(_FLAGS, _JAX, said, strict=True)
    return ", ".join(
        f"--config.mesh.{flag} or {name}" for flag, name, value in names if value in ("", None)
    )


def first_host(nodes: str) -> str:
    """The first name in a list as Slurm writes it: `rack[1-2]n[07,9],x` gives `rack1n07`.

    JAX 0.10's own reading stops at the first bracket ("rack1").
    """
    depth, end = 0, len(nodes)
    for at, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            end = at
            break
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes[:end])


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of a job step; what runs in a batch script without `srun` is alone."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if not all(environment.get(name) for name in names):
        return None
    job, nodes, index = (environment[name] for name in names)
    # Inside `salloc` SLURM_NTASKS is the job's count; SLURM_STEP_NUM_TASKS is this step's.
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    first, number = _PORTS
    step = environment.get("SLURM_STEP_ID", "0")
    port = environment.get("JAX_COORDINATOR_PORT") or first + (int(job) + int(step)) % number
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environment.get("SLURM_NODEID", "0"))
    local = int(environment.get("SLURM_LOCALID", "0")), tasks[min(node, len(tasks) - 1)]
    asked = environment.get("SLURM_GPUS_PER_TASK") or environment.get("SLURM_TRES_PER_TASK", "")
    own = bool(environment.get("SLURM_GPUS_PER_TASK")) or "gpu" in asked
    return Place(
        f"{first_host(nodes)}:{port}", int(count), int(index), local, own, source=f"Slurm job {job}"
    )


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is two on each of three nodes and one on the last."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts or [1]


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if not all(environment.get(name) for name in names):
        return None
    count, index = (int(environment[name]) for name in names)
    local = (
        int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),
        int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
    )
    return Place(_launcher(environment, local[1] == count), count, index, local, source="Open MPI")


def _launcher(environment: Mapping[str, str], one_machine: bool) -> str:
    """Where process 0 can listen: `mpirun`'s own machine; "" if it does not say.

    Open MPI 4 tells its address in a variable, Open MPI 5 does not.
    """
    first, number = _PORTS
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    job, address = re.match(r"(\d+)", uri), re.search(r"tcp6?://\[?([^,\]/]+?)(?:[,\]]|:\d+$)", uri)
    # The number of a job is a multiple of 2^12.
    seed = int(job[1]) >> 12 if job else sum(environment.get("PMIX_NAMESPACE", "").encode())
    port = environment.get("JAX_COORDINATOR_PORT") or first + seed % number
    host = "127.0.0.1" if one_machine else address[1] if address else ""
    return f"{host}:{port}" if host else ""


def _number(name: str, text: str) -> int | None:
    if text and not text.strip().isdecimal():
        raise UserError(f"{name}: needs a whole number, 0 or more; got {text!r}")
    return int(text) if text else None


def _require_agreement(told: Place, batch: Place) -> None:
    """What a user says and what the batch system says of several processes must be the same."""
    if not batch.several:
        return
    for what in ("count", "index"):
        ours, theirs = getattr(told, what), getattr(batch, what)
        if ours is not None and ours != theirs:
            word = "processes" if what == "count" else "as this process"
            raise UserError(
                f"{told.source} say {ours} {word}, {batch.source} says {theirs}; leave the former "
                "out, or start without the latter"
            )
