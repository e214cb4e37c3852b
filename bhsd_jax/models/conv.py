"""3-D convolution that is fast on CPUs too, and the two linen layers on top of it.

XLA:CPU runs 3-D convolutions, their input gradients (`lhs_dilation`) and their weight gradients in
slow generic code, but 2-D convolutions and matrix products in tuned libraries. So on a CPU, and
only there, the three passes are composed of those (`conv_cpu`); every other platform gets XLA's own
convolution. The choice falls when a program is lowered, so one jaxpr serves all platforms. bfloat16
is multiplied as such where the processor can (`conv_bfloat16`), elsewhere in float32.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models import conv_bfloat16, conv_cpu
from bhsd_jax.models.conv_cpu import Padding, Triple
from bhsd_jax.models.initializers import he_normal, he_normal_transpose
from bhsd_jax.models.sums import add_bias
from bhsd_jax.platform import processor

_AXES_3D = ("NDHWC", "DHWIO", "NDHWC")
_ONE: Triple = (1, 1, 1)
_NO_PADDING: Padding = ((0, 0), (0, 0), (0, 0))
_CHANNELS_LAST = "xla_gpu_force_conv_nhwc"


def compiler_options(dtype: DTypeLike, platform: str, kind: str) -> dict[str, bool]:
    """What XLA has to be told of a program with these convolutions in `dtype`.

    Platform and kind are those of a `jax.Device`.

    For NVIDIA's GPUs XLA (jaxlib 0.10.2) gives images of 2-D convolutions in bfloat16 to cuDNN
    channels last, as their tensor cores want them, but those of 3-D convolutions channels first,
    which takes transposes of images and kernels around each. `XLA_FLAGS` of the user come first.
    """
    cuda = platform == "gpu" and kind.startswith("NVIDIA")
    if not cuda or dtype != jnp.bfloat16 or _CHANNELS_LAST in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {_CHANNELS_LAST: True}


def conv3d(
    image: Float[Array, "B D H W C"],
    kernel: Float[Array, "kd kh kw C F"],
    strides: Triple = _ONE,
    padding: Padding = _NO_PADDING,
) -> Float[Array, "B d h w F"]:
    """Cross-correlation with zero padding, in the type of `image`; CPUs sum in float32.

    Differentiable once, in reverse mode. Kernel and image have one type, as `lax` demands.
    """
    if kernel.shape[:3] == strides == _ONE and not any(map(any, padding)):
        if image.dtype == jnp.float32:
            return lax.dot_general(image, kernel[0, 0, 0], (((4,), (0,)), ((), ())))
        return _blocks(image, kernel).reshape(*image.shape[:4], -1)
    return _conv(image, kernel, strides, padding)


def conv_transpose(
    image: Float[Array, "B D H W C"], kernel: Float[Array, "kd kh kw C F"]
) -> Float[Array, "B d h w F"]:
    """Transposed convolution whose stride is its kernel: every voxel becomes a block.

    The kernel is not mirrored: `kernel[i, j, k]` makes the voxels at offset (i, j, k) of a block.
    """
    blocks = _blocks(image, kernel)  # [B D H W kd kh kw F]
    batch, *shape, kd, kh, kw, features = blocks.shape
    size = [n * k for n, k in zip(shape, (kd, kh, kw), strict=True)]
    return blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, features)


class Conv(nn.Module):
    """3-D convolution padded by (k - 1) // 2 on both sides, as PyTorch networks do.

    "SAME" would pad a strided convolution on one side only.
    """

    features: int
    kernel: Triple = (3, 3, 3)
    strides: Triple = _ONE
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32
    kernel_init: Callable[..., Any] = he_normal
    idle_bias: bool = False  # the bias is a parameter but not added: a norm would take it out again

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.kernel, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        d, h, w = (((k - 1) // 2, (k - 1) // 2) for k in self.kernel)
        out = conv3d(image.astype(self.dtype), kernel, self.strides, (d, h, w))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = out if self.idle_bias else out + bias.astype(self.dtype)
        return out


class ConvTranspose(nn.Module):
    """Up-sampling by a transposed convolution whose kernel is its stride."""

    transposed: ClassVar[bool] = True  # see `types.Backbone`
    features: int
    stride: Triple = (2, 2, 2)
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32
    kernel_init: Callable[..., Any] = he_normal_transpose

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.stride, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        out = conv_transpose(image.astype(self.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = add_bias(out, bias.astype(self.dtype))
        return out


def on_cpu(function: Callable[..., Array], channels: int) -> Callable[..., Array]:
    """`function`, which on CPUs is given float32 or bits of bfloat16, whatever they multiply fast.

    Of bfloat16 XLA:CPU would make plain loops. `function` takes arrays of one type, or bits as
    `conv_bfloat16` does; its result is rounded to their type. `channels` are the fewest of its
    arrays and of the result. Bits have no gradients: the caller has to give them.
    """

    def apply(*arrays: Array) -> Array:
        if arrays[0].dtype == jnp.float32:
            return function(*arrays)
        return lax.platform_dependent(*arrays, cpu=_cpu(function, channels), default=function)

    return apply


def _spread(image: Array, kernel: Array) -> Array:
    return conv_bfloat16.contract(image, jnp.moveaxis(kernel, 3, 0), 1)


@jax.custom_vjp
def _blocks(image: Array, kernel: Array) -> Array:
    return on_cpu(_spread, min(kernel.shape[3:]))(image, kernel)


def _blocks_forward(image: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _blocks(image, kernel), (image, kernel)


def _blocks_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    image, kernel = residuals
    fewest = min(kernel.shape[3:])

    def image_grad(grad: Array, kernel: Array) -> Array:
        return conv_bfloat16.contract(grad, kernel.swapaxes(3, 4), 4)

    def kernel_grad(grad: Array, image: Array) -> Array:
        return jax.linear_transpose(lambda k: _spread(image, k), kernel)(grad)[0]

    def cpu_kernel_grad(grad: Array, image: Array) -> Array:
        flat = grad.reshape(*grad.shape[:4], -1)  # a kernel of one voxel and many features
        to_kernel = conv_cpu.kernel_grad(flat, image, _ONE, _NO_PADDING, _ONE)
        return to_kernel.reshape(kernel.shape[3], *kernel.shape[:3], -1).transpose(1, 2, 3, 0, 4)

    return (
        on_cpu(image_grad, fewest)(grad, kernel),
        lax.platform_dependent(grad, image, cpu=_cpu(cpu_kernel_grad, fewest), default=kernel_grad),
    )


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _cpu(function: Callable[..., Array], channels: int) -> Callable[..., Array]:
    """Computed from float32, or from bits of bfloat16 where that is faster; rounded to the type.

    `channels` are the fewest of image and output.
    """

    def apply(*arrays: Array) -> Array:
        narrow = channels < conv_bfloat16.LEAST_CHANNELS
        if arrays[0].dtype != jnp.bfloat16 or narrow or not processor.multiplies_bfloat16():
            given = [a.astype(jnp.float32) for a in arrays]
        else:
            given = [conv_bfloat16.bits(a) for a in arrays]
        out = function(*given)
        if out.dtype == jnp.uint16:
            return lax.bitcast_convert_type(out, jnp.bfloat16)
        return out.astype(arrays[0].dtype)

    return apply


def _native(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    return lax.conv_general_dilated(image, kernel, strides, padding, dimension_numbers=_AXES_3D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    static = {"strides": strides, "padding": padding}
    return lax.platform_dependent(
        image,
        kernel,
        cpu=_cpu(functools.partial(conv_cpu.convolve, **static), min(kernel.shape[3:])),
        default=functools.partial(_native, **static),
    )


def _forward(image: Array, kernel: Array, strides: Triple, padding: Padding):
    return _conv(image, kernel, strides, padding), (image, kernel)


def _backward(strides: Triple, padding: Padding, residuals: tuple[Array, Array], grad: Array):
    image, kernel = residuals
    native = functools.partial(_native, strides=strides, padding=padding)
    fewest = min(kernel.shape[3:])

    def native_image_grad(grad: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: native(x, kernel), image)(grad)[0]

    def native_kernel_grad(grad: Array, image: Array) -> Array:
        return jax.linear_transpose(lambda k: native(image, k), kernel)(grad)[0]

    def cpu_image_grad(grad: Array, kernel: Array) -> Array:
        return conv_cpu.image_grad(grad, kernel, strides, padding, image.shape[1:4])

    def cpu_kernel_grad(grad: Array, image: Array) -> Array:
        return conv_cpu.kernel_grad(grad, image, strides, padding, kernel.shape[:3])

    return (
        lax.platform_dependent(
            grad, kernel, cpu=_cpu(cpu_image_grad, fewest), default=native_image_grad
        ),
        lax.platform_dependent(
            grad, image, cpu=_cpu(cpu_kernel_grad, fewest), default=native_kernel_grad
        ),
    )


_conv.defvjp(_forward, _backward)
