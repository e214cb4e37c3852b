"""These tests compile much and compute little."""

import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    pass
