"""The defaults of every experiment; `bhsd_jax/settings.py` says what each field is.

An experiment file calls `get_config(arg)` and changes a few fields. `arg` is what follows the colon
on the command line, words separated by commas: `--config=configs/cps.py:smoke,data=msd`.
"""

import dataclasses

import ml_collections
from ml_collections.config_dict import FieldReference

from bhsd_jax import settings
from bhsd_jax.configs import backbones
from bhsd_jax.nnunet import topology
from bhsd_jax.platform.errors import UserError

# D, H, W of head CT in thick slices: what nnU-Net's rule gives for BHSD's own training cases.
HEAD_CT_SPACING_MM = (5.0, 0.48828125, 0.48828125)
# As in `volume`, which needs NumPy; what is misspelt is told before that is imported.
HEMORRHAGE = ("background", "EDH", "IPH", "IVH", "SAH", "SDH")
DATA = {  # the word `data=`
    "synthetic": {"name": "synthetic.Synthetic", "root": "", "difficulty": "default"},
    "bhsd": {
        "name": "bhsd.BHSD",
        "root": "data/BHSD",
        "label_dir": "",  # folder of masks, if it has another name
        "allow_missing": False,  # some of the listed cases
        "allow_empty": False,  # masks without bleeding
    },
    "msd": {
        "name": "msd.MSD",
        "root": "data/msd",
        "modality": "auto",  # "ct", "mr", or by the channel's name
        "ignore": "",  # cases to leave out, "a,b"
    },
    "dicom": {
        "name": "dicom.DICOM",
        "root": "data/dicom",
        "masks": "",  # folder of NIfTI masks; "": <root>/masks, or beside the slices
        "classes": HEMORRHAGE,  # by mask value
        "uneven": "refuse",  # slices at uneven steps; or "resample"
        "unshear": False,  # undo the gantry's tilt
        "show_ids": False,  # call cases by their folders
        "salt": "",  # of the hashes they are called by otherwise; "": drawn, kept with the shards
    },
    "rsna": {
        "name": "rsna.RSNA",
        "root": "data/rsna",
        "csv": "stage_2_train.csv",  # in `root`
        "uneven": "resample",
        "unshear": False,
        "bhsd": "",  # BHSD's folder: its outlined scans join, their patients' others are left out
        "allow_missing": False,  # some of the scans that are listed there
    },
    "instance": {"name": "instance.INSTANCE", "root": "data/INSTANCE2022"},
    "ctich": {"name": "ctich.CTICH", "root": "data/ct-ich", "masks": "binary"},
    "hemseg": {
        "name": "hemseg.HemSeg",
        "root": "data/HemSeg-500",
        "dicom": "",  # folder of the challenge's slices, where there are no NIfTI images
        "uneven": "refuse",
    },
    "hemorica": {
        "name": "hemorica.Hemorica",
        "root": "data/Hemorica",
        "images": "",  # folder in `root`; "": images, or what is called alike
        "masks": "",  # likewise
        "values": "",  # types by mask value from 1, "EDH,SDH,..."; "": those of dataset.json
    },
    "mbhseg": {
        "name": "mbhseg.MBHSeg",
        "root": "data/MBH-Seg25",
        "rater": "majority",
        "allow_missing": False,  # cases that the rater did not outline
    },
    "folder": {
        "name": "folder.Folder",
        "root": "data/folder",
        "images": "images",  # in `root`
        "masks": "masks",  # in `root`; scans without one are unlabeled
        "labels": "bhsd",  # classes by mask value: a preset, such as binary
        "classes": "",  # or one's own names of the values 1, 2, ..., such as a,b
        "modality": "ct",
        "split": "train",  # of the scans with a mask; or "test"
        "license": "",
    },
}
PREPROCESS = {  # fields of `config.preprocess` that go with a data set
    # Pinned, because nnU-Net's rule flips between 5.0 and 2.7 mm on subsets of BHSD's scans.
    **{word: {"spacing_mm": HEAD_CT_SPACING_MM} for word in ("bhsd", "rsna", "mbhseg")},
    "msd": {"crop_hu": None},  # nnU-Net's own crop, of CT and MR alike
}
SMOKE = {  # fields of the data set and of its preparation for the word `smoke`
    "synthetic.Synthetic": {
        "data": {
            "size": 64,
            "slices": 10,
            "labeled": 6,
            "bleeding": 2,
            "nonbleeding": 2,
            "difficulty": "easy",
        },
        "preprocess": {"spacing_mm": (16.0, 3.9, 3.9)},
    },
}
WORDS = {
    "smoke": False,
    "backbone": "nnunet",
    "recipe": "published",
    "data": "synthetic",
    "configuration": "3d_fullres",
    "planner": "default",
    "previous": "",
    "preset": "recommended",
    "labels": "",
    "task": "",
    "infer": "full",
}
ABOUT = {  # the words for a reader
    "smoke": "every verb takes seconds",
    "data=synthetic": f"or {', '.join(word for word in DATA if word != 'synthetic')}, or a class "
    "as <module>.<Class>",
    "backbone=nnunet": f"or {', '.join(b for b in backbones.BACKBONES if b != 'nnunet')}, or a "
    "class as <module>.<Class>",
    "recipe=published": "optimizer and schedule of the backbone's authors; or nnunet: nnU-Net's; "
    "or fast: Muon, half the steps",
    "configuration=3d_fullres": "or 2d, 3d_lowres, 3d_cascade_fullres: what nnU-Net plans",
    "planner=default": "or resenc_m, resenc_l, resenc_xl: nnU-Net's, with backbone=nnunet_resenc",
    "previous=FOLDER": "of 3d_cascade_fullres: what its first stage has predicted",
    "preset=recommended": "arguments of the objective; or ssl4mis: the training of its scripts",
    "labels=N": "masks to train with: a count, or a share below 1",
    "task=1": "the paper's tasks: 1 all classes, 2 binary with bleeding scans, 3 with all scans; "
    "without it all scans, binary or not as the experiment has it",
    "infer=full": "nnU-Net's sliding window; or fast: fewer tiles, no mirrored versions",
}
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")  # `configuration=`
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


