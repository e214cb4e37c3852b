"""Words shared by the host side: scans, grids, cases, plans. NumPy only.

Arrays of a scan as it lies in its file are indexed [D, H, W] = the file's (k, j, i), in whatever
direction those run. Prepared arrays are *canonical*: D runs inferior to superior, H anterior to
posterior, W right to left of the patient (the order a radiologist looks at slices in), unless the
plan's `transpose` puts another anatomical axis first.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bhsd_jax.defects import Finding
from bhsd_jax.labels import Labels, Region
from bhsd_jax.platform import files

Shape = tuple[int, int, int]
Millimeters = tuple[float, float, float]  # D, H, W

HEMORRHAGE = ("background", "EDH", "IPH", "IVH", "SAH", "SDH")
"""Classes of BHSD by value in its masks, and of all data sets with the same kinds of bleeding."""

SOME = 2
"""A slice label: the slice shows this class, or another of those that have this value in its row.
So it is where only "any bleeding" is known, which is all that a binary task asks."""


@dataclass(frozen=True)
class Volume:
    """One scan or label map in memory, as it lies in its file."""

    voxels: np.ndarray  # [D H W]: HU or MR intensity (float32 or integer), or class index (uint8)
    affine: np.ndarray  # [4 4] float64: voxel (d, h, w, 1) -> world (x, y, z, 1) in mm, RAS+
    case: str

    @property
    def spacing_mm(self) -> Millimeters:
        """Distance between voxel centers along D, H, W (the lengths of the affine's columns)."""
        d, h, w = column_lengths(self.affine).tolist()
        return d, h, w


@dataclass(frozen=True)
class Grid:
    """How a prepared array lies in its scan, so that a prediction can be mapped back exactly."""

    native_shape: Shape  # [D H W] as in the file
    native_affine: tuple[tuple[float, ...], ...]  # 4 rows of 4; native (d, h, w, 1) -> RAS+ mm
    order: tuple[int, int, int]  # native axis behind the prepared D, H, W
    flip: tuple[bool, bool, bool]  # prepared axis runs against its native axis
    crop_start: Shape  # in reoriented native voxels
    crop_stop: Shape  # exclusive
    shape: Shape  # of the prepared array
    spacing_mm: Millimeters  # of the prepared array
    law: str = "faces"  # outer faces agree (nnU-Net); or first "centers" (BLAST-CT)

    @property
    def cropped_shape(self) -> Shape:
        """Shape after reorienting and cropping, before resampling."""
        d, h, w = (b - a for a, b in zip(self.crop_start, self.crop_stop, strict=True))
        return d, h, w

    @property
    def native_spacing_mm(self) -> Millimeters:
        """Spacing of the reoriented native voxels along the prepared D, H, W."""
        lengths = column_lengths(np.asarray(self.native_affine)).tolist()
        d, h, w = (lengths[axis] for axis in self.order)
        return d, h, w

    @property
    def native_extent_mm(self) -> Millimeters:
        """Extent of the whole scan along the prepared D, H, W."""
        counts = (self.native_shape[axis] for axis in self.order)
        d, h, w = (n * step for n, step in zip(counts, self.native_spacing_mm, strict=True))
        return d, h, w

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Grid":
        """Undoes `to_json`, also after a trip through a JSON file."""
        return cls(
            native_shape=tuple(data["native_shape"]),
            native_affine=tuple(tuple(row) for row in data["native_affine"]),
            order=tuple(data["order"]),
            flip=tuple(data["flip"]),
            crop_start=tuple(data["crop_start"]),
            crop_stop=tuple(data["crop_stop"]),
            shape=tuple(data["shape"]),
            spacing_mm=tuple(data["spacing_mm"]),
            law=data.get("law", "faces"),
        )


@dataclass(frozen=True)
class Series:
    """A scan that lies in many files: one DICOM series, and how it becomes one volume.

    Its text shows no file name: those of DICOM often carry the patient's.
    """

    files: tuple[Path, ...] = field(repr=False)  # in any order
    name: str  # stands for it in messages
    uneven: str = "refuse"  # slices at uneven steps; or "resample"
    unshear: bool = False  # undo the gantry's tilt for the network
    findings: tuple[Finding, ...] = ()  # what had to be said when it was found
    part: int = 0  # which of the volumes in the files, where they hold several (enhanced CT)
    settings: str = "config.data"  # where `uneven` and `unshear` are set, for messages
    own_slices: bool = False
    """Label maps have a plane for each of its slices, and none for those that were interpolated.
    Uneven steps are then resampled for the network; `uneven` is about missing slices alone."""
    uid: str = field(default="", repr=False)  # SeriesInstanceUID; "" if its files do not say


@dataclass(frozen=True)
class Masks:
    """A label map to be made: of several raters', or of one with other class values."""

    files: tuple[Path, ...]  # in any format that is read, on the scan's voxels
    combine: str = "first"  # "majority", "union" or "intersection" (`ct/masks.py` says how)
    values: tuple[int, ...] = ()  # class by value in the files; (): as they are


@dataclass(frozen=True)
class Channels:
    """A scan of several input channels: one file each, or one file that holds them all."""

    files: tuple[Path, ...]  # in the order of the channels
    count: int  # of channels


Image = Path | Series | Channels  # where a scan lies
Label = Path | Masks  # where its label map lies


@dataclass(frozen=True)
class Case:
    """One scan of a data set: where it lies and what is known of it."""

    id: str
    patient: str  # cases of one patient never cross a split
    image: Image
    label: Label | None  # None: no mask
    split: str  # "train", "val", "test", or "unlabeled" (training images used without a mask)
    bleeding: bool | None = None  # volume-level label; None: not known
    slice_labels: tuple[tuple[int, ...], ...] | None = None
    """A row per slice in the file's k order, a column per foreground class: 1, 0, -1 (unknown), or
    `SOME`."""
    table_feed: bool = False
    """Where the gantry was tilted, the affine is drawn upright and its slice step is the table's
    feed: a property of the data set's conversion, which no affine shows."""
    sorted_by: str = ""
    """What cases are sorted by where some of them are drawn; "": by id. Ids that are salted anew in
    every folder of shards would give folds of other scans in each."""
    previous: Path | None = None
    """Label map that the first network of a cascade has predicted; None: there is no cascade."""
    absent: tuple[int, ...] = ()  # classes, by index, that no slice of the scan shows

    def __post_init__(self):
        """Takes paths as text, which data sets of one's own may have."""
        for name in ("image", "label", "previous"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))


