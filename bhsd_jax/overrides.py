"""The flag `--config`, and the fields of a config that other flags set."""

import difflib
import importlib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from bhsd_jax.build import arguments
from bhsd_jax.platform.errors import UserError

PACKAGES = {  # of groups whose fields are those of what they name: where that is
    "data": "bhsd_jax.datasets",
    "model": "bhsd_jax.models",
    "objective": "bhsd_jax.objectives",
    "optimizer": "bhsd_jax.train",
}
_OPTIMIZER = ("optimizer.make_schedule", "optimizer.make_optimizer")  # what the group is given to


def define_config(
    flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None
) -> flags.FlagHolder:
    """The flag `--config`, and its overrides in `argv`; None: in those of the program.

    An override may also name an argument that a class has and the config leaves at its default.
    """
    defined = config_flags.DEFINE_config_file(
        "config", help_string="Experiment file.", flag_values=flag_values, sys_argv=argv
    )
    flag_values["config"].parser = _ConfigFile(argv)
    return defined


class _ConfigFile(config_flags.config_flags.ConfigFileFlagParser):
    """Makes room in a config for arguments that its file does not set."""

    def __init__(self, argv: Sequence[str] | None):
        super().__init__("config")
        self.argv = argv

    def parse(self, path: str) -> Any:
        config = super().parse(path)
        if isinstance(config, ConfigDict):  # and not what a file that cannot be read leaves
            words = [word.lstrip("-") for word in self.argv or sys.argv]
            pairs = (word.partition("=") for word in words if word.startswith("config."))
            _open_arguments(config, {path.partition(".")[2]: value for path, _, value in pairs})
        return config


def _open_arguments(config: Any, given: Mapping[str, str]) -> None:
    """Lets the config have the given fields, by path, that are arguments of what it names.

    Raises:
        UserError: If one is none of them; names the nearest, or all.
    """
    for path in given:
        group, *words = re.split(r"[.\[]", path)
        argument = words[0] if words else ""  # what lies within one is the config's own
        if group in PACKAGES and argument and argument not in config[group]:
            name = given.get(f"{group}.name", config[group]["name"])
            known = (
                optimizer_arguments() if group == "optimizer" else arguments(PACKAGES[group], name)
            )
            if argument not in known:
                raise UserError(_unknown(path, name, {*known, *config[group]} - {"name"}))
            with config.unlocked():
                config[group][argument] = FieldReference(None, field_type=object)


def optimizer_arguments() -> set[str]:
    """Fields that `config.optimizer` may have."""
    found = set().union(*(arguments(PACKAGES["optimizer"], source) for source in _OPTIMIZER))
    return found - {"steps", "parts"}  # which are not of a config


def paths_in_classes() -> list[str]:
    """Paths of fields that no `Settings` describe: of optimizers, and of the words `data=`."""
    common: Any = importlib.import_module("bhsd_jax.configs.common")
    of_data = {name for spec in common.DATA.values() for name in spec} - {"name"}
    paths = [f"optimizer.{name}" for name in optimizer_arguments() - {"name"}]
    return sorted([*paths, *(f"data.{name}" for name in of_data)])


def _unknown(path: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(path.partition(".")[2], known, n=1)
    if near:
        return f'no field {path} in this config, see `bhsd config`. Did you mean "{near[0]}"?'
    return f"no field {path} in this config; {name} takes {', '.join(sorted(known))}"
