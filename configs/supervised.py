"""Supervised training, nnU-Net's recipe.

Run:  python -m bhsd_jax.main preprocess --config=configs/supervised.py --workdir=runs/supervised
      python -m bhsd_jax.main train --config=configs/supervised.py --workdir=runs/supervised
"""

import ml_collections

from bhsd_jax.configs import common
from bhsd_jax.platform.errors import UserError


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults as they are.

    Raises:
        ValueError: If `arg` names a preset: there is none to name.
    """
    config = common.get_config(arg)
    if config.preset != common.WORDS["preset"]:
        raise UserError(
            f"supervised: preset={config.preset} would change nothing; configs/suponly.py has "
            "presets of training with masks alone"
        )
    return config
