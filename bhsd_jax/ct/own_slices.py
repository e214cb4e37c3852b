"""From the network's answer to a plane for each slice that the scanner made, and what it holds.

A series at uneven steps is read as a volume of even ones, since a network knows no others. What it
says of that volume is brought straight to the place of every slice, between planes by monotone
cubic interpolation of every class's logit less that of background: a straight line between planes
would cut off what bulges, 0.8 % of a round bleed 5 cm high at planes of 5 mm, and a curve that
swings beyond its two planes would show a class where neither has it. Each slice stands for the
tissue halfway to the slices beside it; the first and the last reach as far out as in.

A series at even steps is answered in the same way where nnU-Net would give each slice the nearest
of the network's thicker planes: of a round bleed 2 cm high on slices of 2.5 mm, planes of 5 mm
would add 1.6 %. A file is answered as nnU-Net answers it.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Num, UInt8
from scipy import special

from bhsd_jax.ct import centers, geometry, hu, resample, shear
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.labels import Labels
from bhsd_jax.volume import Grid, Image, Series, Shape, Volume

_BEYOND = -1e4  # the margin of what lies beyond a grid of `centers`: background, for certain


@dataclass(frozen=True, eq=False)
class OwnSlices:
    """Where the slices of a scan lie, and the volume that was read of them."""

    shape: Shape  # of the label map: a plane for each slice
    affine: Float64[np.ndarray, "4 4"]  # of the label map; with the mean step where they differ
    places_mm: Float64[np.ndarray, " N"]  # of the planes along their normal, from the first
    places: Float64[np.ndarray, " N"] | None  # among the planes of the volume; None: they are these
    read_shape: Shape  # of the volume, before it was unsheared
    read_affine: Float64[np.ndarray, "4 4"]
    unshear: bool  # the volume was unsheared when it was read
    smooth: bool = False  # never the nearest plane alone, also where every plane is a slice

    @property
    def is_even(self) -> bool:
        """Whether every plane of the volume is a slice."""
        return self.places is None

    def is_on(self, grid: Grid) -> bool:
        """Whether every voxel of the label map is one of the prepared grid, inside its crop."""
        on = grid.shape == grid.cropped_shape and grid.law != geometry.CENTERS
        return on and self.is_even and not self.unshear

    @property
    def steps(self) -> Float64[np.ndarray, " N"]:
        """Where the planes lie, in slice steps of the affine."""
        return self.places_mm / _step_mm(self.affine)

    @property
    def widths_mm(self) -> Float64[np.ndarray, " N"]:
        """What each slice stands for, along the normal."""
        steps = np.diff(self.places_mm)
        if not len(steps):
            return np.full(1, _step_mm(self.affine))
        return (np.append(steps[0], steps) + np.append(steps, steps[-1])) / 2

    def slice_ml(self, *, table_feed: bool) -> Float64[np.ndarray, " N"]:
        """Volume of a voxel of each slice, milliliters; `table_feed` as in `hu.voxel_ml`."""
        each = hu.voxel_ml(self.affine, table_feed=table_feed)
        if self.is_even:
            return np.full(self.shape[0], each)
        return each / _step_mm(self.affine) * self.widths_mm

    def volumes_ml(
        self, label: UInt8[np.ndarray, "N H W"], classes: int, *, table_feed: bool
    ) -> list[float]:
        """Milliliters of each class, background first."""
        if self.is_even:
            each = hu.voxel_ml(self.affine, table_feed=table_feed)
            counts = np.bincount(label.ravel(), minlength=classes)
            return [float(count * each) for count in counts]
        found = slice_counts(label, classes) * self.slice_ml(table_feed=table_feed)[:, None]
        return found.sum(0).tolist()

    def blank(self, case: str) -> Volume:
        """A volume of zeros on these slices, for readers of label maps; it takes no memory."""
        return Volume(np.broadcast_to(np.uint8(0), self.shape), self.affine, case)

    def label(
        self, logits: Float[np.ndarray, "K _ _ _"], grid: Grid, labels: Labels | None = None
    ) -> UInt8[np.ndarray, "N H W"]:
        """The likeliest class on every slice, or its regions; of logits on the grid of the volume.

        Where each plane of a file is a slice it is `geometry.label_of_logits`'.

        Raises:
            ValueError: If the shapes do not fit.
        """
        places = self._places(grid)
        if places is None:
            label = geometry.label_of_logits(logits, grid, labels)
        else:
            label = _label_at(logits, grid, places, labels)
        if not self.unshear:
            return label
        return shear.shear_label(label, self.read_affine, self.read_shape, self.places)

    def on_planes(self, label: UInt8[np.ndarray, "N H W"]) -> UInt8[np.ndarray, "D H W"]:
        """A label map of the slices on the planes of the volume: of each the nearest slice."""
        if self.places is None:
            return label
        planes = np.arange(self.read_shape[0])
        return label[np.abs(planes[:, None] - self.places).argmin(1)]

    def even_label(
        self, logits: Float[np.ndarray, "K _ _ _"], grid: Grid, labels: Labels | None = None
    ) -> UInt8[np.ndarray, "D _ _"]:
        """As `label`, on the even planes of the volume, unsheared if that was; of uneven scans."""
        return _label_at(logits, grid, self._every_plane, labels)

    def probabilities(
        self, logits: Float[np.ndarray, "K _ _ _"], grid: Grid, labels: Labels | None = None
    ) -> Float32[np.ndarray, "K N _ _"]:
        """Class or region probabilities on every slice; unsheared volumes' stay unsheared.

        Raises:
            ValueError: If the shapes do not fit.
        """
        places = self._places(grid)
        if places is None:
            return geometry.probabilities_of_logits(logits, grid, labels)
        return _probabilities_at(logits, grid, places, labels)

    def _places(self, grid: Grid) -> Float64[np.ndarray, " N"] | None:
        """Where logits on this grid are wanted; None: where nnU-Net's law has them."""
        if self.places is not None or not self.smooth or grid.law == geometry.CENTERS:
            return self.places
        # Elsewhere nnU-Net's law is linear along the slices too, and keeps what is planted.
        axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
        along = grid.order.index(0)
        if axis != along or grid.shape[along] == grid.cropped_shape[along]:
            return None
        return self._every_plane

    @property
    def _every_plane(self) -> Float64[np.ndarray, " D"]:
        return np.arange(self.read_shape[0], dtype=np.float64)