@dataclass(frozen=True)
class Survey:
    """The cases of a data set that can be used, and all that is wrong with the folders."""

    cases: tuple[Case, ...]  # sorted by id
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Network:
    """Topology an nnU-Net-like network needs for one spacing and patch; axis order D, H, W."""

    patch: Shape
    batch: int
    features: tuple[int, ...]  # channels per stage
    strides: tuple[Shape, ...]  # per stage; stage 0 is (1, 1, 1)
    kernels: tuple[Shape, ...]  # per stage
    convs_encoder: tuple[int, ...]  # per stage; residual blocks if `residual`
    convs_decoder: tuple[int, ...]  # per stage but the last, that of full resolution first
    batch_dice: bool
    residual: bool = False  # made for a residual encoder; plans of older versions never say so


@dataclass(frozen=True)
class Channel:
    """How one of several input channels is normalized, before it is resampled."""

    name: str
    scheme: str  # nnU-Net's class: a key of `ct.channels.SCHEMES`
    foreground: tuple[float, float, float, float]  # 0.5 %, mean, std, 99.5 % inside labels
    masked: bool = False  # z-scores of the voxels where a channel is not 0; all others stay 0


@dataclass(frozen=True)
class Plan:
    """What preprocessing decided and did: facts about the shards, which training never changes."""

    dataset: str
    classes: tuple[str, ...]  # index 0 is background
    modality: str  # "ct": shards hold int16 HU; "mr": float32, z-scored per scan
    spacing_mm: Millimeters  # D, H, W
    transpose: tuple[int, int, int]  # which of `axes` is behind D, H, W; head CT: 0, 1, 2
    crop_hu: float | None  # CT: box of the largest component above this; None: non-zero voxels
    foreground: tuple[float, float, float, float]  # 0.5 %, mean, std, 99.5 % inside labels (HU)
    median_shape: Shape  # of the prepared training cases
    network: Network
    source_sha256: str  # of the sorted list of input files
    license: str = ""  # of the data; carried into every checkpoint and export
    version: int = 2  # of the preprocessing code
    notes: tuple[str, ...] = field(default=())  # warnings of the planner
    axes: str = "SPL"  # where D, H, W run before `transpose`; "file": as they lie in the file
    normalize_first: bool = False  # as nnU-Net: unrepaired, normalized before it is resampled
    use_mask_for_norm: bool = False  # MR: z-scores of the non-zero voxels; all others stay 0
    repaired: bool = False  # with `normalize_first`: CT is put into HU all the same
    law: str = "faces"  # of resampling, see `Grid`; with "centers" nothing is cropped
    channels: tuple[Channel, ...] = ()  # of scans that have several, or another normalization
    regions: tuple[Region, ...] = ()  # as in `Labels`, and so the next two
    region_order: tuple[int, ...] = ()
    ignore: int | None = None
    listed: tuple[str, ...] = ()  # as in `Labels`
    planar: bool = False  # 2D: slices stay as far apart as they are, and patches are single ones
    previous_stage: str = ""
    """nnU-Net's configuration of the first network of a cascade, whose label map is the last
    channel of every prepared scan; empty: there is none."""

    @property
    def scan_channels(self) -> int:
        """Channels of a prepared scan, without a label map of a first network."""
        return max(len(self.channels), 1)

    @property
    def raw_channels(self) -> int:
        """Channels of a prepared scan, a first network's label map included."""
        return self.scan_channels + bool(self.previous_stage)

    @property
    def as_it_lies(self) -> bool:
        """CT is prepared as its files have it, repaired or in HU or not: nnU-Net's order."""
        return self.normalize_first and not self.repaired

    @property
    def in_hu(self) -> bool:
        """Networks are given CT that is in HU, repaired where it was not."""
        return self.modality == "ct" and not self.as_it_lies

    @property
    def masked(self) -> tuple[int, ...]:
        """Channels of a prepared scan that are 0 wherever the scan is, but for holes in it."""
        if not self.channels:
            return (0,) if self.use_mask_for_norm else ()
        return tuple(index for index, one in enumerate(self.channels) if one.masked)

    @property
    def labels(self) -> Labels:
        """What the values of its label maps mean."""
        return Labels(self.classes, self.regions, self.region_order, self.ignore, self.listed)

    @property
    def normalized_before(self) -> bool:
        """Prepared scans are normalized; else they are CT in HU."""
        return self.normalize_first or self.modality == "mr"

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; what few plans have is left out of the others."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in _RARE or v != _RARE[k]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Undoes `to_json`, also after a trip through a JSON file."""
        values = dict(data)
        network = {key: files.tuples(value) for key, value in values.pop("network").items()}
        channels = tuple(
            Channel(**{key: files.tuples(value) for key, value in one.items()})
            for one in values.pop("channels", ())
        )
        values = {key: files.tuples(value) for key, value in values.items()}
        return cls(network=Network(**network), channels=channels, **values)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads `plan.json`, from the file or the folder it lies in.

        Raises:
            FileNotFoundError: If there is none; says which verb writes it.
            ValueError: If it is damaged; names the file.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no plan; run the verb `preprocess` first")
        remedy = "run what writes it again: `preprocess` that of shards, `train` that of a run"
        return files.read_json(path, cls.from_json, remedy=remedy)


