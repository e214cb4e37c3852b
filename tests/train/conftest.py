"""These tests compile much and compute little."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass


@pytest.fixture
def full_compilation(_quick):
    """For what is read from the compiled text."""
    jax.config.update("jax_disable_most_optimizations", False)