def of(image: Image, shape: Shape, affine: Float64[np.ndarray, "4 4"]) -> OwnSlices:
    """The slices of a scan of which `scan.read` gave a volume of this shape and affine.

    Raises:
        Refusal: As by `scan.read`.
    """
    if not isinstance(image, Series):
        places_mm = np.arange(shape[0]) * _step_mm(affine)
        return OwnSlices(shape, affine, places_mm, None, shape, affine, False)
    stack = dicom_series.arrange(image)
    read = (stack.shape, stack.affine, image.unshear)
    if stack.is_even or not image.own_slices:
        places_mm = np.arange(stack.shape[0]) * _step_mm(stack.affine)
        return OwnSlices(stack.shape, stack.affine, places_mm, None, *read, image.own_slices)
    own = (len(stack.slices), stack.shape[1], stack.shape[2])
    return OwnSlices(own, stack.own_affine, stack.places_mm, stack.places, *read)


def slice_counts(label: UInt8[np.ndarray, "N H W"], classes: int) -> Int[np.ndarray, "N {classes}"]:
    """Voxels of each class in each plane."""
    return np.stack([np.bincount(plane.ravel(), minlength=classes) for plane in label])


def _step_mm(affine: Float[np.ndarray, "4 4"]) -> float:
    """Distance between neighboring planes along their normal."""
    across = np.cross(affine[:3, 1], affine[:3, 2])
    return abs(float(affine[:3, 0] @ across)) / float(np.linalg.norm(across))


def _label_at(
    logits: Float[np.ndarray, "K _ _ _"],
    grid: Grid,
    places: Float64[np.ndarray, " N"],
    labels: Labels | None,
) -> UInt8[np.ndarray, "N H W"]:
    """As `geometry.label_of_logits`, at these places along the first native axis."""
    label = np.zeros((len(places), *grid.native_shape[1:]), np.uint8)
    if labels is not None and labels.regions:
        inside = (_margins_at(one, grid, places) > 0 for one in logits)
        _put(label, labels.assemble(inside), grid, places)
        return label
    if not 1 <= len(logits) <= 256:
        raise ValueError(f"want 1 to 256 classes; got {len(logits)}")
    best = _zeros(grid, places)
    winner = np.zeros(best.shape, np.uint8)
    for index in range(1, len(logits)):
        score = _margins_at(logits[index] - logits[0], grid, places)
        np.copyto(winner, index, where=score > best)
        np.maximum(best, score, out=best)
    _put(label, winner, grid, places)
    return label


def _probabilities_at(
    logits: Float[np.ndarray, "K _ _ _"],
    grid: Grid,
    places: Float64[np.ndarray, " N"],
    labels: Labels | None,
) -> Float32[np.ndarray, "K N H W"]:
    found = np.zeros((len(logits), len(places), *grid.native_shape[1:]), np.float32)
    if labels is not None and labels.regions:
        scores = special.expit(np.stack([_margins_at(one, grid, places) for one in logits]))
    else:
        found[0] = 1
        margins = [_margins_at(one - logits[0], grid, places) for one in logits[1:]]
        scores = special.softmax(np.stack([_zeros(grid, places), *margins]), axis=0)
    for one, score in zip(found, scores, strict=True):
        _put(one, score, grid, places)
    return found


def _zeros(grid: Grid, places: Float64[np.ndarray, " N"]) -> Float32[np.ndarray, "_ _ _"]:
    """The margin of background over itself, on the slices inside the crop, in native order."""
    _, inside, _, _ = _along(grid, places)
    shape = [grid.cropped_shape[axis] for axis in np.argsort(grid.order)]
    return np.zeros((len(inside), *shape[1:]), np.float32)


