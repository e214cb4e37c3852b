"""Mean teacher (BHSD Task 2): binary, labeled and unlabeled patches one to one.

Presets: `recommended` (adapted to nnU-Net's training) and `ssl4mis` (what the paper most likely
ran): `--config=configs/mean_teacher.py:preset=ssl4mis`.
Paper: binary Dice 44.63 against 45.10 without the unlabeled scans (Wu et al. 2023, Table 2).
On MSD Hippocampus with 8 masks: no different from masks alone, -0.1 points [-0.3, 0.2].
Cost: 2.3 times the supervised step of as many labeled patches.
Run:  python -m bhsd_jax.main train runs/mt --config=configs/mean_teacher.py:data=bhsd,task=2
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {
    "recommended": {
        "weight": 2.0,
        "ramp": 0.4,
        "ema_decay": 0.999,
        "views": "weak_strong",
        "noise": 0.0,
    },
    "ssl4mis": {
        **common.SSL4MIS_RAMP,
        "ema_decay": 0.99,
        "views": "shared",
        "noise": 0.1,
        "noise_clip": 0.2,
        "tested": "student",
    },
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults with a student and its moving average."""
    return common.semisupervised(arg, "mean_teacher", "mean_teacher.MeanTeacher", PRESETS)
