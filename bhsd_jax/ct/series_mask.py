"""A label map of a DICOM series, turned to the planes that were read of it."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from bhsd_jax.ct import geometry
from bhsd_jax.ct.dicom.stack import Stack
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.volume import Shape, Volume

_NEAR = 0.02  # of a slice step: how far outside those of a series a mask's may be

Turned = tuple[np.ndarray, list[Finding]]


def onto(label: Volume, shape: Shape, affine: Float64[np.ndarray, "4 4"]) -> Turned | None:
    """The label map in the order of these voxels, if they are its own; and what was found."""
    turned = geometry.onto(label, shape, affine)
    if turned is not None:
        return turned, []
    # Converters write tilted stacks with perpendicular axes: the same voxels, drawn upright.
    turned = geometry.onto(label, shape, _straightened(affine))
    if turned is None:
        return None
    text = "mask of a converter that hides the gantry's tilt; the series' is taken"
    return turned, [Finding(Kind.MASK_UPRIGHT, "kept", text)]


def onto_planes(label: Volume, stack: Stack, shape: Shape) -> Turned | None:
    """Of a label map with a plane for each slice of an uneven series: these, or all of `shape`.

    NIfTI knows no uneven steps. dcm2niix states the first, SimpleITK and `scan.write` the mean; and
    the place of the first slice, or of the last. A plane between slices has the nearest one's.
    """
    if stack.is_even:
        return None
    for affine in _stated(label, stack):
        found = onto(label, stack.own_shape, affine)
        if found is None:
            continue
        turned, findings = found
        planes, more = on_all_planes(turned, stack, shape)
        return planes, [*findings, *more]
    return None


def on_all_planes(drawn: np.ndarray, stack: Stack, shape: Shape) -> Turned:
    """Of a label map [slice, H, W] all planes of `shape`: between slices, the nearest one's."""
    if drawn.shape == shape:
        return drawn, []
    nearest = np.abs(np.arange(shape[0])[:, None] - stack.places).argmin(1)
    text = "mask on slices at uneven steps; planes between them have the nearest one's"
    return drawn[nearest], [Finding(Kind.MASK_UNEVEN, "kept", text)]


def _stated(label: Volume, stack: Stack) -> Iterator[Float64[np.ndarray, "4 4"]]:
    """Affines that a label map on the slices may have, with its own step between them."""
    own = stack.own_affine
    mean = float(np.linalg.norm(own[:3, 0]))
    steps = np.diff(stack.places_mm)
    low, high = mean * steps.min() / steps.mean(), mean * steps.max() / steps.mean()
    upright = _straightened(own)[:3, 0]
    for along, step in itertools.product((own[:3, 0], upright), label.spacing_mm):
        if not low * (1 - _NEAR) <= step <= high * (1 + _NEAR):
            continue
        first = own.copy()
        first[:3, 0] = along / np.linalg.norm(along) * step
        yield first
        last = first.copy()
        last[:3, 3] += (len(stack.slices) - 1) * (own[:3, 0] - first[:3, 0])
        yield last


def _straightened(affine: np.ndarray) -> np.ndarray:
    """With the step from slice to slice turned into the slices' normal, its length kept."""
    across = np.cross(affine[:3, 1], affine[:3, 2])
    across = across / np.linalg.norm(across)
    across = across * np.copysign(np.linalg.norm(affine[:3, 0]), across @ affine[:3, 0])
    straight = affine.copy()
    straight[:3, 0] = across
    return straight
