"""Formulas of few operations: their reference numbers hold in plain machine code, too."""

import pytest


@pytest.fixture(autouse=True)
def _plain(plain_compilation):
    pass
