"""The temperature that `calibrate` has stored with a run. Needs no JAX of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.assemble.manifest import Member
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

NAME = "calibration.json"
_KEYS = ("temperature", "networks", "before", "after", "scans", "voxels")
_AGAIN = "run the verb `calibrate` again"


def key(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Which networks a temperature is for: digests of their checkpoints, and their names."""
    return [
        {"weights_sha256": member.weights_sha256, "networks": list(member.networks)}
        for member in members
    ]


def read(folder: Path) -> dict[str, Any] | None:
    """What was measured of a run; None if it was not.

    Raises:
        ValueError: If the file is damaged; names it.
    """
    path = folder / NAME
    return files.read_json(path, keys=_KEYS, remedy=_AGAIN) if path.is_file() else None


def temperature(folder: Path, members: Sequence[Member]) -> float:
    """The temperature of these networks.

    Raises:
        ValueError: If the run has none, or it was fitted to other networks.
    """
    found: Mapping[str, Any] | None = read(folder)
    if found is None:
        raise UserError(f"{folder / NAME}: not there; run the verb `calibrate` first")
    if found["networks"] != key(members):
        raise UserError(
            f"{folder / NAME}: was fitted to other networks or another checkpoint; {_AGAIN}"
        )
    return float(found["temperature"])
