"""Hounsfield units of files that got them wrong, and the gantry tilt their headers hide."""

import math

import numpy as np
from jaxtyping import Bool, Float, Float32, Num

from bhsd_jax.ct import geometry
from bhsd_jax.defects import Finding, Kind, Refusal

WRAPS_HU = 3095.5  # -1000 HU in unsigned 12 bits
LEAST_AIR = 0.2  # share of the edges of slices that must be wrapped air to undo an overflow
LOWEST_HU, HIGHEST_HU = -1024.0, 3071.0  # what 12 bits can hold
WRAPPED_HU = -20_000.0  # lower is metal that wrapped around in 16 bits
_FARTHEST_HU = 100_000.0  # wrapped and extended-range metal stays well within
_ORTHOGONAL = 1e-3  # largest cosine between two axes that count as perpendicular
_ALONG_X = math.cos(math.radians(1.0))  # an axis this close to x has not been turned away from it


def repair(
    voxels: Num[np.ndarray, "D H W"], *, clip: bool = True
) -> tuple[Float32[np.ndarray, "D H W"], list[Finding]]:
    """Undoes the wraps known from real head CT and, with `clip`, clips to what 12 bits can hold.

    In this order: a scan stored as unsigned 12 bits (nothing negative, nothing above 4096), where
    all below 0 HU came out near +3000, if that makes air of the edges of its slices; metal wrapped
    around in 16 bits (below -20000); padding (-2048, -3024) and extended-range metal, clipped. One
    value below -20000 that fills the corners of all slices is padding too (-32768), and is set to
    the lowest with `clip` or without. Which axis the slices follow does not matter. The findings
    say what was done, with counts; of clipped padding and metal in the same words. The input is not
    changed.

    Raises:
        Refusal: If values lie where no defect known puts HU.
    """
    low_hu, high_hu = float(voxels.min()), float(voxels.max())
    if max(-low_hu, high_hu) > _FARTHEST_HU:
        text = f"no HU: values {low_hu:g} to {high_hu:g}; look at the scale factors"
        raise Refusal(Kind.NO_HU, text)
    repaired = voxels.astype(np.float32)
    done = []
    if low_hu >= 0 and WRAPS_HU <= high_hu < 4096.5 and is_wrapped(repaired):
        # To whole numbers, as stored once: the floor of -1000 HU, read as 3095.98 instead of 3096
        # from behind scale factors, would stay above all bone.
        np.rint(repaired, out=repaired)
        repaired += 1000
        np.mod(repaired, 4096, out=repaired)
        repaired -= 1000
        text = "12-bit overflow undone: values wrapped back into -1000..3095 HU"
        done.append(Finding(Kind.OVERFLOW, "repaired", text))
    outside = _outside(repaired)
    if count := int(np.count_nonzero(outside)):
        np.copyto(repaired, LOWEST_HU, where=outside)
        text = f"padding of {voxels[0, 0, 0]:g} set to {LOWEST_HU:.0f} HU in {count} voxels"
        done.append(Finding(Kind.PADDING, "repaired", text))
    wrapped = repaired < WRAPPED_HU
    if count := int(np.count_nonzero(wrapped)):
        repaired[wrapped] += 65536
        done.append(Finding(Kind.WRAP, "repaired", f"16-bit wrap undone in {count} voxels"))
    low = int(np.count_nonzero(repaired < LOWEST_HU))
    high = int(np.count_nonzero(repaired > HIGHEST_HU))
    if clip and (low or high):
        np.clip(repaired, LOWEST_HU, HIGHEST_HU, out=repaired)
        text = f"clipped to {LOWEST_HU:.0f}..{HIGHEST_HU:.0f} HU: {low} voxels below, {high} above"
        done += [
            Finding(kind, "repaired", text)
            for kind, count in ((Kind.PADDING, low), (Kind.METAL, high))
            if count
        ]
    return repaired, done


