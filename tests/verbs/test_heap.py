"""Freed memory stays with the process, and compiling leaves no holes."""

import os
import subprocess
import sys

import pytest

from bhsd_jax.platform import allocator, machine

_FAULTS = """
import resource, threading, numpy as np
from bhsd_jax.platform import allocator
if {keep}: assert allocator.keep_memory()
def work():
    np.empty(2**26, np.uint8).fill(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): np.empty(2**26, np.uint8).fill(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work); thread.start(); thread.join()
"""


_HOLES = """
import ctypes, resource
from bhsd_jax.platform import allocator
assert allocator.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(2000 + 40 * (i * i % 997)) for i in range(20_000)]
for block in blocks: ctypes.memset(ctypes.c_void_p(block), 1, 2000)
for block in blocks[::2]: libc.free(block)
libc.malloc(2**20)  # sorts them
before = sum(count for _, count in allocator._holes())
closed = allocator.close_holes()
print(before, closed, sum(count for _, count in allocator._holes()))
"""


_PLACES = """
import ctypes, resource
from bhsd_jax.platform import allocator
assert allocator.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.memalign.restype, libc.memalign.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
before, size = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 2**28
allocator.reserve(size, 3)
places = sorted(libc.memalign(64, size) for _ in range(3))
touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(b - a - size for a, b in zip(places, places[1:])), touched * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_of_a_thread_are_faulted_in_only_once():
    kept, handed_back = (_numbers(_FAULTS.format(keep=keep)) for keep in (True, False))
    assert kept[0] < handed_back[0] / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_holes_of_odd_sizes_are_closed():
    before, closed, after = _numbers(_HOLES)
    assert before > 9000
    assert closed > 0.99 * before
    assert after < 0.6 * before, "what is left of the holes, and smaller"


def test_memory_is_kept_only_where_the_machine_has_much_more(monkeypatch):
    asked = []
    monkeypatch.setattr(allocator, "_libc", lambda name: lambda *option: asked.append(option) or 1)
    monkeypatch.setattr(machine, "memory", lambda: 40)
    assert not allocator.mind_memory(10)
    assert not asked
    assert allocator.mind_memory(11)
    assert asked == list(allocator._HAND_BACK)


def test_the_heap_is_left_alone_where_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("BHSD_ALLOCATOR", "system")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("asked for the library"))
    monkeypatch.setattr(machine, "memory", lambda: 2**40)
    assert not allocator.keep_memory()
    assert allocator.close_holes() == 0
    allocator.settle(working=2**20, devices=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_reserved_places_have_room_to_spare_and_cost_no_memory():
    *room, touched = _numbers(_PLACES)
    assert len(room) == 2
    assert min(room) > allocator._ROOM
    assert touched < 2**24


def _numbers(program):
    """What it prints, in a process whose allocator is as the system has it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]
