"""`splits_final.json`, in which nnU-Net keeps its folds: those of a user in place of our own.

It is read beside the data set, checked against its training cases, and kept with the shards, which
are all that training needs.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.datasets.splits import FOLDS, kfold
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, some
from bhsd_jax.volume import Case

logger = logging.getLogger(__name__)

NAME = "splits_final.json"
Folds = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
"""Training and validation cases by fold, each sorted."""

_SHAPE = 'a list with one {"train": [case, ...], "val": [case, ...]} per fold'


def beside(dataset: Any, cases: Iterable[Case], plan: str | Path = "") -> Folds:
    """The folds a user has given for a data set that says where they lie; () if there are none.

    Such a data set has `splits_file`, a path, or else `folds`. Without any they are those beside
    nnU-Net's plan of the data set, where nnU-Net keeps them. Cases that it was told to ignore are
    in no fold.

    Args:
        dataset: Whose folds they are.
        cases: Its cases.
        plan: The plans.json of nnU-Net that takes the place of our own; "": none.

    Raises:
        ValueError: If the file is no list of folds, or names what is no training case.
    """
    path = getattr(dataset, "splits_file", None)
    ignored: set[str] = set(getattr(dataset, "ignore", ()))
    known = {case.id for case in cases if case.split == "train"} | ignored
    if path is not None and Path(path).is_file():
        folds = load(path)
        _require_known(path, folds, known)
    elif folds := getattr(dataset, "folds", ()):
        return folds
    else:
        folds = _of_plan(Path(plan).with_name(NAME), known) if plan else ()
    return tuple((_without(train, ignored), _without(val, ignored)) for train, val in folds)


def _of_plan(path: Path, known: Collection[str]) -> Folds:
    """Those of a data set of nnU-Net's, or () if it is another one, from which the plan comes."""
    folds = load(path)
    if unknown := sorted({case for fold in folds for part in fold for case in part} - set(known)):
        logger.warning("%s: is of another data set (%s); not read", path, some(unknown))
        return ()
    if folds:
        logger.info("the folds are those of %s", path)
    return folds


def unread(path: Path) -> list[Finding]:
    """Whether the folds of nnU-Net v1 lie where those of v2 would, which are read."""
    old = path.with_suffix(".pkl")
    if path.is_file() or not old.is_file():
        return []
    text = (
        f"{old}: is not read, and folds are drawn as nnU-Net draws them; write its list to {NAME}, "
        "names in place of arrays"
    )
    return [Finding(Kind.FOLDS_UNREAD, "kept", text)]


def load(path: str | Path) -> Folds:
    """Reads and checks the file by itself; () if it is not there.

    Raises:
        ValueError: If it is no list of folds, or a fold names a case twice; says which.

    Source: nnU-Net v2.8.1, `nnUNetTrainer.do_split`.
    """
    path = Path(path)
    if not path.is_file():
        return ()
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); expected {_SHAPE}") from error
    if not isinstance(found, list) or not found:
        raise UserError(f"{path}: expected {_SHAPE}; got {_shown(found)}")
    return tuple(_fold(path, index, entry) for index, entry in enumerate(found))


def keep(folder: Path, folds: Folds) -> None:
    """Writes the folds to a folder of shards; without any, no older ones stay there.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    if folds:
        rows = [{"train": list(train), "val": list(val)} for train, val in folds]
        files.write_json(folder / NAME, rows)
    else:
        (folder / NAME).unlink(missing_ok=True)


def offer(folder: Path, dataset: Any, folds: Folds, patients: Mapping[str, str]) -> None:
    """Writes the folds in use to a run folder, as nnU-Net takes them beside its preprocessed data.

    A user's own, or the five of `patients`, the training cases with a mask and whose they are. Only
    for a data set in nnU-Net's layout: names of others may say who was scanned.

    Raises:
        faults.WriteError: If the system says no, such as on a full disk.
    """
    if hasattr(dataset, "splits_file"):
        enough = len(patients) >= FOLDS
        keep(folder, folds or (tuple(kfold(patients, patients=patients)) if enough else ()))


def _fold(path: Path, index: int, entry: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    place = f"{path}: fold {index}"
    if not isinstance(entry, Mapping) or not {"train", "val"} <= entry.keys():
        raise UserError(f"{place}: expected {_SHAPE}; got {_shown(entry)}")
    parts = []
    for part in ("train", "val"):
        names = entry[part]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{place}: {part!r} is a list of case names; got {_shown(names)}")
        parts.append(names)
    train, val = parts
    if twice := sorted(name for name, count in Counter(train + val).items() if count > 1):
        raise UserError(f"{place}: names {some(twice)} twice; a case trains or validates")
    if not train:
        raise UserError(f"{place}: 'train' is empty; name the cases to train on")
    return tuple(sorted(train)), tuple(sorted(val))


def _require_known(path: str | Path, folds: Folds, known: Collection[str]) -> None:
    for index, (train, val) in enumerate(folds):
        if unknown := sorted({*train, *val} - set(known)):
            raise UserError(
                f"{path}: fold {index} names {some(unknown)}, no training case of the data set; "
                "cases are called as their masks, without ending"
            )


def _without(names: Sequence[str], ignored: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in ignored)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
