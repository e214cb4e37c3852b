"""What the machine has."""

import os
import sys


def cores() -> int:
    """Cores this process may use; a batch system may have given only some."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def log_every_s() -> float:
    """How often to say that something still goes on: to a person who waits, or to a file."""
    return 5.0 if sys.stderr.isatty() else 60.0


def memory() -> int:
    """Bytes of memory; 0 if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a Unix system
        return 0
