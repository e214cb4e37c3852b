"""From a row of one of the paper's tables to its config; `table1.py` to `table3.py` have the rows.

The argument names a row and changes what the row leaves open, words separated by commas:
`--config=configs/table2.py:cps,seed=1,preset=ssl4mis,data=bhsd`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from bhsd_jax.configs import backbones, common
from bhsd_jax.platform.errors import UserError

# All masks of the training part train and the last checkpoint is tested: nothing is chosen by
# looking at scans the figures come from.
SHARED = {"split.fold": -1, "predict.checkpoint": "last"}
BLEEDING = 500  # unlabeled volumes of the paper known to bleed; it has three times as many without
SMOKE_BLEEDING = 4  # of the synthetic set at smoke size


@dataclass(frozen=True)
class TableRow:
    """One row: an experiment file with words and fields, and what the paper printed for it."""

    title: str
    experiment: str  # a file in configs/
    words: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)  # dotted
    paper: Mapping[str, float] = field(default_factory=dict)  # Dice in percent by class; {}: ours
    spread: float | None = None  # behind the paper's plus-minus, whose meaning it does not give
    marks: tuple[int, ...] = ()  # numbers of the notes that are about this row


@dataclass(frozen=True)
class PaperTable:
    """A table of Wu et al. 2023, arXiv:2308.11298."""

    name: str
    title: str
    rows: Mapping[str, TableRow]
    default: str  # the row of a config that names none
    baseline: str  # row the others are compared with, "" for none
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every row
    notes: tuple[str, ...] = ()  # what a reader of the figures has to know


def get_config(table: PaperTable, arg: str) -> ml_collections.ConfigDict:
    """The config of the row, seed and words in `arg`.

    Without a row it is the default one, of which words may change anything.

    Raises:
        ValueError: If a word is neither a row nor known, two rows are named, or a word changes
            what the row is about; lists the choices. If `recipe=fast` meets rows with an
            optimizer of their own.
    """
    name, seed, words = _read(table, arg)
    row = table.rows[name]
    smoke = "smoke" in words
    asked = [word for word in words if word != "smoke"]
    experiment = importlib.import_module(f"bhsd_jax.configs.{row.experiment}")
    own = [word for word in row.words if _key(word) not in map(_key, asked)]
    config = experiment.get_config(",".join([*own, *asked]))
    config.name = f"{table.name}-{name}"
    config.seed = seed
    fields = {**SHARED, **table.fields, **row.fields}
    _set(config, fields)
    if common.parse_arg(",".join(asked))["recipe"] == "fast":
        _shorten(config, table, fields)
    if smoke:
        _shrink(config)
    _scale(config)
    return config


def _read(table: PaperTable, arg: str) -> tuple[str, int, list[str]]:
    """Row, seed, and the words of `common` in the argument."""
    rows, seed, words = [], 0, []
    for part in filter(None, arg.split(",")):
        word, _, value = part.partition("=")
        if part in table.rows:
            rows.append(part)
        elif word == "seed" and value.isdecimal():
            seed = int(value)
        elif word in common.WORDS:
            words.append(part)
        else:
            known = ", ".join(k if v is False else f"{k}=..." for k, v in common.WORDS.items())
            raise UserError(
                f"{table.name}: {part!r} is not known; rows are {', '.join(table.rows)}; words are "
                f"seed=0, {known}"
            )
    if len(rows) > 1:
        raise UserError(f"{table.name}: one row at a time; got {' and '.join(rows)}")
    name = rows[0] if rows else table.default
    for part in words if rows else []:
        if _key(part) in map(_key, table.rows[name].words):
            raise UserError(
                f"{table.name}: row {name} is about {', '.join(table.rows[name].words)}; {part} "
                "would make it another row"
            )
    return name, seed, words


def _key(word: str) -> str:
    return word.partition("=")[0]


def _set(config: ml_collections.ConfigDict, fields: Mapping[str, Any]) -> None:
    for path, value in fields.items():
        *parts, last = path.split(".")
        part = config
        for name in parts:
            part = part[name]
        part[last]  # raises where the row names a field that is not there
        part[last] = value


def _shorten(
    config: ml_collections.ConfigDict, table: PaperTable, fields: Mapping[str, Any]
) -> None:
    """A length that the table sets itself is halved as the recipe halves any other."""
    if "optimizer.name" in fields:
        raise UserError(
            f"{table.name}: its rows train with {fields['optimizer.name']}; leave out recipe=fast"
        )
    if "train.steps" in fields:
        config.train.steps //= backbones.SHORTER


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Most of a smoke run is compiling and starting processes; this leaves little else."""
    common.smoke(config)
    if config.data.name == "synthetic.Synthetic":
        config.data.update(test=6, bleeding=SMOKE_BLEEDING)
    config.preprocess.processes = 1
    config.augment.spatial = ({"name": "spatial.Mirror", "p": 0.5},)
    config.augment.intensity = ({"name": "intensity.GaussianNoise", "p": 0.1},)
    config.infer.step = 1.0
    config.report.overlays = False


def _scale(config: ml_collections.ConfigDict) -> None:
    """Gives the synthetic set the paper's proportions, and the row its share of them."""
    if config.data.name != "synthetic.Synthetic" or config.split.bleeding is None:
        return
    there = config.data.get("bleeding", 24)
    config.data.update(bleeding=there, nonbleeding=3 * there)
    for kind in ("bleeding", "nonbleeding"):
        config.split[kind] = round(config.split[kind] / BLEEDING * there)
