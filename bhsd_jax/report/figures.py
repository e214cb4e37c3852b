"""Pictures of a run: training curves, volume agreement, overlays. Needs the extra `report`."""

import base64
import importlib.util
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.platform import files, step_log
from bhsd_jax.platform.errors import UserError, explain_extra
from bhsd_jax.volume import bounding_box

logger = logging.getLogger(__name__)

_SLICES = 3  # of a scan, with contours
REFERENCE, PREDICTION = "#19d3f3", "#ff9f1c"  # told apart with any color vision, seen on gray
_INK, _FAINT = "#1f2933", "#9aa5b1"
_PANELS = 5  # side by side; more on a page cannot be read
_LEGEND = 120  # letters in a line of it
_LINES = ("-", "--", ":", "-.")  # of the first ten, the second, ...: there are ten colors


@dataclass(frozen=True)
class Overlay:
    """One scan with the reference and the predicted mask of one class."""

    image: np.ndarray  # [D H W] HU or intensity, canonical: as a radiologist looks at slices
    reference: np.ndarray  # bool [D H W]
    predicted: np.ndarray  # bool [D H W]
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float]  # intensity shown black, white


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_progress(metrics: Path, out: Path) -> None:
    """Writes the three panels nnU-Net users know: losses and Dice, seconds a step, learning rate.

    Without matplotlib nothing is drawn, and the log says how to get it.
    """
    if not available():
        logger.info("no %s, which needs matplotlib; %s", out.name, explain_extra("report"))
        return
    records = step_log.read(metrics)
    if records:
        files.write_bytes(out, progress_png(records))


