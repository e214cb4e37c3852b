"""Every knob of the five verbs: its default, its unit, who reads it.

An experiment file calls `get_config(arg)` and changes a few fields. `arg` is what follows the colon
on the command line, words separated by commas: `--config=configs/cps.py:smoke,data=msd`.
"""

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder

from configs import backbones

# D, H, W of head CT in thick slices: what nnU-Net's rule gives for BHSD's own training cases.
HEAD_CT_SPACING_MM = (5.0, 0.48828125, 0.48828125)
HEMORRHAGE = ("background", "EDH", "IPH", "IVH", "SAH", "SDH")
DATA = {  # the word `data=`
    "synthetic": {"name": "synthetic.Synthetic", "root": "", "difficulty": "default"},
    "bhsd": {"name": "bhsd.BHSD", "root": "data/BHSD"},
    "msd": {"name": "msd.MSD", "root": "data/msd"},
    "dicom": {
        "name": "dicom.DICOM",
        "root": "data/dicom",
        "masks": "",  # folder of NIfTI masks; "": <root>/masks, or beside the slices
        "classes": HEMORRHAGE,
        "uneven": "refuse",  # slices at uneven steps; or "resample"
        "unshear": False,  # undo the gantry's tilt
        "show_ids": False,  # call cases by their folders
    },
    "rsna": {
        "name": "rsna.RSNA",
        "root": "data/rsna",
        "csv": "stage_2_train.csv",  # in `root`
        "uneven": "resample",
        "unshear": False,
        "bhsd": "",  # BHSD's folder: its outlined scans join, their patients' others are left out
    },
    "instance": {"name": "instance.INSTANCE", "root": "data/INSTANCE2022"},
    "ctich": {"name": "ctich.CTICH", "root": "data/ct-ich", "masks": "binary"},
    "hemseg": {"name": "hemseg.HemSeg", "root": "data/HemSeg-500"},
    "mbhseg": {"name": "mbhseg.MBHSeg", "root": "data/MBH-Seg25", "rater": "majority"},
    "folder": {
        "name": "folder.Folder",
        "root": "data/folder",
        "images": "images",  # in `root`
        "masks": "masks",  # in `root`; scans without one are unlabeled
        "labels": "bhsd",  # classes by mask value: a preset, or their names, background first
        "modality": "ct",
    },
}
WORDS = {
    "smoke": False,
    "backbone": "nnunet",
    "recipe": "published",
    "data": "synthetic",
    "preset": "recommended",
    "labels": "",
    "task": "",
    "infer": "full",
}
# The paper's three tasks. It took 1500 scans that do not bleed for Task 3; 1418 were released.
TASKS = {  # the word `task=`; each sets fields of `config.split`
    "": {},
    "1": {"binary": False, "bleeding": 0, "nonbleeding": 0},
    "2": {"binary": True, "bleeding": 500, "nonbleeding": 0},
    "3": {"binary": True, "bleeding": 500, "nonbleeding": 1500},
}
INFER = {  # the word `infer=`
    # nnU-Net's: tile stride as a share of the tile; average over all mirrored versions.
    "full": {"step": 0.5, "mirror": True},
    # For CPUs: no mirrored versions and fewer tiles, a twelfth to an eighteenth for a head CT.
    "fast": {"step": 0.75, "mirror": False},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults: nnU-Net's recipe on the synthetic set, changed by the words in `arg`."""
    words = parse_arg(arg)
    config = ml_collections.ConfigDict()
    config.name = "supervised"
    config.seed = 0
    config.preset = words["preset"]  # read by experiment files
    config.task = words["task"]  # likewise; "": the experiment's own
    config.data = dict(DATA[words["data"]])  # a class in bhsd_jax/datasets and its arguments
    config.preprocess = _preprocess(words["data"])
    config.split = _split(words["labels"]) | TASKS[words["task"]]
    config.input = _input()
    # Network input channels. "plan": clip to the plan's 0.5 % and 99.5 %, subtract mean, divide by
    # standard deviation (nnU-Net). Or CT windows, one channel each: ((level_hu, width_hu), ...).
    config.windows = FieldReference("plan", field_type=object)
    config.augment = _augment()
    # A class in bhsd_jax/models and its arguments; what is None comes from the plan.
    config.model = {"name": words["backbone"], "features": placeholder(tuple)}
    config.precision = (
        "auto"  # compute type: "float32", "bfloat16", or "auto": bfloat16 on GPU and TPU
    )
    config.loss = {
        "smooth": 1e-5,
        "batch_dice": placeholder(bool),  # None: as the plan says
        "dice_weight": 1.0,
        "ce_weight": 1.0,
    }
    config.objective = {"name": "supervised.Supervised"}
    config.weak = _weak()
    config.optimizer = {
        "name": "sgd",
        "lr": 0.01,
        "momentum": 0.99,
        "weight_decay": 3e-5,  # L2, on every parameter
        "clip": 12.0,  # global gradient norm, per network
        "schedule": "poly",
        "power": 0.9,
        "warmup": 0.0,  # steps; below 1: share of the training
    }
    # A patch of so many voxels goes with the spacing it was planned for, whatever data set has it.
    head_ct = config.preprocess.spacing_mm == HEAD_CT_SPACING_MM
    backbones.choose(config, words["backbone"], words["recipe"], head_ct=head_ct)
    config.train = _train()
    config.mesh = _mesh()
    config.infer = _infer(words["infer"])
    config.predict = _predict()
    config.evaluate = _evaluate()
    config.report = _report()
    if words["smoke"]:
        smoke(config)
    return config


def semisupervised(arg: str, name: str, objective: str, presets: dict) -> ml_collections.ConfigDict:
    """The defaults for a binary task with labeled and unlabeled patches one to one.

    `presets` holds the objective's arguments by preset. `ssl4mis` takes cases in turn and deploys
    the checkpoint that validated best; the others draw with replacement and deploy the last.

    Raises:
        ValueError: If the preset is unknown; lists the choices.
    """
    config = get_config(arg)
    if config.preset not in presets:
        raise ValueError(f"{name}: preset is one of {', '.join(presets)}; got {config.preset!r}")
    config.name = name
    config.objective = {"name": objective, **presets[config.preset]}
    config.split.binary = config.task != "1"
    config.input.labeled = 2
    config.input.unlabeled = 2
    config.predict.checkpoint = "last"
    if config.preset == "ssl4mis":
        config.input.cases, config.predict.checkpoint = "in_turn", "best"
    return config


def parse_arg(arg: str) -> dict:
    """Reads `"smoke,data=msd"`; a word without a value is True.

    Raises:
        ValueError: If a word is not known, or `data=`, `task=` or `infer=` names nothing; lists
            the choices.
    """
    words = dict(WORDS)
    for part in filter(None, arg.split(",")):
        word, equals, value = part.partition("=")
        if word not in WORDS or bool(equals) == isinstance(WORDS[word], bool):
            known = ", ".join(k if isinstance(v, bool) else f"{k}=..." for k, v in WORDS.items())
            raise ValueError(f"config argument {part!r} is not known; words are {known}")
        words[word] = value if equals else True
    if words["data"] not in DATA:
        raise ValueError(f"data={words['data']} is not known; choose from {', '.join(DATA)}")
    if words["task"] not in TASKS:
        raise ValueError(f"task={words['task']} is not known; choose from 1, 2, 3")
    inference(words["infer"])
    return words


def inference(speed: str) -> dict:
    """Fields of `config.infer` for a value of the word `infer=`.

    Raises:
        ValueError: If it is not known; lists the choices.
    """
    if speed not in INFER:
        raise ValueError(f"infer={speed} is not known; choose from {', '.join(INFER)}")
    return dict(INFER[speed])


def _preprocess(data: str) -> dict:
    return {
        "shards": "",  # folder of shards and plan.json; "": <workdir>/shards
        # Target spacing D, H, W in mm. None: nnU-Net's rule. BHSD and what holds its scans is
        # pinned, because that rule flips between 5.0 and 2.7 mm on subsets of it.
        "spacing_mm": HEAD_CT_SPACING_MM
        if data in ("bhsd", "rsna", "mbhseg")
        else placeholder(tuple),
        "planner": "default",  # "default", "resenc_m", "resenc_l", "resenc_xl"
        "plan": "",  # a plans.json of nnU-Net to take instead, spacing and all; "": make one
        "configuration": "3d_fullres",  # of that plans.json; or "3d_lowres"
        # Box of the largest component above this many HU; None: nnU-Net's non-zero voxels.
        "crop_hu": placeholder(float) if data == "msd" else -200.0,
        "cases_per_shard": 16,
        "processes": 0,  # 0: one per core
        "shard_index": 0,  # which of num_shards jobs this is, counted from 0
        "num_shards": 1,  # jobs on one run folder; each writes every num_shards-th shard
        "allow_skipped": False,  # finish with exit 0 although cases were refused
        "verify_only": False,  # check and print the integrity table, write no shards
    }


def _split(labels: str) -> dict:
    split = {
        "fold": 0,  # of 5 over the training cases, as nnU-Net's; -1: no validation part
        # Training cases whose masks are used: a count, or a fraction below 1; None: all. The
        # others' images join the unlabeled stream.
        "labeled": placeholder(object),
        "seed": 0,  # of the nested labeled subsets
        "binary": False,  # merge all classes into one (Tasks 2 and 3)
        "bleeding": placeholder(int),  # unlabeled volumes known to bleed to use; None: all
        "nonbleeding": placeholder(int),  # likewise, known not to bleed
    }
    if labels:
        split["labeled"] = float(labels) if "." in labels else int(labels)
    return split


def _input() -> dict:
    return {
        "patch": placeholder(tuple),  # D, H, W; None: the plan's
        "labeled": placeholder(
            int
        ),  # labeled patches per step, all devices together; None: the plan's batch
        "unlabeled": 0,  # unlabeled patches per step
        # Of either stream: drawn "with_replacement" (nnU-Net) or "in_turn", each once in every pass
        # over them, in an order of its own (SSL4MIS).
        "cases": "with_replacement",
        "foreground": 0.33,  # share of labeled patches centered on a labeled voxel
        "pad": "air",  # outside the scan: "air" (lower clip bound), "nnunet" (0 once normalized)
        # Voxels of unlabeled patches outside the scan: "learned" like any others (SSL4MIS), or
        # "masked", left out of the losses on the network's own answers.
        "outside": "learned",
        "threads": 4,  # that read patches
        "buffer": 8,  # patches read ahead, per stream
        "cache_mb": 4096,  # decoded cases kept in memory, per process
    }


def _augment() -> dict:
    return {
        "spatial": (
            {"name": "spatial.Affine", "rotation_p": 0.2, "scale_p": 0.2, "scale": (0.7, 1.4)},
            {"name": "spatial.Mirror", "p": 0.5},
        ),
        "intensity": (
            {"name": "intensity.GaussianNoise", "p": 0.1, "std": (0.0, 0.1)},
            {"name": "intensity.GaussianBlur", "p": 0.1, "sigma": (0.5, 1.0)},
            {"name": "intensity.Brightness", "p": 0.15, "factor": (0.75, 1.25)},
            {"name": "intensity.Contrast", "p": 0.15, "factor": (0.75, 1.25)},
            {"name": "intensity.LowResolution", "p": 0.125, "zoom": (0.5, 1.0)},
            {"name": "intensity.Gamma", "p": 0.1, "gamma": (0.7, 1.5), "invert": True},
            {"name": "intensity.Gamma", "p": 0.3, "gamma": (0.7, 1.5), "invert": False},
        ),
    }


def _weak() -> dict:
    """Slice labels of the unlabeled scans, with any objective that reads them; weight 0: off."""
    return {
        "neg_sup": 0.0,  # slices without bleeding are labels: 1
        "negatives": "ce",  # their loss: cross entropy, or "volume", the mean probability
        "gate_pseudo": False,  # no pseudo-label of a class that the slice does not show
        "mil": 0.0,  # presence by pooled margins: 0.01 to 0.1
        "sharpness": 5.0,  # of the pooling; 0 is the mean, infinity the maximum
        "size": 0.0,  # bounds on the area: 0.01
        "sizes": "penalty",  # or "barrier", the log-barrier extension
        "barrier": (5.0, 1.1),  # its t at first, growth per 1 % of the training
        "lesion_voxels": 10.0,  # least area of a bleed in a slice that shows it
        "start": 0.3,  # share of the training before `mil` and `size` begin
        "margin": 1,  # slices next to a bleed that are not trusted to lack it
    }


def _train() -> dict:
    return {
        "steps": 250_000,
        "log_every": 50,  # steps
        "validate_every": 5_000,  # steps; whole volumes by sliding window
        "validate_cases": placeholder(int),  # the first so many; None: all
        "save_every": 1_000,  # steps
        # Parts of a batch that go through the network one after another, for the memory of one;
        # their gradients are averaged. What counts over the batch counts over a part: batch Dice,
        # and means over voxels that are sure, inside the scan, or in slices with labels.
        "accumulate": 1,
        "remat": "none",  # "blocks": recompute activations per stage in the backward pass
        "profile": "",  # steps to trace for xprof, like "10:15", into <workdir>/profile
    }


def _mesh() -> dict:
    return {
        # Devices per axis; together all there are, or as many as the patches of a step fill.
        "data": -1,  # groups of devices with patches of their own; -1: all that the others leave
        "model": 1,  # over which parameters and optimizer are split
        "space": 1,  # over which the rows (H) of patches are split; with `model`, over both
        "twins": 1,  # 2: the networks of an objective with twins (CPS) on devices of their own
        # The processes of a run that no cluster tells of: all three here, or in the environment as
        # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        "coordinator": "",  # host:port where process 0 listens
        "num_processes": placeholder(int),
        "process_id": placeholder(int),  # from 0
        "detect": "",  # ask one of JAX's ways, such as "mpi4py"; "": flags, environment, cluster
    }


def _infer(speed: str) -> dict:
    return {
        **inference(speed),
        "mirror_axes": (0, 1, 2),  # D, H, W; of the mirrored versions
        "tiles": placeholder(int),  # tiles per call; None: chosen from the memory of the device
    }


def _predict() -> dict:
    return {
        # A NIfTI file, or a folder with NIfTI files or, at any depth, DICOM series; "": the cases
        # of `split`.
        "images": "",
        # Of DICOM series; as the network was trained. `uneven` slices: "refuse" or "resample";
        # `unshear` undoes the gantry's tilt before the network, and does it again after.
        "dicom": {"uneven": "refuse", "unshear": False},
        "split": "test",  # "val" or "test"
        "out": "",  # folder; "": <workdir>/predictions
        "checkpoint": "best",  # "best", "last", or a step
        # Names from the objective (student, teacher, a, b; ensemble: a and b), averaged; (): the
        # one it deploys.
        "networks": (),
        "probabilities": False,  # also write <case>_probabilities.npz
        "overwrite": True,
        "show_ids": placeholder(bool),  # names of scans in outputs; None: NIfTI's, but not DICOM's
    }


def _evaluate() -> dict:
    return {
        "predictions": "",  # folder; "": <workdir>/predictions
        "references": "",  # folder of masks; "": the data set's own
        "split": "",  # "": the one that was predicted
        "nsd_mm": 1.0,  # tolerance of the surface Dice
        "bootstrap": 2000,  # resamples of patients
        "baseline": False,  # also score the best plain HU threshold on the same cases (CT)
    }


def _report() -> dict:
    return {
        "title": "",  # "": data set and name of the run
        "note": "",  # what a reader must know before the numbers
        "overlays": True,  # pictures of the best, the median and the worst scan of each class
        "show_ids": False,
        "compare": (),  # folders of other runs
    }


def smoke(config: ml_collections.ConfigDict) -> None:
    """Shrinks a config until every verb takes seconds."""
    if config.data.name == "synthetic.Synthetic":
        config.data.update(size=64, slices=10, labeled=6, bleeding=2, nonbleeding=2)
        config.data.difficulty = "easy"
        config.preprocess.spacing_mm = (16.0, 3.9, 3.9)
    config.input.update(patch=(8, 32, 32), labeled=2, threads=1, buffer=2)
    backbones.shrink(config)
    config.train.update(steps=4, log_every=1, validate_every=2, validate_cases=1, save_every=2)
    config.infer.update(mirror=False)
    config.evaluate.bootstrap = 50