_RARE = {
    "channels": (),
    "regions": (),
    "region_order": (),
    "ignore": None,
    "listed": (),
    "planar": False,
    "previous_stage": "",
}


@runtime_checkable
class Dataset(Protocol):
    """A data set on disk, as each module in `datasets/` offers it.

    Its constructor may take `root`, the folder that `--data.root` names; what else it takes is set
    in `config.data` of a config file, which then is a field that flags may change.

    One that looks for defects has `survey() -> Survey` too; `cases` are then the survey's. One that
    has more than plain classes has `labels: Labels`, and one whose scans have several channels
    `channels: tuple[tuple[str, str], ...]`, name and normalization of each. One that takes long to
    find scans without masks has `outlined() -> Iterator[Case]`: its cases with masks, no others.
    One of a user's own masks has `binary_flag: str`: what to set if 1 means any bleeding, or "".
    """

    name: str
    classes: tuple[str, ...]  # index 0 is background
    modality: str  # "ct" or "mr"
    license: str

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id; unique ids; patients disjoint across splits."""
        ...


def outlined_of(dataset: Any) -> Iterator[Case]:
    """The cases of a data set, without those that have no mask where finding them takes long."""
    yield from getattr(dataset, "outlined", dataset.cases)()


def labels_of(dataset: Dataset) -> Labels:
    """What the values of a data set's label maps mean."""
    found = getattr(dataset, "labels", None)  # of a folder, the name of a preset
    return found if isinstance(found, Labels) else Labels(tuple(dataset.classes))


def column_lengths(affine: np.ndarray) -> np.ndarray:
    """Distances in mm [3] between voxel centers along the axes of an affine [4 4] or [3 3].

    Lengths of an oblique affine are off by its rounding, so that 3 x 1 x 1 mm would be now above,
    now below a ratio of 3. Spacings of NIfTI are float32, and so are an sform's numbers: lengths
    of such numbers, and lengths that are float32 but for float64's rounding, are given as float32
    has them. Of axes along the world's nothing is rounded.
    """
    matrix = np.asarray(affine, np.float64)[:3, :3]
    lengths = np.linalg.norm(matrix, axis=0)
    single = lengths.astype(np.float32).astype(np.float64)
    in_single = bool((matrix == matrix.astype(np.float32)).all())
    return np.where(in_single | np.isclose(single, lengths, rtol=1e-12, atol=0), single, lengths)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds all that is true or not 0, of any rank; None if nothing is."""
    box = []
    for axis in range(mask.ndim):  # each sees what the boxes of the axes before have left
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        if not hit.size:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
        mask = mask[(slice(None),) * axis + (box[-1],)]
    return tuple(box)


def cropped_alike(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the smallest box that holds all that is not 0 in either; empty if nothing is."""
    box = bounding_box(one | other) or (slice(0, 0),) * one.ndim
    return one[box], other[box]
