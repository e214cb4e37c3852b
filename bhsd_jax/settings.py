"""Every field of a config: its default, its type, its unit, what it does.

An experiment file in `configs/` starts from these defaults, as a ConfigDict that the command line
may change. The verbs read them back as the frozen `Settings` below, checked once: a value that
means nothing is refused before JAX is imported.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from bhsd_jax import fields
from bhsd_jax.fields import Between, Spec

Millimeters = tuple[float, float, float]
Axis = Literal[0, 1, 2]


COUNT = Between(least=1)
NOT_NEGATIVE = Between(least=0)
SHARE = Between(0, 1)


@dataclass(frozen=True)
class Preprocess:
    """How raw scans become shards."""

    shards: Annotated[str, "folder of shards and plan.json; empty: <run>/shards"] = ""
    spacing_mm: Annotated[
        Millimeters | None,
        "target spacing D, H, W in mm; None: nnU-Net's rule. BHSD and the sets that hold its scans "
        "are pinned, because that rule flips between 5.0 and 2.7 mm on subsets of it",
    ] = None
    planner: Annotated[
        Literal["default", "resenc_m", "resenc_l", "resenc_xl"], "nnU-Net's planner"
    ] = "default"
    plan: Annotated[
        str, "a plans.json of nnU-Net to take instead, spacing and all; empty: make one"
    ] = ""
    configuration: Annotated[
        str, "of nnU-Net's plan, that one or ours: 3d_fullres, 3d_lowres or 2d"
    ] = "3d_fullres"
    crop_hu: Annotated[
        float | None,
        "box of the largest component above this many HU; None: nnU-Net's non-zero voxels",
    ] = -200.0
    cases_per_shard: Annotated[int, "cases", COUNT] = 16
    processes: Annotated[int, "worker processes; 0: one per core", NOT_NEGATIVE] = 0
    shard_index: Annotated[int, "which of num_shards jobs this is, from 0", NOT_NEGATIVE] = 0
    num_shards: Annotated[
        int, "jobs on one run folder; each writes every num_shards-th shard", COUNT
    ] = 1
    allow_skipped: Annotated[bool, "finish with exit code 0 although cases were refused"] = False
    verify_only: Annotated[bool, "check and print the integrity table, write no shards"] = False


@dataclass(frozen=True)
class Split:
    """Which cases train, validate and test."""

    fold: Annotated[
        int,
        "of 5 over the training cases, as nnU-Net's, or of those in a splits_final.json beside an "
        "nnU-Net data set; -1: no validation part",
        Between(least=-1),
    ] = 0
    labeled: Annotated[
        int | float | None,
        "training cases whose masks are used: a count, or a share below 1; None: all. The others' "
        "images join the unlabeled stream",
        NOT_NEGATIVE,
    ] = None
    seed: Annotated[int, "of the nested labeled subsets"] = 0
    binary: Annotated[bool, "merge all classes into one (Tasks 2 and 3)"] = False
    bleeding: Annotated[
        int | None, "unlabeled volumes known to bleed to use; None: all", NOT_NEGATIVE
    ] = None
    nonbleeding: Annotated[int | None, "likewise, known not to bleed", NOT_NEGATIVE] = None


@dataclass(frozen=True)
class Input:
    """Patches, and how they are read."""

    patch: Annotated[tuple[int, int, int] | None, "D, H, W in voxels; None: the plan's", COUNT] = (
        None
    )
    labeled: Annotated[
        int | None,
        "labeled patches per step, all devices together; None: the plan's batch",
        COUNT,
    ] = None
    unlabeled: Annotated[int, "unlabeled patches per step", NOT_NEGATIVE] = 0
    cases: Annotated[
        Literal["with_replacement", "in_turn"],
        "how cases of either stream are drawn: with replacement (nnU-Net), or each once in every "
        "pass over them, in an order of its own (SSL4MIS)",
    ] = "with_replacement"
    foreground: Annotated[float, "share of labeled patches centered on a labeled voxel", SHARE] = (
        0.33
    )
    pad: Annotated[
        Literal["air", "nnunet"],
        "outside the scan: the lower clip bound, or 0 once normalized (nnU-Net)",
    ] = "air"
    outside: Annotated[
        Literal["learned", "masked"],
        "voxels of unlabeled patches outside the scan: learned like any others (SSL4MIS), or left "
        "out of the losses on the network's own answers",
    ] = "learned"
    threads: Annotated[int, "threads that read patches", COUNT] = 4
    buffer: Annotated[int, "patches read ahead, per stream", COUNT] = 8
    cache_mb: Annotated[int, "MB of decoded cases kept in memory, per process", NOT_NEGATIVE] = 4096


@dataclass(frozen=True)
class Augment:
    """Random changes of one patch: classes in bhsd_jax/augment and their arguments, in turn."""

    spatial: Annotated[tuple[Spec, ...], "of places, the same for all of a patch"] = (
        {"name": "spatial.Affine", "rotation_p": 0.2, "scale_p": 0.2, "scale": (0.7, 1.4)},
        {"name": "spatial.Mirror", "p": 0.5},
    )
    intensity: Annotated[tuple[Spec, ...], "of values"] = (
        {"name": "intensity.GaussianNoise", "p": 0.1, "std": (0.0, 0.1)},
        {"name": "intensity.GaussianBlur", "p": 0.1, "sigma": (0.5, 1.0)},
        {"name": "intensity.Brightness", "p": 0.15, "factor": (0.75, 1.25)},
        {"name": "intensity.Contrast", "p": 0.15, "factor": (0.75, 1.25)},
        {"name": "intensity.LowResolution", "p": 0.125, "zoom": (0.5, 1.0)},
        {"name": "intensity.Gamma", "p": 0.1, "gamma": (0.7, 1.5), "invert": True},
        {"name": "intensity.Gamma", "p": 0.3, "gamma": (0.7, 1.5), "invert": False},
    )


@dataclass(frozen=True)
class Loss:
    """Dice and cross entropy of labeled patches."""

    smooth: Annotated[float, "added to both parts of the Dice ratio", NOT_NEGATIVE] = 1e-5
    batch_dice: Annotated[
        bool | None, "sums over the batch instead of each patch; None: as the plan says"
    ] = None
    dice_weight: Annotated[float, "of the Dice loss", NOT_NEGATIVE] = 1.0
    ce_weight: Annotated[float, "of the cross entropy", NOT_NEGATIVE] = 1.0


@dataclass(frozen=True)
class SliceLoss:
    """Slice labels of the unlabeled scans, with any objective that reads them; weight 0: off."""

    neg_sup: Annotated[float, "weight of slices without bleeding as labels: 1", NOT_NEGATIVE] = 0.0
    negatives: Annotated[
        Literal["ce", "volume"], "their loss: cross entropy, or the mean probability"
    ] = "ce"
    gate_pseudo: Annotated[bool, "no pseudo-label of a class that the slice does not show"] = False
    mil: Annotated[float, "weight of presence by pooled margins: 0.01 to 0.1", NOT_NEGATIVE] = 0.0
    sharpness: Annotated[float, "of the pooling; 0 is the mean, infinity the maximum"] = 5.0
    size: Annotated[float, "weight of the bounds on the area: 0.01", NOT_NEGATIVE] = 0.0
    sizes: Annotated[
        Literal["penalty", "barrier"], "how the bounds act: penalty, or log-barrier extension"
    ] = "penalty"
    barrier: Annotated[
        tuple[float, float], "the barrier's t at first, its growth per 1 % of the training"
    ] = (5.0, 1.1)
    lesion_voxels: Annotated[
        float, "least area of a bleed in a slice that shows it, voxels", NOT_NEGATIVE
    ] = 10.0
    start: Annotated[float, "share of the training before `mil` and `size` begin", SHARE] = 0.3
    margin: Annotated[
        int, "slices next to a bleed that are not trusted to lack it", NOT_NEGATIVE
    ] = 1


@dataclass(frozen=True)
class Train:
    """The number of steps, and what happens between them."""

    steps: Annotated[int, "steps of the whole training", COUNT] = 250_000
    log_every: Annotated[int, "steps", COUNT] = 50
    validate_every: Annotated[int, "steps; whole volumes by sliding window", COUNT] = 5_000
    validate_cases: Annotated[int | None, "the first so many cases; None: all", NOT_NEGATIVE] = None
    save_every: Annotated[int, "steps", COUNT] = 1_000
    accumulate: Annotated[
        int,
        "parts of a batch that go through the network one after another, for the memory of one; "
        "their gradients are averaged. What counts over the batch counts over a part: batch Dice, "
        "and means over voxels that are sure, inside the scan, or in slices with labels",
        COUNT,
    ] = 1
    remat: Annotated[
        Literal["none", "blocks"], "recompute activations per stage in the backward pass"
    ] = "none"
    profile: Annotated[str, 'steps to trace for xprof, like "10:15", into <run>/profile'] = ""


@dataclass(frozen=True)
class Mesh:
    """How a run is spread over devices and processes."""

    data: Annotated[
        int, "groups of devices with patches of their own; -1: all that the others leave"
    ] = -1
    model: Annotated[int, "devices over which parameters and optimizer are split", COUNT] = 1
    space: Annotated[
        int, "devices over which the rows (H) of patches are split; with `model`, over both", COUNT
    ] = 1
    twins: Annotated[
        int,
        "2: the networks of an objective with twins (CPS) on devices of their own",
        COUNT,
    ] = 1
    coordinator: Annotated[
        str,
        "host:port where process 0 listens; it, num_processes and process_id are for runs that no "
        "cluster tells of, here or in the environment as JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    ] = ""
    num_processes: Annotated[int | None, "processes of the run", COUNT] = None
    process_id: Annotated[int | None, "which of them this is, from 0", NOT_NEGATIVE] = None
    detect: Annotated[
        str,
        'ask one of JAX\'s ways, such as "mpi4py"; empty: flags, environment, cluster',
    ] = ""


@dataclass(frozen=True)
class Infer:
    """How whole volumes are predicted by a sliding window."""

    step: Annotated[
        float, "stride of the tiles as a share of the tile: 0.5 is nnU-Net's", Between(0.01, 1)
    ] = 0.5
    mirror: Annotated[bool, "average over mirrored versions"] = True
    mirror_axes: Annotated[
        tuple[Axis, ...], "axes that are mirrored, each once: 0 is D, 1 is H, 2 is W"
    ] = (0, 1, 2)
    tiles: Annotated[
        int | None, "tiles per call; None: chosen from the memory of the device", COUNT
    ] = None


@dataclass(frozen=True)
class DicomSeries:
    """How DICOM series are taken; as the network was trained."""

    uneven: Annotated[Literal["refuse", "resample"], "what to do with slices at uneven steps"] = (
        "refuse"
    )
    unshear: Annotated[bool, "undo the gantry's tilt before the network, and do it again after"] = (
        False
    )


@dataclass(frozen=True)
class Predict:
    """Which scans are predicted, with which network, and what is written."""

    images: Annotated[
        str,
        "a NIfTI file, or a folder with NIfTI files or, at any depth, DICOM series; empty: the "
        "cases of `split`",
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
    probabilities: Annotated[bool, "also write <case>_probabilities.npz"] = False
    overwrite: Annotated[bool, "False: keep label maps that are there, go on with the rest"] = True
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
    references: Annotated[str, "folder of masks; empty: the data set's own"] = ""
    split: Annotated[
        Literal["", "train", "val", "test"], "whose cases; empty: the one that was predicted"
    ] = ""
    nsd_mm: Annotated[float, "tolerance of the surface Dice, mm", NOT_NEGATIVE] = 1.0
    bootstrap: Annotated[int, "resamples of patients", COUNT] = 2000
    baseline: Annotated[bool, "also score the best plain HU threshold on the same cases (CT)"] = (
        False
    )


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


Config = Any  # `Settings`, or the ConfigDict of an experiment file that they are read from


RENAMED = {"weak": "slice_loss"}  # groups, by what older versions called them


def under_todays_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config, whichever version wrote it, with its groups as they are called now."""
    return {RENAMED.get(name, name): value for name, value in saved.items()}


@dataclass(frozen=True)
class Settings:
    """A whole config."""

    name: Annotated[str, "of the experiment; runs go to runs/<name> unless --workdir says so"]
    seed: Annotated[int, "of everything that is drawn in a training"]
    preset: Annotated[str, "arguments of the objective: recommended, or ssl4mis"]
    task: Annotated[str, "of the paper: 1, 2 or 3; empty: the experiment's own"]
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
        "compute type; auto is bfloat16 on GPU and TPU, else float32",
    ]
    loss: Loss
    objective: Annotated[Spec, "a class in bhsd_jax/objectives and its arguments"]
    slice_loss: SliceLoss
    optimizer: Annotated[
        Spec,
        "name, lr, clip (global gradient norm, per network), weight_decay, schedule (poly, ...), "
        "power, warmup (steps; below 1: share of the training) and the optimizer's own",
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
