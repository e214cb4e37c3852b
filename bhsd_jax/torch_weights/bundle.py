"""Bundles of MONAI's: the network that a config describes, and nnU-Net's networks in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import weights_file

WEIGHTS = Path("models") / "model.pt"
_CONFIGS = tuple(f"{name}.{kind}" for name in ("inference", "train") for kind in ("json", "yaml"))
_NETWORKS = ("network_def", "network")
_OF_NNUNET = "nnunet_checkpoint.pth"  # what nnU-Net's checkpoint holds beside the weights


def config_of(weights: Path) -> Path | None:
    """The config of the bundle that a file of weights belongs to; None: it is in no bundle."""
    folder = weights.absolute().parent  # the file may be a link into a cache
    configs = [folder.with_name("configs") / name for name in _CONFIGS]
    found = [path for path in configs if folder.name == WEIGHTS.parent.name and path.is_file()]
    return found[0] if found else None


def nnunet_models(path: Path) -> Path:
    """Where folds of nnU-Net lie: in a bundle of its networks in `models`, else in the folder."""
    inside = path / WEIGHTS.parent
    return inside if (inside / _OF_NNUNET).is_file() else path


def read(path: Path) -> weights_file.WeightsFile:
    """A file of weights; of nnU-Net's in a bundle with what its checkpoint had beside them.

    Source: MONAI 1.6.1, `convert_nnunet_to_monai_bundle`: weights in `models/fold_0/model.pt`, all
    else one folder up.

    Raises:
        FileNotFoundError: As `weights_file.read`.
        ValueError: As `weights_file.read`.
    """
    weights = weights_file.read(path)
    rest = path.absolute().parent.with_name(_OF_NNUNET)
    if "init_args" in weights.beside or not rest.is_file():
        return weights
    beside = {**weights_file.beside(rest), "network_weights": weights.state}
    return weights_file.WeightsFile(weights.state, beside)


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
