"""Few masks and many scans without: MSD Hippocampus at 3 mm, with a network for one CPU core.

The training scans of nnU-Net's fold 0, of which `split.labeled` keep their masks; the validation
scans of that fold are tested. Every row makes as many steps on two labeled patches, the last
checkpoint is tested, and where one network is trained its moving average is what is tested, masks
alone included.
Run:  launch/study_hippocampus /data/Task04_Hippocampus --masks=8
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections
from bhsd_jax.configs.tables import PaperTable, TableRow

from bhsd_jax.configs import common, entropy, tables

STEPS = 1600
DECAY = 0.98  # of moving averages: they remember 50 steps
_WORDS = ("data=msd", "task=1")
# Which slices show a class is taken from the withheld masks, and so exact up to the last slice.
_SLICES = {"slice_loss.gate_pseudo": True, "slice_loss.neg_sup": 1.0, "slice_loss.margin": 0}
_ENTROPY = {
    "name": "entropy.EntropyMinimization",
    **entropy.PRESETS["recommended"],
    "ema_decay": DECAY,  # which the experiment file leaves out
}


@dataclass(frozen=True)
class FewMasks(PaperTable):
    """Rows that are compared with masks alone, some of which begin with pretrained weights."""

    pretraining: str = ""  # the row that is trained for them, and not tested
    pretrained: tuple[str, ...] = ()


def _row(
    title: str, experiment: str, fields: Mapping[str, Any] = MappingProxyType({}), **objective: Any
) -> TableRow:
    own = {f"objective.{name}": value for name, value in objective.items()}
    return TableRow(title, experiment, _WORDS, fields={**fields, **own})


def _masks(title: str) -> TableRow:
    averaged = {"name": "supervised.Supervised", "ema_decay": DECAY}
    return TableRow(title, "suponly", _WORDS, fields={"objective": averaged})


TABLE = FewMasks(
    name="hippocampus",
    title="MSD Hippocampus at 3 mm with few masks",
    rows={
        "masks": _masks("Masks alone"),
        "mean_teacher": _row("Mean teacher", "mean_teacher", ema_decay=DECAY),
        "cps": _row("CPS", "cps"),
        "cps_cutmix": _row("CPS with CutMix", "cps_cutmix"),
        "w2s": _row("Weak to strong with CutMix", "w2s", ema_decay=DECAY),
        "bcp": _row("Bidirectional copy-paste", "bcp", ema_decay=DECAY),
        "ict": _row("Interpolation consistency", "ict", ema_decay=DECAY),
        "entropy": TableRow(
            "Entropy minimization", "entropy", _WORDS, fields={"objective": _ENTROPY}
        ),
        "w2s_slices": _row("Weak to strong with slice labels", "w2s", _SLICES, ema_decay=DECAY),
        "pretrained": _masks("Masks alone, pretrained"),
        # Half of the scans in either stream, so that all of them come equally often.
        "pretrain": TableRow("Pretraining", "pretrain", _WORDS, fields={"split.labeled": 0.5}),
    },
    default="masks",
    baseline="masks",
    pretraining="pretrain",
    pretrained=("pretrained",),
    fields={
        "split.fold": 0,
        "predict.split": "val",
        "preprocess.spacing_mm": (3.0, 3.0, 3.0),
        "input.patch": (12, 16, 12),
        "input.threads": 1,
        "optimizer.name": "adam",
        "optimizer.lr": 0.004,
        "optimizer.momentum": 0.9,
        "loss.batch_dice": True,
        "infer.mirror": False,
        "report.overlays": False,
        "train.steps": STEPS,
        "train.validate_every": 400,
        "train.save_every": STEPS,
        "train.log_every": 400,
        # Left and right are mirror images of each other; front and back, top and bottom are not.
        "augment.spatial": (
            {"name": "spatial.Affine", "rotation_p": 0.2, "scale_p": 0.2, "scale": (0.7, 1.4)},
            {"name": "spatial.Mirror", "p": 0.5, "axes": (2,)},
        ),
        "augment.intensity": (
            {"name": "intensity.GaussianNoise", "p": 0.1, "std": (0.0, 0.1)},
            {"name": "intensity.Brightness", "p": 0.15, "factor": (0.75, 1.25)},
            {"name": "intensity.Contrast", "p": 0.15, "factor": (0.75, 1.25)},
            {"name": "intensity.Gamma", "p": 0.3, "gamma": (0.7, 1.5), "invert": False},
        ),
    },
)
# One convolution where there are most voxels: two thirds of the time of two.
_NETWORK = {
    "features": (8, 16, 32),
    "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "kernels": ((3, 3, 3),) * 3,
    "convs_encoder": (1, 2, 2),
    "convs_decoder": 1,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The row, seed and words in `arg`; masks alone if it names no row."""
    config = tables.get_config(TABLE, arg)
    words = [part for part in arg.split(",") if part.partition("=")[0] in common.WORDS]
    smoke = common.parse_arg(",".join(words))["smoke"]
    if config.model.name == "nnunet.PlainConvUNet" and not smoke:
        config.model.update(_NETWORK)
    return config
