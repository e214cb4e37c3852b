"""Machine code that compiles in half the time, for tests that compile much and compute little.

The programs are the same. LLVM leaves their code as it is, and fusions are written as loops instead
of by way of MLIR, which takes most of the compiler's time on CPUs. Not used where reference numbers
of other implementations are checked.
"""

import jaxlib

# jaxlib 0.12 has no such option any more.
_EMITTERS = (
    {"xla_cpu_use_fusion_emitters": False} if jaxlib.version.__version_info__ < (0, 11) else {}
)
OPTIONS = {"xla_backend_optimization_level": 0, **_EMITTERS}  # of jax.jit
ENVIRONMENT = {  # of a process
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in _EMITTERS.items()),
}
