"""A verb in several processes: joining them, dividing the work, gathering the results."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bhsd_jax.platform import cluster, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.train import barrier

_T = TypeVar("_T")


def join(config: Settings, *, saves: bool = False) -> None:
    """Joins the other processes of this run, if there are any; before anything asks for devices.

    Args:
        config: What `mesh` says of them.
        saves: Whether the verb heeds SIGTERM by itself; if not, it ends at once.

    Raises:
        ValueError: If what flags and environment say of them is not enough, or does not agree.
    """
    told = place(config)
    alone = told == cluster.Place() or told.count == 1
    if not alone or config.mesh.detect or cluster.may_be_one_of_several():
        from bhsd_jax.train import processes  # alone, a verb may need no JAX

        processes.start(told, config.mesh.detect, saves=saves)


def place(config: Settings) -> cluster.Place:
    """Which process of the run this is, as far as flags and environment tell."""
    settings = config.mesh
    return cluster.find(settings.coordinator, settings.num_processes, settings.process_id)


def own(jobs: Sequence[_T]) -> list[_T]:
    """This process' share of the jobs: of n processes each takes every n-th."""
    index, count = barrier.place()
    return list(jobs[index::count])


def require_same(jobs: Sequence[str]) -> None:
    """Refuses processes of one run that were given other jobs than the first.

    Each would do its share of what nobody else knows of, and the rest would be left undone without
    a word. To be called in all of them; where there is one it does nothing.

    Args:
        jobs: Names of all that they are to share.

    Raises:
        UserError: In all processes; names one that differs.
    """
    _, count = barrier.place()
    if count == 1:
        return
    from bhsd_jax.train.agreement import gather_words  # alone, a verb may need no JAX

    first, *others = gather_words(hashlib.sha256(json.dumps(list(jobs)).encode()).hexdigest())
    odd = next((index for index, own in enumerate(others, start=1) if own != first), None)
    if odd is not None:
        raise UserError(
            f"process {odd} of {count} was given other scans than process 0, and each would do "
            "a share of its own alone; give all processes of a run the same command, or where "
            "each is to do all of its own, set JAX_NUM_PROCESSES=1"
        )


def first_alone(make: Callable[[], _T]) -> _T:
    """What `make` returns, called in the first process before it is in the others.

    For what is made once and read ever after: not every file system settles who was first.
    """
    index, _ = barrier.place()
    if index:
        barrier.wait_for_all("first")
    try:
        return make()
    finally:
        if not index:
            barrier.wait_for_all("first")


def gather(folder: Path, name: str, part: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Collects one part from every process; the first gets all in order, the others None.

    Every process must come here, whatever befell it. They meet in a hidden folder that is gone
    afterwards; nothing is written where there is one process.

    Args:
        folder: A folder that all processes share.
        name: Of what is gathered; a word fit for a file name.
        part: What this process has to say; JSON.

    Raises:
        faults.WriteError: If this process' part could not be written.
        ValueError: If another's is not there.
    """
    index, count = barrier.place()
    if count == 1:
        return [dict(part)]
    meeting = folder / f".{name}.parts"
    fault = None
    try:
        if index:
            (meeting / f"{index}.json").unlink(missing_ok=True)  # of a run that was killed
            files.write_json(meeting / f"{index}.json", part)
    except OSError as error:
        fault = error
    barrier.wait_for_all(name)
    if index and fault:
        raise fault
    if index:
        return None
    try:
        return [dict(part), *(_read(meeting, other) for other in range(1, count))]
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(meeting)


def _read(meeting: Path, index: int) -> dict[str, Any]:
    try:
        return files.read_json(meeting / f"{index}.json", remedy="run the same command again")
    except FileNotFoundError as error:
        raise UserError(
            f"{meeting}: process {index} could not leave its part; look at what it said"
        ) from error