def is_wrapped(voxels: Num[np.ndarray, "D H W"]) -> bool:
    """Whether a fifth or more of the edges of the slices is air that wrapped around in 12 bits.

    So it is in scans stored as unsigned without their offset, whose air lies at 3096..3596. Where
    a field of view is so tight that tissue fills its edges, bone and metal lie there as well, and
    nothing tells them apart. Slices follow any axis; it is that whose two ends show the least air.
    """
    air = []
    for axis in range(3):
        ends = voxels.take([0, -1], axis)
        air.append(float(np.mean((ends >= WRAPS_HU) & (ends < 4096 - 500))))
    return (sum(air) - min(air)) / 2 >= LEAST_AIR


def _outside(voxels: Float32[np.ndarray, "D H W"]) -> Bool[np.ndarray, "_ _ _"]:
    """Padding at the lowest value of a type: metal, which wraps there too, fills no corners."""
    lowest = voxels[0, 0, 0]
    if lowest < WRAPPED_HU:
        for axis in range(3):  # that of the slices may be any
            corners = np.moveaxis(voxels, axis, 0)[:, [[0], [-1]], [0, -1]]
            if (corners == lowest).all():
                return voxels == lowest
    return np.zeros((1, 1, 1), bool)


def tilt_deg(affine: Float[np.ndarray, "4 4"]) -> float:
    """Rotation about the left-right axis of an affine with perpendicular axes, in degrees.

    Converters write a tilted CT, which is a sheared stack, with such an affine: it is wrong by
    this angle. A sheared affine says where the slices really lie, and one turned about another
    axis as well is no gantry's: both give 0. Positive if the anterior direction points up.
    Which array axis runs which way does not matter.
    """
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(unit.T @ unit - np.eye(3)).max() > _ORTHOGONAL:
        return 0.0
    order, flip = geometry.canonical(affine)
    if abs(unit[0, order[2]]) < _ALONG_X:
        return 0.0
    posterior = unit[:, order[1]] * (-1 if flip[1] else 1)
    return math.degrees(math.atan2(-posterior[2], -posterior[1]))


def voxel_ml(affine: Float[np.ndarray, "4 4"], *, table_feed: bool) -> float:
    """Volume of a voxel in milliliters; with `table_feed`, corrected for the tilt of the gantry.

    With `table_feed`, which only the data set knows, a slice step that is turned about x is the
    feed of the table, longer than the distance between the slices by 1 / cos(tilt): uncorrected,
    26 degrees make every bleed 11 % too big. Of an oblique reformat, or a stack that was resampled
    upright, the affine is right as it is.
    """
    volume_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return volume_ml * slice_share(affine, table_feed=table_feed)


def slice_share(affine: Float[np.ndarray, "4 4"], *, table_feed: bool) -> float:
    """Distance between the slices over the affine's step; below 1 where that is a table feed."""
    if not tilt_corrected(affine, table_feed=table_feed):
        return 1.0
    return math.cos(math.radians(tilt_deg(affine)))


def tilt_corrected(affine: Float[np.ndarray, "4 4"], *, table_feed: bool) -> bool:
    """Whether the slice step is the table feed of a tilted scan, longer than the slice distance."""
    return table_feed and abs(tilt_deg(affine)) > geometry.LEAST_TILT_DEG


def tilt_findings(affine: Float[np.ndarray, "4 4"], *, table_feed: bool) -> list[Finding]:
    """Says of an affine turned about x that it does not show what turned it, unless it is known."""
    tilt = abs(tilt_deg(affine))
    if tilt <= geometry.LEAST_TILT_DEG or table_feed:
        return []
    excess = 100 / math.cos(math.radians(tilt)) - 100
    text = (
        f"turned by {tilt:.1f} degrees about x and taken as it is: right for an oblique reformat; "
        f"if it is a tilted gantry's stack drawn upright, mL are {excess:.1f} % too big"
    )
    return [Finding(Kind.TILT_AMBIGUOUS, "kept", text)]
