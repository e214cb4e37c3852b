"""Hounsfield units: repair of broken values, gantry tilt, volume of a voxel."""

import math

import numpy as np

AIR_HU, TOP_HU = -1024.0, 3071.0  # range of a 12-bit scanner
_TILT_FROM_DEG = 0.5  # below, an angle is patient positioning or rounding
_ORTHOGONAL = 1e-3  # largest cosine between two axes called perpendicular


def repair(voxels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """HU as float32 in -1024..3071, and what had to be done for it.

    In this order: an unsigned 12-bit overflow (all air brighter than bone), the 16-bit wrap of
    metal, then the clip, which also turns padding outside the field of view into air.

    Source: facts on BHSD, of which one scan has the first defect and five the second.
    """
    hu = np.asarray(voxels, np.float32)
    done = []
    lowest, highest = float(hu.min()), float(hu.max())
    if lowest >= 0 and float(np.median(hu[:: max(1, len(hu) // 8)])) > 1000:
        hu = np.mod(hu + 1000.0, 4096.0) - 1000.0
        done.append("12-bit overflow undone: negative HU had wrapped to about +3000")
    if lowest < -20000:
        hu = np.where(hu < -20000, hu + 65536.0, hu)
        done.append(f"16-bit wrap undone: values down to {lowest:.0f} HU")
    elif lowest < AIR_HU - 1:
        done.append(f"padding of {lowest:.0f} HU set to air")
    if highest > 4096:
        done.append(f"values up to {highest:.0f} HU cut at {TOP_HU:.0f}")
    return np.clip(hu, AIR_HU, TOP_HU), done


def tilt_deg(affine: np.ndarray) -> float:
    """Gantry tilt that a NIfTI affine hides: rotation of the slices about the left-right axis.

    Converters that cannot store a shear draw the table feed along the slice normal, so a tilted
    scan looks like a rotated block. 0 where the axes are not perpendicular, for then the shear is
    stored and the affine tells the truth, and where the slices do not lie along left-right.

    Args:
        affine: [4 4], columns D, H, W to x, y, z in mm.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = axes.T @ axes - np.eye(3)
    if np.abs(cosines).max() > _ORTHOGONAL:
        return 0.0
    across = np.abs(axes[0, 1:]).max()  # the in-plane axis along x
    if across < math.cos(math.radians(_TILT_FROM_DEG)):
        return 0.0
    normal = axes[:, 0]
    return math.degrees(math.atan2(abs(normal[1]), abs(normal[2])))


def voxel_ml(affine: np.ndarray, modality: str) -> float:
    """Volume of one voxel in mL; for tilted CT times the cosine of the tilt.

    The header's slice step of such a scan is the table feed, which is longer than the distance of
    the slices: volumes from the header are up to 11 % too large on BHSD.
    """
    volume = abs(float(np.linalg.det(affine[:3, :3]))) / 1000.0
    tilt = tilt_deg(affine) if modality == "ct" else 0.0
    if _TILT_FROM_DEG < tilt < 45:
        volume *= math.cos(math.radians(tilt))
    return volume
