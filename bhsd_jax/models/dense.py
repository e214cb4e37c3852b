"""Linear layers over channels, whose gradients XLA:CPU computes fast.

Derived, the gradient of a bias is a sum over all tokens for one channel after the other: each walks
through the whole gradient, and computes again what was fused into it. Half of the time of a
transformer's linear layers was that. Here a loop on CPUs takes some tokens at a time, for the
kernel and the bias together, both as matrix products.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.conv import on_cpu
from bhsd_jax.models.conv_bfloat16 import bits, contract, divisor
from bhsd_jax.models.initializers import torch_bias, torch_uniform

_TOKENS = 512  # at a time; the products of so many stay in a core's cache
_FEW = 64  # smaller blocks, of numbers of tokens with few divisors, cost more than one large


class Dense(nn.Module):
    """Linear layer over the last axis; starts as PyTorch's unless told otherwise."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32
    kernel_init: Callable[..., Any] = torch_uniform
    bias_init: Callable[..., Any] | None = None  # None: PyTorch's

    @nn.compact
    def __call__(self, x: Float[Array, "B *n C"]) -> Float[Array, "B *n F"]:
        fan_in, bias = x.shape[-1], None
        kernel = self.param("kernel", self.kernel_init, (fan_in, self.features))
        if self.use_bias:
            init = self.bias_init or torch_bias(fan_in)
            bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return dense(x.astype(self.dtype), kernel.astype(self.dtype), bias)


@jax.custom_vjp
def dense(
    x: Float[Array, "B *n C"], kernel: Float[Array, "C F"], bias: Float[Array, " F"] | None
) -> Float[Array, "B *n F"]:
    """The product over the last axis, and the bias if there is one."""
    product = _times(x, kernel)
    return product if bias is None else product + bias


def _times(x: Array, kernel: Array) -> Array:
    return on_cpu(functools.partial(contract, axes=1), min(kernel.shape))(x, kernel)


def _dense(x: Array, kernel: Array, bias: Array | None):
    return dense(x, kernel, bias), (x, kernel, bias)


def _dense_grad(residuals: tuple[Any, ...], grad: Array):
    x, kernel, bias = residuals
    sums = lax.platform_dependent(x, grad, cpu=_sums_by_block, default=_sums)
    to_kernel, to_bias = (part.astype(kernel.dtype) for part in sums)
    return _times(grad, kernel.T), to_kernel, None if bias is None else to_bias


dense.defvjp(_dense, _dense_grad)


def _sums(x: Float[Array, "B *n C"], grad: Float[Array, "B *n F"]) -> tuple[Array, Array]:
    """Gradients of kernel and bias: sums over tokens of x times gradient, and of the gradient."""
    axes = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, grad, (axes, axes)).astype(jnp.float32), grad.sum(axes, jnp.float32)


def _sums_by_block(x: Array, grad: Array) -> tuple[Array, Array]:
    """The same, sample by sample: devices that share a batch then meet once, at the end."""
    left, right = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, grad))
    if left.dtype == jnp.bfloat16:
        left, right = bits(left), bits(right)
    return jax.tree.map(lambda part: part.sum(0), jax.vmap(_sums_of_sample)(left, right))


def _sums_of_sample(left: Array, right: Array) -> tuple[Array, Array]:
    tokens = len(left)
    size = divisor(tokens, _TOKENS)
    size = size if size >= _FEW else tokens
    ones = jnp.ones((1, size))
    ones = ones if left.dtype == jnp.float32 else bits(ones)

    def block(i: Array | int) -> tuple[Array, Array]:
        some = [lax.dynamic_slice_in_dim(a, i * size, size) for a in (left, right)]
        return contract(some[0].T, some[1], 1), contract(ones, some[1], 1)[0]

    if size == tokens:
        return block(0)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(block, 0))

    def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(jnp.add, total, block(i))

    return lax.fori_loop(0, tokens // size, add, zeros)
