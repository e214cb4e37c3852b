"""Files that are there whole or not at all, and what to do about one that is damaged."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.platform import faults
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255  # bytes, on every file system that clusters have
_LONGEST_REASON = 200  # letters
_FILLED_S = 10.0  # within which a file that was created is filled, and everyone sees it
_ABANDONED_S = 3600.0  # a temporary file nobody wrote to for so long is a killed program's
_TEMPORARY = re.compile(r"\..*-(\d+)\.tmp", re.DOTALL)  # as `_hidden` names them
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What using a value raises that is not of the kind it should be."""


def stand_in(begins: bytes) -> str:
    """What lies in the place of a file that begins so, and what to do; "" of anything else.

    Downloads leave such files: of a repository without its large files, or of a page that asks who
    one is.
    """
    begins = begins.lstrip().lower()
    if begins.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; fetch it: git lfs pull"
    if begins.startswith((b"<!doctype", b"<html")):
        return "a web page in place of the file; download the file itself"
    return ""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden name beside `path`; at the end of the block the file there becomes `path`.

    After an error, or if there is none, `path` is as it was. Folders above it are made. No other
    process uses the name: several may write the same file.

    Raises:
        faults.WriteError: If the system says no; names `path`.
    """
    path = Path(path)
    temporary = path.with_name(_hidden(path.name))
    with faults.writing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.exists():
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes a file of indented JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=1))


def write_first(path: str | Path, text: str) -> str:
    """Writes a text unless the file exists; returns its text, the same for processes that race.

    So it is on file systems with hard links, and on those where of several that create a file one
    is told that it was first: on one machine all, and gcsfuse from 2.8 on.

    Raises:
        faults.WriteError: If the system says no.
    """
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(text)
        try:
            os.link(temporary, path)  # unlike a rename it fails where another was first
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            _create(path, text)
        temporary.unlink(missing_ok=True)
    return _read_filled(path)


def _create(path: Path, text: str) -> None:
    """Writes a text into a file that is not there yet; leaves alone what another process creates.

    A rename would not do: it takes the place of what has come since one looked.
    """
    try:
        file = path.open("x")
    except FileExistsError:
        return
    try:
        with file:
            file.write(text)
    except OSError as error:
        # By gcsfuse the file of another machine came first; this one's is gone.
        if error.errno != errno.ESTALE:
            path.unlink(missing_ok=True)
            raise


def _read_filled(path: Path) -> str:
    """The text of a file that another process may have created a moment ago, and fills now.

    Network file systems say for some seconds that it is not there.
    """
    end = time.monotonic() + _FILLED_S
    while time.monotonic() < end:
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    return path.read_text()


def appears(path: Path) -> bool:
    """Whether a file that another process has written is there, or comes within seconds.

    Network file systems say for some seconds that it is not there.
    """
    end = time.monotonic() + _FILLED_S
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    return path.is_file()


def append(path: Path, text: str) -> None:
    """Appends to a file all of a text or nothing of it.

    Raises:
        faults.WriteError: If the system says no.
    """
    rest = memoryview(text.encode())
    with faults.writing(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


def open_folder(folder: Path) -> None:
    """Makes a folder, and tries whether it takes files: before hours go into what it is to hold.

    Raises:
        faults.WriteError: If it cannot be made or written to.
    """
    probe = folder / _hidden("probe")
    with faults.writing(folder, probe):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))  # a block: an empty file fits on a full disk
        finally:
            probe.unlink(missing_ok=True)


def keep_whole(words: str) -> str:
    """A list of words for a config, in which names of files with commas are one word each.

    `launch/sweep` calls its folders so: `runs/sweep-cps/lr=0.1,weight=0.5/seed0`. A pattern that
    the shell has left alone, as in `--runs=runs/fold*`, stands for the folders that it fits.
    """
    left, found = words.split(","), list[str]()
    while left:
        counts = range(len(left), 0, -1)
        fits = ((n, names) for n in counts if (names := _there(",".join(left[:n]))))
        count, names = next(fits, (1, left[:1]))
        found += names
        left = left[count:]
    return words if found == words.split(",") else repr(tuple(found))


def _there(text: str) -> list[str]:
    """The file of a name, or the folders that a pattern fits, sorted; as far as there are any."""
    if os.path.exists(text):
        return [text]
    fits = [] if text.startswith(("(", "[")) else glob.glob(text)  # else a list as Python has it
    return sorted(filter(os.path.isdir, fits))


def sweep(folder: Path) -> None:
    """Removes what killed programs left half-written in a folder and those just below it.

    A file whose writer may still live stays: one of this machine whose process runs, or of another
    machine that was written to within the hour.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                path.unlink(missing_ok=True)


