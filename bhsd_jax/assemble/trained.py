"""The config of a run that was trained, for the verbs that come after. Needs no JAX."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bhsd_jax import fields
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings, under_todays_names

# Groups that say how a verb works or where things lie, and nothing of what was trained.
_LATER = ("data", "preprocess", "infer", "predict", "evaluate", "report", "mesh", "precision")
_FIXED = (
    *("model", "windows", "input.patch", "input.pad", "objective.name"),
    *("split.binary", "split.fold", "split.seed"),
)


def as_trained(config: Settings, workdir: Path) -> Settings:
    """What the run in `workdir` was trained with, and the rest of `config`; `config` if none was.

    Raises:
        ValueError: If `config` differs from the run's in what cannot differ; names the first field.
    """
    path = workdir / "config.json"
    if not path.is_file():
        return config
    saved = files.read_json(
        path, under_todays_names, remedy="run `train` again with the config of that run"
    )
    given = json.loads(json.dumps(config.to_dict()))
    for field in _FIXED:
        was, now = _get(saved, field), _get(given, field)
        if was != now:
            raise UserError(
                f"config.{field} is {_told(now)}, but {workdir} was trained with {_told(was)}; "
                "leave --config out, or give that run's own config and fields"
            )
    tested, was = (_get(one, "objective.tested") for one in (given, saved))
    if tested not in (None, was):
        raise UserError(
            f"config.objective.tested is {_told(tested)}, which counts in training; of a trained "
            f"run --predict.networks={tested}, says which network predicts"
        )
    later = {name: getattr(config, name) for name in _LATER}
    return dataclasses.replace(Settings.of(fields.complete(saved, given)), **later)


def _get(config: Any, path: str) -> Any:
    """The field, without what is left to the plan: None and nothing are one."""
    for part in path.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    if isinstance(config, dict):
        return {key: value for key, value in config.items() if value is not None}
    return config


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
