"""What the machine has."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # of Linux


def cores() -> int:
    """Cores this process may use; a batch system or a container may have given only some.

    A share of the time of all cores counts as so many cores, rounded up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min([count, *_shares(_OWN_GROUPS, _GROUPS)])


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
    return min([whole, *_limits(_OWN_GROUPS, _GROUPS)])


def resident_bytes(maxrss: int) -> int:
    """Bytes of a `ru_maxrss`, which macOS counts in bytes and Linux in KiB."""
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def _limits(groups: Path, root: Path) -> Iterator[int]:
    """Bytes of memory that the control groups of this process allow."""
    for version, folder in _groups(groups, root, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            yield int((folder / name).read_text())


def _shares(groups: Path, root: Path) -> Iterator[int]:
    """Cores whose time the control groups of this process allow."""
    for version, folder in _groups(groups, root, "cpu"):
        names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
            if quota > 0 and period > 0:  # version 1 says -1 where there is no limit
                yield math.ceil(quota / period)


def _groups(groups: Path, root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of a process' control groups of Linux: its own and all above."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            version, top = 2, root
        elif controller in controllers.split(","):
            version, top = 1, root / controller
        else:
            continue
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield version, folder
