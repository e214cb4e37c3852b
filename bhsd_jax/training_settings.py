"""The groups of a config that say how a network is trained: data, objective, schedule, devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bhsd_jax.fields import Between, Spec

COUNT = Between(least=1)
NOT_NEGATIVE = Between(least=0)
SHARE = Between(0, 1)
Millimeters = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """How raw scans become shards."""

    shards: Annotated[str, "folder of shards and plan.json; empty: <run>/shards"] = ""
    spacing_mm: Annotated[
        Millimeters | None,
        "target spacing D, H, W in mm; None: nnU-Net's rule. BHSD and the sets that hold its scans "
        "are pinned, because that rule flips between 5.0 and 2.7 mm on subsets of it",
        Between(above=0),
    ] = None
    planner: Annotated[
        Literal["default", "resenc_m", "resenc_l", "resenc_xl"], "nnU-Net's planner"
    ] = "default"
    memory_gb: Annotated[
        float | None, "GPU to plan for; None: the planner's own, 8, 8, 24 or 40 GB", COUNT
    ] = None
    plan: Annotated[
        str, "a plans.json of nnU-Net to take instead, spacing and all; empty: make one"
    ] = ""
    configuration: Annotated[
        str, "of nnU-Net's plan, that one or ours: 3d_fullres, 3d_lowres, 2d or 3d_cascade_fullres"
    ] = "3d_fullres"
    previous: Annotated[
        tuple[str, ...],
        "of 3d_cascade_fullres: folders of the label maps that networks of its first stage have "
        "predicted of the training cases, each by one that was not trained on the case; or their "
        "runs, whose predictions/ are meant",
    ] = ()
    crop_hu: Annotated[
        float | None,
        "box of the largest component above this many HU; None: nnU-Net's non-zero voxels",
    ] = -200.0
    first: Annotated[
        Literal["resample", "normalize"],
        "what CT gets first: resample: scans stay in HU, and are clipped and normalized in "
        "training; normalize: they are clipped and normalized by the plan's statistics and then "
        "resampled, as nnU-Net's",
    ] = "resample"
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
    seed: Annotated[int, "of the nested labeled subsets", NOT_NEGATIVE] = 0
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
        Literal["with_replacement", "in_turn", "two_stream"],
        "how cases of either stream are drawn: with replacement (nnU-Net); each once in every pass "
        "over them; or as SSL4MIS, where both orders begin anew with every pass over the labeled "
        "cases in whole batches",
    ] = "with_replacement"
    crop: Annotated[
        Literal["nnunet", "uniform"],
        "where patches that need show no foreground lie: nnU-Net's law, or SSL4MIS' RandomCrop",
    ] = "nnunet"
    rot_flip: Annotated[
        bool,
        "turn scans by 0 to 3 quarters in their plane, then mirror them along H or W, before "
        "patches are cut (SSL4MIS' RandomRotFlip)",
    ] = False
    foreground: Annotated[
        float,
        "share of labeled patches centered on a labeled voxel, of a class drawn first, all alike: "
        "of the classes of the masks with split.binary, too, where nnU-Net has but one",
        SHARE,
    ] = 0.33
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
    cache_mb: Annotated[
        int,
        "MB of decoded cases kept in memory, per process; half of the machine's at most",
        NOT_NEGATIVE,
    ] = 4096


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
    previous: Annotated[
        tuple[Spec, ...], "of the label map that the first network of a cascade has predicted"
    ] = (
        {"name": "cascade.BinaryOperator", "p": 0.4, "p_per_label": 0.5, "radius": (1.0, 8.0)},
        {"name": "cascade.RemoveComponent", "p": 0.2, "p_per_label": 0.5, "largest": 0.15},
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
    background: Annotated[bool, "background counts as a class of the Dice loss"] = False
    squared: Annotated[bool, "squares below the line of the Dice ratio (Milletari et al.)"] = False
    from_one: Annotated[
        bool, "the Dice loss is one minus the ratio, not minus it: same gradient"
    ] = False


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
    init_from: Annotated[
        str,
        "weights to begin with: folder of a run, trained or imported, or a file of PyTorch's; what "
        "does not fit stays random, and the log says what. Empty: all is random",
    ] = ""
    init_only: Annotated[
        tuple[str, ...], 'of those, names that begin so, such as "encoder_"; (): all that fit'
    ] = ()
    init_leave: Annotated[
        tuple[str, ...], 'names that stay random, by how they begin, such as "head"; (): none'
    ] = ()
    trackers: Annotated[
        tuple[Literal["wandb", "mlflow"], ...], "besides TensorBoard; extras of these names"
    ] = ()
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
    num_processes: Annotated[
        int | None, "processes of the run; 1: alone, whatever a launcher says", COUNT
    ] = None
    process_id: Annotated[int | None, "which of them this is, from 0", NOT_NEGATIVE] = None
    detect: Annotated[
        str,
        'ask one of JAX\'s ways, such as "mpi4py"; empty: flags, environment, cluster',
    ] = ""


OF_A_CALL: Mapping[str, Any] = {
    "coordinator": "",
    "num_processes": None,
    "process_id": None,
    "detect": "",
}
"""Fields of `mesh` that say who is which process: of one call, and never of a run."""
