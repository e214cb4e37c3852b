"""What a radiologist reads off the outline of one scan: lesions, their sizes, their side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, UInt8

from bhsd_jax.metrics import lesion

ONE_SIDE = 0.9  # of a lesion's voxels, or of a class's volume: less is on both


@dataclass(frozen=True)
class Lesion:
    """One connected bleed of one class."""

    name: str  # of the class
    ml: float
    voxels: int
    first_slice: int  # from 1, in the order of the label map's planes
    last_slice: int
    diameter_mm: float  # largest within a slice, between outer edges of voxels
    abc2_ml: float  # A x B x C / 2
    side: str  # "left", "right" or "both" of the midline; "" where that is not known
    center_mm: tuple[float, float, float]  # of mass; RAS+


@dataclass(frozen=True)
class Slices:
    """Where the planes of a label map lie, and how much each stands for."""

    affine: Float[np.ndarray, "4 4"]  # of rows and columns; planes are placed by `places`
    places: Float[np.ndarray, " N"]  # of the planes, in steps of the affine
    widths_mm: Float[np.ndarray, " N"]
    slice_ml: Float[np.ndarray, " N"]  # of a voxel

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance between rows, and between columns."""
        rows, columns = np.linalg.norm(self.affine[:3, 1:3], axis=0).tolist()
        return rows, columns


def lesions(
    label: UInt8[np.ndarray, "N H W"],
    classes: Sequence[str],
    slices: Slices,
    midline: Float[np.ndarray, " 4"] | None,
) -> list[Lesion]:
    """Every connected bleed, class by class, the largest first.

    `midline` is the plane a x + b y + c z + d = 0 (RAS+ mm, a > 0); where it is not known sides
    are "".

    Source: ABC/2: Kothari et al. 1996, doi:10.1161/01.STR.27.8.1304.
    """
    found = []
    for value, name in enumerate(classes[1:], start=1):
        mask = label == value
        if not mask.any():
            continue
        parts, _ = lesion.components(mask)
        own = [
            _measure(name, parts[box] == number, box[0].start, box, slices, midline)
            for number, box in enumerate(scipy.ndimage.find_objects(parts), start=1)
        ]
        found += sorted(own, key=lambda one: (-one.ml, one.first_slice, one.center_mm))
    return found


def diameter_mm(plane: Bool[np.ndarray, "H W"], pixel_mm: tuple[float, float]) -> float:
    """The largest distance between outer edges of a plane's voxels; 0 of none."""
    corners = _corners(plane) * pixel_mm
    if not len(corners):
        return 0.0
    return float(_distances(corners).max())


def _measure(
    name: str,
    mask: Bool[np.ndarray, "n h w"],
    first: int,
    box: tuple[slice, ...],
    slices: Slices,
    midline: Float[np.ndarray, " 4"] | None,
) -> Lesion:
    own = slice(first, first + len(mask))
    counts = mask.sum((1, 2))
    index = np.argwhere(mask) + [part.start for part in box]
    at = np.stack([slices.places[index[:, 0]], index[:, 1], index[:, 2]], 1)
    world = at @ slices.affine[:3, :3].T + slices.affine[:3, 3]
    weight = slices.slice_ml[index[:, 0]]
    center = (world * weight[:, None]).sum(0) / weight.sum()
    x, y, z = center.tolist()
    return Lesion(
        name=name,
        ml=float((counts * slices.slice_ml[own]).sum()),
        voxels=int(counts.sum()),
        first_slice=first + 1,
        last_slice=first + len(mask),
        diameter_mm=max(diameter_mm(plane, slices.pixel_mm) for plane in mask),
        abc2_ml=_abc2_ml(mask, counts, slices.widths_mm[own], slices.pixel_mm),
        side=_side(world, weight, midline),
        center_mm=(x, y, z),
    )


def _abc2_ml(
    mask: Bool[np.ndarray, "n h w"],
    counts: np.ndarray,
    widths_mm: np.ndarray,
    pixel_mm: tuple[float, float],
) -> float:
    """A: largest diameter, on the slice of the largest area; B: across it, there; C: height.

    Slices with more than 75 % of that area count whole, from 25 % on half, others not.
    """
    corners = _corners(mask[int(counts.argmax())]) * pixel_mm
    distances = _distances(corners)
    one, other = np.unravel_index(int(distances.argmax()), distances.shape)
    along = (corners[other] - corners[one]) / distances.max()
    across = corners @ np.array([-along[1], along[0]])
    share = counts / counts.max()
    height = (widths_mm * np.where(share > 0.75, 1.0, np.where(share >= 0.25, 0.5, 0.0))).sum()
    return float(distances.max() * np.ptp(across) * height / 2 / 1000)


def _side(
    world: Float[np.ndarray, "n 3"],
    weight: Float[np.ndarray, " n"],
    midline: Float[np.ndarray, " 4"] | None,
) -> str:
    if midline is None:
        return ""
    right = weight[world @ midline[:3] + midline[3] > 0].sum() / weight.sum()
    if right >= ONE_SIDE:
        return "right"
    return "left" if right <= 1 - ONE_SIDE else "both"


def _corners(plane: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "n 2"]:
    """Corners of the outermost voxels of each row, in rows and columns; the convex hull's among."""
    rows = np.flatnonzero(plane.any(1))
    if not len(rows):
        return np.zeros((0, 2))
    left = plane[rows].argmax(1)
    right = plane.shape[1] - plane[rows, ::-1].argmax(1)
    ends = [(rows + down, column) for down in (0, 1) for column in (left, right)]
    return np.concatenate([np.stack(pair, 1) for pair in ends]).astype(np.float64)


def _distances(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n n"]:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)
