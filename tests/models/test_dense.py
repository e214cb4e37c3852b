"""Linear layers, layer norms, GELU and softmax: own gradients against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.models.attention import softmax
from bhsd_jax.models.blocks import gelu
from bhsd_jax.models.dense import Dense, dense
from bhsd_jax.models.norms import LayerNorm, normalize_channels
from bhsd_jax.models.sums import (
    add_bias,
    max_of_channels,
    mean_of_voxels,
    sum_of_all_tokens,
    sum_of_channels,
)


def _both(own, plain, *arrays):
    """Results and gradients of both, to what is given, of a sum weighted at random."""
    weight = jax.random.normal(jax.random.key(9), jax.eval_shape(plain, *arrays).shape)

    def run(function):
        def loss(*arrays):
            out = function(*arrays)
            return (out * weight).sum(), out

        every = tuple(range(len(arrays)))
        grads, out = jax.jit(jax.grad(loss, every, has_aux=True))(*arrays)
        return out, *grads

    return run(own), run(plain)


def _agree(own, plain, *arrays):
    for got, want in zip(*_both(own, plain, *arrays), strict=True):
        assert got.shape == want.shape
        off = np.linalg.norm(np.subtract(got, want)) / np.linalg.norm(want)
        assert off < 5e-6


def _plain_norm(x, scale, bias):
    normal = x - x.mean(-1, keepdims=True)
    return normal / jnp.sqrt(jnp.square(normal).mean(-1, keepdims=True) + 1e-5) * scale + bias


# Blocks that divide the tokens, one block, and a number of tokens that has no divisors.
@pytest.mark.parametrize("tokens", [(4, 8, 64), (30,), (2, 509)])
def test_a_linear_layer_has_the_derived_gradient(tokens, key):
    x = jax.random.normal(key, (2, *tokens, 12))
    kernel, bias = jax.random.normal(key, (12, 20)), jnp.arange(20.0)
    _agree(dense, lambda x, kernel, bias: x @ kernel + bias, x, kernel, bias)
    _agree(lambda x, kernel: dense(x, kernel, None), jnp.matmul, x, kernel)


def test_a_linear_layer_in_bfloat16_sums_in_float32(key):
    x = (1 + jax.random.normal(key, (1, 1024, 8))).astype(jnp.bfloat16)
    layer = Dense(4, dtype=jnp.bfloat16)
    params = layer.init(key, x)
    assert layer.apply(params, x).dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(lambda params: layer.apply(params, x).astype(jnp.float32).sum()))(
        params
    )
    want = np.asarray(x, np.float64).sum((0, 1))
    got = np.asarray(grads["params"]["kernel"], np.float64)
    # Rounded once, at the end.
    np.testing.assert_allclose(got, np.tile(want[:, None], 4), rtol=2**-8)
    np.testing.assert_array_equal(grads["params"]["bias"], 1024.0)


@pytest.mark.parametrize("channels", [3, 48, 97, 768])
def test_a_layer_norm_has_the_derived_gradient(channels, key):
    x = 3 + jax.random.normal(key, (2, 4, 6, channels))
    scale, bias = 1 + 0.1 * jax.random.normal(key, (channels,)), jnp.linspace(-1, 1, channels)
    _agree(lambda *given: normalize_channels(*given, 1e-5), _plain_norm, x, scale, bias)


def test_a_layer_norm_is_the_formula_even_far_from_zero(key):
    x = 1000 + jax.random.normal(key, (2, 5, 96))
    got = jax.jit(LayerNorm(affine=False).apply)({}, x)
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5 + 4e3 * np.finfo(np.float32).eps)
    assert not jax.eval_shape(LayerNorm(affine=False).init, key, x)


def test_gelu_is_the_exact_one_in_any_type(key):
    x = jnp.concatenate([jnp.linspace(-12, 12, 97), jax.random.normal(key, (31,))])[None]
    _agree(gelu, lambda x: jax.nn.gelu(x, approximate=False), x)
    got, want = gelu(x.astype(jnp.bfloat16)), jax.nn.gelu(x, approximate=False)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-6, rtol=0.02)


@pytest.mark.parametrize("keys", [5, 64, 343])
def test_softmax_has_the_derived_gradient(keys, key):
    _agree(softmax, jax.nn.softmax, 5 * jax.random.normal(key, (2, 3, 7, keys)) + 80)


@pytest.mark.parametrize("shape", [(2, 3, 4, 64, 96), (1, 7, 37), (2, 1, 1, 1, 8)])
def test_sums_are_those_of_numpy(shape, key):
    values = jax.random.normal(key, shape)
    inner, wide = tuple(range(1, len(shape) - 1)), np.asarray(values, np.float64)
    for got, want in (
        (sum_of_all_tokens(values), wide.sum((0, *inner))),
        (sum_of_channels(values), wide.sum(-1, keepdims=True)),
    ):
        np.testing.assert_allclose(got, want, atol=2e-4)
    if len(shape) == 5:
        mean = mean_of_voxels(values)
        np.testing.assert_allclose(mean, wide.mean(inner, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(max_of_channels(values), values.max(-1, keepdims=True))
    _agree(add_bias, jnp.add, values, jnp.arange(float(shape[-1])))
