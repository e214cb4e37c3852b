"""Means over trainings that differ only in their seed, with both kinds of uncertainty.

The standard deviation says how far another training may lie, the interval how far the mean may
move with other patients. Neither contains the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bhsd_jax.platform.errors import UserError

_LEVEL = (2.5, 97.5)  # percentiles: a 95 % interval
_Draws = Float[np.ndarray, " draws"]  # the sample's own value, then those of its resamples


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds. NaN where nothing is defined."""

    mean: float
    sd: float  # over seeds, with n - 1; NaN for a single one
    low: float  # 95 % interval of the mean, by patient
    high: float
    seeds: int  # for which it is defined


def over_seeds(runs: Sequence[_Draws]) -> OverSeeds:
    """Mean over runs of what `summary.resampled` gives for each; one resample for all of them.

    Raises:
        ValueError: If the runs have different numbers of resamples.
    """
    if len({run.shape for run in runs}) > 1:
        raise UserError(
            f"over_seeds: runs have {sorted({len(run) - 1 for run in runs})} resamples; "
            "evaluate all of them alike"
        )
    table = np.array(runs, dtype=float)
    own = table[:, 0][np.isfinite(table[:, 0])] if table.size else np.empty(0)
    if not own.size:
        return OverSeeds(math.nan, math.nan, math.nan, math.nan, 0)
    drawn = np.isfinite(table[:, 1:])
    # A run that counts in a single patient has no resamples; those of the other runs alone would
    # give the interval of another mean.
    whole = drawn.any(1) | ~np.isfinite(table[:, 0])
    means = _nanmean(table[:, 1:]) if whole.all() else np.empty(0)
    means = means[np.isfinite(means)]
    low, high = np.percentile(means, _LEVEL) if means.size else (math.nan, math.nan)
    sd = float(np.std(own, ddof=1)) if own.size > 1 else math.nan
    return OverSeeds(float(own.mean()), sd, float(low), float(high), own.size)


def paired(runs: Sequence[_Draws], others: Sequence[_Draws]) -> OverSeeds:
    """Mean difference `runs - others` over the seeds both have, in the same order."""
    return over_seeds([a - b for a, b in zip(runs, others, strict=True)])


def _nanmean(table: Float[np.ndarray, "runs draws"]) -> Float[np.ndarray, " draws"]:
    defined = np.isfinite(table)
    count = defined.sum(0)
    sums = np.where(defined, table, 0.0).sum(0)
    return np.divide(sums, count, out=np.full(count.shape, math.nan), where=count > 0)
