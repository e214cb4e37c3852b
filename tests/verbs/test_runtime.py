"""Compiled programs are kept, and XLA is told what it has to be told."""

import os
import signal
import subprocess
import sys

import pytest

from bhsd_jax import main
from bhsd_jax.platform import allocator, startup


def test_the_cache_lies_in_the_users_folder_unless_the_environment_says_where(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(allocator, "keep_memory", lambda: True)
    startup.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(startup.cache_folder())
    assert startup.cache_folder().parent == tmp_path / "bhsd_jax"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    startup.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_a_user_without_a_home_keeps_no_programs(monkeypatch):
    """As of a service or a container that knows neither HOME nor the number of its user."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator, "keep_memory", lambda: True)
    monkeypatch.setattr(startup.Path, "home", nowhere)
    startup.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_only_flags_that_jaxlib_knows_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(startup, "_FLAGS", (("xla_cpu_no_such_flag", "1", "1"),))
    startup.settle_compiler()
    assert os.environ["XLA_FLAGS"] == "--xla_one=1"
    monkeypatch.undo()
    assert startup._jaxlib_knows("xla_dump_to")
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(startup, "_jaxlib_knows", lambda *words: True)
    startup.settle_compiler()
    once = os.environ["XLA_FLAGS"]
    assert once == (
        "--xla_one=1 --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED "
        "--xla_cpu_experimental_ynn_fusion_type=-reduce "
        "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
    )
    startup.settle_compiler()
    assert os.environ["XLA_FLAGS"] == once


@pytest.mark.parametrize("first", ["startup.settle_compiler()", "import bhsd_jax.api"])
def test_a_sum_of_squares_of_sums_is_right(first):
    """jaxlib 0.10.2 of itself gives other numbers for most of these 6000 rows (jax#39103)."""
    program = f"""
import numpy as np
from bhsd_jax.platform import startup
{first}
import jax
import jax.numpy as jnp
rows = np.random.default_rng(0).random((6000, 8), np.float32)
found = jax.jit(lambda x: ((x @ jnp.ones((8, 3))) ** 2).sum(-1))(rows)
right = 3 * rows.astype(np.float64).sum(-1) ** 2
print(np.abs(np.asarray(found) / right - 1).max())
"""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


@pytest.mark.parametrize(
    ("process", "verb", "code"),
    [(1, "predict", 143), (1, "train", 75), (7, "train", 75), (7, "predict", None)],
)
def test_the_first_process_of_a_container_heeds_sigterm(process, verb, code, monkeypatch):
    """The system keeps from it all signals that it does not ask for: it was killed in the end."""
    heeded = {}
    monkeypatch.setattr(os, "getpid", lambda: process)
    monkeypatch.setattr(signal, "signal", heeded.__setitem__)
    main._heed_sigterm(verb)
    assert bool(heeded) == (code is not None)
    for handler in heeded.values():
        with pytest.raises(SystemExit) as ended:
            handler(signal.SIGTERM, None)
        assert ended.value.code == code
