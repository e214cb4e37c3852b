"""Every field of a config: its default, its type, its unit, what it does.

An experiment file in `configs/` starts from these defaults, as a ConfigDict that the command line
may change. The verbs read them back as the frozen `Settings` below, checked once: a value that
means nothing is refused before JAX is imported. How a network is trained is in `training_settings`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from bhsd_jax import fields
from bhsd_jax.fields import Between, Spec
from bhsd_jax.training_settings import (
    COUNT,
    NOT_NEGATIVE,
    Augment,
    Input,
    Loss,
    Mesh,
    Preprocess,
    SliceLoss,
    Split,
    Train,
)

Axis = Literal[0, 1, 2]


@dataclass(frozen=True)
class Infer:
    """How whole volumes are predicted by a sliding window."""

    step: Annotated[
        float, "stride of the tiles as a share of the tile: 0.5 is nnU-Net's", Between(0.01, 1)
    ] = 0.5
    mirror: Annotated[bool, "average over mirrored versions"] = True
    mirror_axes: Annotated[
        tuple[Axis, ...] | None,
        "axes that are mirrored, each once: 0 is D, 1 is H, 2 is W; None: those that the run's own "
        "spatial.Mirror mirrored in training",
    ] = None
    tiles: Annotated[
        int | None, "tiles per call; None: chosen from the memory of the device", COUNT
    ] = None
    law: Annotated[
        Literal["nnunet", "monai", "adjacent"],
        "where tiles lie and how their voxels count: as nnU-Net's or MONAI's, or side by side and "
        "all alike (BLAST-CT's)",
    ] = "nnunet"


@dataclass(frozen=True)
class DicomSeries:
    """How DICOM series are taken; as the network was trained."""

    uneven: Annotated[
        Literal["refuse", "resample"],
        "what to do where slices are missing; steps that are uneven without that need no flag",
    ] = "refuse"
    unshear: Annotated[bool, "undo the gantry's tilt before the network, and do it again after"] = (
        False
    )
    seg: Annotated[
        Literal["", "binary", "labelmap", "fractional"],
        "also write seg/<case>.dcm, a DICOM SEG for the archive; it names the patient, as the "
        "standard demands",
    ] = ""


@dataclass(frozen=True)
class Predict:
    """Which scans are predicted, with which network, and what is written."""

    images: Annotated[
        str,
        "a scan's file, or a folder with such files (NIfTI; .mha, .nrrd and others with the extra "
        "`formats`) or, at any depth, DICOM series; empty: the cases of `split`",
    ] = ""
    dicom: DicomSeries = field(default_factory=DicomSeries)
    split: Annotated[Literal["val", "test"], "whose cases, where `images` names none"] = "test"
    out: Annotated[str, "folder of the label maps; empty: <run>/predictions"] = ""
    checkpoint: Annotated[str | int, "best, last, or a step"] = "best"
    networks: Annotated[
        tuple[str, ...],
        "names from the objective (student, teacher, a, b; ensemble: a and b), averaged; (): the "
        "one it deploys",
    ] = ()
    previous: Annotated[
        str,
        "of the second network of a cascade: folder of the label maps of the first, called as the "
        "scans are, or its run, which then predicts them; empty: <run>/previous_stage, or for "
        "cases of the data set preprocess.previous",
    ] = ""
    runs: Annotated[
        tuple[str, ...],
        "folders of further runs, folds say: all are averaged, those prepared in another way last",
    ] = ()
    combine: Annotated[
        Literal["probabilities", "logits"],
        "what is averaged over several networks; nnU-Net averages the logits of its folds",
    ] = "probabilities"
    probabilities: Annotated[
        bool, "also write <case>_probabilities.npz, with names of classes and axes, and the affine"
    ] = False
    logits: Annotated[
        bool,
        "also write <case>_logits.npz, on the network's own voxels: preprocess.previous takes them "
        "for a second stage as nnU-Net's trainer does",
    ] = False
    nnunet_probabilities: Annotated[
        bool, "also write <case>.npz and <case>.pkl, as nnU-Net's save_probabilities"
    ] = False
    calibrated: Annotated[bool, "probabilities at the temperature of `calibrate`"] = False
    confidence: Annotated[
        bool,
        "also measure how far networks, or one and its answer to the mirrored scan, disagree: for "
        "review.csv, which scans to look at or to outline first",
    ] = False
    report: Annotated[
        bool, "also write report.html, and viewer.html with the extra `viewer`, into `out`"
    ] = False
    postprocessing: Annotated[
        str, "JSON file of what is done to label maps, of launch/folds or nnU-Net; empty: nothing"
    ] = ""
    present_ml: Annotated[
        float, "from how many mL on a scan is said to have a kind of bleed", NOT_NEGATIVE
    ] = 0.1
    overwrite: Annotated[
        bool,
        "False: keep label maps that are there, go on with the rest; refused where other networks "
        "or options made them",
    ] = True
    part_id: Annotated[
        int, "which of num_parts jobs this is, from 0: it predicts every num_parts-th", NOT_NEGATIVE
    ] = 0
    num_parts: Annotated[
        int, "jobs on one folder of label maps; each has its tables in <out>/part_I_of_N", COUNT
    ] = 1
    show_ids: Annotated[
        bool | None, "names of scans in outputs; None: NIfTI's, but not DICOM's"
    ] = None


@dataclass(frozen=True)
class Evaluate:
    """Which label maps are compared with which masks, and how."""

    predictions: Annotated[str, "folder of the label maps; empty: <run>/predictions"] = ""
    references: Annotated[str, "folder of masks, DICOM SEG too; empty: the data set's own"] = ""
    split: Annotated[
        Literal["", "train", "val", "test"], "whose cases; empty: the one that was predicted"
    ] = ""
    nsd_mm: Annotated[float, "tolerance of the surface Dice, mm", NOT_NEGATIVE] = 1.0
    bootstrap: Annotated[int, "resamples of patients", COUNT] = 2000
    baseline: Annotated[bool, "also score the best plain HU threshold on the same cases (CT)"] = (
        False
    )
    also: Annotated[
        tuple[Literal["monai", "medpy", "brats", "panoptica", "raters"], ...],
        "scores as others define them, into cases_also.csv: HD95 of MONAI; HD95, ASD, ASSD of "
        "medpy; BraTS' lesion-wise Dice and HD95; panoptica's PQ, SQ, RQ; MBH-Seg's of several "
        "raters (data=mbhseg)",
    ] = ()
    brats_dilation: Annotated[int, "voxels by which `brats` dilates lesions", COUNT] = 3
    brats_least_mm3: Annotated[float, "`brats` leaves out lesions up to it", NOT_NEGATIVE] = 50.0
    answers: Annotated[
        tuple[str, ...],
        "folders of further label maps, which `raters` takes with `predictions` as one set",
    ] = ()


@dataclass(frozen=True)
class Report:
    """What the report of a run shows."""

    title: Annotated[str, "empty: data set and name of the run"] = ""
    note: Annotated[str, "what a reader must know before the numbers"] = ""
    overlays: Annotated[
        bool, "pictures of the best, the median and the worst scan of each class"
    ] = True
    show_ids: Annotated[bool, "call scans by their names instead of salted hashes"] = False
    compare: Annotated[tuple[str, ...], "folders of other runs"] = ()
    images: Annotated[
        str, "as `predict` was given: a report of these scans, without references"
    ] = ""
    predictions: Annotated[str, "label maps of `images`; empty: <run>/predictions"] = ""
    viewer: Annotated[
        bool, "also write viewer.html, to scroll through the scans; needs the extra `viewer`"
    ] = False
    viewer_mb: Annotated[int, "MB that viewer.html may have; the first scans that fit", COUNT] = 400


Config = Any  # `Settings`, or the ConfigDict of an experiment file that they are read from


RENAMED = {"weak": "slice_loss"}  # groups, by what older versions called them


def under_todays_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config, whichever version wrote it, with its groups as they are called now."""
    return {RENAMED.get(name, name): value for name, value in saved.items()}


