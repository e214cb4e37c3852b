"""Whether a CT is in Hounsfield units, by what its intensities must then show.

A head CT in HU has air below -500 HU, and where a tight field of view has none, it has brain at 15
to 50 HU and little else, or fat. Files in circulation lack that: the rescale intercept was lost,
negative values were read as unsigned, windows were scaled to 0..1 or to 8 bits, or the scan is an
MR. The rules, in this order; shares are of the voxels above -1200 HU, since what lies below is
padding (-1500, -2000, -2048, -3024) and shows nothing:

1. Unsigned: nothing negative, values above 32767, and all but 0.1 % of the scan below 4096, as HU
   are, or above 62000, as -3024 HU and more are in unsigned 16 bits. Undone.
2. Intercept: of all between 300 and 3000 a third or more, and 4 % of the scan, lie within 32 of one
   value in 1004..1124. No tissue is so dense and so alike; the densities of bone and of metal
   spread. It is brain, 1024 too high. Undone where air says so too: 2 % or more at -60..124 and
   little between that and tissue, and brain then at 15..75 HU; or at 25..50 if air lies at 0, where
   an offset of 1000 puts it. Else refused, since the offset is not known.
   Subtracted twice: 2 % or more of all voxels at -2100..-1900, as if padding, but fat below where
   air is (1 % at -1150..-1070), and of what lies above -900 less than 15 % at -20..100, where HU
   have brain. Refused: air of -1000 less 1024 lies where air of -1024 less 1000 does. Without
   fat it is marked where of what lies above -900 half is below -20, as bone then is.
3. Wraps and padding, as by `hu.repair`. If 2 % are left at 3071 HU or above, it is refused; as
   padding, if half of those are one value and the rest is in HU.
4. Air: 2 % or more below -500 HU. Nothing else is asked then: phantoms have no brain, contrast
   medium and other parts of the body have other tissue.
5. No air, a tight field of view: nothing but brain, blood and cerebrospinal fluid (80 % within 32
   of a peak at 5..50, 98 % from 32 below it to 64 above), or 1 % or more of fat at -200..-20 and
   tissue at -150..200. Taken as it is and marked.
6. No air, a window: most of what was not clipped is one peak at 15..50, with 0.1 % or more below
   -5, or with air clipped to one value and bone above 300 or clipped. Taken as it is and marked.
   In 5 and 6 the one value of all corners, with 5 % of the scan, may be what lies outside a brain
   that was cut out of its head: without it, and without asking for fat, they are tried again.
7. All else is refused: no MR has negative values, and what was scaled has its brain elsewhere.

Fewer than 1000 voxels tell nothing. Measured on two heads, a dry skull and 208 MR scans: heads and
skull have 63 to 90 % air and at most 7 % of their dense voxels around 1060; no MR has a value
below 0, and those whose peak lies at 15..50 have 57 to 73 % around it, crops of brain in CT 90 %.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Num

from bhsd_jax.ct import hu
from bhsd_jax.defects import Finding, Kind, Refusal

AIR_HU = -500.0  # a head CT without anything below has been windowed or is no CT
KINDS = (Kind.NO_AIR, Kind.OFFSET, Kind.UNSIGNED, Kind.OVERFLOW, Kind.NOT_HU)
"""What a reader of any number made from a scan has to know, whether undone or not."""

_OFFSET = 1024.0  # lost rescale intercept of nearly all scanners
_PADDING_HU = -1200.0  # lower is padding
_SAMPLE = 500_000  # voxels looked at, evenly spread
_LEAST = 1000  # voxels; fewer tell nothing
_LEAST_BACKGROUND = 0.05  # share of a scan
_FAT = 0.01  # share of a scan
_CORE = 32.0  # half the width of a peak of tissue, noise included
_BIN = 4.0
_REMEDY = (
    "give the scan in HU (look at the rescale slope and intercept of its conversion); for MR, or "
    "to have every scan brought to zero mean as it is, set --config.data.modality=mr of "
    "data=folder or data=msd"
)


def settle(
    voxels: Num[np.ndarray, "D H W"], *, clip: bool = True
) -> tuple[Float32[np.ndarray, "D H W"], list[Finding]]:
    """The scan in HU, with `clip` clipped to 12 bits, and what was undone or is doubtful.

    The input is not changed.

    Raises:
        Refusal: If it is not in HU and what it is in is not beyond doubt.
    """
    shifted, found = _undo_unsigned(voxels)
    shifted, more = _undo_offset(shifted)
    repaired, most = hu.repair(shifted, clip=clip)
    found += [*more, *most]
    step = _step(voxels)
    before, after = shifted.ravel()[::step], repaired.ravel()[::step]
    # What was below padding and no longer is was metal that had wrapped around.
    shown = (before >= _PADDING_HU) | (after > hu.LOWEST_HU)
    seen = _Intensities(np.sort(after[shown]))
    brain = _Intensities(np.sort(after[shown & ~_is_background(after, repaired)]))
    if voxels.size >= _LEAST:
        found += _examine_intercept(_Intensities(np.sort(before)))
        _require_no_bright_padding(before, after, seen)
    plausible = not seen.values.size or _is_plausible(seen) or _is_cut_out(brain)
    if voxels.size >= _LEAST and not plausible:
        raise Refusal(
            Kind.NOT_HU,
            f"no CT in HU: no air below {AIR_HU:g} HU and no brain where HU put it; values "
            f"{float(voxels.min()):g} to {float(voxels.max()):g}, most of them near "
            f"{float(np.median(seen.unclipped)):.4g}: an MR, or a CT that was scaled; {_REMEDY}",
        )
    if float(repaired.min()) > AIR_HU:
        text = f"no air: nothing below {AIR_HU:g} HU; windowed, or not a CT"
        found.append(Finding(Kind.NO_AIR, "kept", text))
    return repaired, found


def in_hu(voxels: Num[np.ndarray, "D H W"]) -> Float32[np.ndarray, "D H W"] | None:
    """What `settle` makes of the scan; None if it refuses it."""
    try:
        return settle(voxels)[0]
    except Refusal:
        return None


def doubts(voxels: Num[np.ndarray, "D H W"]) -> list[Finding]:
    """What `settle` would undo or refuse, for those who take a scan as it lies.

    Nothing is undone, and nothing refused.
    """
    try:
        _, found = settle(voxels)
    except Refusal as error:
        return [Finding(error.kind, "kept", f"taken as it lies, though: {error}")]
    text = "taken as it lies, though of the kind: "
    return [
        finding if finding.done == "kept" else Finding(finding.kind, "kept", text + finding.kind)
        for finding in found
        if finding.kind in KINDS
    ]


@dataclass(frozen=True, eq=False)
class _Intensities:
    """A sorted sample of a scan's voxels, without padding."""

    values: np.ndarray

    def share(self, low: float, high: float) -> float:
        """Of the sample, from `low` up to but without `high`."""
        first, last = np.searchsorted(self.values, (low, high))
        return float(last - first) / max(self.values.size, 1)

    def peak(self, low: float, high: float) -> float:
        """Where most lie between two values, in bins of 20."""
        first, last = np.searchsorted(self.values, (low, high))
        edges = np.arange(low, high + _BIN, _BIN)
        counts, _ = np.histogram(self.values[first:last], edges)
        smooth = np.convolve(counts, np.ones(5), "same")
        return float(edges[int(smooth.argmax())]) + _BIN / 2

    def around(self, peak: float) -> float:
        """Share of what belongs to a peak of one tissue."""
        return self.share(peak - _CORE, peak + _CORE)

    @property
    def unclipped(self) -> np.ndarray:
        """What lies between the lowest and the highest value; all, if nothing does."""
        first, last = self.values[0], self.values[-1]
        inner = self.values[(self.values > first) & (self.values < last)]
        return inner if inner.size else self.values


