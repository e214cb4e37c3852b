#!/usr/bin/env bash
# XLA's partitioner multiplies the gradient of a convolution's kernel by the number of copies.
#
# Eight CPU devices as a mesh "copies" x "space". The rows of the image lie over `space`, the kernel
# is the same everywhere, and nothing is split over `copies`: both rows of devices compute the same.
# A 2-D convolution gives the right values and the right gradient of the image, but the gradient of
# its kernel is exactly as many times too large as there are copies: the compiled program sums it
# over all eight devices, the copies included, where only those of `space` hold parts of the sum.
# A kernel that is split over `copies` brings the same to the value of the convolution.
#
# It matters because nothing is said: a network with split patches trains, to other numbers. A mesh
# with two axes invites it (parameters over one, rows over the other), and so does a deep stage with
# fewer rows than devices. Spreading the rows over both axes, so that there are no copies, is right.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 "numpy<3"
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import jaxlib
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
image = jax.random.normal(jax.random.key(0), (2, 16, 8, 4))  # batch, rows, columns, channels
kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 8))


def convolve(image, kernel):
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=axes)


def total(image, kernel):
    return (convolve(image, kernel) ** 2).sum()


def ratio(function, rows, channels, *at):
    mesh = jax.make_mesh(at, ("copies", "space"), axis_types=(AxisType.Auto,) * 2)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((image, rows), (kernel, channels))]
    found, right = jax.jit(function)(*placed), function(image, kernel)
    return float(jnp.vdot(found, right) / jnp.vdot(right, right))


image_grad, kernel_grad = (jax.grad(total, argnums=i) for i in (0, 1))
rows, both, whole, split = P(None, "space"), P(None, ("copies", "space")), P(), P(None, None, None, "copies")
seen, expected = {}, {}
for copies, space in ((1, 8), (2, 4), (4, 2)):
    at = (copies, space)
    for name, function, where, channels, wrong in (
        ("value", convolve, rows, whole, 1),
        ("gradient of the image", image_grad, rows, whole, 1),
        ("gradient of the kernel", kernel_grad, rows, whole, copies),
        ("gradient of the kernel, rows over both axes", kernel_grad, both, whole, 1),
    ):
        key = f"copies {copies} x space {space}: {name}"
        seen[key], expected[key] = ratio(function, where, channels, *at), wrong
key = "copies 4 x space 2: value, kernel split over copies"
seen[key], expected[key] = ratio(convolve, rows, split, 4, 2), 4
print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {jax.devices()[0].platform}")
for key, value in seen.items():
    print(f"{key}: {value:.4f} times the right one (seen before: {expected[key]})")
same = all(abs(value - expected[key]) < 1e-3 for key, value in seen.items())
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM
