"""From a scan's own voxels to the prepared grid, and exactly back."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Num, Shaped, UInt8
from scipy import ndimage, special

from bhsd_jax.ct import centers, resample
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.labels import Labels
from bhsd_jax.volume import Grid, Millimeters, Shape, Volume, bounding_box

# Where an axis runs in the world (x to the right, y anterior, z superior), by its letter.
_WORLD = {
    "R": (1, 0, 0),
    "A": (0, 1, 0),
    "S": (0, 0, 1),
    "L": (-1, 0, 0),
    "P": (0, -1, 0),
    "I": (0, 0, -1),
}
_SAME_LINE = str.maketrans("LPI", "RAS")
CANONICAL, AS_IN_FILE = "SPL", "file"
CENTERS = "centers"  # the law of `ct/centers`; every other grid keeps that of `ct/resample`
LEAST_TILT_DEG = 0.5  # of a gantry: less is rounding
SAME_SPACING = 0.01  # share by which two spacings of the same voxels may differ
_OFF_GRID_MM = 0.1  # how far voxels of one grid may lie from those of another that is the same
_MARGIN_MM = 5.0  # around the largest component
_MOST_VOXELS = 2**29  # of a prepared scan: a whole body at half a millimeter has as many


def canonical(
    affine: Float[np.ndarray, "4 4"], axes: str = CANONICAL
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Native axes nearest to superior, posterior, left; and which of them run the other way.

    Or to three other letters of R L A P S I; "file" leaves all as they are. The three are assigned
    together, by the largest sum of cosines, so that an oblique scan never has one axis taken twice.

    Raises:
        ValueError: If the letters do not name three axes.
    """
    if axes == AS_IN_FILE:
        return (0, 1, 2), (False, False, False)
    if sorted(axes.translate(_SAME_LINE)) != ["A", "R", "S"]:
        raise ValueError(
            f"axes are {AS_IN_FILE!r} or three letters, one each of R/L, A/P, S/I; got {axes!r}"
        )
    wanted = np.array([_WORLD[letter] for letter in axes], np.float64)
    native = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = wanted @ native  # [wanted, native]
    # Of six orders, since `scipy.optimize` takes longer to import than a scan to be read.
    d, h, w = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(float(cosines[i, axis])) for i, axis in enumerate(order)),
    )
    flip = bool(cosines[0, d] < 0), bool(cosines[1, h] < 0), bool(cosines[2, w] < 0)
    return (d, h, w), flip


def turn(
    voxels: Shaped[np.ndarray, "_ _ _"],
    order: tuple[int, int, int],
    flip: tuple[bool, bool, bool],
) -> Shaped[np.ndarray, "_ _ _"]:
    """A view with axes in another order, as `canonical` gives it, and those of `flip` reversed."""
    return np.flip(voxels.transpose(order), tuple(axis for axis in range(3) if flip[axis]))


def distance_mm(
    one: Float[np.ndarray, "4 4"], other: Float[np.ndarray, "4 4"], shape: tuple[int, ...]
) -> float:
    """How far apart two affines put a voxel of an array of that shape, at most."""
    corners = np.stack([*np.meshgrid(*[(0, n - 1) for n in shape]), np.ones((2, 2, 2))])
    moved = (one - other)[:3] @ corners.reshape(4, -1)
    return float(np.linalg.norm(moved, axis=0).max())


def onto(
    volume: Volume, shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"]
) -> Shaped[np.ndarray, "_ _ _"] | None:
    """The voxels in the order of another grid of the same voxels; None if they are others."""
    moved = np.linalg.inv(affine) @ volume.affine
    whole = np.rint(moved[:3, :3])
    a, b, c = np.abs(whole).argmax(axis=1).tolist()  # the volume's axis behind each of ours
    if sorted((a, b, c)) != [0, 1, 2] or np.abs(whole).sum() != 3:
        return None
    flip = bool(whole[0, a] < 0), bool(whole[1, b] < 0), bool(whole[2, c] < 0)
    turned = turn(volume.voxels, (a, b, c), flip)
    if turned.shape != shape:
        return None
    exact = np.zeros((4, 4))
    exact[3, 3] = 1
    exact[:3, :3] = whole
    exact[:3, 3] = np.where(flip, np.asarray(shape) - 1, 0)
    if distance_mm(volume.affine, affine @ exact, volume.voxels.shape) > _OFF_GRID_MM:
        return None
    return np.ascontiguousarray(turned)


