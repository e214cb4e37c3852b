"""One case of `evaluate`: its files read and compared."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct import geometry, hu, plausibility, scan
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import also, scores, threshold
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Image, Label, Masks, Volume, cropped_alike

ANY = "any"  # all classes merged
_ELSEWHERE = (Kind.MASK_MOVED, Kind.MASK_MIRRORED, Kind.MASK_SPACING)


@dataclass(frozen=True)
class Comparison:
    """Where one case lies and how it is to be scored."""

    case: str
    patient: str
    predicted: Path
    reference: Label
    image: Image | None  # gives the geometry; None: the reference does
    classes: tuple[str, ...]  # background first, as in the files
    modality: str
    binary: bool  # merge the classes of both before anything is counted
    nsd_mm: float
    baseline: bool
    table_feed: bool = False  # as `Case.table_feed`
    wanted: also.Also | None = None  # scores beside the headline's
    answers: tuple[Path, ...] = ()  # more label maps of the case, for `raters`
    labels: Labels | None = None  # None: plain classes

    @property
    def meaning(self) -> Labels:
        """Of the values in the files."""
        return self.labels or Labels(self.classes)


@dataclass(frozen=True)
class Scored:
    """The scores of one case, and what was noticed while reading it."""

    rows: list[scores.ClassScore]  # one per foreground class
    merged: scores.ClassScore  # all classes as one
    histogram: threshold.Histogram | None  # for the threshold, if asked for
    warnings: list[str]
    beside: list[also.AlsoScore] = dataclasses.field(default_factory=list)
    voxels: int = 0  # that the reference annotates

    def to_json(self) -> dict[str, Any]:
        """JSON values, floats with all their digits."""
        plain = dataclasses.asdict(self)
        if self.histogram is not None:
            for name in ("bleeding", "inside"):
                plain["histogram"][name] = plain["histogram"][name].tolist()
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Scored":
        """Undoes `to_json`, also after a trip through a JSON file."""
        bins = data["histogram"]
        return cls(
            [scores.ClassScore(**row) for row in data["rows"]],
            scores.ClassScore(**data["merged"]),
            bins
            and threshold.Histogram(
                np.array(bins["bleeding"]), np.array(bins["inside"]), bins["mask"]
            ),
            data["warnings"],
            [also.AlsoScore(**row) for row in data["beside"]],
            data["voxels"],
        )


def score_case(job: Comparison) -> Scored:
    """Reads and scores one case.

    Raises:
        ValueError: If a file cannot be used, or lies on another grid than its scan.
    """
    place = scan.native(job.image or _without_image(job))
    image, _ = scan.read(place)
    labels = job.meaning
    # Merged, the masks of others may number their classes as they like.
    merges = job.binary and job.image is None and labels.ignore is None
    values = None if merges else labels.values
    try:
        reference, found = scan.read_label(job.reference, place, image, num_classes=values)
    except Refusal as error:
        if error.kind is not Kind.MASK_VALUES or job.image is not None or job.binary:
            raise
        text = f"{error}. To compare bleeding with all else, set config.split.binary"
        raise Refusal(error.kind, text) from error
    predicted, more = scan.read_label(job.predicted, place, image, num_classes=values)
    if job.image is None and any(finding.kind in _ELSEWHERE for finding in more):
        image, said = _placed(job, image)
        more = [*said, *more]
    feed = job.table_feed and job.modality == "ct"
    voxel_ml = hu.voxel_ml(image.affine, table_feed=feed)
    corrected = hu.tilt_corrected(image.affine, table_feed=feed)
    about = scores.Scan(job.case, job.patient, image.spacing_mm, voxel_ml, corrected)
    names = (job.classes[0], ANY)
    full = reference.voxels, predicted.voxels
    # Beyond this box both are background, which counts in no score.
    pair = cropped_alike(*full)
    both = [np.minimum(label, 1) for label in _annotated(labels, *pair)]
    merged = scores.score(both[0], both[1], about, names, job.nsd_mm)[0]
    if not labels.plain:
        rows = scores.score_targets(*pair, about, labels, job.nsd_mm)
    elif job.binary or len(job.classes) == 2:
        rows = [merged if job.binary else dataclasses.replace(merged, name=job.classes[1])]
    else:
        rows = scores.score(*pair, about, job.classes, job.nsd_mm)
    return Scored(
        rows,
        merged,
        _histogram(image, reference.voxels, labels) if job.baseline else None,
        [f"{job.case}: {finding}" for finding in (*found, *more)],
        _also(job, place, image, *_annotated(labels, *full)) if job.wanted else [],
        int(np.count_nonzero(labels.annotated(reference.voxels))),
    )


def _without_image(job: Comparison) -> Path:
    """What gives the geometry where the scan is not at hand: a DICOM SEG has but slices of it."""
    reference = scan.files(job.reference)[0]
    return job.predicted if slice_file.is_dicom(reference) else reference


def _placed(job: Comparison, mask: Volume) -> tuple[Volume, list[Finding]]:
    """What gives mm and mL of two files that lie apart, where the scan is not at hand.

    The mask does; unless it has the affine of an array, which says nothing, and the label map
    states a place. A label map with the affine of an array, as of another program, says nothing.

    Raises:
        UserError: If both state other sizes of the same voxels: one of them is wrong.
    """
    own, _ = scan.read(job.predicted)
    alike = np.allclose(own.spacing_mm, mask.spacing_mm, rtol=geometry.SAME_SPACING)
    if alike or _is_of_array(own):
        return mask, []
    sizes = [" x ".join(f"{mm:.4g}" for mm in one.spacing_mm) for one in (mask, own)]
    if _is_of_array(mask):
        text = f"mask has lost its affine: mm and mL are by the label map's, {sizes[1]} mm"
        found = [Finding(Kind.MASK_MOVED, "kept", text)]
        return dataclasses.replace(mask, affine=own.affine), found
    raise UserError(
        f"{job.case}: its mask has voxels of {sizes[0]} mm (D, H, W), its label map of {sizes[1]} "
        "mm, and distances and volumes hang on which is right; copy the affine of the scan to the "
        "other"
    )


def _is_of_array(volume: Volume) -> bool:
    """Whether an affine is the identity, but for the way axes run."""
    return np.array_equal(np.abs(volume.affine[:, [2, 1, 0, 3]]), np.eye(4))


def _annotated(labels: Labels, reference: np.ndarray, predicted: np.ndarray) -> list[np.ndarray]:
    """Both label maps, with background where the reference does not say what is there."""
    seen = labels.annotated(reference)
    return [np.where(seen, label, 0) for label in (reference, predicted)]


def _also(
    job: Comparison, place: Image, image: Volume, reference: np.ndarray, predicted: np.ndarray
) -> list[also.AlsoScore]:
    """Rows of the classes, of all merged, and of all at once, as far as they are wanted."""
    assert job.wanted is not None
    found: dict[str, dict[str, float]] = {}
    raters, answers = [], [predicted]
    if "raters" in job.wanted.names:
        raters, more = _sets(job, place, image)
        answers += more
    targets = dict(job.meaning.targets)
    several = not job.binary and len(targets) > 1
    single = ANY if job.binary or several else next(iter(targets))
    every: dict[str, tuple[int, ...]] = {**(targets if several else {}), single: ()}
    for name, values in every.items():

        def mask(label: np.ndarray, values: tuple[int, ...] = values) -> np.ndarray:
            return np.isin(label, values) if values else label > 0

        pair = mask(reference), mask(predicted)
        found[name] = also.of_masks(*pair, image.spacing_mm, job.wanted)
        if raters:
            sets = [[mask(label).astype(np.uint8) for label in side] for side in (raters, answers)]
            found[name] |= also.of_raters(*sets)
    if raters and several:
        found[also.ALL] = also.of_raters(raters, answers, multiclass=True)
    return [also.AlsoScore(job.case, job.patient, name, row) for name, row in found.items()]


def _sets(
    job: Comparison, place: Image, image: Volume
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The label maps of all raters, and those of the other answers."""
    assert isinstance(job.reference, Masks)  # `evaluate` has made sure
    values = job.reference.values
    raters = [Masks((file,), "first", values) for file in job.reference.files]

    def read(label: Label) -> np.ndarray:
        return scan.read_label(label, place, image, num_classes=job.meaning.values)[0].voxels

    return [read(label) for label in raters], [read(path) for path in job.answers]


def _histogram(image: Volume, reference: np.ndarray, labels: Labels) -> threshold.Histogram:
    voxels = plausibility.in_hu(image.voxels)
    voxels = hu.repair(image.voxels)[0] if voxels is None else voxels
    seen = labels.annotated(reference)
    return threshold.histogram(voxels, (reference > 0) & seen, image.spacing_mm, seen)
