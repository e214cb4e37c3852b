"""Which of how many processes this is, as flags and environment tell; without JAX."""

import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bhsd_jax.platform.errors import UserError

TRY_AGAIN = 75  # exit code of a training that was asked to stop and has saved (EX_TEMPFAIL)
_FLAGS = ("coordinator", "num_processes", "process_id")
_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORTS = 61440, 4096  # first of the ephemeral ports that jobs share out, and how many
_OPEN_MPI, _FLUX, _TORCHRUN = "Open MPI", "Flux", "torchrun (RANK, WORLD_SIZE)"
_ENDS = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
# By launcher: how many processes the run has and which this is; likewise of this machine.
_NAMES = {
    _OPEN_MPI: [f"OMPI_COMM_WORLD_{end}" for end in _ENDS],
    "jsrun": [f"JSM_NAMESPACE_{end}" for end in _ENDS],
    "MVAPICH": [f"MV2_COMM_WORLD_{end}" for end in _ENDS],
    _FLUX: ["FLUX_JOB_SIZE", "FLUX_TASK_RANK", "", "FLUX_TASK_LOCAL_ID"],
    "MPICH or Intel MPI": ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"],
    "PALS": [f"PMI_{end}" for end in _ENDS],
    _TORCHRUN: ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"],
}


@dataclass(frozen=True)
class Place:
    """The place of one process in a run of several; fields that nothing has told are None or ""."""

    coordinator: str = ""  # host:port where process 0 listens
    count: int | None = None
    index: int | None = None  # 0 .. count - 1
    local: tuple[int, int] = (0, 1)  # which of how many on this machine; of 0 if nobody tells
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
            ValueError: If the processes of this machine cannot have equally many, or nobody tells
                how many they are.
        """
        index, processes = (0, 1) if self.own_gpus else self.local
        if visible and (not processes or visible % processes):
            raise UserError(
                f"{self.source}: {visible} GPUs over {processes or 'who knows how many'} processes "
                "of one machine; start one process a machine, or as many as divide the GPUs, or "
                "say which are whose in JAX_LOCAL_DEVICE_IDS"
            )
        share = visible // (processes or 1)
        return list(range(index * share, (index + 1) * share))


def find(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """The place of this process; an empty one where neither flags nor environment tell.

    Flags come before JAX's variables, and these before what Slurm or another launcher says.
    Clusters that only JAX itself can ask (Cloud TPU, Kubernetes) are not looked at. A count of 1
    counts whatever a launcher says: a shell inherits its variables, too.

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
    # Who is told to be the only one is that, in a shell or notebook of others' processes, too.
    batch = Place() if count == 1 else _launched(environment)
    _require_agreement(told, batch)
    found = batch
    if told != Place(source=told.source):
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


def apart(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables without what launchers say, for a process that is none of those they started.

    Such are the verbs of a series, whatever the series itself was started by.
    """
    told = {"SLURM_STEP_NODELIST", *(name for names in _NAMES.values() for name in names)}
    return {name: value for name, value in environment.items() if name not in told}


def may_be_one_of_several() -> bool:
    """Whether only JAX itself could tell that this machine is one of several (Kubernetes, TPU).

    Of Kubernetes' pods only those of an Indexed Job can be, by a number that JAX takes.
    """
    return "JOB_COMPLETION_INDEX" in os.environ or bool(importlib.util.find_spec("libtpu"))


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


def _launched(environment: Mapping[str, str]) -> Place:
    """What the launcher of this process says of it; an empty place without one.

    Launchers start launchers and hand on their own variables. `mpirun` or torchrun in a job step of
    Slurm is the inner one, whose several processes count. RANK and WORLD_SIZE, which people and
    schedulers of PyTorch jobs set too, come first where they are torchrun's; else they count where
    nobody else says anything: a job's one task inherits those of the shell that submitted it. A
    shell of Slurm's, or `mpirun -n 1`, is a task that others may be started from.
    """
    others = [*(_by_names(name, environment) for name in _NAMES if name != _TORCHRUN)]
    others.append(_slurm(environment))
    if "TORCHELASTIC_RUN_ID" in environment or not any(others):
        others.insert(0, _by_names(_TORCHRUN, environment))
    places = [place for place in others if place]
    first = max(places, key=lambda place: place.several, default=Place())
    # Slurm's tasks may speak PMI too: of those that say the same, the one that knows most.
    same = [place for place in places if (place.count, place.index) == (first.count, first.index)]
    return max(same, key=lambda place: (place.complete, place.local[1] > 0), default=first)


def _by_names(launcher: str, environment: Mapping[str, str]) -> Place | None:
    """What a launcher says in its variables; Slurm's, which say more, are not among them."""
    names = _NAMES[launcher]
    if not all(environment.get(name) for name in names[:2]):
        return None
    if environment[names[0]].strip() == "1":  # whatever its number: some scripts say -1
        return Place(count=1, index=0, source=launcher)
    count, index, here, local = (_number(name, environment.get(name, "")) for name in names)
    if here is None and launcher == _FLUX and environment.get("FLUX_JOB_NNODES") == "1":
        here = count
    if here is None and local is None and launcher == _TORCHRUN:
        here = 1  # as schedulers of PyTorch jobs start them, each in a pod of its own
    place = Place(count=count, index=index, local=(local or 0, here or 0), source=launcher)
    host = _first_machine(place, environment)
    port = environment.get("JAX_COORDINATOR_PORT") or _port(place, environment)
    return replace(place, coordinator=f"{host}:{port}") if host else place


def _first_machine(place: Place, environment: Mapping[str, str]) -> str:
    """Where process 0 can listen, as far as its launcher tells; "" if it does not.

    Open MPI 4 tells where `mpirun` runs, Open MPI 5 does not; in a job of Slurm's all of them begin
    on its first machine.
    """
    if place.local[1] == place.count:
        return "127.0.0.1"
    if place.source == _TORCHRUN:
        return environment.get("MASTER_ADDR", "")
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "") if place.source == _OPEN_MPI else ""
    address = re.search(r"tcp6?://\[?([^,\]/]+?)(?:[,\]]|:\d+$)", uri)
    return address[1] if address else first_host(environment.get("SLURM_JOB_NODELIST", ""))


def _port(place: Place, environment: Mapping[str, str]) -> int:
    """A port that no other run has, most likely; the same in all processes of this one.

    Not torchrun's MASTER_PORT, where it listens itself.
    """
    first, number = _PORTS
    open_mpi = place.source == _OPEN_MPI
    job = re.match(r"(\d+)", environment.get("OMPI_MCA_orte_hnp_uri", "")) if open_mpi else None
    if job:  # a multiple of 2^12
        return first + (int(job[1]) >> 12) % number
    name = environment.get("PMIX_NAMESPACE" if open_mpi else "MASTER_PORT", "")
    words = "\0".join([name, str(os.getuid()), *sys.argv[1:]])
    return first + zlib.crc32(words.encode(errors="surrogateescape")) % number


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