def progress_png(records: Sequence[dict[str, Any]]) -> bytes:
    """Training curves as a PNG."""
    plt = _pyplot()
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9, 8), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    dice = top.twinx()
    top.plot(*_series(records, "train/loss"), color=_INK, lw=1.2)
    names = sorted({k for r in records for k in r if k.startswith("val/dice/")})
    for index, key in enumerate(names):
        label = key.removeprefix("val/dice/")
        style = {"lw": 2.2 if label == "mean" else 1.0, "ls": _LINES[index // 10 % len(_LINES)]}
        dice.plot(
            *_series(records, key), color=f"C{index % 10}", marker="o", ms=3, label=label, **style
        )
    top.set_ylabel("loss")
    dice.set_ylabel("validation Dice")
    dice.set_ylim(0, 1)
    if names:
        widest = max(len(name) for name in names) - len("val/dice/")
        columns = max(1, min(len(names), _LEGEND // (widest + 8)))
        figure.legend(loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    middle.plot(*_series(records, "time/step_s"), color=_INK, lw=1)
    middle.set_ylabel("s per step")
    middle.set_ylim(bottom=0)
    bottom.plot(*_series(records, "train/lr"), color=_INK, lw=1)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    return _png(figure)


def agreement_png(volumes: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Predicted against reference volume in mL, one panel per class; both axes symlog."""
    plt = _pyplot()
    columns = min(len(volumes), _PANELS)
    lines = math.ceil(len(volumes) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3.1 * columns, 3.3 * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(volumes) :]:
        axis.axis("off")
    for axis, (name, (reference, predicted)) in zip(axes.flat, volumes.items(), strict=False):
        top = 1.3 * max(1.0, *reference, *predicted)
        axis.plot([0, top], [0, top], color=_FAINT, lw=1, zorder=0)
        axis.scatter(reference, predicted, s=22, color=PREDICTION, edgecolor=_INK, lw=0.5)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_xlim(-0.1, top)
        axis.set_ylim(-0.1, top)
        axis.set_aspect("equal")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("reference (mL)")
    for line in axes:
        line[0].set_ylabel("predicted (mL)")
    return _png(figure)


def forest_png(
    rows: Sequence[tuple[str, float, float, float, float | None]], axis_title: str
) -> bytes:
    """One line per row, the first on top: value with its interval, and a printed value beside."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.34 * len(rows)), layout="constrained")
    for height, (_, value, low, high, printed) in enumerate(reversed(rows)):
        axis.plot([low, high], [height, height], color=_INK, lw=1.6, zorder=1)
        axis.scatter([value], [height], s=42, color=_INK, zorder=2)
        if printed is not None:
            axis.scatter(
                [printed], [height], s=52, facecolor="white", edgecolor=PREDICTION, lw=2, zorder=3
            )
    axis.set_yticks(range(len(rows)), [title for title, *_ in reversed(rows)])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(left=0)
    axis.grid(axis="x", color=_FAINT, lw=0.4)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(axis_title)
    return _png(figure)


def curves_png(series: Sequence[tuple[str, Sequence[tuple[int, float]]]], axis_title: str) -> bytes:
    """One line per series: shares by step, drawn in percent."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for title, points in series:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, [100 * v for v in values], lw=1.4, marker="o", ms=3, label=title)
    axis.set_xlabel("step")
    axis.set_ylabel(axis_title)
    axis.grid(color=_FAINT, lw=0.4)
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def reliability_png(curves: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Share of voxels that bleed against the probability given, one line per title."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axis.plot([0, 1], [0, 1], color=_FAINT, lw=1, zorder=0)
    for (title, points), color in zip(curves.items(), (_FAINT, PREDICTION, _INK), strict=False):
        axis.plot(*zip(*points, strict=True), color=color, marker="o", ms=4, label=title)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    axis.set_xlabel("probability of bleeding")
    axis.set_ylabel("share of voxels that bleed")
    axis.legend(loc="upper left", fontsize=8, frameon=False)
    return _png(figure)


def overlay_png(case: Overlay) -> bytes:
    """The plain slice with most of the lesion, then it and its neighbors with both contours."""
    plt = _pyplot()
    chosen = choose_slices(case.reference, case.predicted, _SLICES)
    area = _area(case.reference, case.predicted)
    middle = max(chosen, key=lambda index: int(area[index])) if area.any() else chosen[_SLICES // 2]
    rows, columns = _crop(case)
    height, width = case.spacing_mm[1], case.spacing_mm[2]
    figure, axes = plt.subplots(
        1, _SLICES + 1, figsize=(2.5 * (_SLICES + 1), 2.9), facecolor="black", layout="constrained"
    )
    for axis, index, drawn in zip(axes, [middle, *chosen], [False] + [True] * _SLICES, strict=True):
        axis.imshow(
            case.image[index, rows, columns],
            cmap="gray",
            vmin=case.window[0],
            vmax=case.window[1],
            aspect=height / width,
            interpolation="bilinear",
        )
        for mask, color in ((case.reference, REFERENCE), (case.predicted, PREDICTION)):
            part = mask[index, rows, columns]
            if drawn and part.any():
                axis.contour(part.astype(float), [0.5], colors=color, linewidths=1.3)
        axis.set_title(f"slice {index + 1} of {len(case.image)}", color="white", fontsize=8)
        axis.axis("off")
    return _png(figure)


def choose_slices(reference: np.ndarray, predicted: np.ndarray, count: int) -> list[int]:
    """Evenly spread over where the lesion is, about the slice with most of it, which is one.

    It is in the middle unless the scan ends there. Where the reference is empty the prediction
    decides; where both are, the middle of the scan.
    """
    area = _area(reference, predicted)
    middle = int(area.argmax()) if area.any() else len(area) // 2
    touched = np.flatnonzero(area)
    reach = max(1, len(touched) // (count + 1)) if len(touched) else 1
    nearest = (middle + reach * step for step in sorted(range(-count, count + 1), key=abs))
    found = [index for index in nearest if 0 <= index < len(area)][:count]
    return sorted([*found, *[middle] * (count - len(found))])


def _area(reference: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Area of the lesion by slice: the reference's, or the prediction's where that is empty."""
    return (reference if reference.any() else predicted).sum((1, 2))


def data_uri(png: bytes) -> str:
    """The picture as text for the `src` of an image, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _crop(case: Overlay) -> tuple[slice, slice]:
    """Rows and columns of the head: what is brighter than the window's black, and all masks."""
    shown = (case.image > case.window[0]).mean(0) > 0.1
    shown |= (case.reference | case.predicted).any(0)
    rows, columns = bounding_box(shown) or (slice(0, shown.shape[0]), slice(0, shown.shape[1]))
    return rows, columns


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _pyplot() -> Any:
    if not available():
        raise UserError(f"pictures need matplotlib; {explain_extra('report')}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor())
    _pyplot().close(figure)
    return buffer.getvalue()
