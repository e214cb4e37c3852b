"""The three passes of a 3-D convolution as sums of 2-D convolutions: what XLA:CPU runs fast.

Plain functions with no gradients of their own; `conv` ties them together. Shapes are those of
`conv.conv3d`, everything is float32. Every reshape keeps the batch axis the leading factor, so that
a batch sharded over devices stays where it is.
"""

import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Triple = tuple[int, int, int]  # along D, H, W
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # voxels before and after

_ONE: Triple = (1, 1, 1)
_ROWS = 4096  # voxels in a block of planes for the kernel's gradient
_AXES = ("NHWC", "HWIO", "NHWC")


def convolve(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
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
            planes, kernel[k], strides[1:], inside, dimension_numbers=_AXES
        )

    total = functools.reduce(jnp.add, map(tap, range(taps)))
    return total.reshape(batch, out_depth, *total.shape[1:])


def image_grad(
    grad: Array, kernel: Array, strides: Triple, padding: Padding, size: tuple[int, ...]
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
    grad: Array,
    kernel: Array,
    strides: Triple,
    padding: Padding,
    size: tuple[int, ...],
    phase: tuple[int, ...],
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
    # Without the barrier the mirrored kernel is fused into the convolution: slow indexing.
    own = lax.optimization_barrier(own[::-1, ::-1, ::-1].swapaxes(3, 4))
    return convolve(grad, own, _ONE, tuple(pads))


def kernel_grad(
    grad: Array, image: Array, strides: Triple, padding: Padding, size: tuple[int, ...]
) -> Array:
    """Gradient to the kernel: matrix products over all voxels, a few output planes at a time.

    Tap (d, h, w) sums `image[o + (d, h, w)] * grad[o]`, which is `image[q + (d, h, 0)] * grad[q -
    (0, 0, w)]`. So the planes shifted by (d, h), side by side, times the output gradients shifted
    by w, side by side, are all taps at once: both factors are copied a few times, where columns
    of every tap (`im2col`) would copy the image once per tap. Where that is less, for the first
    convolution and for strided ones, it is done.
    """
    rows, columns = size[1], size[2]
    channels, features = image.shape[-1], grad.shape[-1]
    shear = strides[2] == 1 and (columns - 1) * features < rows * (columns - 1) * channels
    batch, depth, height, width, _ = grad.shape
    image = _pad(image, (padding[0], (0, 0), (0, 0)))
    fitting = max(_ROWS // (batch * height * width), 1)
    planes = max(n for n in range(1, min(depth, fitting) + 1) if depth % n == 0)
    seen = (planes - 1) * strides[0] + size[0]

    def block(i: Array | int) -> Array:
        part = lax.dynamic_slice_in_dim(image, i * planes * strides[0], seen, 1)
        right = lax.dynamic_slice_in_dim(grad, i * planes, planes, 1)
        left = _windows(part, 1, size[0], strides[0], 0, planes)
        left = [
            x for plane in left for x in _windows(plane, 2, rows, strides[1], padding[1][0], height)
        ]
        if shear:
            full = image.shape[3]
            shifts = range(-padding[2][0], columns - padding[2][0])
            right = jnp.concatenate([_shift(right, 3, b, full) for b in shifts], -1)
        else:
            left = [
                x
                for row in left
                for x in _windows(row, 3, columns, strides[2], padding[2][0], width)
            ]
        flat = jnp.concatenate(left, -1)
        flat, right = (x.reshape(-1, x.shape[-1]) for x in (flat, right))
        return lax.dot_general(flat, right, (((0,), (0,)), ((), ())))

    blocks = depth // planes
    total = block(0)
    if blocks > 1:
        total = lax.fori_loop(1, blocks, lambda i, total: total + block(i), total)
    if not shear:
        return total.reshape(*size, channels, features)
    return total.reshape(*size[:2], channels, columns, features).swapaxes(2, 3)


def _windows(
    image: Array, axis: int, taps: int, stride: int, before: int, count: int
) -> list[Array]:
    """What each tap sees along an axis: voxels `stride * o + tap - before`, 0 outside."""
    length = (count - 1) * stride + 1
    return [
        lax.slice_in_dim(_shift(image, axis, before - tap, length), 0, length, stride, axis)
        for tap in range(taps)
    ]


def _shift(image: Array, axis: int, by: int, length: int) -> Array:
    """Moves the voxels up an axis, which is `length` long afterwards."""
    config = [(0, 0, 0)] * image.ndim
    config[axis] = (by, length - by - image.shape[axis], 0)
    return lax.pad(image, jnp.zeros((), image.dtype), config)


def _pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around D, H, W; a negative count cuts."""
    if not any(map(any, padding)):
        return image
    zero = jnp.zeros((), image.dtype)
    return lax.pad(image, zero, [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
