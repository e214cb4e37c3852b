"""What can be counted on a head CT and its mask: how blood, brain, bone and noise look.

The same figures were taken of real scans; see `check`. All HU are cut to 0..255, as those were.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np
from scipy import ndimage

from bhsd_jax.metrics.threshold import Histogram, best_band

_BONE_HU = 200.0
_SOFT_HU = (0.0, 100.0)  # between air and bone, bounds excluded
_RING_MM = (1.0, 4.0)  # from a mask: its surroundings
_AROUND_MM = 3.0  # of a mask: not flat brain
_RIM_MM = 5.0  # of the brain, likewise
_WINDOW = 16  # pixels: edge of a piece of flat brain
_FLAT_HU = (20.0, 45.0)  # its mean
_LAGS = (1, 2, 3)  # pixels
_BAND_HU = np.arange(20, 141)
_RAYS = 72  # through the skull
_LEAST_BRAIN_MM2 = 5000.0  # where skull and noise are looked at


@dataclass
class Figures:
    """Collected slice by slice; lists hold one entry per slice."""

    over_100: dict[int, int] = field(default_factory=dict)  # voxels, by class, as the next two
    under_20: dict[int, int] = field(default_factory=dict)
    voxels: dict[int, int] = field(default_factory=dict)
    pieces: dict[int, list[np.ndarray]] = field(default_factory=dict)  # sizes in voxels
    area_cm2: dict[int, list[float]] = field(default_factory=dict)
    blood_hu: dict[int, list[float]] = field(default_factory=dict)
    contrast_hu: dict[int, list[float]] = field(default_factory=dict)
    noise_hu: list[float] = field(default_factory=list)
    correlation: list[list[float]] = field(default_factory=list)  # by lag
    brain_hu: list[np.ndarray] = field(default_factory=list)  # percentiles 5, 25, 50, 75, 95
    skull_mm: list[float] = field(default_factory=list)  # of every ray
    bands: list[Histogram] = field(default_factory=list)

    def add(self, hu: np.ndarray, label: np.ndarray, pixel_mm: float) -> None:
        """Takes the slices of one scan [D H W] on which a class bleeds most."""
        chosen = set()
        for index in np.unique(label[label > 0]).tolist():
            area = (label == index).sum((1, 2))
            chosen.add(k := int(area.argmax()))
            self._add_class(index, _shown(hu[k]), label[k], pixel_mm)
        for k in sorted(chosen):
            self._add_slice(_shown(hu[k]), label[k] > 0, pixel_mm)

    def join(self, other: "Figures") -> None:
        """Takes what another collected."""
        for name in (f.name for f in fields(self)):
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine.extend(more)
            else:
                for index, value in more.items():
                    mine[index] = mine[index] + value if index in mine else value

    def table(self) -> dict[tuple[str, int], float]:
        """The figures by their name and the class they belong to; 0: to none."""
        found: dict[tuple[str, int], float] = {}
        for index, voxels in sorted(self.voxels.items()):
            sizes = np.concatenate(self.pieces[index])
            found["share above 100 HU", index] = self.over_100[index] / voxels
            found["share below 20 HU", index] = self.under_20[index] / voxels
            found["pieces per slice", index] = _median(map(len, self.pieces[index]))
            found["share of pieces of one voxel", index] = float((sizes == 1).mean())
            found["HU", index] = _median(self.blood_hu[index])
            found["HU above its surroundings", index] = _median(self.contrast_hu[index])
            found["cm2 per slice", index] = _median(self.area_cm2[index])
        if self.noise_hu:
            found["noise, HU", 0] = _median(self.noise_hu)
            for lag, column in zip(_LAGS, zip(*self.correlation, strict=True), strict=True):
                found[f"noise, correlation at {lag} px", 0] = _median(column)
            brain = np.median(self.brain_hu, axis=0)
            for percent, value in zip((5, 25, 50, 75, 95), brain, strict=True):
                found[f"brain, HU, {percent} %", 0] = float(value)
            for percent in (10, 50, 90):
                found[f"skull, mm, {percent} %", 0] = float(np.percentile(self.skull_mm, percent))
        if self.bands:
            found["Dice of the best threshold", 0] = best_band(self.bands).mean_dice
        return found

    def _add_class(self, index: int, hu: np.ndarray, label: np.ndarray, pixel_mm: float) -> None:
        own = label == index
        values = hu[own]
        pieces, _ = ndimage.label(own)  # pyright: ignore[reportGeneralTypeIssues]
        gap = np.asarray(ndimage.distance_transform_edt(~own)) * pixel_mm
        ring = (gap > _RING_MM[0]) & (gap <= _RING_MM[1]) & (label == 0)
        around = hu[ring & (hu > _SOFT_HU[0]) & (hu < _SOFT_HU[1])]
        for total, found in (
            (self.over_100, values > 100),
            (self.under_20, values < 20),
            (self.voxels, own),
        ):
            total[index] = total.get(index, 0) + int(found.sum())
        self.pieces.setdefault(index, []).append(np.bincount(pieces.ravel())[1:])
        self.area_cm2.setdefault(index, []).append(values.size * pixel_mm**2 / 100)
        self.blood_hu.setdefault(index, []).append(float(np.median(values)))
        if around.size:
            contrast = float(np.median(values) - np.median(around))
            self.contrast_hu.setdefault(index, []).append(contrast)

    def _add_slice(self, hu: np.ndarray, mask: np.ndarray, pixel_mm: float) -> None:
        bone = hu > _BONE_HU
        closed = ndimage.binary_closing(bone, iterations=max(1, round(1.5 / pixel_mm)))
        inside = np.asarray(ndimage.binary_fill_holes(closed)) & ~bone
        hit, all_ = (np.histogram(hu[m], _BAND_HU)[0] for m in (mask & inside, inside))
        self.bands.append(Histogram(hit, all_, int(mask.sum())))
        if inside.sum() * pixel_mm**2 < _LEAST_BRAIN_MM2:
            return
        self.skull_mm += _skull_mm(bone, inside, pixel_mm)
        core = _apart(inside, _RIM_MM / pixel_mm) & ~_near(mask, _AROUND_MM / pixel_mm)
        flat = _flat(hu, core)
        if flat:
            self.brain_hu.append(np.percentile(hu[core], (5, 25, 50, 75, 95)))
            self.noise_hu.append(_median(piece.std() for piece in flat))
            self.correlation.append(
                [float(np.mean([_correlation(p, lag) for p in flat])) for lag in _LAGS]
            )


def _shown(hu: np.ndarray) -> np.ndarray:
    return np.clip(hu, 0, 255).astype(np.float32)


def _apart(mask: np.ndarray, pixels: float) -> np.ndarray:
    return np.asarray(ndimage.distance_transform_edt(mask)) > pixels


def _near(mask: np.ndarray, pixels: float) -> np.ndarray:
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask)) <= pixels


def _flat(hu: np.ndarray, core: np.ndarray) -> list[np.ndarray]:
    """The flatter half of the pieces of brain, around their mean, each [rows columns]."""
    step = _WINDOW // 2
    pieces = []
    for top in range(0, hu.shape[0] - _WINDOW + 1, step):
        for left in range(0, hu.shape[1] - _WINDOW + 1, step):
            cut = slice(top, top + _WINDOW), slice(left, left + _WINDOW)
            mean = float(hu[cut].mean())
            if _FLAT_HU[0] < mean < _FLAT_HU[1] and core[cut].all():
                pieces.append(hu[cut] - mean)
    return sorted(pieces, key=np.std)[: (len(pieces) + 1) // 2]


def _correlation(piece: np.ndarray, lag: int) -> float:
    return float((piece[:, :-lag] * piece[:, lag:]).mean() / piece.var())


def _skull_mm(bone: np.ndarray, inside: np.ndarray, pixel_mm: float) -> list[float]:
    """Bone from its first to its last pixel on rays from the middle of what lies inside."""
    rows, columns = np.nonzero(inside)
    reach = np.arange(0, 130 / pixel_mm, 0.5)
    found = []
    for angle in np.linspace(0, 2 * np.pi, _RAYS, endpoint=False):
        row = np.rint(rows.mean() + reach * np.sin(angle)).astype(int)
        column = np.rint(columns.mean() + reach * np.cos(angle)).astype(int)
        shown = (row >= 0) & (row < bone.shape[0]) & (column >= 0) & (column < bone.shape[1])
        hit = np.flatnonzero(bone[row[shown], column[shown]])
        if hit.size:
            found.append(float((hit[-1] - hit[0]) * 0.5 * pixel_mm))
    return found


def _median(values: Iterable[float]) -> float:
    return float(np.median(np.fromiter(values, float)))