def _step(voxels: np.ndarray) -> int:
    """Odd, so that no column of a power of two is met again and again."""
    return max(voxels.size // _SAMPLE, 1) | 1


def _seen(voxels: np.ndarray) -> _Intensities:
    sample = voxels.ravel()[:: _step(voxels)]
    return _Intensities(np.sort(sample[sample >= _PADDING_HU].astype(np.float32)))


def _is_background(sample: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Where a sample of a scan has the one value of all its corners, if that is within tissue.

    Whatever cuts brains out of heads sets the rest to 0. What is lowest is told from tissue anyway.
    """
    corners = voxels[:: max(len(voxels) - 1, 1), [[0], [-1]], [0, -1]]
    value = corners.flat[0]
    if (corners != value).any() or value <= AIR_HU or value <= voxels.min():
        return np.zeros(sample.shape, bool)
    found = sample == value
    return found if np.mean(found) >= _LEAST_BACKGROUND else np.zeros(sample.shape, bool)


def _undo_unsigned(voxels: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    low, high = float(voxels.min()), float(voxels.max())
    if voxels.size < _LEAST or low < 0 or not 32767 < high < 65536:
        return voxels, []
    signed = np.where(voxels > 32767, voxels.astype(np.float32) - 65536, voxels)
    if np.mean((voxels > 4096) & (voxels < 62000)) >= 0.001:
        return voxels, []
    text = "read as unsigned 16 bits: 65536 subtracted above 32767, which are negative HU"
    return signed, [Finding(Kind.UNSIGNED, "repaired", text)]


def _undo_offset(voxels: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    seen = _seen(voxels)
    dense = seen.share(300, 3000)
    if voxels.size < _LEAST or dense == 0:
        return voxels, []
    brain = seen.peak(300, 3000)
    core = seen.around(brain)
    if not 1004 <= brain < 1124 or core < 0.04 or core < dense / 3:
        return voxels, []
    air = seen.peak(-60, 124)
    there = seen.share(-60, 124) >= 0.02
    apart = seen.share(150, 700) < 0.3 * seen.share(700, 4096)
    # An offset of 1000 puts air at 0, where that of 1024 cuts it off in many scans, and brain at
    # 1020..1050: then only brain can say which it was, and only where the other makes it none.
    least, most = (15, 75) if air >= 12 else (25, 50)
    sure = least <= brain - _OFFSET <= most
    if not (there and apart and sure):
        raise Refusal(
            Kind.OFFSET,
            f"no HU: tissue lies near {brain:.0f}, as if a rescale intercept had been lost, "
            f"and no air says which; {_REMEDY}",
        )
    text = (
        f"rescale intercept put back: {_OFFSET:.0f} subtracted, since air lay near {air:.0f} and "
        f"brain near {brain:.0f}"
    )
    return voxels.astype(np.float32) - _OFFSET, [Finding(Kind.OFFSET, "repaired", text)]


def _examine_intercept(every: _Intensities) -> list[Finding]:
    """Refuses a scan whose intercept was applied twice; its air would pass for padding.

    Without fat nothing says so surely, and the scan is marked.
    """
    deep = every.share(-2100, -1900)
    fat = every.share(-1150, -1070) >= 0.01 * every.share(_PADDING_HU, np.inf)
    brain = every.share(-20, 100) >= 0.15 * every.share(-900, np.inf)
    if deep < 0.02 or brain:
        return []
    if not fat:
        low = every.share(-900, -20) >= 0.5 * every.share(-900, np.inf) > 0
        text = (
            f"{100 * deep:.0f} % of the voxels lie at -2100..-1900 and few where HU have brain or "
            "dense bone, as if the rescale intercept had been applied twice: look at the scan"
        )
        return [Finding(Kind.OFFSET, "kept", text)] if low else []
    raise Refusal(
        Kind.OFFSET,
        f"no HU: {100 * deep:.0f} % of the voxels lie at -2100..-1900, fat near "
        f"{every.peak(-1150, -1070):.0f} and tissue near {every.peak(-1060, -920):.0f}, as if the "
        f"rescale intercept had been applied twice; {_REMEDY}",
    )


def _require_no_bright_padding(before: np.ndarray, after: np.ndarray, seen: _Intensities) -> None:
    """Refuses a scan in HU of which 2 % or more are one value at the top; what is scaled is none.

    `before` is what was stored, `after` what the repair made of it, and `seen` that without
    padding. Air that had wrapped around in 12 bits was bright before only.
    """
    bright = before[(before >= hu.HIGHEST_HU) & (after >= hu.HIGHEST_HU)]
    if len(bright) < 0.02 * before.size or np.mean(bright == np.median(bright)) < 0.5:
        return
    rest = _Intensities(seen.values[seen.values < hu.HIGHEST_HU])
    if rest.values.size and _is_plausible(rest):
        raise Refusal(
            Kind.NOT_HU,
            f"{100 * len(bright) / before.size:.0f} % of the voxels are at "
            f"{hu.HIGHEST_HU:.0f} HU or above, most of them at {np.median(bright):g}: padding? Set "
            f"what lies outside the scan to {hu.LOWEST_HU:.0f}",
        )


def _is_cut_out(brain: _Intensities) -> bool:
    """Rules 5 and 6, of what is not the background of a scan; a brain has no fat around it."""
    return bool(brain.values.size) and brain.share(-200, -20) < _FAT and _is_plausible(brain)


def _is_plausible(seen: _Intensities) -> bool:
    """Rules 4 to 7, of a scan whose known defects are undone."""
    values = seen.values
    if seen.share(hu.HIGHEST_HU, np.inf) >= 0.02:
        return False
    if seen.share(-np.inf, AIR_HU) >= 0.02:
        return True
    low, high = float(values[0]), float(values[-1])
    inner = _Intensities(seen.unclipped)
    if inner.values.size == values.size:
        return True  # one value or two: made by hand; they tell nothing
    at = inner.peak(-200, 300)
    core = inner.around(at)
    only = core >= 0.8 and inner.share(at - _CORE, at + 2 * _CORE) >= 0.98
    if only and 5 <= at < 50 and high - low >= 20:
        return True
    if high - low < 70:
        return False
    if seen.share(-200, -20) >= _FAT and -150 <= at < 200 and core >= 0.1:
        return at >= -20 or core < 0.5
    beyond = at + 2 * _CORE
    alone = inner.share(beyond, np.inf) < 0.4 and inner.around(inner.peak(beyond, 3200)) < core / 3
    negative = seen.share(-np.inf, -5) >= 0.001
    bone = np.mean(values == high) >= 0.005 or seen.share(300, 3000) >= 0.02
    windowed = bool(bone and np.mean(values == low) >= 0.05)
    return alone and core >= 0.3 and 15 <= at < 50 and (negative or windowed)
