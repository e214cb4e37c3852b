"""Entropy minimization (BHSD Task 2): binary, labeled and unlabeled patches one to one.

Presets: `recommended` (adapted to nnU-Net's training) and `ssl4mis` (what the paper most likely
ran): `--config=configs/entropy.py:preset=ssl4mis`.
Paper: binary Dice 36.91 against 45.10 without the unlabeled scans (Wu et al. 2023, Table 2).
On MSD Hippocampus with 8 masks: no different from masks alone, -0.3 points [-0.5, 0.0], where of
masks alone a moving average was tested and of entropy the trained network.
Cost: twice the supervised step of as many labeled patches.
Run:  python -m bhsd_jax.main train runs/entropy --config=configs/entropy.py:data=bhsd,task=2
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {
    "recommended": {"weight": 0.005, "ramp": 1.0, "patches": "unlabeled", "voxels": "all"},
    "ssl4mis": {
        **common.SSL4MIS_RAMP,
        "patches": "all",
        "voxels": "all",
        "epsilon": 1e-6,
    },
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults with entropy on the unlabeled stream."""
    return common.semisupervised(arg, "entropy", "entropy.EntropyMinimization", PRESETS)
