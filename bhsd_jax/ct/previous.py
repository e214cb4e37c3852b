"""A cascade's first label map, as the last channel of a prepared scan.

The second network of nnU-Net's 3D cascade is given the scan, and where the first, which has looked
at coarser voxels, has put every foreground label. Prepared scans hold that label map as one more
channel, which becomes one channel per label when a network is applied.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Num, UInt8
from scipy import ndimage

from bhsd_jax.ct import channels, geometry, saved_logits, scan
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.volume import Case, Grid, Plan, Volume


def channel(
    case: Case, every: Sequence[Volume], grid: Grid, plan: Plan
) -> tuple[UInt8[np.ndarray, "D H W"], list[Finding]]:
    """What a first network has predicted of a case, on the grid of the second.

    Args:
        case: Of which `previous` names a label map on the scan's own voxels, or a file of logits.
        every: All channels of the scan.
        grid: Of the second network's prepared scan.
        plan: Of the second network.

    Raises:
        Refusal: If none is named, or it is no label map of this scan and these classes.
        FileNotFoundError: If there is no such file.
    """
    if case.previous is None:
        raise Refusal(
            Kind.CHANNELS,
            f"{case.id}: no label map of {plan.previous_stage}, the first stage of this cascade; "
            "name a folder of them, or its run, with config.predict.previous",
        )
    if case.previous.name.endswith(saved_logits.ENDING):
        return saved_logits.label_on(case.previous, grid, plan.labels), []
    classes = len(plan.classes)
    label, found = scan.read_label(case.previous, case.image, every[0], num_classes=classes)
    return resampled(label.voxels, every, grid, plan), found


def resampled(
    label: UInt8[np.ndarray, "d h w"], every: Sequence[Volume], grid: Grid, plan: Plan
) -> UInt8[np.ndarray, "D H W"]:
    """A label map of the scan's own voxels on the grid.

    Where the scan is empty unlabeled voxels are a class of their own meanwhile, so that background
    does not outvote a label at the rim of the scan.

    Source: nnU-Net v2.8.1, `DefaultPreprocessor.run_case` in prediction, `crop_to_nonzero`.
    """
    if label.max() == np.iinfo(np.uint8).max:  # there is no further value
        return geometry.to_grid(label, grid, "label")
    apart = np.where(_empty(every, plan) & (label == 0), 0, label + 1).astype(np.uint8)
    return np.maximum(geometry.to_grid(apart, grid, "label"), 1) - 1


def append(
    image: Num[np.ndarray, "D H W *C"], label: UInt8[np.ndarray, "D H W"]
) -> Num[np.ndarray, "D H W C1"]:
    """A prepared scan with a label map of the same voxels as one more channel of the same type."""
    whole = image if image.ndim == 4 else image[..., None]
    return np.concatenate([whole, label[..., None].astype(image.dtype)], axis=-1)


def _empty(every: Sequence[Volume], plan: Plan) -> Bool[np.ndarray, "d h w"]:
    """Where a scan is 0 in all channels, but for holes; nowhere if it is cropped to a head."""
    shown = channels.union(every).voxels != 0
    if plan.crop_hu is not None:
        return np.zeros_like(shown)
    return ~np.asarray(ndimage.binary_fill_holes(shown))
