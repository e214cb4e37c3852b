"""Numbers of a comparison as text: Dice in percent, differences in points, durations.

A number that rounds to 0 has no minus sign.
"""

import math

from bhsd_jax.metrics.seeds import OverSeeds

NONE = "\N{EM DASH}"  # there is no such number


def points(value: float, digits: int = 2) -> str:
    """A share as text in percent."""
    return NONE if math.isnan(value) else f"{100 * value:z.{digits}f}"


def signed(value: float) -> str:
    """A difference of shares as text in percentage points, with its sign."""
    return NONE if math.isnan(value) else f"{100 * value:+z.2f}"


def printed(value: float | None, spread: float | None = None) -> str:
    """A percentage as the paper has it."""
    if value is None:
        return NONE
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


def with_sd(value: OverSeeds) -> str:
    """Mean and standard deviation over seeds, if there is more than one."""
    mean = points(value.mean)
    return mean if math.isnan(value.sd) else f"{mean} ± {points(value.sd)}"


def interval(value: OverSeeds, *, sign: bool = False) -> str:
    """The 95 % interval by patient."""
    if math.isnan(value.low):
        return NONE
    low, high = (f"{100 * x:{'+' if sign else ''}z.1f}" for x in (value.low, value.high))
    return f"{low} to {high}"


def scaled(value: float | None, unit: float) -> str:
    """A value divided by `unit` as text: three digits, or all before the point above 1000."""
    if value is None:
        return NONE
    return f"{value / unit:.3g}" if value < 1000 * unit else f"{value / unit:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as text in seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
