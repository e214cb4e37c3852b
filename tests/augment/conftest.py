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
