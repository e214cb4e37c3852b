"""These tests compile much and compute little."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """Halves the time of this folder; the programs are the same, their machine code is plainer."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def full_compilation(quick_compilation):
    """For what is read from the compiled text."""
    jax.config.update("jax_disable_most_optimizations", False)
