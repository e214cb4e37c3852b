"""Cross pseudo supervision (BHSD Task 2): binary, labeled and unlabeled patches one to one.

Presets: `recommended` (adapted to nnU-Net's training) and `ssl4mis` (what the paper most likely
ran): `--config=configs/cps.py:preset=ssl4mis`.
Paper: binary Dice 49.50 against 45.10 without the unlabeled scans (Wu et al. 2023, Table 2).
On MSD Hippocampus with 8 masks: 1.1 points above masks alone [0.4, 1.6].
Run:  python -m bhsd_jax.main train runs/cps --config=configs/cps.py:data=bhsd,task=2
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {
    "recommended": {"weight": 0.5, "ramp": 0.4, "views": "independent", "confidence": 0.0},
    "ssl4mis": {
        **common.SSL4MIS_RAMP,
        "views": "shared",
        "confidence": 0.0,
        "twin_init": "kaiming_xavier",
    },
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults with twins and an unlabeled stream."""
    return common.semisupervised(arg, "cps", "cps.CrossPseudoSupervision", PRESETS)
