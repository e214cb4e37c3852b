"""Passes over one stretch that share a series, told apart; and what was reconstructed twice."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bhsd_jax.ct.dicom import stack as dicom_stack
from bhsd_jax.ct.dicom.slice_file import Slice

_NUMBER, _TIME = "acquisition", "time"  # a scanner gives the number to tell just this
_THICKNESS, _FOLDER = "thickness", "folder"
_IMAGE_TYPE, _ENERGY = "image_type", "energy"
_TOLD_BY = (  # fields of a slice, the surest first
    *("space", "moment", "series_number", "kernel", _IMAGE_TYPE, _ENERGY, _THICKNESS),
    *(_NUMBER, _TIME, _FOLDER),
)
_ENOUGH = 3  # slices of each that lie among the other's, where a number tells them apart
_IN_COMMON = 0.5  # of a pass, or without a number of the longest: what both went over
# What may change from slice to slice within one pass.
_CHANGING = (_NUMBER, _TIME, _IMAGE_TYPE, _ENERGY)
_FILLED = 0.1  # slices whose thickness is as near as this to the step leave no gaps


@dataclass(frozen=True, eq=False)
class _Run:
    """Slices that are alike in what tells passes apart."""

    index: list[int]
    places_mm: Float[np.ndarray, " n"]  # in order


def tell_apart(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The slices, or a list for each pass where several surely went over the same stretch.

    A second pass, after contrast or because the patient moved, may lie half a step off and would
    be stacked in between. What lies one after another, as the rotations of step and shoot do, is
    one pass. A single slice that fits into no pass is a list of its own.
    """
    parts = [list(slices)]
    for told_by in _TOLD_BY:
        parts = [one for part in parts for one in _cut(part, told_by)]
    return parts


def _cut(slices: list[Slice], told_by: str) -> list[list[Slice]]:
    found: dict[str, list[int]] = {}
    for index, item in enumerate(slices):
        found.setdefault(_told(item, told_by), []).append(index)
    *_, fewer, _ = (0, *sorted(map(len, found.values())))  # slices of the second largest
    singles = min(map(len, found.values())) < 2
    if "" in found or fewer < 2 or (singles and told_by != _NUMBER):
        return [slices]
    if told_by == _FOLDER and not _are_numbered_anew(slices, found):
        return [slices]
    places = dicom_stack.along_normal(slices)
    runs = [_Run(found[key], np.sort(places[found[key]])) for key in sorted(found, key=_order)]
    lowest_first = sorted(runs, key=lambda run: run.places_mm[0])
    if not any(itertools.starmap(_overlap, itertools.pairwise(lowest_first))):
        return [slices]
    volumes, strays = _volumes(runs)
    parts = [
        [slices[n] for n in sorted(itertools.chain(*(run.index for run in volume)))]
        for volume in volumes
    ]
    if len(parts) < 2 or len(strays) >= min(map(len, parts)) or not _are_whole(parts, told_by):
        return [slices]
    return [*parts, *([slices[n] for n in run.index] for run in strays)]


def _told(item: Slice, told_by: str) -> str:
    """What a slice says of it; "" if it does not."""
    if told_by == _FOLDER:
        return str(item.file.parent)
    if told_by == _THICKNESS:
        return f"{item.thickness_mm:.2f}" if item.thickness_mm else ""
    return getattr(item, told_by)


def _are_numbered_anew(slices: Sequence[Slice], parts: Mapping[str, Sequence[int]]) -> bool:
    """Whether each folder counts its images from the start, and none holds copies of another's.

    So it is where several series were given one UID. An archive that spreads one over folders
    leaves each image its number.
    """
    copies = [{slices[n].instance for n in part} for part in parts.values()]
    numbers = [{slices[n].number for n in part} for part in parts.values()]
    if any(one & other for one, other in itertools.combinations(copies, 2)):
        return False
    return all(
        "" not in one | other and len(one & other) >= _IN_COMMON * min(len(one), len(other))
        for one, other in itertools.combinations(numbers, 2)
    ) and all(len(one) == len(part) for one, part in zip(numbers, parts.values(), strict=True))


def _order(text: str) -> tuple[tuple[float, ...], str]:
    """For the order of acquisition: by the numbers in a text, 2 before 10."""
    return tuple(map(float, re.findall(r"\d+(?:\.\d+)?", text))), text


def _overlap(one: _Run, other: _Run) -> bool:
    """Whether each begins before the other ends."""
    low, high = one.places_mm, other.places_mm
    return bool(low[0] < high[-1] and high[0] < low[-1])


def _volumes(runs: Sequence[_Run]) -> tuple[list[list[_Run]], list[_Run]]:
    """Runs in the order of acquisition, put together that lie one after another; and the rest.

    Where a run fits to several it goes on with the one from which it is a usual step away, else
    with the longest, else with the latest. A single slice begins nothing.
    """
    step = float(np.median(np.concatenate([np.diff(run.places_mm) for run in runs])))
    volumes, strays = list[list[_Run]](), list[_Run]()
    for run in sorted(runs, key=lambda run: len(run.index) < 2):
        free = [
            (-round(abs(_gap_mm(volume, run) - step), 1), sum(len(one.index) for one in volume), n)
            for n, volume in enumerate(volumes)
            if not any(_overlap(run, one) for one in volume)
        ]
        if free:
            volumes[max(free)[-1]].append(run)
        elif len(run.index) < 2:
            strays.append(run)
        else:
            volumes.append([run])
    return volumes, strays


def _gap_mm(volume: Sequence[_Run], run: _Run) -> float:
    low, high = run.places_mm[0], run.places_mm[-1]
    return min(max(one.places_mm[0] - high, low - one.places_mm[-1]) for one in volume)


def _are_whole(parts: Sequence[list[Slice]], told_by: str) -> bool:
    """Whether the parts are surely passes, and not every other piece of one scan."""
    ordered = [_in_order(part) for part in parts]
    places = [dicom_stack.along_normal(part) for part in ordered]
    if any(dicom_stack.hole(np.diff(one)) for one in places):
        return False
    *others, longest = sorted(places, key=np.ptp)
    for one in others:
        low, high = max(one[0], longest[0]), min(one[-1], longest[-1])
        inside = min(np.count_nonzero((low <= p) & (p <= high)) for p in (one, longest))
        if told_by == _NUMBER and inside >= _ENOUGH:
            continue
        if high - low < _IN_COMMON * np.ptp(one if told_by == _NUMBER else longest):
            return False
    together = _in_order(list(itertools.chain(*parts)))
    if not dicom_stack.are_even(together):
        return True
    # With even steps the others of a pass whose step is that of all lie at its ends; and those of
    # other thicknesses are alike but for rounding.
    step = np.mean(np.diff(dicom_stack.along_normal(together)))
    ends = min(np.median(np.diff(one)) for one in places) < 1.5 * step
    if ends or told_by == _THICKNESS or not all(map(dicom_stack.are_even, ordered)):
        return False
    return told_by not in _CHANGING or not _leave_no_gaps(together)


def _in_order(slices: Sequence[Slice]) -> list[Slice]:
    return [slices[index] for index in np.argsort(dicom_stack.along_normal(slices))]


def _leave_no_gaps(slices: Sequence[Slice]) -> bool:
    """Whether slices in order are just as thick as they are apart: one pass filled another."""
    step = float(np.mean(np.diff(dicom_stack.along_normal(slices))))
    thickness = float(np.median([item.thickness_mm for item in slices]))
    return abs(thickness - step) <= _FILLED * step
