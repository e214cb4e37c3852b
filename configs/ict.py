"""Interpolation consistency (BHSD Task 2): binary, labeled and unlabeled patches one to one.

Presets: `recommended` (adapted to nnU-Net's training) and `ssl4mis` (what the paper most likely
ran): `--config=configs/ict.py:preset=ssl4mis`.
Paper: binary Dice 45.38 against 45.10 without the unlabeled scans (Wu et al. 2023, Table 2).
On MSD Hippocampus with 8 masks: no different from masks alone, 0.0 points [-0.3, 0.3].
Cost: 2.3 times the supervised step of as many labeled patches; 1.8 times in `ssl4mis`.
Run:  python -m bhsd_jax.main train runs/ict --config=configs/ict.py:data=bhsd,task=2
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {
    "recommended": {
        "weight": 2.0,
        "ramp": 0.4,
        "ema_decay": 0.999,
        "views": "weak_strong",
        "beta": 0.5,
        "fold": True,
        "pairs": "each",
    },
    "ssl4mis": {
        **common.SSL4MIS_RAMP,
        "ema_decay": 0.99,
        "views": "shared",
        "beta": 0.2,
        "fold": False,
        "pairs": "half",
        "tested": "student",
    },
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults with blends of unlabeled patches."""
    return common.semisupervised(arg, "ict", "ict.InterpolationConsistency", PRESETS)
