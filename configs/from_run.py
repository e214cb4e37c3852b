"""The config a run was trained with: `--config=configs/from_run.py:runs/cps`.

`from_run.py:runs/cps,infer=fast` changes how it predicts, as the word does in other files.
"""

from pathlib import Path

import ml_collections
from ml_collections.config_dict import FieldReference

from bhsd_jax import fields, settings
from bhsd_jax.configs import common
from bhsd_jax.platform import files
from bhsd_jax.training_settings import OF_A_CALL


def get_config(run: str) -> ml_collections.ConfigDict:
    """Reads `<run>/config.json`; fields that an older version did not write have their defaults.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If the file is damaged, or there is no such way to predict; lists the choices.
    """
    folder, _, speed = run.partition(",infer=")
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no config; give the folder of a run that was trained")
    saved = files.read_json(path, remedy="run `train` again with the config of that run")
    filled = fields.complete(settings.under_todays_names(saved), common.get_config().to_dict())
    filled["mesh"] = filled["mesh"] | OF_A_CALL  # which older versions kept
    config = ml_collections.ConfigDict(_restore(filled))
    if speed:
        config.infer.update(common.inference(speed))
    return config


def _restore(value):
    """JSON lists back to tuples; they, and what is None, are open to any override."""
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return FieldReference(files.tuples(value), field_type=object)
    return FieldReference(None, field_type=object) if value is None else value
