"""Convolution and matrix products of bfloat16 on CPUs that have instructions for them.

Such processors multiply bfloat16 and sum in float32 at twice the rate of float32 (AVX512-BF16) to
six times (AMX). XLA:CPU reaches that in matrix products alone: its convolutions of bfloat16 are
slower than those of float32, and every other operation on bfloat16 goes by way of float32, where
writing one row of an array converts the whole of it. So arrays are held here as the integers of
their bits, which are merely copied, and are bfloat16 only where they are multiplied.

A convolution is one matrix product a block of voxels. Of every line of the image its neighbors
along D and H are laid beside it, voxel by voxel, and the product gives what each of these voxels
adds to the outputs at all taps along W; those are then added, each moved by its tap. So what is
copied is as wide as the window along D and H alone.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt16

from bhsd_jax.platform import machine

Triple = tuple[int, int, int]  # along D, H, W

LEAST_CHANNELS = 8  # of image and output; below, copying costs more than the products save
_VOXELS = 1024  # of the output in a block, whose lines then stay in the cache
_MOST_CHAINS = 4  # each is compiled for itself


def bits(array: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """What the functions below take: the array as bfloat16, bit by bit."""
    return lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)


def contract(left: Array, right: Array, axes: int) -> Array:
    """Sum of products over the last axes of one and the first of the other.

    Of bits in float32, of what they stand for; otherwise in the type of the arrays.
    """
    before = tuple(range(left.ndim - axes, left.ndim))
    sums = ((before, tuple(range(axes))), ((), ()))
    if left.dtype != jnp.uint16:
        return lax.dot_general(left, right, sums)
    return _product(_values(left), _values(right), sums)


def convolve(
    image: UInt16[Array, "B D H W C"], kernel: UInt16[Array, "kd kh kw C F"], strides: Triple
) -> UInt16[Array, "B d h w F"]:
    """Cross-correlation without padding, summed in float32 and rounded once."""
    window, features = kernel.shape[:3], kernel.shape[4]
    sizes = zip(image.shape[1:4], window, strides, strict=True)
    blocks = _Blocks(tuple((n - k) // s + 1 for n, k, s in sizes), window, strides)
    image, places = blocks.without_stride(image), blocks.places
    taps, width = blocks.taps, blocks.shape[2]
    folded = resize(kernel, 2, taps * strides[2]).reshape(*window[:2], taps, -1, features)
    weights = _values(folded.transpose(0, 1, 3, 2, 4).reshape(-1, taps * features))

    def block(lines: Array, place: Array) -> tuple[Array, Array]:
        lines = blocks.lines(image, place, lines)
        by_tap = _product(blocks.rows(lines), weights, (((2,), (0,)), ((), ())))
        by_tap = by_tap.reshape(*lines.shape[:4], taps, features)
        shifted = (by_tap[..., tap : tap + width, tap, :] for tap in range(taps))
        return lines, bits(functools.reduce(jnp.add, shifted))

    def chained(rooms: tuple[Array, ...], places: Array) -> tuple[tuple[Array, ...], Array]:
        done = [block(room, place) for room, place in zip(rooms, places, strict=True)]
        return tuple(lines for lines, _ in done), jnp.stack([out for _, out in done])

    count = count_chains(len(places))
    rooms, rounds = (blocks.no_lines(image),) * count, places.reshape(-1, count, 2)
    if len(rounds) == 1:  # see `_loop`
        out = chained(rooms, rounds[0])[1]
    else:
        _, out = lax.scan(chained, rooms, rounds)
    # [blocks B planes lines W F]
    out = out.reshape(len(places), len(image), -1, *blocks.shape[2:], features)
    return out.swapaxes(0, 1).reshape(len(image), *blocks.shape, features)


def kernel_grad(
    grad: UInt16[Array, "B d h w F"],
    image: UInt16[Array, "B D H W C"],
    strides: Triple,
    window: tuple[int, ...],
) -> Float[Array, "kd kh kw C F"]:
    """Gradient of `convolve` to its kernel, whose size is `window`, in float32.

    The sum over samples comes last, as in `conv_cpu.kernel_grad`.
    """
    blocks = _Blocks(grad.shape[1:4], window, strides)
    channels, features, taps = image.shape[4], grad.shape[4], blocks.taps
    image = blocks.without_stride(image)
    batch, places, width = len(image), blocks.places, blocks.shape[2]
    # Lines as wide as the window sees, zeros behind each and in front of all of a block: moved by
    # one tap or more a block is the run that begins earlier.
    grads = resize(grad.reshape(batch, len(places), -1, width, features), 3, width + taps - 1)
    grads = grads.reshape(batch, len(places), -1, features)
    voxels = grads.shape[2]
    grads = resize(grads, 2, voxels + taps - 1, before=taps - 1).swapaxes(2, 3)

    def block(i: Array | int, room: Array) -> tuple[Array, Array]:
        lines = blocks.lines(image, places[i], room)
        own = lax.dynamic_index_in_dim(grads, i, 1, keepdims=False)
        moved = lax.gather(
            own,
            jnp.arange(taps - 1, -1, -1, jnp.int32)[:, None],
            lax.GatherDimensionNumbers((1, 2, 3), collapsed_slice_dims=(), start_index_map=(2,)),
            (batch, features, voxels),
            mode="promise_in_bounds",
        )
        left = _values(moved.swapaxes(0, 1).reshape(batch, -1, voxels))
        return lines, _product(left, blocks.rows(lines), (((2,), (1,)), ((0,), (0,))))

    count = count_chains(len(places))

    def chained(i: Array | int, state: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        done = [block(count * i + k, room) for k, room in enumerate(state[0])]
        total = functools.reduce(jnp.add, (product for _, product in done), state[1])
        return [lines for lines, _ in done], total

    room = blocks.no_lines(image)
    total = jnp.zeros((batch, taps * features, math.prod(room.shape[4:])))
    _, total = _loop(len(places) // count, chained, ([room] * count, total))
    folded = total.sum(0).reshape(taps, features, *window[:2], strides[2], -1)
    whole = folded.transpose(2, 3, 0, 4, 5, 1).reshape(*window[:2], -1, channels, features)
    return whole[:, :, : window[2]]


@dataclass(frozen=True)
class _Blocks:
    """An output in blocks of lines or of planes, and what a window sees of the voxels of one.

    As many voxels of a line as the stride along it count as one of so many times the channels.
    """

    shape: tuple[int, ...]  # of the output
    window: tuple[int, ...]
    strides: Triple

    @property
    def taps(self) -> int:
        """Length of the window along W, in voxels that count as one."""
        return -(-self.window[2] // self.strides[2])

    def without_stride(self, image: Array) -> Array:
        """The image with lines of such voxels, as many as the window sees."""
        width, stride = self.shape[2] + self.taps - 1, self.strides[2]
        if stride == 1:
            return image
        image = resize(image, 3, width * stride)
        return image.reshape(*image.shape[:3], width, -1)

    @functools.cached_property
    def planes_and_lines(self) -> tuple[int, int]:
        """Planes and lines of a block; one of several planes has all lines of each."""
        depth, height, width = self.shape
        lines = divisor(height, _VOXELS // width)
        return (divisor(depth, _VOXELS // (height * width)) if lines == height else 1), lines

    @property
    def places(self) -> Array:
        """First plane and line of every block, counted in voxels of the image."""
        steps = zip(self.shape, self.planes_and_lines, self.strides, strict=False)
        return jnp.array([*itertools.product(*(range(0, n * s, k * s) for n, k, s in steps))])

    def no_lines(self, image: Array) -> Array:
        """Zeros of the shape of `lines`, which fills them."""
        batch, *_, width, channels = image.shape
        taps = self.window[0] * self.window[1]
        return jnp.zeros((batch, *self.planes_and_lines, width, taps, channels), image.dtype)

    def lines(self, image: Array, place: Array, room: Array) -> Array:
        """The lines of the image that a block begins from, beside each voxel its neighbors."""
        batch, planes, lines, width, taps, channels = room.shape
        depth, height = (
            (n - 1) * s + 1 for n, s in zip((planes, lines), self.strides, strict=False)
        )
        ahead = jnp.array([*itertools.product(range(self.window[0]), range(self.window[1]))])

        def put(tap: Array | int, room: Array) -> Array:
            plane, line = place + ahead[tap]
            seen = lax.dynamic_slice(
                image, (0, plane, line, 0, 0), (batch, depth, height, width, channels)
            )
            seen = seen[:, :: self.strides[0], :: self.strides[1], :, None]
            return lax.dynamic_update_slice(room, seen, (0, 0, 0, 0, tap, 0))

        # A loop, because XLA would otherwise fuse the last copy into what reads it, element by
        # element.
        return _loop(taps, put, room)

    def rows(self, lines: Array) -> Float[Array, "B voxels K"]:
        """What the window sees of each voxel along D and H."""
        return _values(lines.reshape(len(lines), -1, math.prod(lines.shape[4:])))


def count_chains(blocks: int) -> int:
    """How many blocks a round of a loop does side by side.

    A block is a chain of copies and products, most of which XLA:CPU gives to one core. Chains that
    need nothing of each other it gives to several; so there are as many as a device has cores.
    """
    return divisor(blocks, min(machine.cores() // jax.local_device_count(), _MOST_CHAINS))


def _loop(count: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """A `fori_loop`, but of one round none.

    XLA (jaxlib 0.10.2) writes such a loop out and then folds constants in it wrongly: of an array
    that is transposed between two changes of its bits' type it forgets the transposition.
    """
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)


def _values(array: Array) -> Array:
    """The numbers of bfloat16 that bits stand for."""
    return lax.bitcast_convert_type(array, jnp.bfloat16)


def _product(left: Array, right: Array, axes: lax.DotDimensionNumbers) -> Array:
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def resize(array: Array, axis: int, length: int, before: int = 0) -> Array:
    """An axis made `length` long: zeros in front and behind; below 0, what is there is cut off."""
    config = [(0, 0, 0)] * array.ndim
    config[axis] = (before, length - before - array.shape[axis], 0)
    return lax.pad(array, jnp.zeros((), array.dtype), config)


def divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`; 1 if that is below 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and (n == 1 or n <= most))