# What the 3D scripts of SSL4MIS (06df604) have in common; tools/guide/ssl4mis.md has the arguments
# they come from. An epoch of theirs, in which they count the ramp, is 150 steps.
SSL4MIS = {
    "input": {
        "labeled": 2,
        "cases": "two_stream",
        "crop": "uniform",
        "rot_flip": True,
        "foreground": 0.0,
        "pad": "nnunet",
    },
    "augment": {"spatial": (), "intensity": ()},
    "loss": {
        "batch_dice": True,
        "background": True,
        "squared": True,
        "from_one": True,
        "dice_weight": 0.5,
        "ce_weight": 0.5,
    },
    "train": {"steps": 30_000, "validate_every": 200},
    "infer": {"step": 64 / 96, "mirror": False},
    "predict": {"checkpoint": "best"},
}
SSL4MIS_RAMP = {"weight": 0.1, "ramp_steps": 200 * 150, "staircase": 150}  # of the unlabeled term
_SSL4MIS_OPTIMIZER = {
    "name": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "clip": None,
    "schedule": "poly_left",
    "power": 0.9,
    "warmup": 0.0,
}
# They set the rate after the step with its number, so that it comes a step late; CPS does not.
_LATE = ("suponly", "entropy", "mean_teacher", "ict")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults: nnU-Net's recipe on the synthetic set, changed by the words in `arg`."""
    words = parse_arg(arg)
    config = ml_collections.ConfigDict()
    config.name = "supervised"
    config.seed = 0
    config.preset = words["preset"]  # read by experiment files
    config.task = words["task"]  # likewise
    config.data = dict(DATA.get(words["data"], {"name": words["data"], "root": ""}))
    config.preprocess = _preprocess(words)
    config.split = _split(words["labels"]) | TASKS[words["task"]]
    config.input = _group(settings.Input)
    config.windows = FieldReference("plan", field_type=object)
    config.augment = dataclasses.asdict(settings.Augment())
    config.model = {"name": words["backbone"], "features": FieldReference(None, field_type=object)}
    config.precision = "auto"
    config.loss = _group(settings.Loss)
    config.objective = {"name": "supervised.Supervised"}
    config.slice_loss = _group(settings.SliceLoss)
    config.optimizer = {
        "name": "sgd",
        "lr": 0.01,
        "momentum": 0.99,
        "weight_decay": 3e-5,  # L2, on every parameter
        "clip": FieldReference(12.0, field_type=object),  # global gradient norm, per network
        "schedule": "poly",
        "power": 0.9,
        "warmup": 0.0,  # steps; below 1: share of the training
    }
    config.train = _group(settings.Train)
    # A patch of so many voxels goes with the spacing it was planned for, whatever data set has it.
    head_ct = config.preprocess.spacing_mm == HEAD_CT_SPACING_MM
    backbones.choose(config, words["backbone"], words["recipe"], head_ct=head_ct)
    config.mesh = _group(settings.Mesh)
    config.infer = _group(settings.Infer)
    config.infer.update(inference(words["infer"]))
    config.predict = _group(settings.Predict)
    config.evaluate = _group(settings.Evaluate)
    config.report = _group(settings.Report)
    if words["smoke"]:
        smoke(config)
    return config


def semisupervised(arg: str, name: str, objective: str, presets: dict) -> ml_collections.ConfigDict:
    """The defaults for a binary task with labeled and unlabeled patches one to one.

    `presets` holds the objective's arguments by preset. `ssl4mis` is the whole training of SSL4MIS'
    scripts, whatever the backbone's own recipe, and deploys the checkpoint that validated best; the
    others are nnU-Net's training and deploy the last.

    Raises:
        ValueError: If the preset is unknown; lists the choices. If it decides what another word
            asks for.
    """
    config = get_config(arg)
    if config.preset not in presets:
        raise UserError(f"{name}: preset is one of {', '.join(presets)}; got {config.preset!r}")
    config.name = name
    config.objective = {"name": objective, **presets[config.preset]}
    config.split.binary = config.task != "1"
    config.input.labeled = 2
    config.input.unlabeled = 2
    config.predict.checkpoint = "last"
    if config.preset == "ssl4mis":
        _require_undecided(arg, name)
        _as_ssl4mis(config)
    if "smoke" in arg.split(","):
        smoke(config)
    return config