def as_saved_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config as this version writes it, to be compared with one of today.

    Fields that its version did not have are at their defaults, which change nothing.
    """
    filled = fields.with_defaults(under_todays_names(saved), Settings)
    return json.loads(json.dumps(filled))


@dataclass(frozen=True)
class Settings:
    """A whole config."""

    name: Annotated[str, "of the experiment; runs go to runs/<name> unless --workdir says so"]
    seed: Annotated[int, "of everything that is drawn in a training", NOT_NEGATIVE]
    preset: Annotated[str, "recommended; or ssl4mis: the whole training as in SSL4MIS' scripts"]
    task: Annotated[
        str,
        "of the paper: 1, 2 or 3; empty: all unlabeled scans, and binary or not as the experiment "
        "has it",
    ]
    data: Annotated[Spec, "a class in bhsd_jax/datasets and its arguments"]
    preprocess: Preprocess
    split: Split
    input: Input
    windows: Annotated[
        Literal["plan"] | tuple[tuple[float, float], ...],
        "channels of the network. plan: clip to the plan's 0.5 % and 99.5 %, subtract mean, divide "
        "by standard deviation (nnU-Net). Or CT windows, one channel each: ((level_hu, width_hu), "
        "...)",
    ]
    augment: Augment
    model: Annotated[Spec, "a class in bhsd_jax/models and its arguments; None comes from the plan"]
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        "compute type; auto is bfloat16 on GPU and TPU, else float32. bfloat16 pays on CPUs that "
        "have instructions for it (AVX512-BF16, AMX), too: two thirds of the time and memory",
    ]
    loss: Loss
    objective: Annotated[Spec, "a class in bhsd_jax/objectives and its arguments"]
    slice_loss: SliceLoss
    optimizer: Annotated[
        Spec,
        "name (sgd, adam, adamw, muon), lr, clip (global gradient norm, per network), "
        "weight_decay, schedule (poly, ...), power, warmup (steps; below 1: share of the "
        "training), hold and lag (steps for which a rate is kept, and by which it comes late) and "
        "the optimizer's own, such as nesterov",
    ]
    train: Train
    mesh: Mesh
    infer: Infer
    predict: Predict
    evaluate: Evaluate
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, config: Config) -> "Settings":
        """Settings from a ConfigDict, or from dictionaries as a run's config.json holds them.

        Raises:
            ValueError: If a field is missing, is not known, or holds what means nothing.
        """
        if isinstance(config, Settings):
            return config
        plain = config.to_dict() if hasattr(config, "to_dict") else config
        return fields.read(cls, plain, "config")
