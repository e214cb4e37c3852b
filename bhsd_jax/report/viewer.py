"""One page to scroll through scans with their bleeds drawn; it needs no other file, no network."""

import base64
import colorsys
import html
import importlib.resources
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8

from bhsd_jax.ct import nifti
from bhsd_jax.platform import files
from bhsd_jax.report import niivue
from bhsd_jax.volume import Millimeters, Volume

CT_WINDOWS = (  # name, level and width in HU
    *(("Brain", 40, 80), ("Subdural", 80, 200)),
    *(("Stroke", 40, 40), ("Bone", 600, 2800)),
)
NO_WINDOWS: tuple[tuple[str, float, float], ...] = ()  # each scan's own range of intensities
_COLORS = {  # told apart with any color vision as far as five can be
    "EDH": "#f0e442",
    "IPH": "#ff6b5e",
    "IVH": "#56b4e9",
    "SAH": "#cc79d6",
    "SDH": "#35c79a",
}
_FURTHER = ("#ff6b5e", "#56b4e9", "#f0e442", "#35c79a", "#cc79d6", "#ff9f1c", "#b0b8ff")
_GOLDEN = 0.618034  # of a circle: steps that never come back near where they were


@dataclass(frozen=True, eq=False)
class Shown:
    """One scan of the page: axes as `volume` calls canonical, so that slice 1 is the lowest."""

    name: str
    image: Num[np.ndarray, "D H W"]  # HU, or intensity
    spacing_mm: Millimeters
    prediction: UInt8[np.ndarray, "D H W"]  # class by voxel
    reference: UInt8[np.ndarray, "D H W"] | None
    ml: Mapping[str, float]  # predicted, by foreground class
    dice: float | None = None  # bleeding against background; None: no reference
    review: float | None = None  # higher: look at it first
    flags: tuple[str, ...] = ()  # sentences a reader must see

    @property
    def center(self) -> tuple[int, int, int]:
        """Voxel (i, j, k) in the middle of the slice with most of the bleed."""
        mask = self.prediction if self.prediction.any() or self.reference is None else None
        mask = (self.reference if mask is None else mask) > 0  # pyright: ignore[reportOptionalOperand]
        d, h, w = (n // 2 for n in mask.shape)
        if mask.any():
            d = int(mask.sum((1, 2)).argmax())
            places = np.argwhere(mask[d])
            h, w = places[np.abs(places - places.mean(0)).sum(1).argmin()].tolist()
        return mask.shape[2] - 1 - w, mask.shape[1] - 1 - h, d


@dataclass(frozen=True)
class Viewer:
    """What stands around the scans."""

    title: str
    subtitle: str
    notice: str
    classes: tuple[str, ...]  # foreground
    windows: tuple[tuple[str, float, float], ...] = CT_WINDOWS  # name, level, width; or none
    unit: str = "HU"
    scans: int | None = None  # in all, where the page may hold only the first of them
    auto: bool = False  # with each scan's own range beside the windows


def write(
    path: str | Path, viewer: Viewer, scans: Iterable[Shown], *, most_mb: float = math.inf
) -> int:
    """Writes the page, one scan after the other, until it has `most_mb`; how many it has.

    Raises:
        ValueError: If the extra `viewer` is not installed.
        faults.WriteError: If the system says no, such as on a full disk.
    """
    module = niivue.module()
    listed: list[dict[str, Any]] = []
    with files.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write(_head(viewer.title))
        for number, scan in enumerate(scans):
            listed.append(_facts(scan, number, viewer))
            out.writelines(_volumes(scan, number))
            if out.tell() >= most_mb * 1e6:
                break
        out.write(_block("page", "application/json", _json(_page(viewer, listed))))
        out.write(
            f'<script type="module">\n{module}\n{_part("viewer.js")}</script></body></html>\n'
        )
    return len(listed)


def colors(classes: Sequence[str]) -> list[str]:
    """One for each foreground class, no two alike."""
    taken = {_COLORS[name] for name in classes if name in _COLORS}
    # Steps of the golden ratio give hues that lie apart, however many there are.
    more = (
        colorsys.hsv_to_rgb(_GOLDEN * k % 1, 0.55, 1 - 0.2 * (k % 2)) for k in itertools.count(1)
    )
    named = ("#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in more)
    free = (one for one in itertools.chain(_FURTHER, named) if one not in taken)
    return [_COLORS.get(name) or next(free) for name in classes]


def as_nifti(voxels: Num[np.ndarray, "D H W"], spacing_mm: Millimeters) -> bytes:
    """A canonical array as gzipped NIfTI in RAS+, its middle at the origin."""
    turned = np.ascontiguousarray(voxels[:, ::-1, ::-1])
    affine = np.zeros((4, 4))
    for axis, (mm, count) in enumerate(zip(spacing_mm, voxels.shape, strict=True)):
        affine[2 - axis, axis] = mm
        affine[2 - axis, 3] = -mm * (count - 1) / 2
    affine[3, 3] = 1
    return nifti.to_bytes(Volume(turned, affine, "scan"))


def compact(image: Num[np.ndarray, "D H W"]) -> Num[np.ndarray, "D H W"]:
    """HU as int16, for tenths of them are noise; other intensities as they are."""
    if image.dtype.kind != "f" or not 1000 <= np.abs(image).max() <= 32767:
        return image
    return np.rint(image).astype(np.int16)


def _head(title: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_part('viewer.css')}</style></head><body>"
        f"{_part('viewer.html')}\n"
    )


def _volumes(scan: Shown, number: int) -> Iterable[str]:
    masks = {
        "image": compact(scan.image),
        "prediction": scan.prediction,
        "reference": scan.reference,
    }
    for name, voxels in masks.items():
        if voxels is not None:
            packed = base64.b64encode(as_nifti(voxels, scan.spacing_mm)).decode()
            yield _block(f"{name}-{number}", "text/plain", packed)


def _facts(scan: Shown, number: int, viewer: Viewer) -> dict[str, Any]:
    d, h, w = scan.image.shape
    return {
        "number": number,
        "name": scan.name,
        "shape": (w, h, d),
        "center": scan.center,
        "ml": {name: round(scan.ml.get(name, 0.0), 3) for name in viewer.classes},
        "total": round(sum(scan.ml.values()), 3),
        "dice": scan.dice,
        "review": scan.review,
        "reference": scan.reference is not None,
        "range": [float(value) for value in np.percentile(scan.image, (2, 99.5))],
        "flags": scan.flags,
    }


def _page(viewer: Viewer, listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    orders = [{"key": "total", "title": "Largest first", "largest": True}]
    if any(one["dice"] is not None for one in listed):  # the page opens with the first order
        orders.insert(0, {"key": "dice", "title": "Worst first", "largest": False})
    if any(one["review"] is not None for one in listed):
        orders.append({"key": "review", "title": "Review first", "largest": True})
    orders.append({"key": "place", "title": "By name", "largest": False})
    places = {name: place for place, name in enumerate(sorted(one["name"] for one in listed))}
    windows: list[dict[str, Any]] = [
        {
            "name": name,
            "low": level - width / 2,
            "high": level + width / 2,
            "about": f"level {level:g}, width {width:g} {viewer.unit}".strip(),
        }
        for name, level, width in viewer.windows
    ]
    if viewer.auto or not windows:  # null: each scan's own range
        windows.append({"name": "Auto", "low": None, "high": None, "about": "2 % to 99.5 %"})
    few = f"; {len(listed)} of them are on this page" if len(listed) < (viewer.scans or 0) else ""
    drawn = zip(viewer.classes, colors(viewer.classes), strict=True)
    legend = [{"name": name, "color": color} for name, color in drawn]
    return {
        "title": viewer.title,
        "subtitle": viewer.subtitle + few,
        "notice": viewer.notice,
        "unit": viewer.unit,
        "classes": legend,
        "windows": windows,
        "orders": orders,
        "cases": [{**one, "place": places[one["name"]]} for one in listed],
    }


def _json(value: Any) -> str:
    """JSON that a script element can hold: nothing in it ends the element."""
    return json.dumps(value).replace("<", "\\u003c")


def _block(name: str, kind: str, text: str) -> str:
    return f'<script id="{name}" type="{kind}">{text}</script>\n'


def _part(name: str) -> str:
    place = importlib.resources.files("bhsd_jax.report") / "viewer_page" / name
    return place.read_text(encoding="utf-8")
