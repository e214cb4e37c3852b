"""The summary of `evaluate` as lines of text."""

import math
from collections.abc import Mapping
from typing import Any

from bhsd_jax.metrics import also
from bhsd_jax.verbs.scoring import ANY

HEADLINE = "nnunet"  # convention


def table(found: Mapping[str, Any]) -> list[str]:
    """The summary as lines of text; a class no case has is said to be so, in words."""
    lines = [
        f"{found['n_cases']} cases, Dice by the convention {HEADLINE!r} "
        f"[95 % interval, {found['bootstrap']} resamples of "
        f"{found.get('scored', {}).get('resampled', 'patients')}]; others beside it",
        f"{'class':<14}{'Dice':>7}  {'interval':<16}{'present':>9}{'pooled':>9}{'empty=1':>9}"
        f"{'n':>5}{'in ref':>8}{'false':>7}{'HD95 mm':>9}{'NSD':>7}",
    ]
    for name in (*found["classes"], "mean"):
        lines.append(_line(name, found["conventions"], found["metrics"].get(name)))
    if len(found["classes"]) > 1:
        merged = found["binary"]
        lines.append(_line(ANY, merged["conventions"], merged["metrics"]))
    lines += also.lines(found.get("also", {}))
    if "baseline" in found:
        low, high = found["baseline"]["band_hu"]
        lines.append(
            f"best plain threshold, {low:.0f} to {high:.0f} HU, chosen on these very cases: "
            f"Dice {_number(found['baseline']['dice'])} (all classes merged)"
        )
    return lines


def _line(name: str, conventions: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    head = conventions[HEADLINE][name]
    if head["n"] == 0:
        return f"{name:<14}not in reference (n=0)"
    interval = f"[{_number(head['low'])}, {_number(head['high'])}]"
    others = "".join(
        f"{_number(conventions[key][name]['dice']):>9}"
        for key in ("present", "pooled", "both-empty=1")
    )
    text = f"{name:<14}{_number(head['dice']):>7}  {interval:<16}{others}{head['n']:>5}"
    if metrics is None:  # of the mean over classes: their counts do not add up to one of cases
        return text
    return (
        f"{text}{head['n_present']:>8}{head['n_false_positive']:>7}"
        f"{_number(metrics['hd95_mm_median'], 1):>9}{_number(metrics['nsd_mean']):>7}"
    )


def _number(value: float, digits: int = 3) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"
