"""Supervised training alone, the row the paper's Table 2 compares with: binary, two patches a step.

Presets: `recommended` is nnU-Net's training, `ssl4mis` that of SSL4MIS' own script:
`--config=configs/suponly.py:preset=ssl4mis`.
Paper: binary Dice 45.10 (Wu et al. 2023, Table 2, "SupOnly").
Cost: a quarter of the step of CPS.
Run:  python -m bhsd_jax.main train --config=configs/suponly.py:data=bhsd --workdir=runs/suponly
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {"recommended": {}, "ssl4mis": {}}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The semi-supervised defaults without the unlabeled stream."""
    config = common.semisupervised(arg, "suponly", "supervised.Supervised", PRESETS)
    config.input.unlabeled = 0
    return config
