"""Instance normalization against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.models.blocks import require_patch
from bhsd_jax.models.norms import InstanceNorm


def _standardize(image, epsilon):
    return InstanceNorm(epsilon, affine=False).apply({}, image)


def _formula(image, epsilon):
    image = np.asarray(image, np.float64)
    mean, variance = image.mean((1, 2, 3), keepdims=True), image.var((1, 2, 3), keepdims=True)
    return (image - mean) / np.sqrt(variance + epsilon)


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1000.0, 1.0), (5.0, 1e-3)])
def test_an_instance_norm_is_the_formula_even_far_from_zero(offset, spread, key):
    image = offset + spread * jax.random.normal(key, (2, 3, 4, 5, 6))
    got = jax.jit(_standardize, static_argnums=1)(image, 1e-5)
    # A few last digits of the mean, in units of the result.
    rounding = 4 * np.finfo(np.float32).eps * offset / np.sqrt(spread**2 + 1e-5)
    np.testing.assert_allclose(got, _formula(image, 1e-5), atol=1e-5 + rounding)


def test_the_gradient_of_an_instance_norm_is_the_derived_one(key):
    image_key, grad_key = jax.random.split(key)
    image = 3 + jax.random.normal(image_key, (2, 2, 3, 4, 5))
    weight = jax.random.normal(grad_key, image.shape)

    def plain(image):
        mean = image.mean((1, 2, 3), keepdims=True)
        variance = jnp.square(image - mean).mean((1, 2, 3), keepdims=True)
        return (image - mean) / jnp.sqrt(variance + 1e-2)

    got = jax.jit(jax.grad(lambda x: (weight * _standardize(x, 1e-2)).sum()))(image)
    want = jax.jit(jax.grad(lambda x: (weight * plain(x)).sum()))(image)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_instance_norm_scales_and_shifts_each_channel(key):
    image = jax.random.normal(key, (2, 2, 3, 4, 2))
    params = {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([1.0, -3.0])}
    got = jax.jit(InstanceNorm().apply)({"params": params}, image)
    want = _formula(image, 1e-5) * [2.0, 0.5] + [1.0, -3.0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_instance_norm_without_affine_has_no_parameters():
    image = jax.ShapeDtypeStruct((1, 2, 2, 2, 3), jnp.float32)
    assert not jax.eval_shape(InstanceNorm(affine=False).init, jax.random.key(0), image)


def test_statistics_of_bfloat16_are_float32(key):
    image = (100 + jax.random.normal(key, (1, 4, 8, 8, 2))).astype(jnp.bfloat16)
    norm = InstanceNorm(affine=False, dtype=jnp.bfloat16)
    got = jax.jit(norm.apply)({}, image)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), _formula(image, 1e-5), atol=0.02)


def test_a_wrong_patch_is_refused_with_the_nearest_that_fits():
    require_patch("Net", (8, 64, 32), (4, 32, 32))
    with pytest.raises(ValueError, match=r"Net: patch \(1, 40, 50\).*nearest is \(4, 32, 64\)"):
        require_patch("Net", (1, 40, 50), (4, 32, 32))
