"""Compiled programs are kept, and operations ordered for memory."""

import os

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


def test_only_flags_that_jaxlib_knows_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(startup, "_SCHEDULER", "xla_cpu_no_such_flag")
    startup.order_for_memory()
    assert os.environ["XLA_FLAGS"] == "--xla_one=1"
    monkeypatch.undo()
    assert startup._jaxlib_knows("xla_dump_to")
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    monkeypatch.setattr(startup, "_jaxlib_knows", lambda *words: True)
    startup.order_for_memory()
    once = os.environ["XLA_FLAGS"]
    assert once == "--xla_one=1 --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    startup.order_for_memory()
    assert os.environ["XLA_FLAGS"] == once
