"""A training that several processes can share and that compiles in seconds: `tiny.py:cps`."""

import importlib

from bhsd_jax.configs import common


def get_config(arg: str = "cps"):
    """The smoke size of an experiment, with four patches of each kind and nothing to augment."""
    config = importlib.import_module(f"bhsd_jax.configs.{arg}").get_config("smoke")
    config.input.update(labeled=4, unlabeled=config.input.unlabeled and 4, patch=(4, 16, 16))
    config.augment = {"spatial": (), "intensity": ()}
    config.model.features = (4, 8)
    config.train.update(steps=5, log_every=1, validate_every=5, validate_cases=3, save_every=2)
    config.predict.checkpoint = "last"
    assert common.parse_arg("smoke")["smoke"]
    return config
