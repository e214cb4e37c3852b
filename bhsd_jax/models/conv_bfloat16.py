"""Convolution and matrix products of bfloat16 on CPUs that have instructions for them.

Such processors multiply bfloat16 and sum in float32 at twice the rate of float32 (AVX512-BF16) to
six times (AMX). XLA:CPU reaches that in matrix products alone: its convolutions of bfloat16 are
slower than those of float32, and every other operation on bfloat16 goes by way of float32, where
writing one row of an array converts the whole of it. So arrays are held here as the integers of
their bits, which are merely copied, and are bfloat16 only where they are multiplied.

A convolution is one matrix product a block of voxels, whose left side has all that the window sees
of a voxel in one row. Such rows are copied fastest if each is one run of memory, so two steps make
them: of every line of the image, its neighbors along D and H are laid beside it, voxel by voxel;
then a row is the run of as many voxels of that as the window is wide.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt16

Triple = tuple[int, int, int]  # along D, H, W

LEAST_CHANNELS = 8  # of image and output; below, gathering costs more than the products save
_VOXELS = 1024  # of the output in a block, whose gathered neighborhoods then stay in the cache


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
    places, room = blocks.places, blocks.no_lines(image)
    weights = _values(kernel.transpose(2, 0, 1, 3, 4).reshape(-1, features))

    def block(lines: Array, place: Array) -> tuple[Array, Array]:
        lines = blocks.lines(image, place, lines)
        return lines, bits(_product(blocks.neighborhoods(lines), weights, (((2,), (0,)), ((), ()))))

    if len(places) == 1:  # see `_loop`
        out = block(room, places[0])[1][None]
    else:
        _, out = lax.scan(block, room, places)  # [blocks B voxels F]
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
    batch, features, places = len(image), grad.shape[4], blocks.places
    grads = grad.reshape(batch, len(places), -1, features).swapaxes(2, 3)

    def block(i: Array | int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        lines = blocks.lines(image, places[i], state[0])
        left = _values(lax.dynamic_index_in_dim(grads, i, 1, keepdims=False))
        near = blocks.neighborhoods(lines)
        return lines, state[1] + _product(left, near, (((2,), (1,)), ((0,), (0,))))

    total = jnp.zeros((batch, features, math.prod(window) * image.shape[4]))
    _, total = _loop(len(places), block, (blocks.no_lines(image), total))
    by_tap = total.sum(0).reshape(features, window[2], *window[:2], -1)
    return by_tap.transpose(2, 3, 1, 4, 0)


@dataclass(frozen=True)
class _Blocks:
    """An output in blocks of lines or of planes, and what a window sees of the voxels of one."""

    shape: tuple[int, ...]  # of the output
    window: tuple[int, ...]
    strides: Triple

    @functools.cached_property
    def planes_and_lines(self) -> tuple[int, int]:
        """In a block; of several planes it has all lines."""
        depth, height, width = self.shape
        lines = divisor(height, _VOXELS // width)
        return (divisor(depth, _VOXELS // (height * width)) if lines == height else 1), lines

    @property
    def places(self) -> Array:
        """First plane and line of every block, counted in voxels of the image."""
        steps = zip(self.shape, self.planes_and_lines, self.strides, strict=False)
        return jnp.array([*itertools.product(*(range(0, n * s, k * s) for n, k, s in steps))])

    def no_lines(self, image: Array) -> Array:
        """Room for `lines`."""
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

        # Were it not a loop, its end would be compiled together with what reads it, number by
        # number.
        return _loop(taps, put, room)

    def neighborhoods(self, lines: Array) -> Float[Array, "B voxels K"]:
        """What the window sees of each voxel: its taps along W, D and H, and channels."""
        batch, planes, rows, width, taps, channels = lines.shape
        first = np.arange(planes * rows)[:, None] * width
        first = (first + np.arange(self.shape[2]) * self.strides[2]).reshape(-1, 1)
        size = taps * channels
        near = lax.gather(
            lines.reshape(batch, -1),
            jnp.asarray(first * size, jnp.int32),
            lax.GatherDimensionNumbers((0, 2), collapsed_slice_dims=(), start_index_map=(1,)),
            (batch, self.window[2] * size),
            mode="promise_in_bounds",
        )
        return _values(near)


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


def divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`; 1 if that is below 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and (n == 1 or n <= most))
