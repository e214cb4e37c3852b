"""How the C library's allocator serves programs on CPUs: glibc's, elsewhere nothing is changed.

JAX takes and gives back the working memory of a program, and of many of its operations, at every
call. What glibc does by default, and what compiling leaves behind, costs more than the arithmetic
of a small operation. `BHSD_ALLOCATOR=system` in the environment leaves everything as it is.
"""

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from typing import Any

from bhsd_jax.platform import machine

# Options of glibc's `mallopt`: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never).
_KEEP = ((-8, 1), (-4, 0), (-1, -1))
_HAND_BACK = ((-4, 65536), (-1, 2**17))  # glibc's defaults
_KEPT = 2  # times the working memory: room for the programs of a validation, say
_ROOM, _PIECE, _TRIES = 2**26, 2**20, 256  # bytes, bytes, pieces
_HOLES = (2**10, 2**20)  # bytes; smaller ones are found at once, larger ones are worth having


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


def settle(working: int, devices: int) -> None:
    """Readies the heap, after compiling, for a program that will run many times.

    Args:
        working: Bytes that it needs on one device.
        devices: That run it at a time.
    """
    if not mind_memory(working * devices):
        close_holes()
        reserve(working, devices)


def close_holes() -> int:
    """Takes the holes that compiling has left out of use, for good; says how many.

    They are 10^5, of all sizes, and glibc walks its sorted lists of them whenever a block of such
    a size is taken or given back: microseconds each time, under the lock that all threads share. A
    step of a Swin-UNETR took 3.4 s with them and 2.5 s without. Their pages go back to the system
    first, so that a closed hole is an address and no memory.
    """
    malloc, trim = _libc("malloc"), _libc("malloc_trim")
    if malloc is None or trim is None:
        return 0
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    trim(0)
    malloc(_PIECE)  # larger than any of them: on its way it sorts those that are not in a list yet
    closed = 0
    # A hole is as large as its list demands or larger. What is left of it stays a hole on purpose:
    # with none at all, small objects settle in the places that `reserve` sets aside.
    for size, count in _holes():
        for _ in range(count):
            malloc(size - 2 * ctypes.sizeof(ctypes.c_size_t))  # less what a block keeps for itself
        closed += count
    return closed


def _holes() -> Iterator[tuple[int, int]]:
    """Least size and number of the holes in each list of the main heap, by its own account."""
    opened, info, closed = (_libc(name) for name in ("fdopen", "malloc_info", "fclose"))
    opened.restype = ctypes.c_void_p
    info.argtypes, closed.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
    with open(os.memfd_create("holes"), "w+b") as file:  # a file in memory
        stream = opened(os.dup(file.fileno()), b"w")
        if not stream:
            return
        info(0, stream)
        closed(stream)
        file.seek(0)
        text = file.read().decode()
    text = text.partition('<heap nr="1"')[0]
    for entry in re.finditer(r'<size from="(\d+)" to="(\d+)" total="\d+" count="(\d+)"', text):
        least, most, count = map(int, entry.groups())
        if _HOLES[0] <= least and most <= _HOLES[1]:
            yield least, count


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
    if os.environ.get("BHSD_ALLOCATOR") == "system":
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
