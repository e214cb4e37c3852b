"""One synthetic head CT with its mask: from a number to voxels.

The random draws and their order are part of the format: change them and `VERSION` goes up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bhsd_jax.phantom.anatomy import (
    HEAD_TO_CAVITY_MM,
    Head,
    Points,
    bone_mm,
    depths,
    draw_head,
    outside_hu,
)
from bhsd_jax.phantom.bleeds import (
    LEVELS,
    class_set,
    displacement,
    draw_lesions,
    paint,
    with_hydrocephalus,
)
from bhsd_jax.phantom.brain import brain_hu, tissues
from bhsd_jax.phantom.flaws import add_metal, redraw
from bhsd_jax.phantom.lesions import Lesion, Space
from bhsd_jax.phantom.outline import outline
from bhsd_jax.phantom.scanner import Scan, acquire, draw_scan, show
from bhsd_jax.phantom.surgery import Surgery, draw_surgery
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE

VERSION = 2
# Independent random streams of one case: a bleed more leaves head, scanner and noise as they are.
_HEAD, _SCAN, _CLASSES, _LESIONS, _SURGERY, _NOISE, _METAL, _RATER = _STREAMS = range(8)

_SCAR_HU = 30.0  # where bone was taken away


@dataclass(frozen=True)
class Options:
    """What may be asked for; None is drawn."""

    size: int = 128  # rows and columns
    slices: int = 24
    sub: int = 3  # thin slices averaged into one
    thick_mm: float | None = None  # of a slice; None: 160 mm over all slices
    difficulty: str = "default"  # a name in `LEVELS`
    classes: tuple[int, ...] | None = None  # bleeds by class index; (): none
    volumes_ml: Mapping[int, float] = field(default_factory=dict)  # by class index
    tilt_deg: float | None = None
    pad_hu: int | None = None  # 0: no padding
    metal: bool = False  # a coil in the brain, with streaks
    rater_noise: bool = False  # outlines a pixel off, as another rater would have them

    def __post_init__(self) -> None:
        if min(self.size, self.slices, self.sub) < 1:
            raise UserError(
                f"Options: size {self.size}, slices {self.slices} and sub {self.sub} must be > 0"
            )
        if self.difficulty not in LEVELS:
            raise UserError(
                f"Options: difficulty {self.difficulty!r} is not known; use {', '.join(LEVELS)}"
            )
        named = {*(self.classes or ()), *self.volumes_ml}
        if not named <= set(range(1, len(HEMORRHAGE))):
            raise UserError(f"Options: bleeds are classes 1 to 5; got {sorted(named)}")


@dataclass(frozen=True)
class Truth:
    """What is known of a made case beyond its mask."""

    scan: Scan
    head: Head
    surgery: Surgery


def make_case(seed: int, options: Options = Options()) -> tuple[np.ndarray, np.ndarray, Truth]:
    """HU int16 [D H W], label uint8 [D H W], and what is known of them.

    Axes are a BHSD file's (k, j, i): slices superior, rows anterior, columns left. A case depends
    on seed, options and `VERSION` only. Other bleeds leave the head, the scanner and its noise as
    they are, but for the tissue they push aside and the ventricles they widen.
    """
    rng = [np.random.default_rng((VERSION, stream, seed)) for stream in _STREAMS]
    level = LEVELS[options.difficulty]
    head = draw_head(rng[_HEAD])
    scan = draw_scan(
        rng[_SCAN],
        size=options.size,
        slices=options.slices,
        sub=options.sub,
        thick_mm=options.thick_mm,
        tilt_deg=options.tilt_deg,
        pad_hu=options.pad_hu,
        noise=level.noise,
    )
    classes = options.classes
    if classes is None:
        classes = class_set(rng[_CLASSES].random())
    lesions = draw_lesions(rng[_LESIONS], classes, options.volumes_ml, level)
    surgery = draw_surgery(rng[_SURGERY], level.surgery)
    hu, cells, points, depth = _skull(head, surgery, scan)
    space = _space(with_hydrocephalus(head, lesions), lesions, points, depth)
    inside = brain_hu(head, space.tissue)
    blood = paint(lesions, space, inside, scan.voxel_ml / scan.sub, level.loose)
    inside += 13 * np.exp(-depth / 7)  # beam hardening left beside the bone
    blood[surgery.leave(points, depth, space.tissue, inside)] = 0
    del space
    hu += _per_cell(cells, inside, hu.shape)
    hu /= scan.sub
    cavity = _per_cell(cells, np.full(cells.size, 1 / scan.sub), hu.shape)
    shown = show(scan, hu, scan.offset_mm[1] - head.half_length_mm - HEAD_TO_CAVITY_MM)
    requested = {c: lesion.volume_ml for c, lesion in lesions.items()}
    label = outline(cells, blood, requested, shown, scan)
    if options.rater_noise:
        label = redraw(label, rng[_RATER])
    image = acquire(scan, shown, cavity, rng[_NOISE])
    if options.metal:
        image = add_metal(image, cavity, scan, rng[_METAL])
    return image, label, Truth(scan, head, surgery)


def _space(head: Head, lesions: Mapping[int, Lesion], points: Points, depth: np.ndarray) -> Space:
    """The cavity's voxels with mass effect."""
    shift = displacement(lesions, points)
    rest = (points[0] - shift[0], points[1] - shift[1], points[2] - shift[2])
    return Space(points, rest, depth, tissues(head, rest, depth))


def _skull(
    head: Head, surgery: Surgery, scan: Scan
) -> tuple[np.ndarray, np.ndarray, Points, np.ndarray]:
    """Sums of thin-slice HU with the cavity left at 0 [D H W]; the thin voxels inside it [N].

    The latter as the thick voxel each lies in, its patient coordinates, and its depth.
    """
    hu = np.zeros((scan.slices, scan.size, scan.size), np.float32)
    cells, points, deep = [], [], []
    for index in range(scan.slices * scan.sub):
        plane = scan.plane(index)
        bumps = head.bumps(plane)
        vault, cavity = depths(head, plane, bumps)
        bone = bone_mm(plane, bumps)
        outside = outside_hu(head, plane, vault, cavity, bone, surgery.swelling(plane))
        outside[surgery.opened(plane) & (vault <= 0) & (vault > -bone)] = _SCAR_HU
        inside = np.flatnonzero(cavity > 0)
        outside.ravel()[inside] = 0
        hu[index // scan.sub] += outside
        cells.append((inside + index // scan.sub * scan.size**2).astype(np.int32))
        points.append(np.stack([p.ravel()[inside] for p in plane]))
        deep.append(cavity.ravel()[inside])
    x, y, z = np.concatenate(points, axis=1)
    return hu, np.concatenate(cells), (x, y, z), np.concatenate(deep)


def _per_cell(cells: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum of the values of all thin voxels in a thick one, float32."""
    total = np.bincount(cells, weights=values, minlength=int(np.prod(shape)))
    return total.astype(np.float32).reshape(shape)
