"""One case from files to scores: what `evaluate` does in every worker process (without JAX)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct import hu, scan
from bhsd_jax.metrics import scores, threshold
from bhsd_jax.volume import Image, Label, Volume

ANY = "any"  # all classes merged


@dataclass(frozen=True)
class Job:
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


@dataclass(frozen=True)
class Scored:
    """What is known of one case."""

    rows: list[scores.Row]  # one per foreground class
    merged: scores.Row  # all classes as one
    histogram: threshold.Histogram | None  # for the threshold, if asked for
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, all their digits."""
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
            [scores.Row(**row) for row in data["rows"]],
            scores.Row(**data["merged"]),
            bins
            and threshold.Histogram(
                np.array(bins["bleeding"]), np.array(bins["inside"]), bins["mask"]
            ),
            data["warnings"],
        )


def score_case(job: Job) -> Scored:
    """Reads and scores one case.

    Raises:
        ValueError: If a file cannot be used, or lies on another grid than its scan.
    """
    place = scan.native(job.image or scan.files(job.reference)[0])
    image, _ = scan.read(place)
    classes = len(job.classes)
    reference, warnings = scan.read_label(job.reference, place, image, num_classes=classes)
    predicted, more = scan.read_label(job.predicted, place, image, num_classes=classes)
    about = scores.Scan(
        job.case, job.patient, image.spacing_mm, hu.voxel_ml(image.affine, job.modality)
    )
    names = (job.classes[0], ANY)
    both = [np.minimum(label.voxels, 1) for label in (reference, predicted)]
    merged = scores.score(both[0], both[1], about, names, job.nsd_mm)[0]
    if job.binary or len(job.classes) == 2:
        rows = [merged if job.binary else dataclasses.replace(merged, name=job.classes[1])]
    else:
        rows = scores.score(reference.voxels, predicted.voxels, about, job.classes, job.nsd_mm)
    return Scored(
        rows,
        merged,
        _histogram(image, both[0] > 0) if job.baseline else None,
        [f"{job.case}: {text}" for text in (*warnings, *more)],
    )


def _histogram(image: Volume, mask: np.ndarray) -> threshold.Histogram:
    return threshold.histogram(hu.repair(image.voxels)[0], mask, image.spacing_mm)
