"""Files that are there whole or not at all."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden name beside `path`; at the end of the block the file there becomes `path`.

    After an error, or if there is none, `path` is as it was. Folders above it are made. No other
    process uses the name: several may write the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Likewise, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Likewise, as indented JSON."""
    write_text(path, json.dumps(value, indent=1))
