"""What is settled before JAX starts: the cache of programs, the compiler, and the memory."""

import contextlib
import importlib.util
import mmap
import os
import platform
from pathlib import Path

from bhsd_jax.platform import allocator, processor

# Keeps reductions away from YNNPACK, to which jaxlib 0.10.2 hands them on CPUs: a sum of squares of
# sums then comes out wrong without a word (`findings/xla_cpu_sum_of_sums_wrong.sh`; jax#39103 is of
# the same kind). Products and convolutions stay with it, where they are right and fast.
RIGHT_SUMS = ("xla_cpu_experimental_ynn_fusion_type", "-reduce")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
# Of XLA on CPUs: flag, its value, and a word by which a jaxlib shows that it knows that.
_FLAGS = (
    # Operations run in the order that needs least memory: a quarter less in a step.
    (
        "xla_cpu_scheduler_type",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    ),
    (*RIGHT_SUMS, "LIBRARY_FUSION_TYPE_REDUCE"),
    # Devices of one process wait for each other in every step. Where another program keeps the
    # core of one of them for 20 seconds XLA complains, and 40 later it ends the process.
    ("xla_cpu_collective_call_terminate_timeout_seconds", "3600", ""),
)


def prepare() -> None:
    """Sets compilation cache, compiler and allocator; variables that are already set stay.

    Programs that took over a second to compile are kept in the user's cache folder, so that the
    next scan or the resumed run starts at once; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    with contextlib.suppress(RuntimeError):  # a user of a container whom it does not know
        os.environ.setdefault(_CACHE, str(cache_folder()))
    settle_compiler()
    allocator.keep_memory()


def settle_compiler() -> None:
    """How XLA compiles for CPUs, in `XLA_FLAGS`, which counts until JAX first asks for devices."""
    for name, value, word in _FLAGS:
        flags = os.environ.get("XLA_FLAGS", "")
        if name not in flags and _jaxlib_knows(name, word):
            os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


def _jaxlib_knows(*words: str) -> bool:
    """Whether all occur in its library: JAX ends the process over a flag that it does not know."""
    spec = importlib.util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("libjax_common.*"):
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
            ):
                return all(text.find(word.encode()) >= 0 for word in words)
    return False


def cache_folder() -> Path:
    """Folder of compiled programs; one per kind of processor, as home folders may be shared.

    Raises:
        RuntimeError: If neither HOME nor the list of users tells where the user is at home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "bhsd_jax" / f"{platform.machine()}-{processor.digest()}"
