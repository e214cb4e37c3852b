"""What is settled before JAX starts: where compiled programs are kept, and how memory is used."""

import ctypes
import hashlib
import importlib.util
import mmap
import os
import platform
from pathlib import Path
from typing import Any

from bhsd_jax import machine

# Options of glibc's `mallopt`: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never).
_KEEP = ((-8, 1), (-4, 0), (-1, -1))
_HAND_BACK = ((-4, 65536), (-1, 2**17))  # glibc's defaults
_KEPT = 2  # times the working memory: room for the programs of a validation, say
_ROOM, _PIECE, _TRIES = 2**26, 2**20, 256  # bytes, bytes, pieces
_SCHEDULER, _LEAST_MEMORY = "xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def prepare() -> None:
    """Sets all three; what the environment already says stays.

    Programs that took over a second to compile are kept in the user's cache folder, so that the
    next scan or the resumed run starts at once; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    os.environ.setdefault(_CACHE, str(cache_folder()))
    order_for_memory()
    keep_memory()


def order_for_memory() -> None:
    """On CPUs, operations run in the order that needs least memory: a quarter less in a step."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _SCHEDULER not in flags and _jaxlib_knows(_SCHEDULER, _LEAST_MEMORY):
        os.environ["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}={_LEAST_MEMORY}".strip()


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
    """One per kind of processor: programs for one may not run on another that shares the home."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "bhsd_jax" / f"{platform.machine()}-{_processor()}"


def keep_memory() -> bool:
    """Freed blocks stay with the process; says whether the system's allocator can do that.

    Activations and gradients are large blocks. glibc hands each back to the system at once, and
    every page of the next one is faulted in and zeroed anew. One arena, because those of threads
    get large blocks from the system whatever the thresholds are.
    """
    mallopt = _libc("mallopt")
    return mallopt is not None and all(mallopt(*option) for option in _KEEP)


def mind_memory(working: int) -> bool:
    """Takes `keep_memory` back where the machine has too little for it; says whether it did.

    Args:
        working: Bytes that programs on all devices need at a time.
    """
    if _KEPT * working <= machine.memory() // 2:
        return False
    mallopt = _libc("mallopt")
    return mallopt is not None and all(mallopt(*option) for option in _HAND_BACK)


def reserve(block: int, count: int) -> None:
    """Sets places aside for blocks that programs take and give back at every step.

    Left to itself the heap grows by a block now and then: the place of the last one is a few bytes
    too short, for an aligned block asks for more than it keeps, and something small lies beside
    it. A place with room to spare, between neighbors that never go, stays good for the next one.
    Only addresses are taken; what is not written to is not memory.

    Args:
        block: Bytes of working memory of a device.
        count: Devices.
    """
    malloc, free = _libc("malloc"), _libc("free")
    if malloc is None or free is None:
        return
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.argtypes = [ctypes.c_void_p]
    size = block + max(block // 8, _ROOM)
    places = []
    for _ in range(count):
        places.append(malloc(size))
        _put_behind(places[-1], size, malloc, free)
    for place in places:
        free(place)


def _put_behind(place: int | None, size: int, malloc: Any, free: Any) -> None:
    """Takes a piece right behind a block, for good; holes elsewhere that would fit are passed."""
    passed = []
    while len(passed) < _TRIES:
        piece = malloc(_PIECE)
        if place and piece and 0 <= piece - (place + size) < mmap.PAGESIZE:
            break
        passed.append(piece)
    for piece in passed:
        free(piece)


def _libc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(features.encode()).hexdigest()[:8]