def turned_onto(one: Volume, other: Volume) -> Shaped[np.ndarray, "_ _ _"] | None:
    """Voxels of `one` in the order of `other`, which has the same in another; None of all else."""
    same = canonical(one.affine) == canonical(other.affine)
    return None if same else onto(one, other.voxels.shape, other.affine)


def locate(
    volume: Volume,
    *,
    spacing_mm: Millimeters,
    transpose: tuple[int, int, int] = (0, 1, 2),
    crop_hu: float | None = None,
    axes: str = CANONICAL,
    law: str = "faces",
) -> Grid:
    """Plans the way of a scan to the prepared spacing: axis order, crop box, shape.

    The box is that of the non-zero voxels (`crop_hu` None), or that of the largest face-connected
    component above `crop_hu` plus 5 mm on every side; of the whole scan if there are none.
    `transpose` names which of `axes` (see `canonical`) is behind each prepared axis, and
    `spacing_mm` is in prepared order. The last voxel may stick out or fall short: the shape is
    rounded. With the law "centers" nothing is cropped.

    Raises:
        ValueError: If a spacing is not positive, `transpose` is no permutation, or `axes` are none.
        Refusal: If the scan would get more voxels than any has.
    """
    if sorted(transpose) != [0, 1, 2] or not all(0 < mm < math.inf for mm in spacing_mm):
        raise ValueError(
            f"{volume.case}: want a permutation of (0, 1, 2) and three positive spacings; "
            f"got transpose {transpose}, spacing_mm {spacing_mm}"
        )
    native_order, native_flip = canonical(volume.affine, axes)
    a, b, c = transpose
    order = native_order[a], native_order[b], native_order[c]
    flip = native_flip[a], native_flip[b], native_flip[c]
    turned = turn(volume.voxels, order, flip)
    native_mm = volume.spacing_mm
    old_mm = native_mm[order[0]], native_mm[order[1]], native_mm[order[2]]
    if law == CENTERS:
        start, stop, new_shape = (0, 0, 0), turned.shape, centers.shape_for
    else:
        (start, stop), new_shape = _crop_box(turned, old_mm, crop_hu), resample.resampled_shape
    cropped = stop[0] - start[0], stop[1] - start[1], stop[2] - start[2]
    shape = new_shape(cropped, old_mm, spacing_mm)
    if math.prod(shape) > _MOST_VOXELS:
        raise Refusal(
            Kind.TOO_LARGE,
            f"{volume.case}: {cropped} voxels of {old_mm} mm would become {shape} of {spacing_mm} "
            "mm, more than fit; look at the spacing in the scan's header",
        )
    d, h, w = volume.voxels.shape
    return Grid(
        native_shape=(d, h, w),
        native_affine=tuple(tuple(row) for row in volume.affine.tolist()),
        order=order,
        flip=flip,
        crop_start=start,
        crop_stop=stop,
        shape=shape,
        spacing_mm=spacing_mm,
        law=law,
    )


def native_box(native: Shaped[np.ndarray, "_ _ _"], grid: Grid) -> Shaped[np.ndarray, "_ _ _"]:
    """The crop of an array of the native shape, in prepared order; a view, to read or to write."""
    box = tuple(map(slice, grid.crop_start, grid.crop_stop))
    return turn(native, grid.order, grid.flip)[box]


def to_grid(voxels: Num[np.ndarray, "_ _ _"], grid: Grid, kind: str) -> Num[np.ndarray, "_ _ _"]:
    """Brings an array of the scan's native shape to the grid: turned, cropped, resampled.

    `kind` is "image" (cubic, float32) or "label" (majority of linear weights, uint8).
    An array that needs no change is not copied.

    Raises:
        ValueError: If the shape is not the grid's native one, or `kind` is another word.
    """
    _check_shape(voxels.shape, grid.native_shape, "native")
    cropped = native_box(voxels, grid)
    axis = resample.separate_axis(grid.native_spacing_mm, grid.spacing_mm)
    if grid.law == CENTERS and kind in ("image", "label"):
        sizes = grid.shape, grid.native_spacing_mm, grid.spacing_mm
        if kind == "label":
            return centers.label_to_centers(cropped, *sizes, grid.flip)
        x, y, z = (row[3] for row in grid.native_affine[:3])
        return centers.to_centers(
            cropped, *sizes, grid.flip, origin_mm=(z, -y, -x), order=grid.order
        )
    if kind == "image":
        return np.ascontiguousarray(resample.resample_image(cropped, grid.shape, axis))
    if kind == "label":
        cropped = cropped.astype(np.uint8, copy=False)
        return np.ascontiguousarray(resample.resample_label(cropped, grid.shape, axis))
    raise ValueError(f"to_grid: kind is 'image' or 'label'; got {kind!r}")


