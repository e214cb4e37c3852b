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
    """Gradient to the kernel: the image convolved with the output gradient as a huge kernel.

    Here channels are the batch, and samples and planes the channels that are summed over. As for
    the image, each phase of an in-plane stride is a dense convolution of its own.
    """
    image = _pad(image, (padding[0], (0, 0), (0, 0)))
    taps = []
    for d in range(size[0]):
        last = d + (grad.shape[1] - 1) * strides[0] + 1
        planes = lax.slice_in_dim(image, d, last, strides[0], axis=1)
        phases = itertools.product(range(strides[1]), range(strides[2]))
        parts = [_phase_taps(grad, planes, strides, padding, size, phase) for phase in phases]
        nothing = jnp.zeros((*size[1:], image.shape[-1], grad.shape[-1]), grad.dtype)
        taps.append(functools.reduce(jnp.add, [p for p in parts if p is not None] or [nothing]))
    return jnp.stack(taps)


def _phase_taps(
    grad: Array,
    planes: Array,
    strides: Triple,
    padding: Padding,
    size: tuple[int, ...],
    phase: tuple[int, ...],
) -> Array | None:
    """Gradient to the taps `(h, w) = phase (mod stride)` of one kernel plane, zero elsewhere.

    None where there are no such taps, or all of them lie in the padding.
    """
    places, pads = [], []
    for axis in (1, 2):
        start, step = phase[axis - 1], strides[axis]
        taps = len(range(start, size[axis], step))
        first = start - padding[axis][0]  # image index under the first of these taps
        begin = first if first >= 0 else first % step
        before = (begin - first) // step
        wanted = taps + grad.shape[axis + 1] - 1 - before
        seen = min(len(range(begin, planes.shape[axis + 1], step)), max(wanted, 0))
        if not taps or not seen:
            return None
        stop = begin + (seen - 1) * step + 1
        planes = lax.slice_in_dim(planes, begin, stop, step, axis=axis + 1)
        places.append((start, size[axis] - start - (taps - 1) * step - 1, step - 1))
        pads.append((before, wanted - seen))
    # Padding inside the convolution: with `lax.pad` before it, this is three times slower.
    part = lax.conv_general_dilated(
        planes.reshape(-1, *planes.shape[2:]),
        grad.reshape(-1, *grad.shape[2:]),
        (1, 1),
        pads,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )
    return lax.pad(part, jnp.zeros((), part.dtype), [*places, (0, 0, 0), (0, 0, 0)])


def _pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around D, H, W; a negative count cuts."""
    if not any(map(any, padding)):
        return image
    zero = jnp.zeros((), image.dtype)
    return lax.pad(image, zero, [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
