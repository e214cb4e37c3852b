"""3-D convolution that is fast on CPUs too, and the two linen layers on top of it.

XLA:CPU runs 3-D convolutions, their input gradients (`lhs_dilation`) and their weight gradients in
slow generic code, but 2-D convolutions and matrix products in tuned libraries. So on a CPU, and only
there, the three passes are composed of those; every other platform gets XLA's own convolution. The
choice falls when a program is lowered, so one jaxpr serves all platforms.

Every reshape keeps the batch axis the leading factor: a batch sharded over devices stays where it is.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Triple = tuple[int, int, int]  # along D, H, W
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # voxels before and after

_AXES_3D = ("NDHWC", "DHWIO", "NDHWC")
_AXES_2D = ("NHWC", "HWIO", "NHWC")
_ONE: Triple = (1, 1, 1)
_HE = 2 / 1.0001  # gain of a leaky ReLU with slope 0.01
he_normal = nn.initializers.variance_scaling(_HE, "fan_in", "normal")
# PyTorch takes the second axis of its (in, out, kernel) weight for the fan-in.
he_normal_transpose = nn.initializers.variance_scaling(
    _HE, "fan_in", "normal", in_axis=-1, out_axis=-2
)


def conv3d(
    image: Float[Array, "B D H W C"],
    kernel: Float[Array, "kd kh kw C F"],
    strides: Triple = _ONE,
    padding: Padding = ((0, 0), (0, 0), (0, 0)),
) -> Float[Array, "B d h w F"]:
    """Cross-correlation with zero padding, in the type of `image`; CPUs compute in float32.

    Differentiable once, in reverse mode. Kernel and image have one type, as `lax` demands.
    """
    if kernel.shape[:3] == strides == _ONE and not any(map(any, padding)):
        return _on_cpu_in_float32(_pointwise)(image, kernel[0, 0, 0])
    return _conv(image, kernel, strides, padding)


def conv_transpose(
    image: Float[Array, "B D H W C"], kernel: Float[Array, "kd kh kw C F"]
) -> Float[Array, "B d h w F"]:
    """Transposed convolution whose stride is its kernel: every voxel becomes a block.

    The kernel is not mirrored: `kernel[i, j, k]` makes the voxels at offset (i, j, k) of a block.
    """
    blocks = _on_cpu_in_float32(_spread)(image, kernel)  # [B D H W kd kh kw F]
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

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        shape = (*self.kernel, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        d, h, w = (((k - 1) // 2, (k - 1) // 2) for k in self.kernel)
        out = conv3d(image.astype(self.dtype), kernel, self.strides, (d, h, w))
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


class ConvTranspose(nn.Module):
    """Up-sampling by a transposed convolution whose kernel is its stride."""

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
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


def _pointwise(image: Array, kernel: Array) -> Array:
    return lax.dot_general(image, kernel, (((4,), (0,)), ((), ())))


def _spread(image: Array, kernel: Array) -> Array:
    return lax.dot_general(image, kernel, (((4,), (3,)), ((), ())))


def _on_cpu_in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """Library calls exist for float32 only; bfloat16 on a CPU would fall back to plain loops."""

    def apply(*arrays: Array) -> Array:
        if arrays[0].dtype == jnp.float32:
            return function(*arrays)
        return lax.platform_dependent(*arrays, cpu=_in_float32(function), default=function)

    return apply


def _in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(*arrays: Array) -> Array:
        return function(*(a.astype(jnp.float32) for a in arrays)).astype(arrays[0].dtype)

    return apply


def _native(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    return lax.conv_general_dilated(image, kernel, strides, padding, dimension_numbers=_AXES_3D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    static = {"strides": strides, "padding": padding}
    return lax.platform_dependent(
        image,
        kernel,
        cpu=_in_float32(functools.partial(composed_conv, **static)),
        default=functools.partial(_native, **static),
    )


def _forward(image: Array, kernel: Array, strides: Triple, padding: Padding):
    return _conv(image, kernel, strides, padding), (image, kernel)


def _backward(strides: Triple, padding: Padding, residuals: tuple[Array, Array], grad: Array):
    image, kernel = residuals
    native = functools.partial(_native, strides=strides, padding=padding)

    def native_image_grad(grad: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: native(x, kernel), image)(grad)[0]

    def native_kernel_grad(grad: Array, image: Array) -> Array:
        return jax.linear_transpose(lambda k: native(image, k), kernel)(grad)[0]

    def cpu_image_grad(grad: Array, kernel: Array) -> Array:
        return composed_image_grad(grad, kernel, strides, padding, image.shape[1:4])

    def cpu_kernel_grad(grad: Array, image: Array) -> Array:
        return composed_kernel_grad(grad, image, strides, padding, kernel.shape[:3])

    return (
        lax.platform_dependent(
            grad, kernel, cpu=_in_float32(cpu_image_grad), default=native_image_grad
        ),
        lax.platform_dependent(
            grad, image, cpu=_in_float32(cpu_kernel_grad), default=native_kernel_grad
        ),
    )


_conv.defvjp(_forward, _backward)


def composed_conv(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    """The sum over depth taps of 2-D convolutions, with depth folded into the batch."""
    inside = [(max(a, 0), max(b, 0)) for a, b in padding[1:]]
    # 2-D convolutions with negative padding leave the library; those margins are cut here.
    cut = [(min(a, 0), min(b, 0)) for a, b in padding[1:]]
    image = _pad(image, (padding[0], *cut))
    batch, depth, height, width, channels = image.shape
    taps = kernel.shape[0]
    out_depth = (depth - taps) // strides[0] + 1

    def tap(k: int) -> Array:
        last = k + (out_depth - 1) * strides[0] + 1
        planes = lax.slice_in_dim(image, k, last, strides[0], axis=1)
        planes = planes.reshape(batch * out_depth, height, width, channels)
        return lax.conv_general_dilated(
            planes, kernel[k], strides[1:], inside, dimension_numbers=_AXES_2D
        )

    total = functools.reduce(jnp.add, map(tap, range(taps)))
    return total.reshape(batch, out_depth, *total.shape[1:])


def composed_image_grad(
    grad: Array, kernel: Array, strides: Triple, padding: Padding, size: Triple
) -> Array:
    """Gradient to the image: one dense convolution per phase of the stride, interleaved.

    Image voxel `s q + r` met only the taps `t = r + p (mod s)`; for one phase r these form a small
    kernel of their own, and no zeros are ever multiplied.
    """
    whole = tuple(-(-n // s) for n, s in zip(size, strides, strict=True))
    phases = []
    for phase in itertools.product(*map(range, strides)):
        part = _phase_grad(grad, kernel, strides, padding, size, phase)
        phases.append(
            jnp.zeros((len(grad), *whole, kernel.shape[3]), grad.dtype)
            if part is None
            else _pad(part, tuple((0, a - b) for a, b in zip(whole, part.shape[1:4], strict=True)))
        )
    if len(phases) == 1:
        return phases[0]
    blocks = jnp.stack(phases, axis=4).reshape(len(grad), *whole, *strides, kernel.shape[3])
    full = [n * s for n, s in zip(whole, strides, strict=True)]
    dense = blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(grad), *full, kernel.shape[3])
    d, h, w = size
    return dense[:, :d, :h, :w]


def _phase_grad(
    grad: Array, kernel: Array, strides: Triple, padding: Padding, size: Triple, phase: Triple
) -> Array | None:
    """Gradient to the image voxels `stride * q + phase`; None where no tap or voxel is."""
    starts, pads = [], []
    for axis in range(3):
        s, r, before = strides[axis], phase[axis], padding[axis][0]
        start = (r + before) % s
        taps = len(range(start, kernel.shape[axis], s))
        count = len(range(r, size[axis], s))
        if not taps or not count:
            return None
        shift = (r + before - start) // s
        starts.append(start)
        pads.append((taps - 1 - shift, count + shift - grad.shape[axis + 1]))
    own = kernel[tuple(slice(start, None, s) for start, s in zip(starts, strides, strict=True))]
    # Without the barrier the mirrored kernel is fused into the convolution as slow index arithmetic.
    own = lax.optimization_barrier(own[::-1, ::-1, ::-1].swapaxes(3, 4))
    return composed_conv(grad, own, _ONE, tuple(pads))


def composed_kernel_grad(
    grad: Array, image: Array, strides: Triple, padding: Padding, size: Triple
) -> Array:
    """Gradient to the kernel: the image convolved with the output gradient as a huge kernel.

    Here channels are the batch, and samples and planes the channels that are summed over. As for
    the image, each phase of an in-plane stride is a dense convolution of its own.
    """
    image = _pad(image, padding)
    taps = []
    for d in range(size[0]):
        last = d + (grad.shape[1] - 1) * strides[0] + 1
        planes = lax.slice_in_dim(image, d, last, strides[0], axis=1)
        phases = itertools.product(range(strides[1]), range(strides[2]))
        parts = [_phase_taps(grad, planes, strides, size, phase) for phase in phases]
        taps.append(functools.reduce(jnp.add, [p for p in parts if p is not None]))
    return jnp.stack(taps)


def _phase_taps(
    grad: Array, planes: Array, strides: Triple, size: Triple, phase: tuple[int, int]
) -> Array | None:
    """Gradient to the taps `(h, w) = phase (mod stride)` of one kernel plane, zero elsewhere."""
    places = []
    for axis in (1, 2):
        start, step = phase[axis - 1], strides[axis]
        taps = len(range(start, size[axis], step))
        if not taps:
            return None
        reach = start + (taps + grad.shape[axis + 1] - 2) * step + 1
        planes = lax.slice_in_dim(planes, start, reach, step, axis=axis + 1)
        places.append((start, size[axis] - start - (taps - 1) * step - 1, step - 1))
    part = lax.conv_general_dilated(
        planes.reshape(-1, *planes.shape[2:]),
        grad.reshape(-1, *grad.shape[2:]),
        (1, 1),
        "VALID",
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )
    return lax.pad(part, jnp.zeros((), part.dtype), [*places, (0, 0, 0), (0, 0, 0)])


def _pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around D, H, W; a negative count cuts."""
    if not any(map(any, padding)):
        return image
    zero = jnp.zeros((), image.dtype)
    return lax.pad(image, zero, [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