def label_from_grid(label: UInt8[np.ndarray, "_ _ _"], grid: Grid) -> UInt8[np.ndarray, "_ _ _"]:
    """The label of the nearest prepared voxel, on the scan's own voxels; 0 outside the crop.

    Raises:
        ValueError: If the shape is not the grid's.
    """
    _check_shape(label.shape, grid.shape, "prepared")
    native = np.zeros(grid.native_shape, np.uint8)
    nearest = map(resample.nearest_index, grid.shape, grid.cropped_shape)
    native_box(native, grid)[...] = label[np.ix_(*nearest)]
    return native


def argmax_from_grid(
    logits: Float[np.ndarray, "K _ _ _"], grid: Grid
) -> UInt8[np.ndarray, "_ _ _"]:
    """The likeliest class on the scan's own voxels; 0 outside the crop.

    Logits are brought back one class at a time and only the best so far is kept, so that memory
    does not grow with the number of classes. In a tie the lowest class wins.

    Raises:
        ValueError: If the shape is not the grid's, or there are more than 256 classes.

    Source: nnU-Net v2.8.1, `convert_predicted_logits_to_segmentation_with_correct_shape`.
    """
    _check_shape(logits.shape[1:], grid.shape, "prepared")
    if not 1 <= len(logits) <= 256:
        raise ValueError(f"argmax_from_grid: want 1 to 256 classes; got {len(logits)}")
    if grid.law == CENTERS:
        return _nearest_center(logits.argmax(0).astype(np.uint8), grid)
    axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
    wins = _planes_where_it_wins(logits, axis)
    best = resample.resample_linear(logits[0], grid.cropped_shape, axis, np.logical_or.reduce(wins))
    winner = np.zeros(grid.cropped_shape, np.uint8)
    for index in range(1, len(logits)):
        if not wins[index - 1].any():
            continue
        score = resample.resample_linear(logits[index], grid.cropped_shape, axis, wins[index - 1])
        np.copyto(winner, index, where=score > best)
        best = np.maximum(best, score)  # not in place: it may be the caller's array
    native = np.zeros(grid.native_shape, np.uint8)
    native_box(native, grid)[...] = winner
    return native


def _planes_where_it_wins(
    logits: Float[np.ndarray, "K _ _ _"], axis: int | None
) -> Bool[np.ndarray, "_ _"]:
    """Of every class but background, in which planes across `axis` it is likelier anywhere.

    Elsewhere it is not likelier after linear resampling either, to the last bit: both are sums of
    the same weights, which are not negative, times larger and smaller numbers. Without an axis
    there is one plane, the volume.
    """
    across = tuple(a for a in range(3) if a != axis)
    found = [(one > logits[0]).any(across) for one in logits[1:]]
    shape = (len(found), 1 if axis is None else logits.shape[1 + axis])
    return np.array(found, bool).reshape(shape)


def probabilities_from_grid(
    logits: Float[np.ndarray, "K _ _ _"], grid: Grid
) -> Float32[np.ndarray, "K _ _ _"]:
    """Class probabilities on the scan's own voxels; outside the crop, background is 1.

    Logits are brought back, then comes the softmax: the likeliest class is `argmax_from_grid`'s.

    Raises:
        ValueError: If the shape is not the grid's.

    Source: nnU-Net v2.8.1, `convert_predicted_logits_to_segmentation_with_correct_shape`.
    """
    _check_shape(logits.shape[1:], grid.shape, "prepared")
    axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
    native = np.zeros((len(logits), *grid.native_shape), np.float32)
    native[0] = 1
    if grid.law == CENTERS:
        chances = special.softmax(logits, axis=0)
        return np.stack([_nearest_center(one, grid, i == 0) for i, one in enumerate(chances)])
    inside = [native_box(one, grid) for one in native]
    for one, box in zip(logits, inside, strict=True):
        box[...] = resample.resample_linear(one, grid.cropped_shape, axis)
    highest = np.max(inside, axis=0)
    total = np.zeros(grid.cropped_shape, np.float32)
    for box in inside:
        box[...] = np.exp(box - highest)
        total += box
    for box in inside:
        box /= total
    return native


