"""The first state of a training: drawn, or with the weights of a run that was trained before."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from bhsd_jax.build import build
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Train
from bhsd_jax.train.checkpoint import load_networks
from bhsd_jax.train.transfer import transfer
from bhsd_jax.types import TrainState

logger = logging.getLogger(__name__)


def begin_with(asked: Train, drawn: TrainState, twins: Sequence[str] = ()) -> TrainState:
    """The state of step 0 with the network that another run deploys, if `asked.weights` names one.

    A moving average begins as a copy. The networks `twins` begin alike but for what
    `asked.weights_leave` names.

    Raises:
        ValueError: If the folder is no run, or its network has nothing in common with this one.
        FileNotFoundError: If it has no checkpoint.
    """
    if not asked.weights:
        return drawn
    folder = Path(asked.weights)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"train.weights: {config} is not there; name the folder of a trained run")
    spec = json.loads(config.read_text())["objective"]
    step, params, ema = load_networks(folder / "checkpoints", "last")
    networks = build("bhsd_jax.objectives", spec).deployable(params, ema)
    begun = transfer(
        drawn.params,
        next(iter(networks.values())),
        twins=twins,
        leave=asked.weights_leave,
    )
    logger.info(
        "%s, step %d: %d of %d parameter arrays are taken; drawn: %s",
        *(folder, step, len(begun.taken), len(begun.taken) + len(begun.drawn)),
        ", ".join(begun.drawn) or "none",
    )
    ema = None if drawn.ema is None else begun.params
    return dataclasses.replace(drawn, params=begun.params, ema=ema)