def _margins_at(
    margins: Float[np.ndarray, "_ _ _"], grid: Grid, places: Float64[np.ndarray, " N"]
) -> Float32[np.ndarray, "_ _ _"]:
    """One class's logits less background's, or a region's, on the slices inside the crop."""
    along, inside, start, count = _along(grid, places)
    if grid.law == geometry.CENTERS:
        return _margins_from_centers(margins, grid, places[inside])
    shape = list(grid.cropped_shape)
    shape[along] = margins.shape[along]  # across the slices it is interpolated below
    axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
    planes = resample.resample_linear(margins, (shape[0], shape[1], shape[2]), axis)
    back = np.argsort(grid.order)
    planes = np.flip(planes, tuple(a for a in range(3) if grid.flip[a])).transpose(back)
    place = (places[inside] - start + 0.5) * len(planes) / count - 0.5
    return between(planes, np.clip(place, 0, len(planes) - 1))


def _margins_from_centers(
    margins: Float[np.ndarray, "_ _ _"], grid: Grid, places: Float64[np.ndarray, " N"]
) -> Float32[np.ndarray, "_ _ _"]:
    """As `_margins_at`, where first centers coincide; in rows and columns of the nearest voxel.

    An axis that runs against the file's begins one voxel beyond the scan, see `centers`.
    """
    along, native_mm, mm = grid.order.index(0), grid.native_spacing_mm, grid.spacing_mm
    turned = grid.native_shape[0] - places if grid.flip[along] else places
    place = turned * native_mm[along] / mm[along]
    shape, sizes_mm, flips = list(grid.cropped_shape), list(native_mm), list(grid.flip)
    # Along the slices all planes stay as they are.
    shape[along], sizes_mm[along], flips[along] = margins.shape[along], mm[along], False
    (d, h, w), (d_mm, h_mm, w_mm), (d_flip, h_flip, w_flip) = shape, sizes_mm, flips
    flip = d_flip, h_flip, w_flip
    planes = centers.from_centers(margins, (d, h, w), (d_mm, h_mm, w_mm), mm, flip, _BEYOND)
    planes = np.flip(planes, tuple(np.flatnonzero(flip).tolist())).transpose(np.argsort(grid.order))
    found = between(planes, np.clip(place, 0, len(planes) - 1))
    found[place >= len(planes) - 0.5] = _BEYOND
    return found


def between(
    planes: Float[np.ndarray, "D H W"], places: Float64[np.ndarray, " N"]
) -> Float32[np.ndarray, "N H W"]:
    """Planes at places 0..D-1 by monotone cubic interpolation; never beyond the two beside one.

    Source: Fritsch and Butland 1984, SIAM J. Sci. Stat. Comput. 5(2); as SciPy's
    `PchipInterpolator` but at the ends, where the curve keeps the slope of its chord.
    """
    return np.stack([_at(planes, place) for place in places])


def _at(planes: Float[np.ndarray, "D H W"], place: float) -> Float32[np.ndarray, "H W"]:
    last = len(planes) - 1
    below = min(int(place), max(last - 1, 0))
    share = np.float32(place - below)
    if not share:
        return planes[below].astype(np.float32)
    rise = planes[below + 1] - planes[below]
    before = planes[below] - planes[below - 1] if below else rise
    after = planes[below + 2] - planes[below + 1] if below + 1 < last else rise
    first, second = _slope(before, rise), _slope(rise, after)
    cubic = share * (first + second - 2 * rise) + 3 * rise - 2 * first - second
    return planes[below] + share * (first + share * cubic)


def _slope(
    before: Float[np.ndarray, "H W"], after: Float[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W"]:
    """At a plane: the harmonic mean of the rises beside it, 0 at a peak or in a trough."""
    alike = before * after > 0
    total = np.where(alike, before + after, 1)
    return np.where(alike, 2 * before * after / total, 0)


def _along(grid: Grid, places: Float64[np.ndarray, " N"]) -> tuple[int, np.ndarray, int, int]:
    """Of the slices: the prepared axis; which lie in the crop; where that begins, and its length.

    The latter two in planes of the volume, in native direction.
    """
    along = grid.order.index(0)
    start, stop = grid.crop_start[along], grid.crop_stop[along]
    if grid.flip[along]:
        start, stop = grid.native_shape[0] - stop, grid.native_shape[0] - start
    inside = np.flatnonzero((places > start - 0.5) & (places < stop - 0.5))
    return along, inside, start, stop - start


def _put(
    native: Num[np.ndarray, "N H W"],
    crop: Num[np.ndarray, "_ _ _"],
    grid: Grid,
    places: Float64[np.ndarray, " N"],
) -> None:
    """Writes what lies in the crop, in native order, into an array on the slices."""
    along, inside, _, _ = _along(grid, places)
    start, stop = list(grid.crop_start), list(grid.crop_stop)
    start[along], stop[along] = int(inside[0]), int(inside[-1]) + 1
    if grid.flip[along]:
        start[along], stop[along] = len(places) - stop[along], len(places) - start[along]
    n, h, w = native.shape
    (a, b, c), (d, e, f) = start, stop
    own = replace(grid, native_shape=(n, h, w), crop_start=(a, b, c), crop_stop=(d, e, f))
    geometry.native_box(native, own)[...] = geometry.turn(crop, grid.order, grid.flip)
