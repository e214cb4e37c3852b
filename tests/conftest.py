"""Eight fake CPU devices, and shape annotations checked at run time."""

import gc
import pkgutil
import subprocess
from pathlib import Path

import jax
import jaxtyping
import plain_code
import pytest
from jax._src import compiler

import bhsd_jax
from bhsd_jax.platform import startup

startup.settle_compiler()  # as the program does
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


def pytest_collection_finish():
    """What is imported by now stays: searching it for garbage is a tenth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def quick_compilation(monkeypatch):
    """For tests that compile much and compute little: plain machine code of all programs.

    `jax_disable_most_optimizations` turned off again, it is a user's.
    """
    make = compiler.get_compile_options

    def quick(*places, **options):
        asked = options.pop("env_options_overrides", None) or {}
        plain = plain_code.OPTIONS if jax.config.read("jax_disable_most_optimizations") else {}
        return make(*places, env_options_overrides={**plain, **asked}, **options)

    monkeypatch.setattr(compiler, "get_compile_options", quick)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def full_compilation(quick_compilation):
    """For what is read from the compiled text, and for single bits, among quick compilations."""
    jax.config.update("jax_disable_most_optimizations", False)


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
