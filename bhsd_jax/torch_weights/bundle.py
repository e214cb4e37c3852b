"""The network that a config of MONAI's bundles describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bhsd_jax.platform.errors import UserError

WEIGHTS = Path("models") / "model.pt"
_CONFIGS = ("inference.json", "train.json")
_NETWORKS = ("network_def", "network")


def config_of(weights: Path) -> Path | None:
    """The config of the bundle that a file of weights belongs to; None: it is in no bundle."""
    folder = weights.absolute().parent  # the file may be a link into a cache
    configs = [folder.with_name("configs") / name for name in _CONFIGS]
    found = [path for path in configs if folder.name == WEIGHTS.parent.name and path.is_file()]
    return found[0] if found else None


def network_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and arguments of a bundle's network; of other JSON "" and all that it holds.

    Raises:
        UserError: If an argument is an expression, which only running it would tell.

    Source: MONAI 1.6.1, `ConfigParser`: "_target_" is the class, "@name" another entry, "$" begins
    Python.
    """
    described = next((config[k] for k in _NETWORKS if isinstance(config.get(k), Mapping)), config)
    arguments = {}
    for name, given in described.items():
        if name.startswith("_"):  # MONAI's own words
            continue
        named = isinstance(given, str) and given.startswith("@")
        value = config.get(given[1:], given) if named else given
        if isinstance(value, str) and value.startswith(("@", "$")):
            raise UserError(
                f"bundle: {name} of the network is an expression, {value}, which is not run; give "
                "the arguments written out with --constructor"
            )
        arguments[name] = value
    return str(described.get("_target_", "")).rpartition(".")[2], arguments
