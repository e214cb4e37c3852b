"""Tells which of a run's processes this one is, and waits for the others."""

import itertools
import sys

_DAYS_S = 7 * 24 * 3600  # others may have hours of work left; that one died is told by heartbeats
_numbers = itertools.count()


def place() -> tuple[int, int]:
    """Index of this process, and how many there are; (0, 1) where JAX was never loaded."""
    if "jax" not in sys.modules:
        return 0, 1
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def wait_for_all(name: str) -> None:
    """Returns when every process has called it; at once where there is only one.

    No device takes part: the processes may be busy for very different times, and a collective
    operation would give up.
    """
    _, count = place()
    if count == 1:
        return
    from orbax.checkpoint import multihost

    # Naming the processes chooses the coordinator's barrier, which keeps to the time limit.
    multihost.sync_global_processes(
        f"{name}-{next(_numbers)}", timeout=_DAYS_S, processes=set(range(count))
    )
