"""What the system says no to, in words: which path, what happened, what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_WORDS = {  # what happened, what to do
    errno.ENOSPC: ("no space left on the device", "free some, or choose another folder"),
    errno.EDQUOT: ("your quota of this file system is used up", "free some, or choose another"),
    errno.EFBIG: (
        "the file grew beyond the limit",
        "raise `ulimit -f`, or use another file system",
    ),
    errno.EROFS: ("the file system is read-only", "choose another folder, or mount it for writing"),
    errno.EACCES: ("no permission", "change its rights, or choose another folder"),
    errno.EPERM: ("the system does not permit it", "change its rights, or choose another folder"),
    errno.ENOENT: ("no such file or folder", "look whether it was moved or removed"),
    errno.EEXIST: ("a file lies where a folder is needed", "move it, or choose another folder"),
    errno.ENOTDIR: ("a part of the path is a file, no folder", "choose another path"),
    errno.EISDIR: ("a folder lies where a file is needed", "move it, or choose another folder"),
    errno.ENOTEMPTY: ("the folder is not empty", "look what lies in it"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("links lead in a circle", "choose another path"),
    errno.EXDEV: ("the link leads to another device", "choose another path"),
    errno.EMFILE: ("this process has too many files open", "raise `ulimit -n`"),
    errno.ENFILE: ("the machine has too many files open", "end other programs, or ask its keeper"),
    errno.EIO: ("the device failed", "look into the kernel's log; copy the data to a sound disk"),
    errno.ENXIO: ("the device is gone", "mount it again"),
    errno.ENODEV: ("the device is gone", "mount it again"),
    errno.ESTALE: ("the network file system has lost it", "mount it again"),
    errno.EHOSTDOWN: ("the file server is down", "try again when it answers"),
    errno.ENOTCONN: ("the file server is not connected", "mount it again"),
    errno.ENOLCK: ("the file system has no locks", "use one that has, or mount it with them"),
    errno.ENOTSUP: ("the file system cannot do that", "choose a folder on another"),
    errno.EINVAL: ("the file system refuses the name or the call", "choose another name or folder"),
    errno.EBUSY: ("it is in use", "end the program that uses it"),
    errno.ETIMEDOUT: ("no answer in time", "look at the network and try again"),
}


class WriteError(OSError):
    """A file could not be written; what was at its place before is as it was.

    Kept apart from the error of a file that cannot be read: that is one case's, this is everyone's.
    """


def explain(error: OSError, place: Path | None = None) -> str | None:
    """An operating system error in one line: path, what happened, what to do; None if unknown.

    Args:
        error: The system's.
        place: The folder to name where the error names no path.
    """
    known = _WORDS.get(error.errno or 0)
    if known is None:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    happened, remedy = known
    if error.errno == errno.ENOSPC:
        happened = _full(Path(path or place or "/"))
    where = path or f"a file in {place or 'a folder that was not named'}"
    written = isinstance(error, WriteError)
    return (
        f"{where}: {'cannot be written: ' if written else ''}{happened}; {remedy}"
        f"{'. What was there before is as it was' if written else ''}"
    )


@contextlib.contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """What fails while `path` is written, or `temporary` for it, is a WriteError that names it.

    A folder above it that is the cause keeps its own name; errors of other files are as they were.

    Raises:
        WriteError: If the system says no.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WORDS or isinstance(error, WriteError):
            raise
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        above = bool(named) and Path(named) in path.parents
        if named and not above and Path(named) not in (path, temporary):
            raise
        where = named if above else str(path)
        raise WriteError(error.errno, os.strerror(error.errno), where) from error


def os_error_behind(error: Exception, path: Path) -> OSError | None:
    """The operating system error behind a library's own exception; None if its text names none.

    ArrayRecord says "write() failed: No space left on device; writing /a/path" by RuntimeError.
    """
    for code in _WORDS.keys() - {errno.EINVAL}:  # "Invalid argument" may be said of damaged files
        if os.strerror(code) in str(error):
            return OSError(code, os.strerror(code), str(path))
    return None


def _full(path: Path) -> str:
    """Whether space or the number of files is at its end, and how much of it there is."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            state = os.statvfs(folder)
            if state.f_files and not state.f_favail:
                return f"no inode left on the device ({state.f_files} files is all it holds)"
            free, whole = (n * state.f_frsize / 1e6 for n in (state.f_bavail, state.f_blocks))
            return f"no space left on the device ({free:.1f} of {whole:.1f} MB are free)"
    return _WORDS[errno.ENOSPC][0]
