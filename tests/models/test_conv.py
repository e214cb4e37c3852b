"""The composed CPU convolution against XLA's own, and the layers on it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bhsd_jax.models.conv import Conv, ConvTranspose, conv3d, conv_transpose

AXES = ("NDHWC", "DHWIO", "NDHWC")
SAME = ((1, 1), (1, 1), (1, 1))
NONE = ((0, 0), (0, 0), (0, 0))
CASES = [  # size, kernel, strides, padding
    ((5, 6, 7), (3, 3, 3), (1, 1, 1), SAME),
    ((3, 7, 6), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1))),
    ((5, 8, 7), (3, 3, 3), (2, 2, 2), SAME),
    ((6, 5, 9), (2, 4, 5), (3, 1, 2), ((0, 1), (2, 1), (4, 0))),
    ((4, 5, 3), (3, 1, 3), (2, 2, 1), ((3, 4), (1, 0), (0, 5))),
    ((7, 7, 7), (3, 3, 3), (2, 2, 2), ((-1, 1), (1, -1), (-1, -1))),
    ((5, 4, 3), (1, 1, 1), (1, 1, 1), NONE),
    ((5, 7, 2), (2, 2, 2), (4, 3, 5), NONE),
    ((1, 1, 2), (3, 3, 3), (2, 2, 2), SAME),
]
BLOCKS = [  # of which a kernel's gradient is the sum
    ((2, 96, 20), (3, 3, 3), (1, 1, 1), SAME),  # two of lines of each plane
    ((40, 6, 7), (3, 3, 3), (1, 1, 1), SAME),  # several of the lines of all planes
    ((3, 50, 41), (2, 3, 2), (1, 2, 2), SAME),  # of lines, by phases of the stride
]


def _arrays(size, kernel, dtype=jnp.float32):
    random = np.random.default_rng(3)  # JAX's would be compiled for every shape
    image = random.standard_normal((2, *size, 3), np.float32)
    weight = random.standard_normal((*kernel, 3, 4), np.float32)
    return jnp.asarray(image, dtype), jnp.asarray(weight, dtype)


def _pass_values(function, image, kernel):
    """Output and both gradients of one random projection of it."""

    def project(image, kernel):
        out = function(image, kernel)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (weight * out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(project, (0, 1), has_aux=True))(image, kernel)
    return out, *grads


@pytest.mark.parametrize(("size", "kernel", "strides", "padding"), CASES + BLOCKS)
def test_conv3d_and_its_gradients_are_those_of_lax(size, kernel, strides, padding):
    image, weight = _arrays(size, kernel)
    native = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=AXES,
        precision=lax.Precision.HIGHEST,
    )
    got = _pass_values(lambda x, k: conv3d(x, k, strides, padding), image, weight)
    want = _pass_values(native, image, weight)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5)


def test_a_cpu_program_has_no_3d_convolution_and_others_have_no_2d_one():
    image, kernel = _arrays((2, 4, 4), (3, 3, 3))
    grads = jax.jit(jax.grad(lambda x, k: conv3d(x, k, (1, 2, 2), SAME).sum(), (0, 1)))
    exported = {
        platform: jax.export.export(grads, platforms=[platform])(image, kernel).mlir_module()
        for platform in ("cpu", "cuda")
    }
    ranks = {
        platform: {
            line[line.index("-> tensor<") :].count("x")
            for line in text.splitlines()
            if "stablehlo.convolution" in line
        }
        for platform, text in exported.items()
    }
    assert ranks["cpu"] == {4}
    assert ranks["cuda"] == {5}


def test_bfloat16_is_computed_in_float32_on_a_cpu_and_rounded_once(full_compilation):
    image, kernel = _arrays((3, 4, 5), (3, 3, 3), jnp.bfloat16)
    run = jax.jit(lambda x, k: conv3d(x, k, (1, 1, 1), SAME))
    wide = run(image.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_array_equal(run(image, kernel), wide.astype(jnp.bfloat16))


def test_gradients_have_the_types_of_image_and_kernel():
    image, kernel = _arrays((3, 4, 5), (3, 3, 3), jnp.bfloat16)
    grads = jax.eval_shape(
        jax.grad(lambda x, k: conv3d(x, k, (1, 1, 1), SAME).sum(), (0, 1)), image, kernel
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
def test_conv_transpose_is_that_of_lax_with_a_mirrored_kernel(stride):
    image, kernel = _arrays((2, 3, 4), stride)

    def native(image, kernel):
        mirrored = kernel[::-1, ::-1, ::-1]
        return lax.conv_transpose(image, mirrored, stride, "VALID", dimension_numbers=AXES)

    got = _pass_values(conv_transpose, image, kernel)
    want = _pass_values(native, image, kernel)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_conv_transpose_writes_the_kernel_unmirrored_behind_a_single_voxel():
    image = jnp.zeros((1, 2, 1, 1, 1)).at[0, 1].set(2.0)
    kernel = jnp.arange(6.0).reshape(1, 2, 3, 1, 1)
    out = conv_transpose(image, kernel)
    np.testing.assert_array_equal(out[0, 1, :, :, 0], [[0, 2, 4], [6, 8, 10]])
    assert not out[0, 0].any()


def test_a_strided_layer_pads_both_sides():
    layer = Conv(1, (1, 3, 3), (1, 2, 2), kernel_init=jax.nn.initializers.ones)
    image = jnp.arange(1.0, 17.0).reshape(1, 1, 4, 4, 1)
    out, _ = layer.init_with_output(jax.random.key(0), image)
    # Windows centered on rows and columns 0 and 2, as in PyTorch; "SAME" would center on 1 and 3.
    np.testing.assert_array_equal(out[0, 0, :, :, 0], [[14, 30], [57, 99]])


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(Conv(256, (1, 3, 3)), 64 * 9), (ConvTranspose(256, (2, 2, 2)), 256 * 8)],
)
def test_kernels_start_as_full_normals_of_the_reference_spread(layer, fan_in, key):
    init = jax.jit(layer.init)
    kernel = init(key, jnp.zeros((1, 1, 1, 1, 64)))["params"]["kernel"]
    std = np.sqrt(2 / (1.0001 * fan_in))
    np.testing.assert_allclose(kernel.std(), std, rtol=0.02)
    assert float(abs(kernel).max()) > 3.5 * std  # a truncated normal ends at 2.3


def test_a_batch_sharded_over_devices_needs_only_the_all_reduce_of_the_kernel(full_compilation):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    image = jax.ShapeDtypeStruct((8, 4, 64, 64, 2), jnp.float32, sharding=rows)
    kernels = tuple(
        jax.ShapeDtypeStruct((*shape, 2, 2), jnp.float32, sharding=everywhere)
        for shape in ((3, 3, 3), (1, 2, 2))
    )

    def loss(kernels, image):
        kernel, up = kernels
        hidden = conv_transpose(conv3d(image, kernel, (1, 2, 2), SAME), up)
        return jnp.square(conv3d(hidden, kernel, (1, 1, 1), SAME)).sum()

    text = jax.jit(jax.grad(loss)).lower(kernels, image).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1  # none in the loops over planes
    assert len(re.findall(r" while\(", text)) >= 2
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
