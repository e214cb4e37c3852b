"""Files that one program at a time holds, among all that see them: who works in a folder."""

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

TRAINING = ".lock"  # in a run folder: held by who trains there
SERIES = ".series.lock"  # in a folder of `launch/...`: held by who makes there what is not finished

_LOOKED_S = 0.2  # far longer than `is_held` takes
_without: set[str] = set()  # reasons why there are no locks, that were said


@contextlib.contextmanager
def held(path: Path, *, waiting: str = "") -> Iterator[bool]:
    """Holds a file during the block; whether that could be done, since no other program holds it.

    The system lets go of it when this program ends, however that comes. Where a file system knows
    no locks it counts as held, which is said once.

    Args:
        path: The file, which is made; its folder is there.
        waiting: If another program holds it, this is said, and the block begins when it no longer
            does; empty: the block begins at once.
    """
    with path.open("w") as file:
        ours = _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not ours:
            time.sleep(_LOOKED_S)  # it may have been looked at
            ours = _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if waiting and not ours:
            logger.warning("%s", waiting)
            ours = _take(file, fcntl.LOCK_EX)
        yield ours


def is_held(path: Path) -> bool:
    """Whether some program, this one or another, holds the file; False where nothing tells."""
    try:
        with path.open() as file:
            return not _take(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # nobody has held it yet, or it cannot be read
        return False


def _take(file: IO[str], how: int) -> bool:
    """Whether the file is ours, until it is closed."""
    try:
        fcntl.flock(file, how)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # Lustre without `flock`, NFS without a lock service
        reason = error.strerror or type(error).__name__
        if reason not in _without:
            _without.add(reason)
            logger.warning(
                "%s: this file system has no locks (%s); see to it that no other program works in "
                "that folder",
                *(file.name, reason),
            )
    return True
