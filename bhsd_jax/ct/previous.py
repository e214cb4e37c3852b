"""A cascade's first label map, as the last channel of a prepared scan.

The second network of nnU-Net's 3D cascade is given the scan, and where the first, which has looked
at coarser voxels, has put every foreground label. Prepared scans hold that label map as one more
channel, which becomes one channel per label when a network is applied.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Num, UInt8

from bhsd_jax.ct import channels, saved_logits, scan
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
    return channels.label_on(label.voxels, every, grid, plan), found


def append(
    image: Num[np.ndarray, "D H W *C"], label: UInt8[np.ndarray, "D H W"]
) -> Num[np.ndarray, "D H W C1"]:
    """A prepared scan with a label map of the same voxels as one more channel of the same type."""
    whole = image if image.ndim == 4 else image[..., None]
    return np.concatenate([whole, label[..., None].astype(image.dtype)], axis=-1)