def _nearest_center(
    voxels: Shaped[np.ndarray, "_ _ _"], grid: Grid, outside: float = 0
) -> Shaped[np.ndarray, "_ _ _"]:
    native = np.empty(grid.native_shape, voxels.dtype)
    turned = native_box(native, grid)
    sizes = turned.shape, grid.native_spacing_mm, grid.spacing_mm
    turned[...] = centers.from_centers(voxels, *sizes, grid.flip, outside)
    return native


def label_of_logits(
    logits: Float[np.ndarray, "K _ _ _"], grid: Grid, labels: Labels | None = None
) -> UInt8[np.ndarray, "_ _ _"]:
    """The label map on the scan's own voxels; 0 outside the crop.

    Of classes `argmax_from_grid`'s. A voxel is in a region whose probability is above one half;
    later regions are written over earlier ones.

    Raises:
        ValueError: If the shape is not the grid's, or there are more than 256 classes.

    Source: nnU-Net v2.8.1, `LabelManager.convert_probabilities_to_segmentation`.
    """
    if labels is None or not labels.regions:
        return argmax_from_grid(logits, grid)
    native = np.zeros(grid.native_shape, np.uint8)
    native_box(native, grid)[...] = labels.assemble(one > 0 for one in _cropped(logits, grid))
    return native


def probabilities_of_logits(
    logits: Float[np.ndarray, "K _ _ _"], grid: Grid, labels: Labels | None = None
) -> Float32[np.ndarray, "K _ _ _"]:
    """Probability of every class or region on the scan's own voxels.

    Outside the crop background is 1, of classes; regions are 0.

    Raises:
        ValueError: If the shape is not the grid's.
    """
    if labels is None or not labels.regions:
        return probabilities_from_grid(logits, grid)
    native = np.zeros((len(logits), *grid.native_shape), np.float32)
    for one, whole in zip(_cropped(logits, grid), native, strict=True):
        native_box(whole, grid)[...] = special.expit(one)
    return native


def _cropped(
    logits: Float[np.ndarray, "K _ _ _"], grid: Grid
) -> Iterator[Float[np.ndarray, "_ _ _"]]:
    """Each channel on the scan's voxels inside the crop."""
    _check_shape(logits.shape[1:], grid.shape, "prepared")
    axis = resample.separate_axis(grid.spacing_mm, grid.native_spacing_mm)
    for one in logits:
        yield resample.resample_linear(one, grid.cropped_shape, axis)


def _crop_box(
    voxels: Shaped[np.ndarray, "_ _ _"], spacing_mm: Millimeters, crop_hu: float | None
) -> tuple[Shape, Shape]:
    if crop_hu is None:
        inside, margin_mm = voxels != 0, 0.0
    else:
        inside, margin_mm = _largest_component(voxels > crop_hu), _MARGIN_MM
    box = bounding_box(inside) or tuple(slice(0, size) for size in voxels.shape)
    pads = [math.ceil(margin_mm / spacing) for spacing in spacing_mm]
    d, h, w = (max(part.start - pad, 0) for part, pad in zip(box, pads, strict=True))
    stops = (part.stop + pad for part, pad in zip(box, pads, strict=True))
    d_stop, h_stop, w_stop = map(min, stops, voxels.shape)
    return (d, h, w), (d_stop, h_stop, w_stop)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    component, count = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues]
    if count < 2:
        return mask
    sizes = np.bincount(component.ravel())
    sizes[0] = 0
    return component == sizes.argmax()


def _check_shape(got: tuple[int, ...], want: Shape, which: str) -> None:
    if got != want:
        raise ValueError(f"grid: array has shape {got}, but the {which} shape is {want}")
