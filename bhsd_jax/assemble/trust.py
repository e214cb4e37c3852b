"""What a reader should know before a label map is trusted: disagreement, and unlike scans."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bhsd_jax.assemble import data
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import geometry, unlike
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.metrics.overlap import mean_pairwise_dice
from bhsd_jax.types import Params
from bhsd_jax.volume import Grid, Plan


@dataclass(frozen=True)
class View:
    """One network as it answers alone, without mirrored versions."""

    window: SlidingWindow
    network: Params
    fill: float | tuple[float, ...]


@dataclass(frozen=True)
class Trust:
    """Measures of one run's answers."""

    plan: Plan
    seen: unlike.Seen | None
    views: tuple[View, ...] = ()  # none: disagreement is not wanted

    def unlike(self, image: np.ndarray, grid: Grid, stored: np.ndarray) -> str:
        """In what a prepared scan [D H W C] differs from the training data; empty: nothing known.

        `stored` are its voxels as they were read.
        """
        return "; ".join(unlike.sentences(image, grid, self.plan, self.seen, stored))

    def disagreement(self, image: np.ndarray, grid: Grid) -> float | None:
        """1 less the mean Dice of all bleeding, over pairs of networks; None: it is not wanted.

        0 if all answers to the prepared scan [D H W C] are the same, 1 if they have no voxel in
        common. A single network is compared with its own answer to the left-right mirror image.
        """
        if not self.views:
            return None
        masks = [_mask(view, image) for view in self.views]
        if len(masks) == 1:
            native = geometry.canonical(np.asarray(grid.native_affine))[0][2]
            sides = grid.order.index(native)  # the prepared axis between left and right
            masks.append(np.flip(_mask(self.views[0], np.flip(image, sides)), sides))
        return 1 - mean_pairwise_dice(masks)


def make(
    run: Run,
    networks: Sequence[tuple[SlidingWindow, Sequence[Params], float | tuple[float, ...]]],
) -> Trust:
    """The measures of a run.

    Args:
        run: Whose data set says what was seen.
        networks: Window, networks and fill value of all that answer together; none: disagreement
            is not wanted.
    """
    views: list[View] = []
    for window, members, fill in networks:
        plain = dataclasses.replace(window, mirror=False)  # one, so that it is compiled once
        views += [View(plain, network, fill) for network in members]
    folders = (run.folder, data.shards_folder(run.config, run.folder).parent)
    return Trust(run.plan, unlike.Seen.load(folders), tuple(views))


def _mask(view: View, image: np.ndarray) -> np.ndarray:
    return view.window.labels([view.network], image, fill=view.fill) > 0
