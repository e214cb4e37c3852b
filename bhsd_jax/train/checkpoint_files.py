"""What a checkpoint is on disk: a folder named by its step, whole by its own list of SHA-256 sums.

`SHA256SUMS` is read by `sha256sum -c`; its comment lines hold what that format has no place for.
A step is written under the name `40.unfinished` and renamed once its list is there, so a folder
`40` was whole once. Nothing else below the folder of checkpoints is ever touched.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
KEPT = 3  # newest steps; the best one stays beside them
_SEAL = "# SHA-256 of all below this line: "
_UNFINISHED = re.compile(r"(0|[1-9]\d*)\.unfinished(-\d+)?")


class Damaged(UserError):  # noqa: N818  (a state of the disk that callers get around)
    """A step is not what was saved."""


@dataclass(frozen=True)
class Listing:
    """What `SHA256SUMS` says of a step."""

    step: int
    dice: float | None  # mean validation Dice at this step, if it was validated
    sizes: Mapping[str, int]  # bytes by path
    sums: Mapping[str, str]  # SHA-256 by path

    @property
    def rank(self) -> tuple[float, int]:
        """The best step has the highest; the newest of equals, and of those without a Dice."""
        return (-1.0 if self.dice is None else self.dice, self.step)


def steps(folder: Path) -> list[int]:
    """Steps that were written to the end, damaged ones among them; a step's name is its number."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def is_saved(folder: Path, step: int) -> bool:
    """Whether that step was written to the end; its content is not looked at."""
    return (folder / str(step) / SUMS).is_file()


def unfinished(folder: Path, step: int) -> Path:
    """Folder in which a step is written before it gets its own name."""
    return folder / f"{step}.unfinished"


