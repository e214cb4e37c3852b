"""Slices of one DICOM series in order: where they lie, and the one affine that holds them all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from bhsd_jax.ct.dicom.slice_file import Slice
from bhsd_jax.ct.geometry import LEAST_TILT_DEG
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Shape

SAME_MM = 0.01  # two slices this close lie at one position
_EVEN = 0.02  # of the step: how far a slice may be from its place
TENTH_MM = 0.1  # to which some archives round positions; no couch is more exact
_ROUNDED = 0.65  # of what was rounded to: so far from the line through all may a slice be
_MOST = 0.4  # of the step: but not further
_WHOLE = 0.05  # of the step: gaps this near to a multiple of it are missing slices
_HOLE = 2.5  # times the steps beside it: too much to fill in
_THICKER = 1.5  # times the thinnest slice: scanned so on purpose
_BLOCK = 3  # wide steps in a row, and none elsewhere: a protocol, not slices that are missing
_ASIDE_MM = 0.2  # off the line through the first and the last: what rounding to tenths can do


@dataclass(frozen=True, eq=False)
class Stack:
    """A volume to be filled: D runs along the slices' normal, H against the files' rows.

    So rows run to the front of a supine patient, as converters to NIfTI have them.
    """

    slices: tuple[Slice, ...]  # by position along the normal
    shape: Shape
    affine: Float[np.ndarray, "4 4"]  # (d, h, w, 1) -> RAS+ mm; sheared where the gantry was tilted
    source: Float[np.ndarray, " D"]  # which of `slices` each plane is, or lies between
    findings: tuple[Finding, ...]

    @property
    def is_even(self) -> bool:
        """Whether each plane is one of the slices."""
        return len(self.slices) == len(self.source) and not (self.source % 1).any()

    @property
    def places_mm(self) -> Float[np.ndarray, " n"]:
        """Where the slices lie along their normal, from the first."""
        places = along_normal(self.slices)
        return places - places[0]

    @property
    def places(self) -> Float[np.ndarray, " n"]:
        """Where the slices lie among the planes, of which the first and the last are slices."""
        return self._in_steps(self.shape[0] - 1)

    @property
    def own_shape(self) -> Shape:
        """Of an array with a plane for each slice."""
        return len(self.slices), self.shape[1], self.shape[2]

    @property
    def own_places(self) -> Float[np.ndarray, " n"]:
        """Where the slices lie, in steps of `own_affine`."""
        return self._in_steps(len(self.slices) - 1)

    @property
    def own_affine(self) -> Float[np.ndarray, "4 4"]:
        """Of an array with a plane for each slice; where steps are uneven it has their mean."""
        affine = self.affine.copy()
        affine[:3, 0] *= (self.shape[0] - 1) / (len(self.slices) - 1)
        return affine

    def _in_steps(self, last: int) -> Float[np.ndarray, " n"]:
        places = self.places_mm
        return places / places[-1] * last


def arrange(
    slices: Sequence[Slice],
    *,
    uneven: str,
    setting: str,
    same: Callable[[Slice, Slice], bool],
    even_out: bool = False,
) -> Stack:
    """Orders slices by position along their normal; numbers and names in files do not count.

    Copies of a slice (`same`) are dropped. Steps that differ, as where the posterior fossa was
    scanned thinner or one slice is missing, are refused, or with `uneven` "resample" brought to
    even ones of about the smaller of the usual steps, from the first slice to the last. `setting`
    is the flag that sets `uneven`. With `even_out` it is asked for missing slices only, and steps
    that differ without one are brought to even ones whatever it says.

    Raises:
        Refusal: If no single affine holds the slices; says which and what to do.
    """
    if uneven not in ("refuse", "resample"):
        raise UserError(f"uneven is refuse or resample; got {uneven!r}")
    found: list[Finding] = []
    kept = _in_order(slices, same, found)
    if len(kept) < 2:
        text = f"{len(kept)} slices are no volume: their distance is not known"
        raise Refusal(Kind.TOO_FEW_SLICES, text)
    places = along_normal(kept)
    steps = np.diff(places)
    depth = len(kept)
    as_they_are = True
    if not are_even(kept):
        kind, text = _describe(kept, steps)
        if uneven == "refuse" and not (even_out and kind is Kind.SLICES_UNEVEN):
            raise _refused(kind, text, setting)
        _require_no_hole(steps)
        usual = float(np.percentile(steps, 25, method="lower"))
        if kind is Kind.SLICES_MISSING:  # rounded steps have no percentile that is the true one
            usual = _single(steps)
        depth = max(2, round((places[-1] - places[0]) / usual) + 1)
        even = (places[-1] - places[0]) / (depth - 1)
        text = f"{text}; interpolated to {depth} slices at steps of {even:.3f} mm"
        found.append(Finding(kind, "kept", text))
        as_they_are = not even_out  # shards of stacks that keep their number were made so
    targets = np.linspace(places[0], places[-1], depth)
    source = np.interp(targets, places, np.arange(len(kept)))
    if depth == len(kept) and as_they_are:
        source = np.arange(depth, dtype=np.float64)
    affine = _affine(kept, depth, found)
    rows, columns = kept[0].shape
    return Stack(tuple(kept), (depth, rows, columns), affine, source, tuple(found))


def along_normal(slices: Sequence[Slice]) -> Float[np.ndarray, " n"]:
    """Places of slices along the normal that they share, mm.

    Each along its own would multiply what their cosines differ by, which is rounding, by the
    distance from the scanner's center.
    """
    return np.asarray([item.position for item in slices]) @ _normal(slices)


def are_even(slices: Sequence[Slice]) -> bool:
    """Whether slices in order lie at even steps, but for what rounding of positions can do.

    Rounded steps are told from missing slices by their size, and from a slice that lies elsewhere
    by the line through all: what was rounded is never further than half the unit from its own line.
    """
    places, count = along_normal(slices), len(slices)
    even = np.linspace(places[0], places[-1], count)
    step, off = even[1] - even[0], np.abs(places - even).max()
    if off <= _EVEN * step + 1e-6:
        return True
    rounded_mm = _rounded_mm(slices)
    allowed = min(rounded_mm, _MOST * step)
    index = np.arange(count)
    line = np.polynomial.Polynomial.fit(index, places, 1)(index)
    widest = np.abs(np.diff(places) - step).max()
    return bool(
        off <= allowed + 1e-6
        and widest <= min(rounded_mm * count / (count - 1), _MOST * step) + 1e-6
        and np.abs(places - line).max() <= max(_EVEN * step, _ROUNDED * rounded_mm, TENTH_MM)
    )


def hole(steps: Float[np.ndarray, " n"]) -> tuple[int, float] | None:
    """The first step that is far wider than those beside it: which, and the wider one of these."""
    around = np.concatenate([[0.0], steps, [0.0]])
    beside = np.maximum(around[:-2], around[2:])
    holes = np.flatnonzero((steps > _HOLE * beside) & (beside > 0))
    return (int(holes[0]), float(beside[holes[0]])) if len(holes) else None


def _normal(slices: Sequence[Slice]) -> Float[np.ndarray, "3"]:
    """Unit vector across the slices: of the mean of their cosines."""
    rows = np.mean([item.along_row for item in slices], axis=0)
    across = np.cross(rows, np.mean([item.along_column for item in slices], axis=0))
    return across / np.linalg.norm(across)


def _in_order(
    slices: Sequence[Slice], same: Callable[[Slice, Slice], bool], found: list[Finding]
) -> list[Slice]:
    """By place, without copies."""
    places = along_normal(slices)
    kept: list[int] = []
    for index in np.argsort(places, kind="stable").tolist():
        if kept and abs(places[index] - places[kept[-1]]) < SAME_MM:
            if not same(slices[index], slices[kept[-1]]):
                raise Refusal(
                    Kind.ONE_PLACE,
                    f"two different slices at one position, {places[index]:.2f} mm along "
                    "the normal: several acquisitions share the series; keep one of them",
                )
            continue
        kept.append(index)
    if len(kept) < len(slices):
        text = f"copies of slices left out: {len(slices) - len(kept)}"
        found.append(Finding(Kind.SLICES_TWICE, "kept", text))
    return [slices[index] for index in kept]


def _rounded_mm(slices: Sequence[Slice]) -> float:
    """How far apart along the normal rounding may have brought what lay at one place.

    To whole millimeters if all coordinates that differ from slice to slice are whole, else to
    tenths; an oblique normal adds up what was rounded in each.
    """
    positions = np.asarray([item.position for item in slices])
    moving = positions[:, np.ptp(positions, axis=0) > SAME_MM]
    unit = 1.0 if np.abs(moving - np.rint(moving)).max(initial=0) < 1e-4 else TENTH_MM
    return unit * float(np.abs(_normal(slices)).sum())


def _single(steps: Float[np.ndarray, " n"]) -> float:
    """The step where no slice is missing; the mean, for rounding makes it differ."""
    return float(steps[steps < _THICKER * np.median(steps)].mean())


def _describe(slices: Sequence[Slice], steps: Float[np.ndarray, " n"]) -> tuple[Kind, str]:
    thickness_mm = np.asarray([item.thickness_mm for item in slices])
    usual = _single(steps)
    times = steps / usual
    # Whole millimeters are no rounding where the steps without a gap are alike.
    differ_mm = max(float(np.ptp(steps[steps < _THICKER * usual])), _ASIDE_MM)
    near = max(_WHOLE, min(differ_mm / usual, _rounded_mm(slices) / usual, _MOST) + 1e-6)
    whole = (np.abs(times - np.rint(times)) <= near).all() and (np.rint(times) >= 1).all()
    wide = np.rint(times) > 1
    if whole and wide.any() and not _on_purpose(wide, thickness_mm):
        missing = int((np.rint(times) - 1).sum())
        first = int(np.argmax(wide))
        return Kind.SLICES_MISSING, (
            f"{missing} {'slice is' if missing == 1 else 'slices are'} missing: "
            f"{steps[first]:.2f} mm after slice {first + 1} of {len(steps) + 1} by position, "
            f"{usual:.2f} mm elsewhere"
        )
    return Kind.SLICES_UNEVEN, (
        f"slices at uneven steps, {steps.min():.2f} to {steps.max():.2f} mm, mostly "
        f"{np.median(steps):.2f} mm"
    )


def _on_purpose(wide: Bool[np.ndarray, " n"], thickness_mm: Float[np.ndarray, " m"]) -> bool:
    """Whether wide steps are the protocol's: between thicker slices, or all in one long row."""
    thinnest = float(thickness_mm.min())
    thicker = thickness_mm >= _THICKER * thinnest
    if thinnest > 0 and (thicker[:-1] | thicker[1:])[wide].all():
        return True
    where = np.flatnonzero(wide).tolist()
    return len(where) >= _BLOCK and where[-1] - where[0] + 1 == len(where)


