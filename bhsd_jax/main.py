"""Entry point: `python -m bhsd_jax.main [VERB] --config=configs/FILE.py:WORDS --workdir=FOLDER`."""

import importlib
import logging as standard_logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from bhsd_jax.verbs import runtime

VERBS = ("preprocess", "train", "predict", "evaluate", "report")  # in the order of the pipeline

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<config.name>.")


def main(argv: Sequence[str]) -> None:
    """Runs one verb; `train` if none is given.

    Raises:
        app.UsageError: If the verb is not known.
    """
    verb = argv[1] if len(argv) > 1 else "train"
    if len(argv) > 2 or verb not in VERBS:
        raise app.UsageError(f"expected one verb of {', '.join(VERBS)}; got {' '.join(argv[1:])}")
    _set_up_logging()
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or f"runs/{config.name}")
    standard_logging.getLogger("bhsd_jax").info("%s, run folder %s", verb, workdir)
    if verb in ("train", "predict"):
        runtime.prepare()
    try:
        importlib.import_module(f"bhsd_jax.verbs.{verb}").run(config, workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        logging.debug("%s", error, exc_info=True)
        sys.exit(f"{verb}: {error}")


def _set_up_logging() -> None:
    """Our own progress, other libraries' warnings."""
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("bhsd_jax").setLevel(standard_logging.INFO)


def cli() -> None:
    """The console script `bhsd`."""
    flags.mark_flag_as_required("config")
    app.run(main)


if __name__ == "__main__":
    cli()
