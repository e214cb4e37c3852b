"""The mask of a phantom: what a reader outlines on the slices as they are shown.

Blood is painted into thin slices. A reader sees the thick ones, unsharp as the scanner made them,
and draws a smooth line around what is blood there: bone that a clot only touches is left out, and
so are specks.
"""

import numpy as np
from scipy import ndimage

from bhsd_jax.phantom.scanner import Scan

_SMOOTH = 1.2, 0.7  # mm, pixels at least: standard deviation of the hand's unsteadiness
_VISIBLE_HU = (-60.0, 90.0)  # beyond: air, bone, a drain
_SPECK_MM2 = 8.0  # smaller pieces are not outlined
_COVERED = 0.07  # least share of a voxel's surroundings that is blood
_CROSS = ndimage.generate_binary_structure(2, 1)[None]


def outline(
    cells: np.ndarray,
    blood: np.ndarray,
    wanted_ml: dict[int, float],
    shown: np.ndarray,
    scan: Scan,
) -> np.ndarray:
    """Labels of the thick slices, uint8 [D H W].

    Each class gets the voxels around which it covers most, as many as its volume asks for if so
    many show it; the smallest class chooses first.

    Args:
        cells: The thick voxel each thin voxel of the cavity lies in [N].
        blood: Class painted into each thin voxel [N].
        wanted_ml: Volume of the mask by class.
        shown: HU of the thick slices without noise [D H W].
        scan: How the head was scanned.
    """
    label = np.zeros(shown.shape, np.uint8)
    for index in sorted(wanted_ml, key=lambda c: wanted_ml[c]):
        own = cells[blood == index]
        if own.size == 0:
            continue
        box = _box(own, shown.shape, scan)
        share = _share(own, box, shown.shape, scan)
        sight = shown[box]
        share[(sight < _VISIBLE_HU[0]) | (sight > _VISIBLE_HU[1]) | (label[box] > 0)] = 0
        count = max(1, round(wanted_ml[index] / scan.voxel_ml))
        label[box][_choose(share, count, scan)] = index
    return label


def _box(cells: np.ndarray, shape: tuple[int, ...], scan: Scan) -> tuple[slice, slice, slice]:
    """What holds the cells and all that smoothing reaches from them."""
    reach = int(np.ceil(4 * _sigma(scan))) + 1
    d, h, w = np.unravel_index(cells, shape)
    return (
        slice(int(d.min()), int(d.max()) + 1),
        slice(max(0, int(h.min()) - reach), int(h.max()) + reach + 1),
        slice(max(0, int(w.min()) - reach), int(w.max()) + reach + 1),
    )


def _sigma(scan: Scan) -> float:
    """Standard deviation of the smoothing, pixels."""
    return max(_SMOOTH[0] / scan.pixel_mm, _SMOOTH[1])


def _share(
    cells: np.ndarray, box: tuple[slice, slice, slice], shape: tuple[int, ...], scan: Scan
) -> np.ndarray:
    """Share of every voxel's surroundings in its slice that the cells cover, over the box."""
    d, h, w = np.unravel_index(cells, shape)
    size = [min(s.stop, n) - s.start for s, n in zip(box, shape, strict=True)]
    inner = np.ravel_multi_index((d - box[0].start, h - box[1].start, w - box[2].start), size)
    counts = np.bincount(inner, minlength=int(np.prod(size))).astype(np.float32).reshape(size)
    sigma = _sigma(scan)
    return ndimage.gaussian_filter(counts / scan.sub, (0, sigma, sigma), mode="constant")


def _choose(share: np.ndarray, count: int, scan: Scan) -> np.ndarray:
    """The `count` voxels of the largest share, specks left out, as a mask."""
    chosen = _largest(share, count)
    smallest = _SPECK_MM2 / scan.pixel_mm**2
    if smallest <= 2:  # in coarse pixels nothing is a speck
        return chosen
    kept = _without_specks(chosen, smallest)
    # What the specks would have held goes to the rims of what stays.
    near = ndimage.binary_dilation(kept, _CROSS, iterations=2)
    return _without_specks(_largest(share * near, count), smallest)


def _largest(share: np.ndarray, count: int) -> np.ndarray:
    flat = share.ravel()
    open_ = np.flatnonzero(flat > _COVERED)
    if open_.size == 0:
        open_ = np.flatnonzero(flat > 0)
    chosen = np.zeros(flat.size, bool)
    # A stable sort, so that equal shares fall the same way on every machine.
    chosen[open_[np.argsort(-flat[open_], kind="stable")[:count]]] = True
    return chosen.reshape(share.shape)


def _without_specks(mask: np.ndarray, smallest: float) -> np.ndarray:
    """Pieces, within their slices, of at least `smallest` voxels; the largest in any case."""
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = _CROSS[0]
    pieces, _ = ndimage.label(mask, flat)  # pyright: ignore[reportGeneralTypeIssues]
    pieces = np.asarray(pieces, np.int64)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    large = sizes >= min(smallest, max(sizes.max(), 1))
    return large[pieces]
