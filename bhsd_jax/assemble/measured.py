"""What is told of a scan besides its label map: lesions, sides, and whether each class is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from bhsd_jax.ct import hu, midline, plausibility, scan
from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import measure
from bhsd_jax.metrics.measure import Lesion
from bhsd_jax.volume import Case, Plan, Volume


@dataclass(frozen=True)
class ScanVolumes:
    """One line of `volumes.csv`."""

    case: str
    tilt_deg: float  # gantry; 0 for MR
    # Time spent on reading, networks and writing of this scan, which run beside those of others;
    # waiting for others does not count. None: the label map was there already.
    seconds: float | None
    ml: Mapping[str, float]  # by foreground class
    tilt_corrected: bool = False  # they are the affine's times the cosine of the tilt
    warning: str = ""  # why the scan may not be in HU, or what was undone so that it is
    unlike: str = ""  # how it is unlike the training data
    disagreement: float | None = None  # of the networks, 0 to 1; None: not asked for
    lesions: Sequence[Mapping[str, Any]] = field(default=())  # fields of `measure.Lesion`
    present_ml: float = 0.0  # from how much on a class is said to be there; never of nothing
    all_ml: float | None = None  # of all regions together, which overlap; None: their sum

    @property
    def total_ml(self) -> float:
        """Volume of all classes, or of all regions together."""
        return sum(self.ml.values()) if self.all_ml is None else self.all_ml

    def flat(self) -> dict[str, Any]:
        """One value per column."""
        volumes = {f"{name}_ml": f"{value:.4f}" for name, value in self.ml.items()}
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        total = f"{self.total_ml:.4f}"
        tilt = {"tilt_deg": f"{self.tilt_deg:.2f}", "tilt_corrected": int(self.tilt_corrected)}
        last = {"seconds": seconds, "warning": self.warning, "unlike": self.unlike}
        last["disagreement"] = "" if self.disagreement is None else f"{self.disagreement:.4f}"
        row = {"case": self.case, **volumes, "all_ml": total, **tilt, **last}
        row["present_from_ml"] = f"{self.present_ml:g}"
        for name, found in self.bleeds().items():
            row[f"{name}_present"] = "yes" if found["present"] else "no"
            row[f"{name}_lesions"] = found["lesions"]
            row[f"{name}_largest_lesion_ml"] = _rounded(found["largest_lesion_ml"], 4)
            row[f"{name}_first_slice"] = found["first_slice"] or ""
            row[f"{name}_last_slice"] = found["last_slice"] or ""
            row[f"{name}_diameter_mm"] = _rounded(found["diameter_mm"], 1)
            row[f"{name}_side"] = found["side"]
        return row

    def listed(self) -> dict[str, Any]:
        """The entry in `volumes.json`: as in the table, numbers with all their digits."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        del plain["lesions"], plain["present_ml"]
        if self.all_ml is None:  # their sum says as much
            del plain["all_ml"]
        return plain | {"ml": dict(self.ml), "bleeds": self.bleeds()}

    def bleeds(self) -> dict[str, dict[str, Any]]:
        """By class: whether it is there, and its lesions, slices, size and side."""
        return {name: self._bleed(name, ml) for name, ml in self.ml.items()}

    def lesion_rows(self) -> list[dict[str, Any]]:
        """Lines of `lesions.csv`."""
        rows = []
        for number, lesion in enumerate(self.lesions, start=1):
            x, y, z = lesion["center_mm"]
            rows.append(
                {
                    "case": self.case,
                    "lesion": number,
                    "class": lesion["name"],
                    "ml": f"{lesion['ml']:.4f}",
                    "voxels": lesion["voxels"],
                    "first_slice": lesion["first_slice"],
                    "last_slice": lesion["last_slice"],
                    "diameter_mm": f"{lesion['diameter_mm']:.1f}",
                    "abc2_ml": f"{lesion['abc2_ml']:.4f}",
                    "side": lesion["side"],
                    "center_x_mm": f"{x:.1f}",
                    "center_y_mm": f"{y:.1f}",
                    "center_z_mm": f"{z:.1f}",
                }
            )
        return rows

    def _bleed(self, name: str, ml: float) -> dict[str, Any]:
        own = [lesion for lesion in self.lesions if lesion["name"] == name]
        return {
            "present": ml > 0 and ml >= self.present_ml,
            "lesions": len(own),
            "largest_lesion_ml": max((lesion["ml"] for lesion in own), default=None),
            "first_slice": min((lesion["first_slice"] for lesion in own), default=None),
            "last_slice": max((lesion["last_slice"] for lesion in own), default=None),
            "diameter_mm": max((lesion["diameter_mm"] for lesion in own), default=None),
            "side": _side(own),
        }


def lesions(
    case: Case,
    own: OwnSlices,
    label: np.ndarray,
    plan: Plan,
    labels: Labels,
    seen: Volume | None = None,
) -> list[Lesion]:
    """The lesions of every class or region on the scan's own slices; sides of head CT only.

    `seen` is what `scan.read` gave of the scan, if it was read already.

    Raises:
        ValueError: If the scan has become unreadable.
    """
    if not label.any():
        return []
    feed = case.table_feed and plan.modality == "ct"
    widths_mm = own.widths_mm * hu.slice_share(own.affine, table_feed=feed)
    slices = measure.Slices(own.affine, own.steps, widths_mm, own.slice_ml(table_feed=feed))
    middle = _midline(case, plan, seen)
    if not labels.regions:
        return measure.lesions(label, labels.names, slices, middle)
    found = []
    for (name, _), mask in zip(labels.targets, labels.masks(label), strict=True):
        named = (labels.names[0], name)
        found += measure.lesions(mask.astype(np.uint8), named, slices, middle)
    return found


def _midline(case: Case, plan: Plan, seen: Volume | None) -> np.ndarray | None:
    if plan.modality != "ct" or not scan.has_sides(case.image):
        return None
    volume = scan.read_native(case.image, seen)
    voxels = plausibility.in_hu(volume.voxels)
    # A network may take a scan that is not in HU, but the midline is found by HU alone.
    return None if voxels is None else midline.of(voxels, volume.affine)


def _side(own: Sequence[Mapping[str, Any]]) -> str:
    if not own or not all(lesion["side"] for lesion in own):
        return ""
    share = {"left": 0.0, "both": 0.5, "right": 1.0}
    right = sum(lesion["ml"] * share[lesion["side"]] for lesion in own)
    right /= sum(lesion["ml"] for lesion in own)
    if right >= measure.ONE_SIDE:
        return "right"
    return "left" if right <= 1 - measure.ONE_SIDE else "both"


def _rounded(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
