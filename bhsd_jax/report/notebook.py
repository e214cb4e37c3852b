"""The viewer of a scan inside a notebook: NiiVue's widget, from what the page shows."""

import importlib
from typing import Any

import numpy as np

from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.report import niivue, viewer
from bhsd_jax.report.viewer import Shown, Viewer

_OPACITY = 0.55  # of the bleeds


def widget(scan: Shown, around: Viewer) -> Any:
    """An `ipyniivue.NiiVue` with the scan and its bleeds in their colors, as on the page.

    Args:
        scan: What to show.
        around: Its classes and windows; the first window is taken.

    Raises:
        ValueError: If the extra `viewer` is not installed.
    """
    if not niivue.available():
        raise UserError(f"the widget needs NiiVue; {explain_extra('viewer')}")
    library = importlib.import_module("ipyniivue")
    low, high = (float(value) for value in np.percentile(scan.image, (2, 99.5)))
    if around.windows:
        _, level, width = around.windows[0]
        low, high = level - width / 2, level + width / 2
    image = library.Volume(
        data=viewer.as_nifti(viewer.compact(scan.image), scan.spacing_mm),
        name="scan.nii.gz",
        colormap="gray",
        cal_min=low,
        cal_max=high,
    )
    bleeds = library.Volume(
        data=viewer.as_nifti(scan.prediction, scan.spacing_mm),
        name="bleeds.nii.gz",
        opacity=_OPACITY,
    )
    bleeds.set_colormap_label(_colors(around.classes))
    made = library.NiiVue(is_radiological_convention=True, sagittal_nose_left=True, is_ruler=True)
    made.load_volumes([image, bleeds])
    return made


def _colors(classes: tuple[str, ...]) -> dict[str, Any]:
    shown = viewer.colors(classes)
    channels = {
        key: [0, *(int(color[at : at + 2], 16) for color in shown)]
        for key, at in (("R", 1), ("G", 3), ("B", 5))
    }
    alpha = [0] + [255] * len(classes)
    return {**channels, "A": alpha, "I": list(range(len(classes) + 1)), "labels": ["", *classes]}
