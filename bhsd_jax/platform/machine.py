"""What the machine has."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def cores() -> int:
    """Cores this process may use; a batch system may have given only some."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def log_every_s() -> float:
    """How often to say that something still goes on: to a person who waits, or to a file."""
    return 5.0 if sys.stderr.isatty() else 60.0


def memory() -> int:
    """Bytes of memory that this process may use; 0 if the system does not tell.

    A container or a batch system may have given it less than the machine has.
    """
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a Unix system
        return 0
    return min([whole, *_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits(groups: Path, root: Path) -> Iterator[int]:
    """What Linux' control groups, versions 1 and 2, allow this process: its own and all above."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                    yield int((folder / name).read_text())
