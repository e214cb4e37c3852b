"""Convolutions of bfloat16 on a CPU: exact products of rounded values, summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_conv import CASES, SAME

from bhsd_jax.models import conv_bfloat16, conv_cpu
from bhsd_jax.models.conv import conv3d, conv_transpose
from bhsd_jax.platform import machine, processor

pytestmark = pytest.mark.usefixtures("full_compilation")


@pytest.fixture(params=[True, False], ids=["bits", "float32"])
def multiplied(request, monkeypatch):
    """With and without such instructions; products of bits are right everywhere, if slower."""
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: request.param)
    return request.param


def arrays(size, kernel, channels=9, features=10, batch=2):
    random = np.random.default_rng(3)  # JAX's would be compiled for every shape
    image, weight = (
        random.standard_normal(shape, np.float32)
        for shape in ((batch, *size, channels), (*kernel, channels, features))
    )
    return jnp.asarray(image, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)


def native(image, kernel, strides, padding):
    axes = ("NDHWC", "DHWIO", "NDHWC")
    return lax.conv_general_dilated(image, kernel, strides, padding, dimension_numbers=axes)


BLOCKS = [
    ((2, 6, 2050), (1, 3, 3), (1, 1, 1), SAME),  # wider than a block
    ((3, 70, 40), (3, 3, 3), (1, 1, 1), SAME),  # several blocks of rows
    ((12, 20, 17), (3, 3, 3), (1, 2, 1), SAME),  # several blocks of planes
]


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES + BLOCKS)
def test_output_and_both_gradients_are_those_of_the_rounded_values(size, kernel, strides, padding):
    image, weight = arrays(size, kernel, batch=1)

    @jax.jit
    def rounded(image, weight, grad):
        with jax.default_matmul_precision("highest"):
            want, pull = jax.vjp(lambda x, k: native(x, k, strides, padding), image, weight)
            return want, *pull(grad)

    @jax.jit
    def multiplied(image, weight, grad):
        return (
            conv_cpu.convolve(image, weight, strides, padding),
            conv_cpu.image_grad(grad, weight, strides, padding, size),
            conv_cpu.kernel_grad(grad, image, strides, padding, kernel),
        )

    shape = jax.eval_shape(lambda x, k: native(x, k, strides, padding), image, weight).shape
    grad = np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape).astype(jnp.bfloat16)
    given = [np.asarray(array) for array in (image, weight, grad)]
    wanted = rounded(*(array.astype(np.float32) for array in given))
    got = multiplied(*map(conv_bfloat16.bits, map(jnp.asarray, given)))
    *images, to_kernel = zip(got, wanted, strict=True)
    for ours, theirs in images:  # rounded once, by half a unit in the last of 8 bits
        ours = lax.bitcast_convert_type(ours, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=5e-5 * float(abs(theirs).max()))
    ours, theirs = to_kernel
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-5 * float(abs(theirs).max()))


@pytest.mark.parametrize("held", [conv_bfloat16.bits, lambda x: x.astype(jnp.float32)])
def test_blocks_side_by_side_give_the_same_numbers_as_one_after_another(held, monkeypatch):
    size, kernel = (4, 48, 64), (3, 3, 3)
    image, weight = map(held, arrays(size, kernel))
    grad = image[..., :1] + jnp.zeros(10, image.dtype)

    def passes(cores):
        monkeypatch.setattr(machine, "cores", lambda: cores * jax.local_device_count())

        @jax.jit
        def both(image, weight, grad):
            return (
                conv_cpu.convolve(image, weight, (1, 1, 1), SAME),
                conv_cpu.kernel_grad(grad, image, (1, 1, 1), SAME, kernel),
            )

        return jax.device_get(both(image, weight, grad))

    alone, abreast = passes(1), passes(3)
    assert conv_bfloat16.count_chains(12) == 3
    for one, other in zip(alone, abreast, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_layer_rounds_once_with_and_without_the_instructions(multiplied):
    image, kernel = arrays((3, 6, 5), (3, 3, 3))
    run = lambda x, k: conv3d(x, k, (1, 1, 1), SAME)  # noqa: E731
    got = jax.jit(run)(image, kernel)
    assert got.dtype == jnp.bfloat16
    want = native(image.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1, 1), SAME)
    # Half a unit in the last place of 8 bits, and what the order of float32 sums may turn.
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-4)
    text = jax.jit(run).lower(image, kernel).as_text()
    assert ("stablehlo.convolution" in text) == (not multiplied)
    grads = jax.jit(jax.grad(lambda x, k: run(x, k).astype(jnp.float32).sum(), (0, 1)))
    assert [g.dtype for g in grads(image, kernel)] == [jnp.bfloat16] * 2


def test_few_channels_are_convolved_in_float32(monkeypatch):
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: True)
    image, kernel = arrays((3, 6, 5), (3, 3, 3), channels=1)
    text = jax.jit(lambda x, k: conv3d(x, k, (1, 1, 1), SAME)).lower(image, kernel).as_text()
    assert "stablehlo.convolution" in text


def test_a_batch_over_devices_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: True)
    devices = jax.devices()
    image, kernel = arrays((4, 6, 8), (3, 3, 3), batch=len(devices))
    mesh = Mesh(np.array(devices), ("batch",))
    spread = jax.device_put(image, NamedSharding(mesh, PartitionSpec("batch")))
    run = jax.jit(
        jax.grad(lambda x, k: (conv3d(x, k, (1, 1, 1), SAME) ** 2).mean(dtype=jnp.float32))
    )
    text = run.lower(spread, kernel).compile().as_text()
    assert text is not None
    assert "all-gather" not in text
    np.testing.assert_array_equal(run(spread, kernel), run(image, kernel))


def test_products_of_bits_are_those_of_the_rounded_values():
    left, right = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((0, (6, 3, 4)), (1, (3, 4, 5)))
    )
    want = np.tensordot(left, right, 2)
    np.testing.assert_allclose(conv_bfloat16.contract(left, right, 2), want, atol=1e-5)
    got = conv_bfloat16.contract(*map(conv_bfloat16.bits, (left, right)), 2)
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (left, right)]
    np.testing.assert_allclose(got, np.tensordot(*rounded, 2), atol=1e-5)


@pytest.mark.parametrize("channels", [9, 3])
def test_pointwise_and_transposed_layers_are_rounded_once(multiplied, channels):
    image, kernel = arrays((3, 4, 5), (1, 2, 2), channels=channels)
    wide = [array.astype(jnp.float32) for array in (image, kernel)]

    def both(image, kernel):
        def run(image, kernel):
            return conv_transpose(image, kernel), conv3d(image, kernel[:, :1, :1])

        out, pull = jax.vjp(run, image, kernel)
        return out, pull(
            tuple(jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(o.dtype) for o in out)
        )

    got, want = jax.jit(both)(image, kernel), jax.jit(both)(*wide)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = float(abs(theirs).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=2**-7, atol=2**-7 * scale)
