"""What the processor of this machine can do."""

import functools
import hashlib
import platform
from pathlib import Path


@functools.cache
def features() -> frozenset[str]:
    """Names of its instruction sets, as Linux has them; on other systems none are known."""
    return frozenset(_line().split())


def multiplies_bfloat16() -> bool:
    """Whether it has instructions for products of bfloat16, summed in float32."""
    return not features().isdisjoint(("avx512_bf16", "amx_bf16"))


def digest() -> str:
    """Names the kind of processor; machines that may run each other's programs share it."""
    return hashlib.sha256(_line().encode()).hexdigest()[:8]


def _line() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
