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
_ROUNDED_MM = 0.1  # positions that were rounded to this, as some archives do, may be so far off
_ROUNDED = 0.2  # of the step: but not further
_WHOLE = 0.05  # of the step: gaps this near to a multiple of it are missing slices
_HOLE = 2.5  # times the steps beside it: too much to fill in
_THICKER = 1.5  # times the thinnest slice: scanned so on purpose
_BLOCK = 3  # wide steps in a row, and none elsewhere: a protocol, not slices that are missing
_ASIDE_MM = 0.1  # how far a slice may lie off the line through the first and the last


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
        places = np.asarray([along_normal(item) for item in self.slices])
        return places - places[0]

    @property
    def places(self) -> Float[np.ndarray, " n"]:
        """Where the slices lie among the planes, of which the first and the last are slices."""
        places = self.places_mm
        return places / places[-1] * (self.shape[0] - 1)

    @property
    def own_affine(self) -> Float[np.ndarray, "4 4"]:
        """Of an array with a plane for each slice; where steps are uneven it has their mean."""
        affine = self.affine.copy()
        affine[:3, 0] *= (self.shape[0] - 1) / (len(self.slices) - 1)
        return affine


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
    order = sorted(slices, key=along_normal)
    kept = _without_copies(order, same, found)
    if len(kept) < 2:
        text = f"{len(kept)} slices are no volume: their distance is not known"
        raise Refusal(Kind.TOO_FEW_SLICES, text)
    places = np.asarray([along_normal(item) for item in kept])
    steps = np.diff(places)
    depth = len(kept)
    as_they_are = True
    if _is_uneven(places, _rounded_mm(kept)):
        kind, text = _describe(steps, np.asarray([item.thickness_mm for item in kept]))
        if uneven == "refuse" and not (even_out and kind is Kind.SLICES_UNEVEN):
            raise _refused(kind, text, setting)
        _require_no_hole(steps)
        usual = float(np.percentile(steps, 25, method="lower"))
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


def normal(item: Slice) -> Float[np.ndarray, "3"]:
    """Unit vector across the slice."""
    across = np.cross(item.along_row, item.along_column)
    return across / np.linalg.norm(across)


def along_normal(item: Slice) -> float:
    """Place of the slice along its normal, mm."""
    return float(normal(item) @ np.asarray(item.position))


def _without_copies(
    order: Sequence[Slice], same: Callable[[Slice, Slice], bool], found: list[Finding]
) -> list[Slice]:
    kept: list[Slice] = []
    for item in order:
        if kept and abs(along_normal(item) - along_normal(kept[-1])) < SAME_MM:
            if not same(item, kept[-1]):
                raise Refusal(
                    Kind.ONE_PLACE,
                    f"two different slices at one position, {along_normal(item):.2f} mm along "
                    "the normal: several acquisitions share the series; keep one of them",
                )
            continue
        kept.append(item)
    if len(kept) < len(order):
        text = f"copies of slices left out: {len(order) - len(kept)}"
        found.append(Finding(Kind.SLICES_TWICE, "kept", text))
    return kept


def _is_uneven(places: Float[np.ndarray, " n"], rounded_mm: float) -> bool:
    even = np.linspace(places[0], places[-1], len(places))
    step = even[1] - even[0]
    allowed = max(_EVEN * step, min(rounded_mm, _ROUNDED * step))
    return bool(np.abs(places - even).max() > allowed + 1e-6)


def _rounded_mm(slices: Sequence[Slice]) -> float:
    """To what positions were rounded: all of them are multiples of it; 0 if they are not."""
    tenths = np.asarray([item.position for item in slices]) / _ROUNDED_MM
    return _ROUNDED_MM if np.abs(tenths - np.rint(tenths)).max() < 1e-4 else 0.0


def _describe(
    steps: Float[np.ndarray, " n"], thickness_mm: Float[np.ndarray, " m"]
) -> tuple[Kind, str]:
    usual = float(np.median(steps))
    times = steps / usual
    whole = (np.abs(times - np.rint(times)) <= _WHOLE).all() and (np.rint(times) >= 1).all()
    if whole and not _on_purpose(times > _THICKER, thickness_mm):
        missing = int((np.rint(times) - 1).sum())
        first = int(np.argmax(times > _THICKER))
        return Kind.SLICES_MISSING, (
            f"{missing} {'slice is' if missing == 1 else 'slices are'} missing: "
            f"{steps[first]:.2f} mm after slice {first + 1} of {len(steps) + 1} by position, "
            f"{usual:.2f} mm elsewhere"
        )
    return Kind.SLICES_UNEVEN, (
        f"slices at uneven steps, {steps.min():.2f} to {steps.max():.2f} mm, mostly {usual:.2f} mm"
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
    around = np.concatenate([[0.0], steps, [0.0]])
    beside = np.maximum(around[:-2], around[2:])
    holes = np.flatnonzero((steps > _HOLE * beside) & (beside > 0))
    if len(holes):
        first = int(holes[0])
        raise Refusal(
            Kind.MISSING,
            f"{steps[first]:.2f} mm without a slice after slice {first + 1} of {len(steps) + 1} "
            f"by position, {beside[first]:.2f} mm beside it: too much to interpolate; fetch the "
            "missing slices",
        )


def _affine(kept: Sequence[Slice], depth: int, found: list[Finding]) -> Float[np.ndarray, "4 4"]:
    first = kept[0]
    corners = np.asarray([item.position for item in kept])
    places = np.asarray([along_normal(item) for item in kept])
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
    cosine = float(step @ normal(first) / np.linalg.norm(step))
    tilt = math.degrees(math.acos(min(1.0, abs(cosine))))
    if tilt > LEAST_TILT_DEG:
        text = f"gantry tilt of {tilt:.1f} degrees, kept as shear in the affine"
        found.append(Finding(Kind.TILTED, "kept", text))
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
