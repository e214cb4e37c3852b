"""Label maps on the voxels of their scans, one of several, and those with other class values."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from bhsd_jax.ct import geometry
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Volume

WAYS = ("first", "majority", "union", "intersection")
_SAME_PLACE_MM = 0.01  # two affines that put every voxel this close are the same


def lay(label: Volume, image: Volume, *, placed: bool) -> tuple[np.ndarray, list[Finding]]:
    """The voxels of a label map in the order of its image's, and what is to be said of its place.

    Where both have the same voxels in another order of axes, as after MONAI's `Orientation` or
    FSL's `fslreorient2std`, the label map is turned: an affine that was lost or mistaken would not
    hit the same places. Any other counts for nothing: the image's is taken, and the label map's
    voxels as they lie.

    Args:
        label: As its file has it.
        image: Its scan.
        placed: Whether the label map's file states a place at all.

    Raises:
        Refusal: If it has other voxels than its image.
    """
    turned = geometry.turned_onto(label, image) if placed else None
    if turned is not None:
        text = "label has its axes in another order than the image, on the same voxels; turned"
        return turned, [Finding(Kind.TURNED, "repaired", text)]
    require_shape(label.voxels, image)
    return label.voxels, _apart(label, image, placed=placed)


def require_shape(label: np.ndarray, image: Volume) -> None:
    """Refuses a label map of another shape than its image."""
    if label.shape != image.voxels.shape:
        raise Refusal(
            Kind.MASK_SHAPE,
            f"label has shape {label.shape} (D, H, W), but its image {image.voxels.shape}; draw it "
            "on this scan, or resample it onto the scan's voxels, nearest neighbor",
        )


def _apart(label: Volume, image: Volume, *, placed: bool) -> list[Finding]:
    """What is to be said of a label map whose affine is not that of its image; [] if it is.

    Source: nnU-Net v2.8.1, `verify_dataset_integrity`, which refuses another spacing.
    """
    apart_mm = geometry.distance_mm(label.affine, image.affine, label.voxels.shape)
    if apart_mm <= _SAME_PLACE_MM:
        return []
    alike = geometry.canonical(label.affine) == geometry.canonical(image.affine)
    sizes = [" x ".join(f"{mm:.4g}" for mm in one.spacing_mm) for one in (label, image)]
    same = np.allclose(label.spacing_mm, image.spacing_mm, rtol=geometry.SAME_SPACING)
    if alike and placed and not same:
        text = (
            f"label has voxels of {sizes[0]} mm, its image of {sizes[1]}, as if it had been drawn "
            "on another reconstruction; they are taken for the image's: look whether it fits"
        )
        return [Finding(Kind.MASK_SPACING, "kept", text)]
    if alike:
        text = f"label affine is up to {apart_mm:.3g} mm off the image's, which is taken"
        return [Finding(Kind.MASK_MOVED, "repaired", text)]
    text = (
        "label affine has axes that run the other way than the image's; its voxels are taken as "
        "they lie: look whether the mask is mirrored"
    )
    return [Finding(Kind.MASK_MIRRORED, "kept", text)]


def reclass(
    label: UInt8[np.ndarray, "D H W"], values: Sequence[int], num_classes: int | None, name: str
) -> UInt8[np.ndarray, "D H W"]:
    """Puts `values[v]` for v; () changes nothing.

    Raises:
        Refusal: If the label holds a value that has no class.
    """
    known = values or range(256 if num_classes is None else num_classes)
    if int(label.max()) >= len(known):
        odd = [value for value in np.unique(label).tolist() if value >= len(known)]
        raise Refusal(
            Kind.MASK_VALUES,
            f"{name}: label values {', '.join(map(str, odd[:10]))} have no class; the label map "
            f"knows 0..{len(known) - 1}",
        )
    return np.asarray(known, np.uint8)[label]


def combine(labels: Sequence[UInt8[np.ndarray, "D H W"]], way: str) -> UInt8[np.ndarray, "D H W"]:
    """One label map of several raters', voxel by voxel.

    "first" takes the first; "majority" the class with most votes, background being one, the lowest
    in a tie; "union" the foreground class with most votes wherever there is any; "intersection"
    the class that all agree on, else background.

    Raises:
        ValueError: If the way is another word.
    """
    if way not in WAYS:
        raise UserError(f"masks are combined by {', '.join(WAYS)}; got {way!r}")
    first = labels[0]
    if way == "first" or len(labels) == 1:
        return first
    if way == "intersection":
        agreed = np.all([label == first for label in labels[1:]], axis=0)
        return np.where(agreed, first, 0).astype(np.uint8)
    best: np.ndarray = np.zeros(first.shape, np.uint8)
    most: np.ndarray = np.zeros(first.shape, np.uint8)
    if way == "majority":
        most += np.sum([label == 0 for label in labels], axis=0, dtype=np.uint8)
    for index in range(1, max(int(label.max()) for label in labels) + 1):
        votes = np.sum([label == index for label in labels], axis=0, dtype=np.uint8)
        np.copyto(best, index, where=votes > most)
        np.maximum(most, votes, out=most)
    return best
