"""What the first look at a case found, kept on disk until a file of the case changes.

One file per case, so that jobs which share nothing but a file system can look at a data set
together, and one that is started again goes on where it stopped. A refusal is kept as well, until
a file of the case, the code, or a library that decodes files is another.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct import formats
from bhsd_jax.ct.prepared import Facts
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform import files
from bhsd_jax.volume import Case

_DECODERS = (  # of NIfTI; of DICOM, and what may be installed beside it for compressed voxels
    *("nibabel", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg"),
    *("pylibjpeg-rle", "pyjpegls", "python-gdcm", "pillow", "SimpleITK", "tifffile"),
    "imagecodecs",
)


def key(case: Case, settings: Mapping[str, Any]) -> str:
    """Changes when a file of the case was replaced, or anything else its facts depend on.

    Files are told apart by size and time stamp, as `make` and `rsync` do. The code that finds the
    facts counts too, and so do the libraries that decode files: none of another version is taken
    for its own. Of a data set's code only the case counts that it has made.
    """
    known = dataclasses.asdict(dataclasses.replace(case, label=None))
    known |= {"image": repr(case.image), "label": repr(case.label)}
    files = [(str(path), *_stamp(path)) for path in _files(case)]
    made_by = [_code(), _decoders()]
    text = json.dumps([known, files, dict(settings), made_by], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, case: Case, wanted: str) -> Facts | Finding | None:
    """Facts, or why the case was refused; None if nothing is known under the key `wanted`.

    A file that is damaged is removed, which a line says: the case is looked at again.
    """
    path = _place(folder, case)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        _require_sums(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            if head["key"] != wanted:
                return None
            if "refused" in head:
                return _finding(head["refused"])
            facts = files.tuples(head["facts"])
            facts["findings"] = tuple(map(_finding, facts["findings"]))
            return Facts(**facts, foreground=stored["foreground"])
    except Exception as error:  # NumPy parses a damaged header as Python, which raises anything
        files.discard(path, str(error) or type(error).__name__)
        return None


def save(folder: Path, case: Case, wanted: str, found: Facts | Finding) -> None:
    """Keeps facts, or the reason of a refusal, under a key; they replace what was there.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    path = _place(folder, case)
    head: dict[str, Any] = {"key": wanted, "case": case.id}
    foreground = np.zeros(0, np.float32)
    if isinstance(found, Facts):
        facts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        foreground = facts.pop("foreground")
        facts["findings"] = [dataclasses.astuple(finding) for finding in found.findings]
        head["facts"] = facts
    else:
        head["refused"] = dataclasses.astuple(found)
    data = io.BytesIO()
    np.savez_compressed(data, head=np.array(json.dumps(head)), foreground=foreground)
    files.write_bytes(path, data.getvalue())


def _require_sums(data: bytes) -> None:
    """NumPy stops reading where its array ends, before the sum of a part is compared."""
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        if (name := parts.testzip()) is not None:
            raise ValueError(f"{name} is not what was written")


def _place(folder: Path, case: Case) -> Path:
    # Not by id: those come from file names, and a folder of 25,000 files is slow to list.
    name = hashlib.sha256(case.id.encode()).hexdigest()
    return folder / name[:2] / f"{name[2:34]}.npz"


def _files(case: Case) -> Iterable[Path]:
    for source in (case.image, case.label, case.previous):
        if source is None:
            continue
        if not isinstance(source, Path):  # a scan of many files lists them
            for path in sorted(source.files):
                yield from formats.parts(path)
        elif source.is_dir():
            yield from sorted(path for path in source.rglob("*") if path.is_file())
        else:
            yield from formats.parts(source)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        return -1, error.errno or 0
    return found.st_size, found.st_mtime_ns


def sources() -> list[Path]:
    """The code that reads and judges scans: this room, and the words it shares with others."""
    room = Path(__file__).parents[1]
    return sorted(
        [*room.rglob("*.py"), *(room.parent / f"{n}.py" for n in ("defects", "labels", "volume"))]
    )


@functools.cache
def _code() -> str:
    """A digest of that code, whatever its comments and docstrings say."""
    total = hashlib.sha256()
    for path in sources():
        total.update(ast.dump(_without_docstrings(ast.parse(path.read_text()))).encode())
    return total.hexdigest()


@functools.cache
def _decoders() -> dict[str, str]:
    """Versions of what is installed: with another decoder, a scan that was refused may be read."""
    found = {}
    for name in _DECODERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _finding(stored: Sequence[Any]) -> Finding:
    kind, *rest = stored
    return Finding(Kind(kind), *rest)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
