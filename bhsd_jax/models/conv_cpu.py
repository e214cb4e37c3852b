"""The three passes of a 3-D convolution as sums of 2-D convolutions: what XLA:CPU runs fast.

Plain functions with no gradients of their own; `conv` ties them together. Shapes are those of
`conv.conv3d`. The arrays given are float32 and so are the results; or they are the bits of bfloat16
(`conv_bfloat16`), and so are images that result. Every reshape keeps the batch axis the leading
factor, so that a batch sharded over devices stays where it is.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bhsd_jax.models import conv_bfloat16
from bhsd_jax.models.conv_bfloat16 import Triple, resize

Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # voxels before and after

_ONE: Triple = (1, 1, 1)
_VOXELS = 1024  # in a block for the kernel's gradient
_AXES = ("NHWC", "HWIO", "NHWC")


def convolve(image: Array, kernel: Array, strides: Triple, padding: Padding) -> Array:
    """The sum over depth taps of 2-D convolutions, with depth folded into the batch.

    Of bits of bfloat16 it is one matrix product a block.
    """
    if image.dtype == jnp.uint16:
        return conv_bfloat16.convolve(_pad(image, padding), kernel, strides)
    inside = [(max(a, 0), max(b, 0)) for a, b in padding[1:]]
    # XLA:CPU runs negative padding in generic code, so that such margins are cut off first.
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
    # Without the barrier XLA fuses the mirroring into the convolution, whose indexing gets slow.
    own = lax.optimization_barrier(own[::-1, ::-1, ::-1].swapaxes(3, 4))
    return convolve(grad, own, _ONE, tuple(pads))


def kernel_grad(
    grad: Array, image: Array, strides: Triple, padding: Padding, size: tuple[int, ...]
) -> Array:
    """Gradient to the kernel: every tap is one matrix product over all voxels, sample by sample.

    Phases of the stride are kernels of their own, as in `image_grad`. The sum over samples comes
    last, so that devices which share a batch have nothing to say to each other before.
    """
    if image.dtype == jnp.uint16:
        return conv_bfloat16.kernel_grad(grad, _pad(image, padding), strides, size)
    total = jnp.zeros(())
    for phase in itertools.product(*map(range, strides)):
        taps = [len(range(r, k, s)) for r, k, s in zip(phase, size, strides, strict=True)]
        if not all(taps):
            continue
        # Voxel `s o + tap - before` of the image is `o + tap // s - pad` of those of its phase.
        starts, pads = [], []
        for r, s, (before, _) in zip(phase, strides, padding, strict=True):
            starts.append((r - before) % s)
            pads.append(-((r - before) // s))
        part = image[:, *(slice(a, None, s) for a, s in zip(starts, strides, strict=True))]
        own = jax.vmap(functools.partial(_taps_grad, before=pads, taps=taps))(grad, part).sum(0)
        places = [
            (r, k - r - (n - 1) * s - 1, s - 1)
            for r, k, n, s in zip(phase, size, taps, strides, strict=True)
        ]
        total += lax.pad(own, jnp.zeros((), own.dtype), [*places, (0, 0, 0), (0, 0, 0)])
    return total


def _taps_grad(grad: Array, image: Array, before: list[int], taps: list[int]) -> Array:
    """One sample, stride 1: tap t gets the sum over voxels o of `image[o + t - before] grad[o]`.

    The image is transposed once: XLA:CPU multiplies [C, voxels] by [voxels, F] nearly twice as
    fast as [voxels, C] transposed. Its lines are as wide as the window sees, and the gradient's are
    made so with zeros: what a tap sees of a block of lines is then one run of memory a channel, and
    such runs are copied fast.
    """
    width, features, channels = *grad.shape[2:], image.shape[-1]
    sizes = [n + k - 1 for n, k in zip(grad.shape, taps, strict=False)]
    for axis, size in enumerate(sizes):
        image = resize(image, axis, size, before=before[axis])
    # Where a plane is smaller than a block, the lines of all planes are taken for those of one.
    flat = math.prod(grad.shape[1:3]) < _VOXELS / 4
    if flat:
        grad = resize(grad, 1, sizes[1]).reshape(1, -1, width, features)
        image = image.reshape(1, -1, *image.shape[2:])
    # What the last lines' taps see past their end is multiplied by zeros.
    image = resize(image, 1, image.shape[1] + taps[1]).transpose(0, 3, 1, 2)
    planes, height = grad.shape[:2]
    lines, wide = _divisor(height, _VOXELS / sizes[2]), sizes[2]
    ahead = [h * wide + w for h, w in itertools.product(*map(range, taps[1:]))]
    runs = lax.GatherDimensionNumbers((1, 2), collapsed_slice_dims=(0,), start_index_map=(0, 2))

    def block(i: Array | int) -> Array:
        plane, line = i // (height // lines), i % (height // lines) * lines
        right = lax.dynamic_slice(grad, (plane, line, 0, 0), (1, lines, width, features))
        right = resize(right, 2, wide).reshape(-1, features)
        # Outside the loop XLA would fuse this reshape with the transposition above.
        channels_first = image.reshape(len(image), channels, -1)
        products = []
        for tap in range(taps[0]):
            deep, down = (plane, line + tap * sizes[1]) if flat else (plane + tap, line)
            starts = jnp.stack([jnp.stack([deep, down * wide + run]) for run in ahead])
            seen = lax.gather(
                channels_first, starts, runs, (1, channels, len(right)), mode="promise_in_bounds"
            )
            products.append(seen.reshape(-1, len(right)) @ right)
        return jnp.concatenate(products).reshape(-1, channels, features)

    blocks = planes * (height // lines)
    count = conv_bfloat16.count_chains(blocks)

    def chained(i: Array | int, total: Array) -> Array:
        return functools.reduce(jnp.add, [block(count * i + k) for k in range(count)], total)

    total = jnp.zeros((math.prod(taps), channels, features))
    total = lax.fori_loop(0, blocks // count, chained, total)
    return total.reshape(*taps, channels, features)


def _divisor(number: int, wanted: float) -> int:
    """The divisor whose ratio to what is wanted is nearest to 1."""
    fits = (n for n in range(1, number + 1) if number % n == 0)
    return min(fits, key=lambda n: max(n / wanted, wanted / n))


def _pad(image: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Zeros around D, H, W; a negative count cuts."""
    if not any(map(any, padding)):
        return image
    zero = jnp.zeros((), image.dtype)
    return lax.pad(image, zero, [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)])
