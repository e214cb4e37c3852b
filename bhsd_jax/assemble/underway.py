"""A scan on its way from file to label map: what one step of prediction hands to the next."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from bhsd_jax.ct.own_slices import OwnSlices
from bhsd_jax.volume import Case, Grid, Volume


@dataclass(frozen=True, eq=False)
class Ready:
    """A scan that was read and prepared, for the networks."""

    case: Case
    name: str  # in tables and log
    seen: Volume  # its first channel, as `scan.read` gives it
    own: OwnSlices
    images: tuple[np.ndarray, ...]  # [D H W C]: one for each way in which runs prepare it
    grids: tuple[Grid, ...]  # of the images
    warnings: tuple[str, ...]  # repairs and oddities
    doubts: tuple[str, ...]  # those of them that anyone who uses the scan has to know
    unlike: str  # in what the scan differs from the training data; empty: in nothing that is known
    seconds: float  # that its steps have taken so far; see `Stopwatch`


@dataclass(frozen=True, eq=False)
class Answer:
    """What the networks say of a scan: logits, or the likeliest class where that is enough."""

    scan: Ready  # its images are gone: ()
    logits: tuple[Float[np.ndarray, "K _ _ _"], ...]  # on each of its grids, of different shapes
    likeliest: UInt8[np.ndarray, "D H W"] | None  # on the first of its grids
    disagreement: float | None  # of the networks; None: not asked for


class Stopwatch:
    """Seconds that are spent on one scan, not those in which it waits for others."""

    def __init__(self) -> None:
        self._begun, self._left_out = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Since it was made, less what was left out."""
        return time.monotonic() - self._begun - self._left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out what happens meanwhile."""
        begun = time.monotonic()
        yield
        self._left_out += time.monotonic() - begun

    def add(self, seconds: float) -> None:
        """Counts what another watch has measured."""
        self._left_out -= seconds