def finish(
    folder: Path, step: int, dice: float | None, facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes `facts` beside the arrays, lists every file, and gives the step its name."""
    path = unfinished(folder, step)
    for name, value in facts.items():
        files.write_json(path / f"{name}.json", value)
    names = _files(path)
    sizes = {name: (path / name).stat().st_size for name in names}
    _write(path, Listing(step, _finite(dice), sizes, {name: _sum(path / name) for name in names}))
    path.rename(folder / str(step))


def rate(folder: Path, step: int, dice: float) -> None:
    """Notes the Dice of a step that was validated after it was saved.

    Raises:
        Damaged: If the step has no readable list.
    """
    _write(folder / str(step), replace(listing(folder, step), dice=_finite(dice)))


def _write(path: Path, listed: Listing) -> None:
    facts = {"step": listed.step, "dice": listed.dice, "bytes": dict(listed.sizes)}
    lines = [f"# {json.dumps(facts)}\n", *(f"{v}  {name}\n" for name, v in listed.sums.items())]
    text = "".join(lines)
    seal = hashlib.sha256(text.encode()).hexdigest()
    files.write_text(path / SUMS, f"{_SEAL}{seal}\n{text}")


def _finite(dice: float | None) -> float | None:
    return dice if dice is not None and math.isfinite(dice) else None


def read(folder: Path, step: int, name: str) -> dict[str, Any]:
    """One of the facts of a step that is whole."""
    return json.loads((folder / str(step) / f"{name}.json").read_text())


def has(folder: Path, step: int, name: str) -> bool:
    """Whether a step has one of the facts."""
    return (folder / str(step) / f"{name}.json").is_file()


def read_if_kept(folder: Path, step: int, name: str) -> dict[str, Any]:
    """One of the facts; {} for a step of an older version, which did not keep it."""
    return read(folder, step, name) if has(folder, step, name) else {}


def listing(folder: Path, step: int) -> Listing:
    """The list of a step.

    Raises:
        Damaged: If there is none, or it is not what was written, or it is of another step.
    """
    path = folder / str(step) / SUMS
    if not path.is_file():
        raise Damaged(_without_list(path.parent))
    try:
        first, text = path.read_bytes().decode().split("\n", 1)
        intact = first == _SEAL + hashlib.sha256(text.encode()).hexdigest()
    except (UnicodeDecodeError, ValueError):
        intact, text = False, ""
    if not intact:
        raise Damaged(f"{SUMS} is not as it was written")
    comment, *lines = text.splitlines()
    facts = json.loads(comment.removeprefix("# "))
    if facts["step"] != step:
        raise Damaged(f"it holds step {facts['step']}, under another step's name")
    pairs = (line.split("  ", 1) for line in lines)
    return Listing(step, facts["dice"], facts["bytes"], {name: value for value, name in pairs})


def digest(folder: Path, step: int) -> str:
    """SHA-256 that stands for a checkpoint: of the lines of its list that name files.

    `grep -v '^#' SHA256SUMS | sha256sum` says the same.
    """
    lines = (folder / str(step) / SUMS).read_text().splitlines(keepends=True)
    named = "".join(line for line in lines if not line.startswith("#"))
    return hashlib.sha256(named.encode()).hexdigest()


def require_intact(folder: Path, step: int) -> Listing:
    """Compares every file of a step with its list.

    Raises:
        Damaged: Names the first file that is missing, truncated or changed.
    """
    listed, path = listing(folder, step), folder / str(step)
    for name, wanted in listed.sums.items():
        if not (path / name).is_file():
            raise Damaged(f"{name} is missing")
        size = (path / name).stat().st_size
        if size != listed.sizes[name]:
            raise Damaged(f"{name} has {size} bytes of {listed.sizes[name]}")
        if _sum(path / name) != wanted:
            raise Damaged(f"{name} differs from what was saved (SHA-256)")
    return listed


def first_intact(folder: Path, candidates: Iterable[int]) -> tuple[int | None, dict[int, str]]:
    """The first step that is whole, and what is wrong with those before it."""
    damaged: dict[int, str] = {}
    for step in candidates:
        try:
            require_intact(folder, step)
        except (Damaged, OSError) as error:
            damaged[step] = str(error)
        else:
            return step, damaged
    return None, damaged


def warn(folder: Path, damaged: Mapping[int, str], instead: str) -> None:
    """Says of every damaged step what is wrong, and what is done instead."""
    for step, reason in damaged.items():
        logger.warning(
            "DAMAGED CHECKPOINT %s: %s; it is left as it is, %s",
            folder / str(step),
            reason,
            instead,
        )


def by_rank(folder: Path) -> tuple[list[int], dict[int, str]]:
    """Steps from the best to the worst, and those whose list cannot be read with the reason."""
    listings: list[Listing] = []
    unread: dict[int, str] = {}
    for step in steps(folder):
        try:
            listings.append(listing(folder, step))
        except (Damaged, OSError) as error:
            unread[step] = str(error)
    return [one.step for one in sorted(listings, key=lambda one: one.rank, reverse=True)], unread


def set_aside(folder: Path, step: int) -> None:
    """Renames what stands where a step is to be written, so that nothing of it is lost."""
    path = folder / str(step)
    if path.exists():
        _rename(path, f"{step}.damaged")


def _rename(path: Path, wanted: str) -> None:
    """Renames what is in the way of a step; to the first of `wanted`, `wanted-2` ... not there."""
    names = (f"{wanted}{f'-{n}' if n > 1 else ''}" for n in range(1, 1_000_000))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(target)
    logger.warning("%s is in the way of a checkpoint to be written; renamed to %s", path, target)


def make_room(folder: Path, step: int) -> None:
    """Prepares for writing a step.

    Raises:
        OSError: If nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    set_aside(folder, step)
    place = unfinished(folder, step)
    if place.exists():
        _rename(place, place.name)
    place.mkdir()


def _remove_unfinished(folder: Path) -> None:
    """Deletes what killed saves have left; by their name these are ours and were never whole."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and not path.is_symlink() and _delete(path):
            logger.info("%s: a save was cut off here; removed", path)


def _delete(path: Path, *, under: Path | None = None) -> bool:
    """Whether a folder could be deleted, which another user's or one in use on NFS cannot.

    It takes room and harms nothing: that is said, and no reason to lose a checkpoint.
    """
    try:
        shutil.rmtree(path.rename(under) if under else path)
    except OSError as error:
        logger.warning("%s: could not be deleted (%s); it is of no use and takes room", path, error)
        return False
    return True


def prune(folder: Path) -> None:
    """Deletes all but the newest steps and the best; never one that has no readable list."""
    ranked, _ = by_rank(folder)
    kept = {*ranked[:1], *sorted(ranked)[-KEPT:]}
    for step in sorted(set(ranked) - kept):
        path = folder / str(step)
        if not path.is_symlink():
            # Renamed first: a step that is deleted by half must not look like a damaged one.
            _delete(path, under=unfinished(folder, step))


def is_old(folder: Path, step: int) -> bool:
    """Whether a version of this program saved the step that wrote no list."""
    return not is_saved(folder, step) and (folder / str(step) / "digest").is_dir()


def _without_list(path: Path) -> str:
    if is_old(path.parent, int(path.name)):
        return (
            f"it was saved by an older version of this program, which wrote no {SUMS}; "
            "only that version can use it"
        )
    return f"{SUMS} is missing"


def _files(path: Path) -> list[str]:
    paths = (Path(top) / name for top, _, names in os.walk(path) for name in names)
    return sorted(file.relative_to(path).as_posix() for file in paths if file != path / SUMS)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
