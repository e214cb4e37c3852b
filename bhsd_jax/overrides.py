"""The flag `--config`, and the fields of a config that other flags set."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from bhsd_jax.build import arguments

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
    """Lets the config have the given fields, by path, that are arguments of what it names."""
    for path in given:
        group, _, argument = path.partition(".")
        if group in PACKAGES and argument and argument not in config[group]:
            name = given.get(f"{group}.name", config[group]["name"])
            sources = _OPTIMIZER if group == "optimizer" else (name,)
            if any(argument in arguments(PACKAGES[group], source) for source in sources):
                with config.unlocked():
                    config[group][argument] = FieldReference(None, field_type=object)
