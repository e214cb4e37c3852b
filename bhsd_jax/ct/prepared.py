"""What is known of a case: the facts of the first pass over its files, and its prepared form.

Apart from `prepare`, which makes both: readers of shards need no libraries of file formats.
"""

from dataclasses import dataclass

import numpy as np

from bhsd_jax.defects import Finding, texts
from bhsd_jax.volume import Grid, Millimeters, Shape


@dataclass(frozen=True, eq=False)
class Facts:
    """What the first pass learns of a case: enough to plan, to check, to notice a changed file."""

    case: str
    patient: str
    split: str
    bleeding: bool | None
    shape: Shape  # canonical axes, cropped
    spacing_mm: Millimeters  # canonical axes
    tilt_deg: float  # gantry; 0 for MR
    intensity: tuple[float, float, float]  # minimum, median, maximum of the file, before repairs
    voxels: tuple[int, ...]  # per class of the file's mask, background first; () without one
    volume_ml: tuple[float, ...]  # the same; see `tilt_corrected`
    foreground: np.ndarray  # float32 [n], of several channels [n C]: drawn intensities inside the
    # mask; n = 0 if it is empty
    source_sha256: str
    findings: tuple[Finding, ...]  # repairs and oddities
    field_mm: Millimeters = (0.0, 0.0, 0.0)  # extent of the whole scan, canonical axes
    voxels_sha256: str = ""  # of the intensities as read: equal for copies under other names
    order: Shape = (0, 1, 2)  # native axis behind each canonical one
    relative_size: float = 1.0  # voxels of the crop over those of the whole scan
    tilt_corrected: bool = False  # volumes are the affine's times the cosine of the tilt

    @property
    def warnings(self) -> list[str]:
        """What the findings say."""
        return texts(self.findings)


@dataclass(frozen=True, eq=False)
class Prepared:
    """One case as training reads it."""

    case: str
    patient: str
    split: str
    bleeding: bool | None
    slice_labels: tuple[tuple[int, ...], ...] | None
    """Like `Case.slice_labels`, but one row per slice of the prepared array."""
    image: np.ndarray  # [D H W] int16 HU, or float32 normalized; [D H W C] of several channels, of
    # which the last is the first stage's label map where the plan has a `previous_stage`
    label: np.ndarray | None  # uint8 [D H W]
    grid: Grid
    foreground: tuple[np.ndarray, ...]  # per foreground class or region: int32 [n 3] voxel
    # positions; then of all that is annotated, where not everything is
    volume_ml: tuple[float, ...] = ()  # per class, background first; of the native grid
    source_sha256: str = ""  # of the files the case was made from
    warnings: tuple[str, ...] = ()  # repairs and oddities; not in the record
    doubts: tuple[str, ...] = ()  # those of them that anyone who uses the scan has to know
    sorted_by: str = ""  # as of its case
    values: int = 0  # that its mask may hold; 0: background and one per entry of `foreground`

    @property
    def channels_last(self) -> np.ndarray:
        """The image [D H W C], however many channels there are."""
        return self.image if self.image.ndim == 4 else self.image[..., None]
