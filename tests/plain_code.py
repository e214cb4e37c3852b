"""Machine code that compiles in half the time, for tests that compile much and compute little.

The programs are the same. LLVM leaves their code as it is, and fusions are written as loops instead
of by way of MLIR, which takes most of the compiler's time on CPUs. Not used where reference numbers
of other implementations are checked.
"""

import os

import jax
import jaxlib
from jax._src import compiler

# jaxlib 0.12 has no such option any more.
_EMITTERS = (
    {"xla_cpu_use_fusion_emitters": False} if jaxlib.version.__version_info__ < (0, 11) else {}
)
OPTIONS = {"xla_backend_optimization_level": 0, **_EMITTERS}  # of jax.jit


def environment():
    """Of a child process; beside the flags that ours has."""
    emitters = [f"--{name}={str(value).lower()}" for name, value in _EMITTERS.items()]
    flags = " ".join([os.environ.get("XLA_FLAGS", ""), *emitters])
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags.strip()}


def compile_in_one_piece():
    """The same code from one module of LLVM, here and in child processes.

    XLA makes up to 32 of them, to be compiled on as many cores. One takes a quarter less of the
    compiler's time, and all cores have tests to run.
    """
    from bhsd_jax.platform import startup

    name, flags = "xla_cpu_parallel_codegen_split_count", os.environ.get("XLA_FLAGS", "")
    if name not in flags and startup._jaxlib_knows(name):
        os.environ["XLA_FLAGS"] = f"{flags} --{name}=1".strip()


def compile_plainly():
    """Plain machine code of all programs of this process from now on.

    While `jax_disable_most_optimizations` is turned off again, it is a user's.
    """
    make = compiler.get_compile_options

    def plain(*places, **options):
        asked = options.pop("env_options_overrides", None) or {}
        told = OPTIONS if jax.config.read("jax_disable_most_optimizations") else {}
        return make(*places, env_options_overrides={**told, **asked}, **options)

    compiler.get_compile_options = plain
    jax.config.update("jax_disable_most_optimizations", True)
