"""Bidirectional copy-paste (Bai et al. 2023) with a moving-average teacher, binary by default.

The objective of `configs/w2s.py:preset=bcp` under its own name: a box of every unlabeled patch is
pasted into a labeled one and the other way round; the rest is `w2s.WeakToStrong`'s.
Claim: on MSD Hippocampus with 4, 8, 16 masks 1.9, 2.0, 0.6 points above masks alone, in every seed,
where an `ema_decay` of 0.98 fitted 1600 steps (tools/LAB_BOOK.md).
Cost: 3.3 times the supervised step of as many labeled patches.
Run:  python -m bhsd_jax.main train runs/bcp --config=configs/bcp.py:data=bhsd,task=2
"""

import ml_collections

from bhsd_jax.configs import common

PRESETS = {
    "recommended": {"weight": 1.0, "ramp": 0.4, "ema_decay": 0.99, "pairing": "labeled"},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults with a student of patches that are pasted both ways."""
    return common.semisupervised(arg, "bcp", "w2s.WeakToStrong", PRESETS)
