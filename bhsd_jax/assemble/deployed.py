"""The networks of a run's checkpoint that predict."""

import logging
from collections.abc import Mapping, Sequence

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.checkpoint import load_networks, load_statistics
from bhsd_jax.types import Params

logger = logging.getLogger(__name__)


def load(run: Run) -> tuple[int, dict[str, Params]]:
    """The checkpoint's step and the variables of the networks to average, by name.

    "ensemble" stands for all twins.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the objective has no network of a wanted name, or none that segments.
    """
    settings = run.config.predict
    which = settings.checkpoint
    which = int(which) if str(which).isdigit() else which
    objective = wiring.objective(run.config)
    if not getattr(objective, "segments", True):
        raise UserError(
            f"{run.folder}: objective {run.config.objective['name']} has seen no mask, so that its "
            "network segments nothing; begin a training with its weights, by "
            f"--train.init_from={run.folder}, and name that run"
        )
    step, params, ema = load_networks(run.folder / "checkpoints", which)
    statistics = load_statistics(run.folder / "checkpoints", step)
    found = objective.deployable(params, ema)
    asked = tuple(settings.networks) or tuple(found)[:1]
    together = {"ensemble": objective.twins} if objective.twins else {}
    wanted = [one for name in asked for one in together.get(name, (name,))]
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise UserError(
            f"config.predict.networks: no {', '.join(map(repr, unknown))}; "
            f"this objective has {', '.join([*found, *together])}"
        )
    logger.info("checkpoint of step %d, network %s", step, " + ".join(wanted))
    return step, {
        name: {"params": found[name], **_own(statistics, name, objective.twins)} for name in wanted
    }


def _own(statistics: Mapping[str, Params], name: str, twins: Sequence[str]) -> dict[str, Params]:
    """The statistics of one network, where each of several has its own."""
    return {kind: tree[name] if name in twins else tree for kind, tree in statistics.items()}
