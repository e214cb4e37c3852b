"""The temperature that `calibrate` has stored with a run. Needs no JAX of its own."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax import fields
from bhsd_jax.assemble import origins
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.assemble.run import Run
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

NAME = "calibration.json"
_KEYS = ("temperature", "networks", "before", "after", "scans", "voxels")
_AGAIN = "run the verb `calibrate` again"


def key(members: Sequence[Member]) -> list[dict[str, Any]]:
    """The networks that a temperature is for: digests of their checkpoints, and their names."""
    return [
        {"weights_sha256": member.weights_sha256, "networks": list(member.networks)}
        for member in members
    ]


def made_with(run: Run, members: Sequence[Member]) -> dict[str, Any]:
    """How the networks' logits come about, as plain values: a temperature holds for no others.

    The mean of probabilities is less sure than that of logits, and either is the less sure the more
    mirrored versions and tiles are averaged.
    """
    facts = origins.facts_of(run, members)
    several = sum(len(member.networks) for member in members) > 1
    names = ("infer", "mirrors", "precision", *(("combine",) if several else ()))
    return {name: facts[name] for name in names if name in facts}


def read(folder: Path) -> dict[str, Any] | None:
    """What was measured of a run; None if it was not.

    Raises:
        ValueError: If the file is damaged; names it.
    """
    path = folder / NAME
    return files.read_json(path, keys=_KEYS, remedy=_AGAIN) if path.is_file() else None


def temperature(run: Run, members: Sequence[Member]) -> float:
    """The temperature of these networks, as the run's config predicts with them.

    Raises:
        ValueError: If the run has none, or it was fitted to other networks, or to logits that were
            made in another way.
    """
    path, found = run.folder / NAME, read(run.folder)
    if found is None:
        raise UserError(f"{path}: not there; run the verb `calibrate` first")
    if found["networks"] != key(members):
        raise UserError(f"{path}: was fitted to other networks or another checkpoint; {_AGAIN}")
    ours, theirs = made_with(run, members), found.get("made_with")
    if theirs is None:  # of an older version
        logger.warning(
            "%s: does not say how its networks were averaged, mirrored and tiled; if that was not "
            "as now, its temperature is of other probabilities: %s",
            *(path, _AGAIN),
        )
    elif differs := next(fields.differences(theirs, ours), ""):
        raise UserError(
            f"{path}: was fitted to logits made otherwise: {differs}; predict as then, or {_AGAIN} "
            "with the options of now"
        )
    return float(found["temperature"])


def is_of(found: Mapping[str, Any], weights: Sequence[str]) -> bool:
    """Whether what `read` gives is of the checkpoints with these digests, and of no others."""
    return [one["weights_sha256"] for one in found["networks"]] == list(weights)


def subject(found: Mapping[str, Any]) -> str:
    """What was calibrated, in words, as far as it is known."""
    if len(found["networks"]) > 1:
        return f"{len(found['networks'])} runs together"
    steps = found.get("steps")  # older versions have not noted it
    return f"the checkpoint of step {steps[0]}" if steps else "a checkpoint of unknown step"
