"""Compiled programs are kept, and freed memory stays with the process."""

import os
import subprocess
import sys

import pytest

from bhsd_jax import machine
from bhsd_jax.verbs import runtime

_FAULTS = """
import resource, threading, numpy as np
from bhsd_jax.verbs import runtime
if {keep}: assert runtime.keep_memory()
def work():
    np.empty(2**26, np.uint8).fill(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): np.empty(2**26, np.uint8).fill(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work); thread.start(); thread.join()
"""


_PLACES = """
import ctypes, resource
from bhsd_jax.verbs import runtime
assert runtime.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.memalign.restype, libc.memalign.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
before, size = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 2**28
runtime.reserve(size, 3)
places = sorted(libc.memalign(64, size) for _ in range(3))
touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(b - a - size for a, b in zip(places, places[1:])), touched * resource.getpagesize())
"""


def test_the_cache_lies_in_the_users_folder_unless_the_environment_says_where(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(runtime, "keep_memory", lambda: True)
    runtime.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(runtime.cache_folder())
    assert runtime.cache_folder().parent == tmp_path / "bhsd_jax"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    runtime.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_only_flags_that_jaxlib_knows_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(runtime, "_SCHEDULER", "xla_cpu_no_such_flag")
    runtime.order_for_memory()
    assert os.environ["XLA_FLAGS"] == "--xla_one=1"
    monkeypatch.undo()
    assert runtime._jaxlib_knows("xla_dump_to")
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(runtime, "_jaxlib_knows", lambda *words: True)
    runtime.order_for_memory()
    once = os.environ["XLA_FLAGS"]
    assert once == "--xla_one=1 --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    runtime.order_for_memory()
    assert os.environ["XLA_FLAGS"] == once


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_large_blocks_of_a_thread_are_faulted_in_only_once():
    kept, handed_back = (_numbers(_FAULTS.format(keep=keep)) for keep in (True, False))
    assert kept[0] < handed_back[0] / 10


def test_memory_is_kept_only_where_the_machine_has_much_more(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "_libc", lambda name: lambda *option: asked.append(option) or 1)
    monkeypatch.setattr(machine, "memory", lambda: 40)
    assert not runtime.mind_memory(10)
    assert not asked
    assert runtime.mind_memory(11)
    assert asked == list(runtime._HAND_BACK)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_reserved_places_have_room_to_spare_and_cost_no_memory():
    *room, touched = _numbers(_PLACES)
    assert len(room) == 2
    assert min(room) > runtime._ROOM
    assert touched < 2**24


def _numbers(program):
    """What it prints, in a process whose allocator is as the system has it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]
