"""Eight fake CPU devices, and shape annotations checked at run time."""

import gc
import os
import pkgutil
import signal
import subprocess
from pathlib import Path

import jax
import jaxtyping
import plain_code
import pytest

import bhsd_jax
from bhsd_jax.platform import startup

ALL = bool(os.environ.get("BHSD_TEST_ALL"))  # all is compiled as the program compiles
startup.settle_compiler()  # as the program does
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` and some services ignore for all below
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

plain_code.compile_in_one_piece()
if not ALL:
    plain_code.compile_plainly()


def pytest_collection_finish():
    """What is imported by now stays: searching it for garbage is a tenth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def _compilation(request):
    """As the program compiles, where reference numbers of others are compared, else plain code."""
    asked = {*request.fixturenames}
    full = {"golden", "full_compilation"} & asked and "plain_compilation" not in asked
    if full and not ALL:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if full and not ALL:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def full_compilation():
    """Asked for by what is read from the compiled text, and for single bits."""


@pytest.fixture
def plain_compilation():
    """Asked for by tests with reference files that compile much beside what others check fully."""


@pytest.fixture
def golden():
    """Folder of small reference files."""
    return GOLDEN


@pytest.fixture
def disk(tmp_path):
    """Makes small file systems of their own: `disk("size=64k")`; whoever may not mount is skipped.

    Called again for the same place, it changes the options: `disk("ro", again=True)`.
    """
    place = tmp_path / "disk"

    def mount(options, again=False):
        place.mkdir(exist_ok=True)
        words = f"remount,{options}" if again else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)
