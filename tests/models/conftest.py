"""These tests compile much and compute little, but for those of reference numbers."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick(request, quick_compilation):
    if "golden" in request.fixturenames:
        jax.config.update("jax_disable_most_optimizations", False)
