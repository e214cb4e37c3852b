"""Entry point: `python -m bhsd_jax.main [VERB] --config=configs/FILE.py:WORDS --workdir=FOLDER`."""

import importlib
import logging as standard_logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from bhsd_jax.platform import cluster, faults, files, startup
from bhsd_jax.train import barrier

VERBS = ("preprocess", "train", "predict", "evaluate", "report")  # in the order of the pipeline

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<config.name>.")


def main(argv: Sequence[str]) -> None:
    """Runs one verb; `train` if none is given. What a user can mend is one line, and exit code 1.

    Raises:
        app.UsageError: If the verb is not known.
    """
    verb = argv[1] if len(argv) > 1 else "train"
    if len(argv) > 2 or verb not in VERBS:
        raise app.UsageError(f"expected one verb of {', '.join(VERBS)}; got {' '.join(argv[1:])}")
    _set_up_logging()
    config = _CONFIG.value
    try:
        name = config.name  # here it shows if the file could not be read
    except OSError as error:
        sys.exit(f"{verb}: --config: {_last(error)}")
    workdir = Path(_WORKDIR.value or f"runs/{name}")
    standard_logging.getLogger("bhsd_jax").info("%s, run folder %s", verb, workdir)
    try:
        if verb == "train":  # until the training itself heeds it there is nothing to save
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(cluster.TRY_AGAIN))
        if verb in ("train", "predict"):
            startup.prepare()
        files.sweep(workdir)
        importlib.import_module(f"bhsd_jax.verbs.{verb}").run(config, workdir)
    except KeyboardInterrupt:
        _end(f"{verb}: interrupted", 130)  # as a shell says it
    except Exception as error:
        reason = _reason(error, workdir)
        logging.debug("%s", error, exc_info=True)
        _end(f"{verb}: {reason}" if reason else traceback.format_exc(), 1)


def _end(words: str, code: int) -> NoReturn:
    """Ends this process; at once where there are others, which would be waited for.

    They may be in the middle of what needs this one, and notice that it is gone.
    """
    sys.stderr.write(f"{words}\n")
    if barrier.place()[1] > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _reason(error: Exception, workdir: Path) -> str | None:
    """One line of what went wrong; None where only a traceback tells."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return faults.explain(error, workdir)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return None
    return str(error)


def _parse_flags(argv: list[str]) -> Any:
    """As absl does; but a field, a word or a config file that is refused is one line as well."""
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:
        field = str(error).strip("\"'")
        reason = f"--config has no field {field}; configs/common.py lists them all"
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{_last(error)}; --help lists all flags"
    sys.exit(f"{Path(argv[0]).stem}: {reason}")


def _last(error: Exception) -> str:
    """The last line of an error whose text holds a traceback, or tells of an earlier one."""
    text = str(error).strip().rpartition("failure to load: ")[2]
    if "Traceback" in text:
        text = text.splitlines()[-1].strip().removeprefix("ValueError: ")
    return " ".join(text.split())


def _set_up_logging() -> None:
    """Our own progress, other libraries' warnings."""
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("bhsd_jax").setLevel(standard_logging.INFO)


def cli() -> None:
    """The console script `bhsd`."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
    cli()
