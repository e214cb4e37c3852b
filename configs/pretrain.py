"""Pretraining without masks: the backbone fills in hidden blocks of every training scan.

No mask takes part. Half of the patches come from the scans with masks, half from the others. A
training begins with the weights by `--config.train.init_from=runs/pretrain`, and draws its heads by
`--config.train.init_leave=head,`; the head of Primus is the last of its `up_0`, `up_1`, ...
Claim: tools/LAB_BOOK.md says what it brings on MSD Hippocampus.
Cost: as the supervised step of as many patches.
Run:  python -m bhsd_jax.main train --config=configs/pretrain.py:data=bhsd --workdir=runs/pretrain
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {"recommended": {"block": (4, 4, 4), "hidden": 0.6}, "ssl4mis": {}}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The semi-supervised defaults, with an objective that no mask takes part in."""
    config = common.semisupervised(arg, "pretrain", "masked.MaskedModeling", PRESETS)
    config.train.validate_cases = 0  # there is no segmentation to score
    config.input.foreground = 0.0  # nor does a patch lean on one
    return config
