"""What a prediction was made with: versions, the weights' digest, options. Needs no JAX of its own.

Nothing in it names a folder or a file of the user: such names may be a patient's.
"""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bhsd_jax import __version__
from bhsd_jax.assemble.run import Run
from bhsd_jax.train import checkpoint_files


@dataclass(frozen=True)
class Member:
    """What of a run takes part in a prediction."""

    folder: Path
    step: int
    networks: tuple[str, ...]
    mirror: tuple[int, ...] = ()  # axes that are mirrored

    @property
    def weights_sha256(self) -> str:
        """The digest of its checkpoint, see `checkpoint_files.digest`."""
        return checkpoint_files.digest(self.folder / "checkpoints", self.step)


_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "nibabel", "pydicom")
# Fields of `predict` that say where files lie and which are written, and nothing of the answer.
_PLACES = (
    *("images", "out", "runs", "show_ids"),
    *("overwrite", "report", "part_id", "num_parts"),
)


def of_prediction(run: Run, members: Sequence[Member]) -> dict[str, Any]:
    """Fields for `predictions.json`, all plain."""
    options = {
        name: value
        for name, value in dataclasses.asdict(run.config.predict).items()
        if name not in _PLACES
    }
    return {
        "versions": versions(),
        "weights_sha256": [member.weights_sha256 for member in members],
        "options": {"predict": options, "infer": dataclasses.asdict(run.config.infer)},
    }


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that numbers depend on."""
    found = {"bhsd_jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