def read_json(
    path: str | Path,
    parse: Callable[[Any], Any] = dict,
    *,
    keys: Sequence[str] = (),
    remedy: str = "restore it from a copy, or remove it and run what wrote it again",
) -> Any:
    """Reads a file that holds one JSON object.

    Args:
        path: The file.
        parse: Makes of the object what is returned; may raise whatever malformed values raise.
        keys: What it must have.
        remedy: What to do if it is damaged.

    Raises:
        ValueError: If it is damaged; names the file and, in it, the line.
        FileNotFoundError: If it is not there.
    """
    data = Path(path).read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, got a {type(value).__name__}")
        if missing := [key for key in keys if key not in value]:
            raise KeyError(missing[0])
        return parse(value)
    except MALFORMED as error:
        raise UserError(f"{path}: damaged ({_reason(error, data)}); {remedy}") from error


def tuples(value: Any) -> Any:
    """Lists back to tuples, as they were before they went through a JSON file."""
    if isinstance(value, Mapping):
        return {name: tuples(item) for name, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def recall_json(
    path: Path,
    parse: Callable[[Any], Any] = dict,
    *,
    keys: Sequence[str] = (),
    remove: bool = True,
) -> Any:
    """Like `read_json`, for a file that can be made again: None if it is missing or damaged.

    What is damaged is removed, which a line says; unless `remove` is False: it is replaced later.
    """
    try:
        return read_json(path, parse, keys=keys, remedy="it is made anew")
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s", error)
        if remove:
            unlink(path)
        return None


def discard(path: Path, reason: str) -> None:
    """Removes a damaged file that is about to be made anew, and says so."""
    logger.warning("%s: damaged (%s); it is made anew", path, _in_line(reason))
    unlink(path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one per line; none if there is no file.

    A last line that a crash has cut off is left out, and so is a damaged one, which is said.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError(f"expected an object, got a {type(record).__name__}")
        except MALFORMED as error:
            if line and number < len(lines):
                reason = _reason(error, line)
                logger.warning("%s: line %d is damaged (%s); left out", path, number, reason)
        else:
            records.append(record)
    return records


def _reason(error: Exception, data: bytes) -> str:
    """What is wrong with the content of a JSON file."""
    if not data.strip(b"\0"):
        return f"holds {len(data)} zero bytes" if data else "the file is empty"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, KeyError):
        return f"has no {error}"
    return _in_line(str(error)) or type(error).__name__


def _in_line(text: str) -> str:
    """Of a library's text what fits in a line: it may hold the damaged bytes themselves."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def unlink(path: Path) -> None:
    """Removes a file if it is there.

    Raises:
        faults.WriteError: If the system says no.
    """
    with faults.writing(path):
        path.unlink(missing_ok=True)


def _hidden(name: str) -> str:
    """A name no other process uses, and that tells whose it is."""
    end = f".{_host()}-{os.getpid()}.tmp"
    if len(os.fsencode(name)) + len(end) >= _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{end}"


def _host() -> str:
    """The machine and this one's list of processes on it: a container has its own."""
    try:
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        space = "0"
    return f"{socket.gethostname()[:64]}.{space}"


def _is_abandoned(path: Path) -> bool:
    parts = _TEMPORARY.fullmatch(path.name)
    if parts is None:
        return False
    if time.time() - path.stat().st_mtime > _ABANDONED_S:
        return True
    here = path.name.endswith(f".{_host()}-{parts[1]}.tmp")
    return here and not _runs(int(parts[1]))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True
