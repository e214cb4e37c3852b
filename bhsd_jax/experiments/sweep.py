"""One config under several settings: what `launch/sweep` runs."""

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bhsd_jax import command_line
from bhsd_jax.experiments import launch
from bhsd_jax.experiments.queue import Trial
from bhsd_jax.experiments.study import Heading, Study
from bhsd_jax.platform.errors import UserError

# Name of a row: its fields, `field=value`, and words of the config after a colon, `:word=value`.
Settings = Mapping[str, tuple[str, ...]]


def cli(arguments: Sequence[str]) -> int:
    """Runs the unfinished trials of a sweep and writes its report; returns the exit code.

    Raises:
        ValueError: If an option or a setting is not accepted.
    """
    arguments = launch.find_configs(arguments)
    options = _parser().parse_args(arguments)
    paths = launch.enter_home(options, "out", "shards", "list")
    again = [sys.executable, "-m", "bhsd_jax.experiments.sweep", *arguments, *paths]
    return launch.launch(make_study(options), options, again)


def make_study(options: argparse.Namespace) -> Study:
    """The trials of a sweep; all settings are compared with the first.

    Raises:
        ValueError: If there is no setting, one has no value, or two have the same name.
    """
    if options.list and options.fields:
        raise UserError("sweep: give fields or --list, not both")
    settings = read_list(Path(options.list)) if options.list else grid(options.fields)
    if options.out is None:
        options.out = Path("runs") / f"sweep-{Path(options.config.partition(':')[0]).stem}"
    shared = launch.overrides(options.override)
    runs = []
    for seed in launch.seeds(options.seeds):
        for row, changes in settings.items():
            words = [change[1:] for change in changes if change.startswith(":")]
            fields = [change for change in changes if not change.startswith(":")]
            config = _with_words(options.config, words)
            own = (config, *shared, *launch.overrides(fields), f"--config.seed={seed}")
            runs.append(launch.make_run(row, seed, own, options.out, options.shards))
    _require_same_scans(runs)
    rows = {row: Heading(_title(row, fields)) for row, fields in settings.items()}
    smoke = "smoke" in options.config.partition(":")[2].split(",")
    return Study(
        title=f"Sweep of {options.config}",
        out=options.out,
        rows=rows,
        runs=runs,
        baseline=next(iter(rows)) if len(rows) > 1 else "",
        smoke=smoke,
    )


def _require_same_scans(runs: Sequence[Trial]) -> None:
    """Refuses settings that are scored on other scans or classes, before they are trained.

    Raises:
        ValueError: Says in what they differ; of folds, what compares them.
    """
    configs = [run.config for run in runs]
    scored = [config.evaluate.split or config.predict.split for config in configs]
    differs = {
        "data.name": {str(config.data["name"]) for config in configs},
        "split.binary": {str(config.split.binary) for config in configs},
        "evaluate.split": set(scored),
    }
    for field, values in differs.items():
        if len(values) > 1:
            raise UserError(
                f"sweep: settings with {field} {' and '.join(sorted(values))} are scored on other "
                "scans or classes, so that no table compares them; give each a sweep of its own"
            )
    pairs = zip(configs, scored, strict=True)
    validated = {config.split.fold for config, split in pairs if split == "val"}
    if len(validated) > 1:
        raise UserError(
            f"sweep: settings of folds {', '.join(map(str, sorted(validated)))} are each scored on "
            "validation scans of their own, so that no table compares them; launch/folds runs a "
            "config on all folds"
        )


def _with_words(config: str, words: Sequence[str]) -> str:
    """The flag of a config with more words, of which the later count."""
    file, _, given = config.partition(":")
    every = ",".join(filter(None, [given, *words]))
    return f"--config={file}:{every}" if every else f"--config={file}"


def grid(fields: Sequence[str]) -> Settings:
    """All combinations of `field=a,b,c`; commas inside brackets do not separate.

    `:recipe=nnunet,fast` varies a word of the config instead.

    Raises:
        ValueError: If a field has no value, or there is none.
    """
    axes = []
    for text in fields:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise UserError(f"sweep: needs FIELD=A,B,C, like train.steps=100,200; got {text!r}")
        axes.append([f"{name}={value}" for value in _split(values)])
    if not axes:
        raise UserError("sweep: nothing to vary; give FIELD=A,B,C or --list=FILE")
    return _named([(None, fields) for fields in itertools.product(*axes)])


def read_list(path: Path) -> Settings:
    """Lines of a name and `field=value` words, or only such words; `#` begins a comment.

    Raises:
        ValueError: If the file has no setting, or names one twice.
        FileNotFoundError: If there is no file.
    """
    found = []
    for line in path.read_text().splitlines():
        words = shlex.split(line, comments=True)
        words = [command_line.at_home(word).removeprefix("--config.") for word in words]
        if words:
            name = None if "=" in words[0] else words[0]
            found.append((name, tuple(words[name is not None :])))
    if not found:
        raise UserError(f"{path}: no setting in it; a line is NAME FIELD=VALUE ...")
    return _named(found)


def _named(settings: Sequence[tuple[str | None, tuple[str, ...]]]) -> Settings:
    found: dict[str, tuple[str, ...]] = {}
    for given, fields in settings:
        name = given or _short(fields)
        if name in found:
            raise UserError(f"sweep: two settings are called {name}; name them in a --list")
        found[name] = fields
    return found


def _short(fields: Sequence[str]) -> str:
    """A name fit for a folder: `optimizer.lr=0.1` gives `lr=0.1`."""
    pairs = [field.partition("=") for field in fields]
    text = ",".join(f"{name.rpartition('.')[2]}={value}" for name, _, value in pairs)
    return re.sub(r"[^\w.=+,-]+", "_", text).strip("_")


def _split(values: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _title(row: str, fields: Sequence[str]) -> str:
    text = ", ".join(fields)
    return text if row == _short(fields) else f"{row}: {text}" if text else row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="as a verb takes it, such as cps:smoke")
    parser.add_argument(
        "fields",
        nargs="*",
        metavar="FIELD=A,B,C",
        help="all combinations are run; :WORD=A,B,C varies a word of the config",
    )
    parser.add_argument("--list", help="a file instead: a line per setting, NAME FIELD=VALUE ...")
    launch.add_options(parser)
    return parser


if __name__ == "__main__":
    launch.main(cli)