def _require_undecided(arg: str, name: str) -> None:
    """Refuses words whose fields SSL4MIS' scripts decide, rather than drop them unsaid."""
    words = parse_arg(arg)
    for word in ("recipe", "infer"):
        if words[word] != WORDS[word]:
            raise UserError(
                f"{name}: preset=ssl4mis decides optimizer, length and sliding window; got "
                f"{word}={words[word]}, which would change nothing; leave one of them out"
            )


def _as_ssl4mis(config: ml_collections.ConfigDict) -> None:
    """Everything of SSL4MIS' scripts but network, patch and data, which are the config's own."""
    for group, values in SSL4MIS.items():
        config[group].update(values)
    config.optimizer = {
        **_SSL4MIS_OPTIMIZER,
        "clip": FieldReference(None, field_type=object),
        "lag": int(config.name in _LATE),
    }
    if config.model.name in backbones.DEEPLY_SUPERVISED:
        config.model.deep_supervision = False


def parse_arg(arg: str) -> dict:
    """Reads `"smoke,data=msd"`; a word without a value is True.

    Raises:
        ValueError: If a word is not known, or `data=`, `configuration=`, `planner=`, `task=` or
            `infer=` names nothing; lists the choices.
    """
    words = dict(WORDS)
    for part in filter(None, arg.split(",")):
        word, equals, value = part.partition("=")
        if word not in WORDS or bool(equals) == isinstance(WORDS[word], bool):
            known = ", ".join(k if isinstance(v, bool) else f"{k}=..." for k, v in WORDS.items())
            raise UserError(f"config argument {part!r} is not known; words are {known}")
        words[word] = value if equals else True
    if words["data"] not in DATA and "." not in words["data"]:  # a class is found by name, later
        raise UserError(
            f"data={words['data']} is not known; choose from {', '.join(DATA)}, or name a class as "
            "<module>.<Class>"
        )
    if words["configuration"] not in CONFIGURATIONS:
        raise UserError(
            f"configuration={words['configuration']} is not known; choose from "
            f"{', '.join(CONFIGURATIONS)}, or name that of a plan with preprocess.configuration"
        )
    topology.planner_named(words["planner"])
    if words["task"] not in TASKS:
        raise UserError(f"task={words['task']} is not known; choose from 1, 2, 3")
    inference(words["infer"])
    return words


def inference(speed: str) -> dict:
    """Fields of `config.infer` for a value of the word `infer=`.

    Raises:
        ValueError: If it is not known; lists the choices.
    """
    if speed not in INFER:
        raise UserError(f"infer={speed} is not known; choose from {', '.join(INFER)}")
    return dict(INFER[speed])


def _group(group: type) -> dict:
    """The defaults of a group, so that the command line may set what is open to more than one type.

    A ConfigDict lets a field keep its type; tuples, and what may be None, may be given as any
    literal and are checked by `Settings.of`.
    """
    values = {}
    for part in dataclasses.fields(group):
        value = getattr(group(), part.name)
        if dataclasses.is_dataclass(value):
            values[part.name] = _group(type(value))
        elif value is None or isinstance(value, tuple):
            values[part.name] = FieldReference(value, field_type=object)
        else:
            values[part.name] = value
    return values


def _preprocess(words: dict) -> dict:
    group = _group(settings.Preprocess)
    group["crop_hu"] = FieldReference(group["crop_hu"], field_type=object)  # None: nnU-Net's
    for name, value in PREPROCESS.get(words["data"], {}).items():
        group[name] = FieldReference(value, field_type=object)
    group.update(configuration=words["configuration"], planner=words["planner"])
    if words["previous"]:
        group["previous"] = FieldReference((words["previous"],), field_type=object)
    return group


def _split(labels: str) -> dict:
    group = _group(settings.Split)
    if labels:
        try:
            amount = float(labels) if "." in labels else int(labels)
        except ValueError:
            raise UserError(
                f"labels={labels} is no number; give a count, such as labels=8, or a share below "
                "1, such as labels=0.1"
            ) from None
        group["labeled"] = FieldReference(amount, field_type=object)
    return group


def smoke(config: ml_collections.ConfigDict) -> None:
    """Shrinks a config until every verb takes seconds."""
    for group, values in SMOKE.get(config.data.name, {}).items():
        config[group].update(values)
    config.input.update(patch=(8, 32, 32), labeled=2, threads=1, buffer=2)
    backbones.shrink(config)
    config.train.update(steps=4, log_every=1, validate_every=2, validate_cases=1, save_every=2)
    config.infer.update(mirror=False)
    config.evaluate.bootstrap = 50