def _refused(kind: Kind, text: str, setting: str) -> Refusal:
    remedy = f"set --{setting}=resample to interpolate"
    if kind is Kind.SLICES_MISSING:
        return Refusal(Kind.MISSING, f"{text}; fetch what is missing, or {remedy}")
    return Refusal(Kind.UNEVEN, f"{text}; {remedy}")


def _require_no_hole(steps: Float[np.ndarray, " n"]) -> None:
    if found := hole(steps):
        first, beside = found
        raise Refusal(
            Kind.MISSING,
            f"{steps[first]:.2f} mm without a slice after slice {first + 1} of {len(steps) + 1} "
            f"by position, {beside:.2f} mm beside it: too much to interpolate; fetch the "
            "missing slices",
        )


def _affine(kept: Sequence[Slice], depth: int, found: list[Finding]) -> Float[np.ndarray, "4 4"]:
    first = kept[0]
    corners = np.asarray([item.position for item in kept])
    places = along_normal(kept)
    share = (places - places[0]) / (places[-1] - places[0])
    line = corners[0] + share[:, None] * (corners[-1] - corners[0])
    aside = float(np.linalg.norm(corners - line, axis=1).max())
    if aside > _ASIDE_MM:
        raise Refusal(
            Kind.SHIFTED,
            f"slices are shifted sideways by up to {aside:.2f} mm, each in its own way: no single "
            "affine holds them; resample the series with a tool that knows the scanner",
        )
    step = (corners[-1] - corners[0]) / (depth - 1)
    down = np.asarray(first.along_column) * first.spacing_mm[0]
    matrix = np.eye(4)
    matrix[:3, 0] = step
    matrix[:3, 1] = -down
    matrix[:3, 2] = np.asarray(first.along_row) * first.spacing_mm[1]
    matrix[:3, 3] = corners[0] + down * (first.shape[0] - 1)
    cosine = float(step @ _normal(kept) / np.linalg.norm(step))
    tilt = math.degrees(math.acos(min(1.0, abs(cosine))))
    if tilt > LEAST_TILT_DEG:
        text = f"gantry tilt of {tilt:.1f} degrees, kept as shear in the affine"
        found.append(Finding(Kind.TILTED, "kept", text))
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
