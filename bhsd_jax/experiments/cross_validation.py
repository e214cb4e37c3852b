"""Every training case predicted by the fold that did not see it: scores, and what raises them."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from bhsd_jax.ct import probabilities, scan
from bhsd_jax.experiments.queue import Trial
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import overlap, postprocessing
from bhsd_jax.metrics.postprocessing import Rule, Tally
from bhsd_jax.platform.errors import UserError
from bhsd_jax.platform.workers import Pool
from bhsd_jax.verbs import evaluate
from bhsd_jax.verbs.scoring import ANY, Comparison


@dataclass(frozen=True)
class Case:
    """A scan with its mask, and where what was predicted for it lies."""

    comparison: Comparison
    probabilities: tuple[Path, ...] = ()  # to be averaged; none: the comparison's label map


@dataclass(frozen=True)
class Candidate:
    """One config, or two of which the probabilities are averaged."""

    name: str
    runs: tuple[Trial, ...]  # of all folds
    cases: tuple[Case, ...]  # of all folds, each once

    @property
    def classes(self) -> tuple[str, ...]:
        """Background first; what is scored, so that a binary run has two."""
        first = self.cases[0].comparison
        return (first.classes[0], ANY) if first.binary else first.meaning.names


def candidate(name: str, runs: Sequence[Trial]) -> Candidate:
    """The config whose folds these finished runs are.

    Raises:
        UserError: If two of them predicted one case.
    """
    cases = [Case(one) for run in runs for one in evaluate.comparisons(run.config, run.workdir)]
    names = [case.comparison.case for case in cases]
    twice = sorted({case for case in names if names.count(case) > 1})
    if twice:
        raise UserError(f"{name}: predicted by two folds: {', '.join(twice[:4])}")
    return Candidate(name, tuple(runs), tuple(cases))


def pairs(single: Sequence[Candidate]) -> list[Candidate]:
    """Every two candidates as one, by the mean of their probabilities.

    Raises:
        UserError: If they were not validated on the same cases, or did not write probabilities.
    """
    return [_together(a, b) for a, b in itertools.combinations(single, 2)]


def tally(candidate: Candidate, workers: Pool, rules: tuple[Rule, ...]) -> Tally:
    """Voxel counts of every case and class once the rules of postprocessing were applied."""
    counts = dict(workers.each(partial(_count, rules=rules), candidate.cases))
    return np.stack([counts[case] for case in candidate.cases])


def _together(a: Candidate, b: Candidate) -> Candidate:
    mine, theirs = ({case.comparison.case: case for case in one.cases} for one in (a, b))
    odd = sorted(mine.keys() ^ theirs.keys())
    if odd:
        raise UserError(
            f"{a.name} and {b.name} were not validated on the same cases ({odd[0]}); give all "
            "configs the same data and folds, or set --no-ensembles"
        )
    cases = [_average(mine[name], theirs[name]) for name in mine]
    return Candidate(f"{a.name} + {b.name}", (*a.runs, *b.runs), tuple(cases))


def _average(a: Case, b: Case) -> Case:
    paths = tuple(probabilities.beside(case.comparison.predicted) for case in (a, b))
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path}: not there; predict with --override predict.probabilities=True, or set "
                "--no-ensembles"
            )
    return Case(a.comparison, paths)


def _count(case: Case, rules: tuple[Rule, ...]) -> Int[np.ndarray, "classes 3"]:
    """True positives, false positives and false negatives of every class."""
    one = case.comparison
    place = scan.native(one.image or scan.files(one.reference)[0])
    image, _ = scan.read(place)
    labels = one.meaning
    reference = scan.read_label(one.reference, place, image, num_classes=labels.values)[0].voxels
    if case.probabilities:
        predicted = _likeliest(case.probabilities, labels)
    else:
        found, _ = scan.read_label(one.predicted, place, image, num_classes=labels.values)
        predicted = found.voxels
    if one.binary:
        reference, predicted = np.minimum(reference, 1), np.minimum(predicted, 1)
        labels = Labels((labels.classes[0], ANY))
    predicted = postprocessing.apply(predicted, tuple(map(labels.values_of, rules)))
    if labels.plain:
        counts = overlap.count(reference, predicted, len(labels.classes))
        return np.array([(each.tp, each.fp, each.fn) for each in counts])
    targets = overlap.count_targets(reference, predicted, labels)
    return np.array([(0, 0, 0), *((each.tp, each.fp, each.fn) for each in targets)])


def _likeliest(paths: Sequence[Path], labels: Labels) -> np.ndarray:
    """The class of the highest mean probability, the first of equals; or the regions above half."""
    total = 0.0
    for path in paths:
        total = total + probabilities.load(path).values.astype(np.float32)
    mean = np.asarray(total)
    if labels.regions:
        label = labels.assemble(one > len(paths) / 2 for one in mean)
    else:
        label = np.argmax(mean, axis=0).astype(np.uint8)
    return label.transpose(2, 1, 0)  # files hold i, j, k


def in_no_mask(counts: Tally, classes: Sequence[str]) -> set[str]:
    """Foreground classes of which no case's reference has a voxel."""
    absent = (counts[:, 1:, 0] + counts[:, 1:, 2] == 0).all(0)
    return {name for name, gone in zip(classes[1:], absent, strict=True) if gone}


def mean_dice(
    counts: Tally, classes: Sequence[str], left_out: Collection[str] = ()
) -> Mapping[str, float]:
    """By foreground class and as "mean", by nnU-Net's convention; NaN where it is not defined.

    The mean is over all classes but `left_out`: one in no mask has a Dice of 0 for whoever draws a
    voxel of it, and none for whoever draws none, so that no mean over it compares configs.
    """
    each = dict(zip(classes[1:], map(float, postprocessing.mean_dice(counts)), strict=True))
    counted = [dice for name, dice in each.items() if name not in left_out]
    return each | {"mean": float(np.mean(counted)) if counted else math.nan}
