"""Supervised training, nnU-Net's recipe.

Run:  python -m bhsd_jax.main preprocess --config=configs/supervised.py --workdir=runs/supervised
      python -m bhsd_jax.main train --config=configs/supervised.py --workdir=runs/supervised
"""

import ml_collections

from bhsd_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults as they are."""
    return common.get_config(arg)
