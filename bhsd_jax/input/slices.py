"""What is known of the slices of an unlabeled scan, as a table that patches are cut from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import SOME, Shape


@dataclass(frozen=True)
class Slices:
    """How slice labels become targets."""

    classes: int  # foreground classes of the data
    binary: bool = False  # all of them become one
    # Slices next to one that shows a class are not trusted to lack it: readers disagree most about
    # the ends of a bleed.
    margin: int = 1

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"slice_loss.margin is a number of slices; got {self.margin}")

    @property
    def columns(self) -> int:
        """Foreground classes of the targets."""
        return 1 if self.binary else self.classes

    def table(
        self, labels: Sequence[Sequence[int]] | None, bleeding: bool | None, depth: int
    ) -> Int[np.ndarray, "D K"]:
        """Per slice and class 1 if it shows it, 0 if not, -1 if not known.

        A scan without bleeding lacks every class in every slice. That a scan bleeds says nothing
        of a single slice.
        """
        if bleeding is False:
            return np.zeros((depth, self.columns), np.int8)
        if labels is None:
            return np.full((depth, self.columns), -1, np.int8)
        table = np.asarray(labels, np.int8).reshape(depth, self.classes)
        if self.binary:
            absent, shown = (table == 0).all(1, keepdims=True), (table > 0).any(1, keepdims=True)
            table = np.where(shown, 1, np.where(absent, 0, -1)).astype(np.int8)
        near = np.zeros(table.shape, bool)
        for k in range(1, self.margin + 1):
            near[k:] |= table[:-k] > 0
            near[:-k] |= table[k:] > 0
        # `SOME`: the slice shows one of several classes, so that each of them is unknown.
        table = np.where(table == SOME, -1, table)
        return np.where((table == 0) & near, -1, table).astype(np.int8)

    def rows(
        self,
        labels: Sequence[Sequence[int]] | None,
        bleeding: bool | None,
        shape: Shape,
        corner: Shape,
        cut: Shape,
    ) -> Int[np.ndarray, "D K"]:
        """The slices of a cut at `corner`; beyond the scan is air, which lacks every class."""
        table = self.table(labels, bleeding, shape[0])
        index = np.arange(corner[0], corner[0] + cut[0])
        inside = (index >= 0) & (index < shape[0])
        rows = np.zeros((cut[0], self.columns), np.int8)
        rows[inside] = table[index[inside]]
        return rows
