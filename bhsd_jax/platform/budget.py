"""What long work will take of memory and disk: said before it begins, refused if it cannot fit."""

import logging
import shutil
from pathlib import Path

from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

TRAIN_WITH_LESS = (
    "set a smaller input.patch or input.labeled, train.accumulate=2, train.remat=blocks, or "
    "precision=bfloat16"
)
_OF_JAX = ("JaxRuntimeError", "XlaRuntimeError")  # the second is its older name
_EXHAUSTED = ("resource_exhausted", "out of memory", "out_of_memory")


def require_memory(needed: float, what: str, remedy: str, available: float | None = None) -> None:
    """Refuses work that cannot fit into memory.

    Args:
        needed: Bytes, the least it can do with.
        what: The work, as the subject of "needs".
        remedy: What the user can do.
        available: Bytes of the device; None: of the machine, as far as this process may use them.

    Raises:
        UserError: If it needs more than there is. Nothing is said where the system does not tell.
    """
    have = machine.memory() if available is None else available
    if have and needed > have:
        raise UserError(
            f"{what} needs at least {in_words(needed)} of memory, and there are {in_words(have)}; "
            f"{remedy}"
        )


def explain_exhausted(error: BaseException) -> str | None:
    """What JAX or NumPy says where there is no memory left, and what to do; None of other errors.

    The device may be large enough: another program may hold what this one would need.
    """
    if isinstance(error, MemoryError):
        return (
            f"{str(error).rstrip('.') or 'no memory is left'}; this machine, or what a batch "
            "system, a container or `ulimit -v` leaves of it, has no more. Ask for more, or use "
            "less: preprocess.processes=1, input.cache_mb=0, infer.tiles=1"
        )
    text = str(error).strip().rstrip(".")
    of_jax = any(kind.__name__ in _OF_JAX for kind in type(error).__mro__)
    if not of_jax or not any(words in text.lower() for words in _EXHAUSTED):
        return None
    return (
        f"{text}; if another program holds memory of the device (`nvidia-smi` lists them), end it "
        f"or wait for it. If not: to train, {TRAIN_WITH_LESS}, or spread it over more devices "
        "(mesh.model, mesh.space); to predict and to validate, infer.tiles=1"
    )


def require_disk(folder: Path, needed: float, what: str, least: float | None = None) -> None:
    """Says how much will be written, and refuses it if the file system has not that much free.

    Args:
        folder: Where it will be written; it, or a folder above it, is there.
        needed: Bytes that it may take.
        what: The files, as the subject of "take".
        least: Bytes that it takes in any case; None: `needed`.

    Raises:
        UserError: If less than `least` is free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    least = needed if least is None else least
    amount = f"up to {in_words(needed)}" if least < needed else in_words(needed)
    if free < least:
        raise UserError(
            f"{folder}: {what} take {amount}, and {in_words(free)} are free; make room, or choose "
            "another folder"
        )
    warn = logger.warning if free < needed else logger.info
    warn("%s take %s; %s are free", what, amount, in_words(free))


def in_words(size: float) -> str:
    """Bytes for a reader, two digits or more: 340 MB, 8.5 GB, 1,200 GB."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{size / unit:.2g} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
