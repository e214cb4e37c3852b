"""The CT scanner of the phantom: grid with gantry tilt, slice profile, sharpness, noise, padding.

Arrays are [D, H, W] = a BHSD file's (k, j, i): slices run superior, rows anterior, columns left.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.special import expit

from bhsd_jax.phantom.anatomy import Points

AIR_HU = -1024
LARGEST_HU = 3071
_SHARPNESS_MM = 0.45  # standard deviation of what a point becomes in the plane
_COVERED_MM = 160.0  # of the head, if the slice thickness is not given
_FIELD_MM = ((250.0, 220.0, 240.0, 190.0), (0.70, 0.12, 0.12, 0.06))  # and how often
_PADDING_HU = ((0, -2048, -3024), (0.52, 0.245, 0.235))  # 0: none


@dataclass(frozen=True)
class Scan:
    """How one head was scanned."""

    size: int  # rows and columns
    slices: int
    sub: int  # thin slices averaged into one
    thick_mm: float
    field_mm: float  # edge of the square image
    tilt_deg: float  # of the gantry about x; BHSD's are never positive
    yaw_deg: float
    roll_deg: float
    offset_mm: tuple[float, float, float]  # of the head from the middle
    pad_hu: int  # outside the circle of reconstruction; 0: no padding
    noise_hu: float  # standard deviation
    streak_hu: float  # amplitude near the skull base; 0: none
    streak_deg: float
    streak_mm: float  # wavelength

    @property
    def pixel_mm(self) -> float:
        """Distance between rows, and between columns."""
        return self.field_mm / self.size

    @property
    def across_mm(self) -> np.ndarray:
        """Position of every row, and of every column, from the middle."""
        return (np.arange(self.size) - (self.size - 1) / 2) * self.pixel_mm

    @property
    def feed_mm(self) -> float:
        """Table feed between slices: along the patient, so more than the thickness with a tilt."""
        return float(self.thick_mm / np.cos(np.deg2rad(self.tilt_deg)))

    @property
    def voxel_ml(self) -> float:
        """True volume of a voxel; the header's is larger by 1 / cos(tilt)."""
        return self.pixel_mm**2 * self.thick_mm / 1000

    @property
    def true_affine(self) -> np.ndarray:
        """Voxel (d, h, w, 1) -> world in mm, RAS+: slices are displaced along the patient's z."""
        return self._affine((0.0, 0.0, self.feed_mm))

    @property
    def stored_affine(self) -> np.ndarray:
        """As BHSD's headers have it: the table feed drawn along the slice normal, shear lost."""
        tilt = np.deg2rad(self.tilt_deg)
        return self._affine((0.0, -self.feed_mm * np.sin(tilt), self.feed_mm * np.cos(tilt)))

    def _affine(self, slice_step: tuple[float, float, float]) -> np.ndarray:
        tilt = np.deg2rad(self.tilt_deg)
        affine = np.eye(4)
        affine[:3, 0] = slice_step
        affine[:3, 1] = 0, self.pixel_mm * np.cos(tilt), self.pixel_mm * np.sin(tilt)
        affine[:3, 2] = -self.pixel_mm, 0, 0
        middle = (np.array((self.slices, self.size, self.size)) - 1) / 2
        affine[:3, 3] = -affine[:3, :3] @ middle
        return affine

    def plane(self, index: int) -> Points:
        """Patient coordinates of thin slice `index` of `slices * sub`, each [H W]."""
        across = self.across_mm.astype(np.float32)
        along = (index + 0.5) / self.sub - self.slices / 2
        tilt, yaw, roll = np.deg2rad((self.tilt_deg, self.yaw_deg, self.roll_deg)).tolist()
        x = across[None, :]
        y = across[:, None] * np.float32(np.cos(tilt))
        z = across[:, None] * np.float32(np.sin(tilt)) + np.float32(along * self.feed_mm)
        cos, sin = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
        x, y = x * cos - y * sin - self.offset_mm[0], x * sin + y * cos - self.offset_mm[1]
        cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
        return x * cos - z * sin, y, x * sin + z * cos - self.offset_mm[2]


