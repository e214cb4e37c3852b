"""Convolution and matrix products of bfloat16 on CPUs that have instructions for them.

Such processors multiply bfloat16 and sum in float32 at twice the rate of float32 or more. XLA:CPU
reaches that in matrix products alone: its convolutions of bfloat16 are slower than those of
float32, and every other operation on bfloat16 goes by way of float32, where writing one row of an
array converts the whole of it. So arrays are held here as the integers of their bits, which are
merely copied, and are bfloat16 only where they are multiplied. All results are float32.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt16

Triple = tuple[int, int, int]  # along D, H, W

LEAST_CHANNELS = 8  # of image and output; below, gathering costs more than the products save
_VOXELS = 2048  # of the output in a block, whose gathered neighborhoods then stay in the cache


def bits(array: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """What `convolve` and `multiply` take: the array as bfloat16, bit by bit."""
    return lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)


def multiply(left: Array, right: Array) -> Float[Array, "M N"]:
    """Matrix product [M K] by [K N] in float32; of bits, of what they stand for."""
    if left.dtype == jnp.uint16:
        left, right = (lax.bitcast_convert_type(a, jnp.bfloat16) for a in (left, right))
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def convolve(
    image: UInt16[Array, "B D H W C"], kernel: UInt16[Array, "kd kh kw C F"], strides: Triple
) -> Float[Array, "B d h w F"]:
    """Cross-correlation without padding, sample by sample, in blocks of rows or of planes."""
    return jax.vmap(lambda one: _sample(one, kernel, strides))(image)


def _sample(image: Array, kernel: Array, strides: Triple) -> Array:
    (kd, kh, kw), features = kernel.shape[:3], kernel.shape[4]
    ends = zip(image.shape[:3], (kd, kh, kw), strides, strict=True)
    depth, height, width = ((n - k) // s + 1 for n, k, s in ends)
    rows = divisor(height, _VOXELS // width)
    planes = divisor(depth, _VOXELS // (height * width)) if rows == height else 1
    shape = ((planes - 1) * strides[0] + kd, (rows - 1) * strides[1] + kh, *image.shape[2:])
    # Of each voxel the neighbors along D and W lie side by side, and are one row of a product.
    places = np.arange(math.prod(shape[:3])).reshape(shape[:3])
    first = places[: shape[0] - kd + 1 : strides[0], :, : shape[2] - kw + 1 : strides[2]]
    near = jnp.asarray(first[..., None] + places[:kd, 0, :kw].ravel(), jnp.int32)
    weights = kernel.swapaxes(0, 1).reshape(kh, -1, features)

    def block(place: Array) -> Array:
        start = (place[0] * planes * strides[0], place[1] * rows * strides[1], 0, 0)
        part = lax.dynamic_slice(image, start, shape).reshape(-1, shape[3])
        gathered = part.at[near].get(mode="promise_in_bounds")

        def product(y: int) -> Array:
            left = lax.slice_in_dim(gathered, y, y + shape[1] - kh + 1, strides[1], axis=1)
            return multiply(left.reshape(planes * rows * width, -1), weights[y])

        return functools.reduce(jnp.add, map(product, range(kh)))

    order = itertools.product(range(depth // planes), range(height // rows))
    blocks = lax.map(block, jnp.array(list(order), jnp.int32))
    return blocks.reshape(depth, height, width, features)


def divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`; 1 if that is below 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and (n == 1 or n <= most))
