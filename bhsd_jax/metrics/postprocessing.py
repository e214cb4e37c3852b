"""Removing all but the largest component, where cross-validation shows that it helps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from bhsd_jax.metrics import lesion
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

Rule = tuple[int, ...]  # classes that keep, as one mask, their largest component
Tally = Int[np.ndarray, "cases classes 3"]  # tp, fp, fn; the background comes first

_THEIRS = "remove_all_but_largest_component_from_segmentation"  # the one function nnU-Net has


@dataclass(frozen=True)
class Trial:
    """One rule that was tried, and the mean Dice without and with it."""

    rule: Rule
    before: float  # of the foreground, or of the class if the rule is about one class alone
    after: float
    taken: bool


def keep_largest(label: UInt8[np.ndarray, "_ _ _"], rule: Rule) -> UInt8[np.ndarray, "_ _ _"]:
    """A label map in which all but the largest component of the rule's classes is background.

    Components are of 26-connected voxels. Of several largest ones all stay.

    Source: nnU-Net v2.8.1, `remove_all_but_largest_component_from_segmentation`.
    """
    mask = np.isin(label, rule)
    components, sizes = lesion.components(mask)
    if len(sizes) < 2:
        return label
    removed = np.append(False, sizes < sizes.max())
    return np.where(removed[components], 0, label).astype(label.dtype)


def load(
    path: Path, classes: Sequence[str], values: Sequence[Sequence[int]] | None = None
) -> tuple[Rule, ...]:
    """The rules of a JSON file: of `launch/folds`, or the `postprocessing.json` of nnU-Net.

    The first is like {"keep_largest": [["EDH", "SDH"], ["SAH"]]}; nnU-Net's names values of label
    maps. `values` are those of each of `classes`, which are regions; None: their numbers. Of a
    `postprocessing.pkl` the JSON file is read that nnU-Net writes beside it.

    Source: nnU-Net v2.8.1, `determine_postprocessing`, for its file.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it holds something else, or a class that is not a foreground class.
    """
    if path.suffix == ".pkl":
        path = path.with_suffix(".json")
    stored = files.read_json(path, remedy="choose another predict.postprocessing")
    values = values or [(index,) for index in range(len(classes))]
    try:
        if "postprocessing_kwargs" in stored:
            return _of_nnunet(stored, values)
        named = [tuple(rule) for rule in stored["keep_largest"]]
        return tuple(tuple(classes.index(name, 1) for name in rule) for rule in named)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{path}: wants {{"keep_largest": [[class, ...], ...]}} of the classes '
            f"{', '.join(classes[1:])}; got {stored!s:.300}"
        ) from error


def _of_nnunet(stored: Mapping[str, Any], values: Sequence[Sequence[int]]) -> tuple[Rule, ...]:
    """Rules that name values of label maps, as one value or a list, by our numbers of classes."""
    if set(stored["postprocessing_fns"]) - {_THEIRS}:
        raise ValueError("a function that is not known")
    rules = []
    for arguments in stored["postprocessing_kwargs"]:
        given = arguments["labels_or_regions"]
        wanted = set(given if isinstance(given, list) else [given])
        rule = tuple(i for i, own in enumerate(values) if i and set(own) <= wanted)
        if set().union(*(values[index] for index in rule)) != wanted:
            raise ValueError("values of no class")
        rules.append(rule)
    return tuple(rules)


def to_json(rules: Sequence[Rule], classes: Sequence[str]) -> dict[str, list[list[str]]]:
    """The rules by the names of their classes, as `load` reads them."""
    return {"keep_largest": [[classes[index] for index in rule] for rule in rules]}


def apply(label: UInt8[np.ndarray, "_ _ _"], rules: Sequence[Rule]) -> UInt8[np.ndarray, "_ _ _"]:
    """The rules, one after the other."""
    for rule in rules:
        label = keep_largest(label, rule)
    return label


def decide(tally: Callable[[tuple[Rule, ...]], Tally], classes: int) -> list[Trial]:
    """The rules that were tried, in their order; those taken are to be applied in it.

    First all foreground classes as one mask: taken if the mean foreground Dice rises and that of no
    class falls. Then every class for itself, on top of what was taken before: taken if its own Dice
    rises. Dice is a mean over the cases where it is defined.

    Args:
        tally: Voxel counts of all cases after these rules.
        classes: Their number, the background counted.

    Source: nnU-Net v2.8.1, `determine_postprocessing`.
    """
    foreground = tuple(range(1, classes))
    dice = mean_dice(tally(()))
    trials: list[Trial] = []
    taken: tuple[Rule, ...] = ()
    together = mean_dice(tally((foreground,)))
    # The Dice of a class in no case is NaN, and so is the mean: nothing is taken, as in nnU-Net.
    better = float(np.mean(together)) > float(np.mean(dice)) and not (together < dice).any()
    trials.append(Trial(foreground, float(np.mean(dice)), float(np.mean(together)), better))
    if better:
        taken, dice = (foreground,), together
    for index in foreground if len(foreground) > 1 else ():
        alone = mean_dice(tally((*taken, (index,))))
        better = bool(alone[index - 1] > dice[index - 1])
        before, after = float(dice[index - 1]), float(alone[index - 1])
        trials.append(Trial((index,), before, after, better))
        if better:
            taken, dice = (*taken, (index,)), alone
    return trials


def mean_dice(tally: Tally) -> Float[np.ndarray, " foreground"]:
    """Per foreground class, over the cases where either mask has voxels; NaN if none has."""
    tp, fp, fn = np.moveaxis(tally[:, 1:].astype(np.float64), -1, 0)
    size = 2 * tp + fp + fn
    defined = size > 0
    each = np.where(defined, 2 * tp / np.where(defined, size, 1), 0).sum(0)
    cases = defined.sum(0)
    return np.where(cases > 0, each / np.maximum(cases, 1), np.nan)