def draw_scan(
    rng: np.random.Generator,
    *,
    size: int,
    slices: int,
    sub: int,
    thick_mm: float | None,
    tilt_deg: float | None,
    pad_hu: int | None,
    noise: float,
) -> Scan:
    """Draws what is None, and all that cannot be asked for; `noise` scales noise and streaks."""
    thick_mm = _COVERED_MM / slices if thick_mm is None else thick_mm
    field_mm = float(rng.choice(_FIELD_MM[0], p=_FIELD_MM[1]))
    tilted = rng.random() < 0.63
    drawn_tilt = -round(2 * float(np.clip(rng.normal(18, 6), 5, 29))) / 2  # in half degrees
    drawn_pad = int(rng.choice(_PADDING_HU[0], p=_PADDING_HU[1]))
    yaw, roll = rng.normal(0, (4, 3)).tolist()
    x, y, z = rng.normal(0, (4, 8, 6)).tolist()
    streaks = rng.random() < 0.5
    return Scan(
        size=size,
        slices=slices,
        sub=sub,
        thick_mm=thick_mm,
        field_mm=field_mm,
        tilt_deg=(drawn_tilt if tilted else 0.0) if tilt_deg is None else tilt_deg,
        yaw_deg=yaw,
        roll_deg=roll,
        offset_mm=(x, y, z + 2),
        pad_hu=drawn_pad if pad_hu is None else pad_hu,
        noise_hu=noise * rng.uniform(2.9, 4.6) * float(np.sqrt(5 / thick_mm)),
        streak_hu=noise * rng.uniform(1.5, 5) * streaks,
        streak_deg=rng.uniform(0, 180),
        streak_mm=rng.uniform(14, 30),
    )


def show(scan: Scan, hu: np.ndarray, bottom_mm: float) -> np.ndarray:
    """Slice averages as sharp as the scanner is, without noise, and what the head lies in.

    Args:
        scan: How it is scanned.
        hu: Slice averages without any defect [D H W] float32; changed in place.
        bottom_mm: Height of the lowest point of the head above the middle of the image.
    """
    _add_headrest(hu, scan.across_mm, bottom_mm)
    sigma = _SHARPNESS_MM / scan.pixel_mm
    return ndimage.gaussian_filter(hu, (0, sigma, sigma), mode="nearest")


def acquire(scan: Scan, hu: np.ndarray, cavity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds noise, streaks and padding: int16 [D H W].

    Args:
        scan: How it is scanned.
        hu: What `show` gives; changed in place.
        cavity: Share of every voxel that lies in the cranial cavity.
        rng: For the noise.
    """
    across = scan.across_mm
    radius = np.hypot(across[:, None], across[None, :]).astype(np.float32)
    # The head attenuates most along lines through its middle.
    hu += _noise(scan, rng) * (0.45 + 0.75 * expit((110 - radius) / 12))
    if scan.streak_hu:
        hu += _streaks(scan, across) * cavity
    out = np.clip(np.rint(hu), AIR_HU, LARGEST_HU).astype(np.int16)
    if scan.pad_hu:
        out[:, radius > scan.field_mm / 2] = scan.pad_hu
    return out


def _add_headrest(hu: np.ndarray, across: np.ndarray, bottom_mm: float) -> None:
    """A cradle under the head: a shell, foam in it, and a second shell."""
    x, y = across[None, :], across[:, None]
    middle = bottom_mm + 88
    ring = np.hypot(x, y - middle) - 88  # mm outside a circle that touches the head's lowest point
    under = y < middle - 35
    parts = ((2.0, 3.2, 20), (3.2, 13.0, -930), (13.0, 15.0, 90))  # from, to, HU
    for inner, outer, value in parts:
        part = (ring >= inner) & (ring < outer) & under
        hu[:, part] = np.where(hu[:, part] < -900, np.float32(value), hu[:, part])


def _noise(scan: Scan, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal((scan.slices, scan.size, scan.size), dtype=np.float32)
    scale = scan.noise_hu
    if scan.pixel_mm < 1:  # the kernel's band; coarser pixels do not show it
        fine, coarse = 0.44 / scan.pixel_mm, 1.6 / scan.pixel_mm
        blurred = ndimage.gaussian_filter(noise, (0, fine, fine), mode="wrap")
        blurred -= 0.2 * ndimage.gaussian_filter(noise, (0, coarse, coarse), mode="wrap")
        noise = blurred
    else:
        scale = scale / scan.pixel_mm**0.8
    return noise * np.float32(scale / noise.std())


def _streaks(scan: Scan, across: np.ndarray) -> np.ndarray:
    """Dark and bright bands between the petrous bones."""
    angle = np.deg2rad(scan.streak_deg)
    phase = across[None, :] * np.cos(angle) + across[:, None] * np.sin(angle)
    bands = scan.streak_hu * np.cos(2 * np.pi * phase / scan.streak_mm)
    height = np.arange(scan.slices) / scan.slices
    return (bands * np.exp(-(((height - 0.22) / 0.1) ** 2))[:, None, None]).astype(np.float32)
