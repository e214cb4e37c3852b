"""Eight fake CPU devices, and shape annotations checked at run time."""

import pkgutil
from pathlib import Path

import jax
import jaxtyping
import pytest

import bhsd_jax

jax.config.update("jax_num_cpu_devices", 8)
# The words are left out: transformations rebuild pytree containers around specs and None.
_CHECKED = [
    f"bhsd_jax.{info.name}"
    for info in pkgutil.iter_modules(bhsd_jax.__path__)
    if info.name not in ("types", "volume", "main", "build")
]
jaxtyping.install_import_hook(
    _CHECKED,  # an int may stand for a float, as everywhere in Python
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def golden():
    """Folder of small reference files."""
    return GOLDEN
