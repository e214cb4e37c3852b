"""How parameters start: as in PyTorch's own layers, or as a reference draws them.

PyTorch reads the fan-in of a transposed convolution off the second axis of its (in, out, kernel)
weight, and the fan-out off the first: the other way round than for a convolution. The initializers
whose name ends in `transpose` do the same with a [D H W in out] kernel.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

_SWAPPED = {"in_axis": -1, "out_axis": -2}
_HE = 2 / 1.0001  # gain of a leaky ReLU with slope 0.01

# nnU-Net's: Kaiming normal, not truncated.
he_normal = nn.initializers.variance_scaling(_HE, "fan_in", "normal")
he_normal_transpose = nn.initializers.variance_scaling(_HE, "fan_in", "normal", **_SWAPPED)
# PyTorch's default for linear layers and convolutions: within 1 / sqrt(fan-in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
torch_uniform_transpose = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", **_SWAPPED)
# As CoTr draws its convolutions.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
fan_out_normal_transpose = nn.initializers.variance_scaling(2.0, "fan_out", "normal", **_SWAPPED)
# For positions. PyTorch's `trunc_normal_` cuts at +-2, which is 100 standard deviations here:
# nothing is ever cut.
trunc_normal = nn.initializers.normal(0.02)


def torch_bias(fan_in: int) -> Callable[..., Any]:
    """PyTorch's default for biases: uniform within 1 / sqrt(fan-in)."""
    bound = fan_in**-0.5

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
