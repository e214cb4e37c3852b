"""The paper's tables by one command: what `launch/table1`, `table2` and `table3` run."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.experiments import launch
from bhsd_jax.experiments.study import Heading, Study
from bhsd_jax.platform.errors import UserError

NAMES = ("table1", "table2", "table3")


def cli(arguments: Sequence[str]) -> int:
    """Runs the unfinished trials of a table and writes its report; returns the exit code.

    Raises:
        ValueError: If an option or a row is not accepted.
    """
    options = _parser().parse_args(arguments)
    paths = launch.enter_home(options, "root", "out", "shards")
    table = importlib.import_module(f"bhsd_jax.configs.{options.table}").TABLE
    _make_out(options)
    again = [sys.executable, "-m", "bhsd_jax.experiments.paper_tables", *arguments, *paths]
    return launch.launch(make_study(table, options), options, again)


def make_study(table: Any, options: argparse.Namespace) -> Study:
    """The trials of a table, seed by seed, so that every row soon has a first result.

    Raises:
        ValueError: If a row is not one of the table's; lists them.
    """
    chosen = options.rows.split(",") if options.rows else list(table.rows)
    unknown = [row for row in chosen if row not in table.rows]
    if unknown:
        raise UserError(
            f"--rows: no {', '.join(unknown)}; {table.name} has {', '.join(table.rows)}"
        )
    runs = [
        launch.make_run(
            row, seed, _arguments(table, row, seed, options), options.out, options.shards
        )
        for seed in launch.seeds(options.seeds)
        for row in table.rows
        if row in chosen
    ]
    rows = {
        key: Heading(_marked(row), row.paper, row.spread)
        for key, row in table.rows.items()
        if key in chosen
    }
    return Study(
        title=table.title,
        out=options.out,
        rows=rows,
        runs=runs,
        baseline=table.baseline if table.baseline in chosen else "",
        notes=table.notes,
        smoke=options.smoke,
    )


def _marked(row: Any) -> str:
    return row.title + "".join(f" [{number}]" for number in row.marks)


def _arguments(table: Any, row: str, seed: int, options: argparse.Namespace) -> list[str]:
    fixed = {word.partition("=")[0] for word in table.rows[row].words}
    words = [row, f"seed={seed}", f"data={options.data}"]
    for word in ("preset", "recipe"):
        value = getattr(options, word)
        if value and word not in fixed:
            words.append(f"{word}={value}")
    words += ["smoke"] if options.smoke else []
    root = [f"--config.data.root={options.root}"] if options.root else []
    file = f"configs/{table.name}.py:{','.join(words)}"
    return [f"--config={file}", *root, *launch.overrides(options.override)]


def _make_out(options: argparse.Namespace) -> None:
    """By default a folder per table, preset and size, so that none meets another's runs."""
    options.data = options.data or ("synthetic" if options.smoke else "bhsd")
    if options.out is None:
        parts = [options.table, options.preset, options.recipe]
        parts += [options.data] if options.data != "bhsd" and not options.smoke else []
        parts += ["smoke"] if options.smoke else []
        options.out = Path("runs") / "-".join(filter(None, parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/table*", description=__doc__, allow_abbrev=False)
    parser.add_argument("table", choices=NAMES)
    parser.add_argument("--rows", help="of the table, separated by commas; default all")
    parser.add_argument("--preset", help="ssl4mis or recommended, where a row leaves it open")
    parser.add_argument("--recipe", help="of the backbones, where a row leaves it open")
    parser.add_argument("--data", help="default bhsd, with --smoke synthetic")
    parser.add_argument("--root", help="where the data set lies as downloaded")
    parser.add_argument("--smoke", action="store_true", help="the whole table in minutes")
    launch.add_options(parser)
    return parser


if __name__ == "__main__":
    launch.main(cli)
