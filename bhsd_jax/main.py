"""Entry point: `bhsd VERB [RUN] [--config=NAME:WORDS]`, the same as `python -m bhsd_jax.main`."""

import gc
import importlib
import logging as standard_logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from bhsd_jax import __version__, command_line, overrides
from bhsd_jax.assemble import trained
from bhsd_jax.command_line import UsageError
from bhsd_jax.platform import budget, cluster, faults, files, startup
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.train import barrier

_DEFECT = (
    "This is a defect of bhsd_jax and not of your data. Please report it, with all lines above, "
    "the command, config.json of the run, and what `bhsd --version` and `pip list` say."
)
_CONFIG = overrides.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<config.name>.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object (`bhsd info`).")


def main(verb: str) -> None:
    """Runs one verb. What a user can mend is one line, and exit code 1."""
    _set_up_logging()
    try:
        config = Settings.of(_CONFIG.value)  # here it shows if the file could not be read
        workdir = Path(_WORKDIR.value or f"runs/{config.name}")
        if verb in command_line.LATER:
            config = trained.as_trained(config, workdir)
        told = _told(verb, config, workdir)
    except (OSError, ValueError) as error:
        sys.exit(f"{verb}: {_last(error)}")
    if told:
        _print(told)
        return
    standard_logging.getLogger("bhsd_jax").info("%s, run folder %s", verb, workdir)
    try:
        _heed_sigterm(verb)
        if verb in ("train", "predict", "calibrate"):
            startup.prepare()
        files.sweep(workdir)
        _imported(verb).run(config, workdir)
        # Process 0 may still write tables or a page; JAX's shutdown would wait for a minute alone.
        barrier.wait_for_all("end")
    except KeyboardInterrupt:
        _end(f"{verb}: interrupted", 130)  # as a shell says it
    except Exception as error:
        reason = _reason(error, workdir)
        logging.debug("%s", error, exc_info=True)
        _end(f"{verb}: {reason}" if reason else f"{traceback.format_exc()}{_DEFECT}", 1)


def _heed_sigterm(verb: str) -> None:
    """What SIGTERM does, which ends a process by itself unless it is the first of a container."""
    if verb == "train":  # until the training itself heeds it there is nothing to save
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(cluster.TRY_AGAIN))
    elif os.getpid() == 1:
        code = 128 + signal.SIGTERM  # as a shell says it
        signal.signal(signal.SIGTERM, lambda *_: _end(f"{verb}: ended by SIGTERM", code))


def _imported(verb: str) -> Any:
    """Its module. What is imported stays, and is never searched for garbage.

    That search is a sixth of the time in which JAX traces a train step.
    """
    gc.disable()
    module = importlib.import_module(f"bhsd_jax.verbs.{verb}")
    gc.freeze()
    gc.enable()
    return module


def _told(verb: str, config: Settings, workdir: Path) -> str:
    """What a verb prints that does nothing else; empty for the others."""
    if verb == "config":
        return "".join(f"{line}\n" for line in command_line.config_lines(config))
    if verb == "info":
        info: Any = importlib.import_module("bhsd_jax.verbs.info")
        return info.text(config, workdir, as_json=_JSON.value)
    return ""


def _print(text: str) -> None:
    """Writes to standard output, whose reader may be gone, as after `bhsd config | head`."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    if not isinstance(error, UserError | OSError | FloatingPointError):
        return budget.explain_exhausted(error)
    if isinstance(error, OSError) and error.errno is not None:
        return faults.explain(error, workdir)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | UserError):
        return None
    return str(error)


def _parse_flags(argv: Sequence[str]) -> Any:
    """Parses flags as absl does; what is refused of a config becomes a `UsageError` of one line."""
    file = argv[1].removeprefix("--config=").partition(":")[0]
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:
        if error.name == "get_config":
            text = (
                f"{file}: no function get_config(arg), which returns a config; begin with that of"
            )
            raise UsageError(f"{text} bhsd_jax.configs.common") from None
        # absl has put the text through `repr`.
        words = str(error.args[0]).replace("\\n", "\n").replace("\\'", "'")
        field, _, hint = words.strip("'\"").partition("\n")
        reason = f"no field {field.strip(chr(39))} in this config, see `bhsd config`. {hint}"
        reason = f"{_place(file, error)}{reason}"
    except flags.IllegalFlagValueError as error:
        reason = _of_type(re.sub(r"^flag --config=.*?: (?=no field )", "", _last(error)))
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        reason = _last(error)
    except SyntaxError as error:
        reason = f"{error.filename}, line {error.lineno}: {error.msg}"
    except Exception as error:  # whatever a file of one's own may raise
        reason = f"{_place(file, error)}{type(error).__name__}: {error}"
    raise UsageError(reason.strip())


def _place(file: str, error: Exception) -> str:
    """The line of a config file that raised an error, before a message; "" if it is none of it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [one.lineno for one in frames if Path(one.filename) == Path(file).absolute()]
    lines = lines or [one.lineno for one in frames if one.filename == file]
    return f"{file}, line {lines[-1]}: " if lines else ""


def _of_type(reason: str) -> str:
    """What absl says of a value that it cannot read, with the field's type in words."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", reason)
    kind = match and command_line.kind_of(match[1])
    return f"--{match[1]}={match[2]}: must be {kind}" if match and kind else reason


def _last(error: Exception) -> str:
    """One line of an error: of a traceback in its text the last, which ml_collections adds."""
    # ml_collections wraps what a config file raises: "... failure to load: Traceback ...".
    text = str(error).strip().rpartition("failure to load: ")[2]
    if "Traceback" in text:
        places = re.findall(r'File "(.*?)", line (\d+), in get_config', text)
        text = text.splitlines()[-1].strip()
        told = re.sub(r"^([\w.]*\.UserError|ValueError): ", "", text)
        where = "".join(f"{file}, line {line}: " for file, line in places[-1:])
        text = f"{where}{text}" if told == text else told
    return " ".join(text.split())


def _set_up_logging() -> None:
    """Our own progress, other libraries' warnings."""
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("bhsd_jax").setLevel(standard_logging.INFO)


def cli() -> None:
    """The console script `bhsd`."""
    try:
        command = command_line.parse(sys.argv[1:], __version__)
        if command.text:
            _print(command.text)
            return
        sys.argv[1:] = command.flags  # where ml_collections looks for overrides
        _parse_flags(sys.argv)
    except UsageError as error:
        sys.stderr.write(f"bhsd: {error}\n")
        sys.exit(2)
    app.run(lambda _: main(command.verb), argv=[sys.argv[0]], flags_parser=lambda argv: argv)


if __name__ == "__main__":
    cli()
