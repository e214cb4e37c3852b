"""Supervised training alone, the row the paper's Table 2 compares with: binary, two patches a step.

Presets: `recommended` draws cases with replacement and deploys the last checkpoint, `ssl4mis` takes
them in turn and deploys the one that validated best.
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
