"""Validation in the loop: whole volumes by sliding window, Dice per class on the prepared grid."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from scipy.special import softmax

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.recipe import Recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import overlap
from bhsd_jax.platform import allocator
from bhsd_jax.shards.store import Shards
from bhsd_jax.train.log import Log
from bhsd_jax.types import Metrics, Params, TrainState

logger = logging.getLogger(__name__)


class _AskedToStop(Exception):  # noqa: N818  (a request, not an error)
    """The run is to stop while a scan is in the networks."""


@dataclass
class Validation:
    """Scores every network the objective could deploy; the first gives the headline.

    Twins are also scored together, as "ensemble": the mean of their probabilities.
    """

    window: SlidingWindow
    deployable: Callable[[Params, Params | None], dict[str, Params]]
    twins: tuple[str, ...]
    normalize: Callable[[Any], Any]
    fill: tuple[float, ...]
    shards: Shards
    cases: Sequence[str]
    labels: Labels
    binary: bool
    log: Log
    asked: Callable[[], bool]  # whether the run is to stop; processes ask equally often
    newest: tuple[int, float] = field(default=(-1, float("nan")))

    @classmethod
    def of(
        cls,
        run: Run,
        cases: Sequence[str],
        recipe: Recipe,
        log: Log,
        mesh: Mesh,
        asked: Callable[[], bool],
    ) -> "Validation":
        """The validation of a run; of n processes each scores every n-th case."""
        config, model = run.config, recipe.parts.model

        def forward(params: Params, image: jax.Array) -> Any:
            return model.apply({"params": params}, image, train=False)

        window = SlidingWindow(
            forward,
            recipe.cut.patch,
            step=config.infer.step,
            mirror=False,
            tiles_per_call=config.infer.tiles,
            law=config.infer.law,
            # Several processes have a case each, so that none can take part in another's tiles.
            mesh=mesh if mesh.size > 1 and jax.process_count() == 1 else None,
            regions=run.labels.region_order,
            options=wiring.compiler_options(model),
        )
        return cls(
            window=window,
            deployable=recipe.parts.objective.deployable,
            twins=recipe.parts.objective.twins,
            normalize=jax.jit(run.network_input),
            fill=run.network_input.fill(config.input.pad),
            shards=run.shards,
            cases=tuple(cases)[: config.train.validate_cases],
            labels=run.labels,
            binary=config.split.binary,
            log=log,
            asked=asked,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Background, then what is scored."""
        return self.labels.names

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes Dice by nnU-Net's rule, averaged over cases.

        `val/dice/<class>` and `val/dice/mean` are the first network's; the others' are
        `val_<network>/dice/...`. Every network's mean is also `val/dice/<network>`. The means are
        over the classes that some mask has: one in none counts 0 as soon as a voxel of it is drawn
        and nothing else, so that a mean over it would not rank the checkpoints. Nothing is written
        if the run is asked to stop meanwhile.
        """
        if not self.cases:
            return
        begun = time.monotonic()
        found = self.deployable(state.params, state.ema)
        scored = self._scores({name: _local(params) for name, params in found.items()}, step)
        if scored is None:
            logger.warning("validation of step %d is left undone: asked to stop", step)
            return
        scores, shown = scored
        values: dict[str, float] = {}
        for index, (name, dice) in enumerate(scores.items()):
            prefix = "val/dice" if index == 0 else f"val_{name}/dice"
            values |= {f"{prefix}/{c}": v for c, v in zip(self.classes[1:], dice, strict=True)}
            mean = _mean(np.where(shown, dice, np.nan))
            values[f"{prefix}/mean"] = values[f"val/dice/{name}"] = mean
        if self.newest[0] < 0 and jax.default_backend() == "cpu":
            allocator.close_holes()  # the first validation has compiled programs of its own
        self.newest = (step, values["val/dice/mean"])
        seconds = time.monotonic() - begun
        self.log.validated(seconds)
        self.log.write(step, values | {"time/validation_s": seconds})
        logger.info(
            "step %d  validation Dice %.4f on %d cases (%s)  %.0f s",
            step,
            self.newest[1],
            len(self.cases),
            ", ".join(
                f"{name} {values[f'val/dice/{name}']:.3f}" for name in (*self.classes[1:], *scores)
            ),
            seconds,
        )

    def dice_at(self, step: int) -> float:
        """Mean Dice if this very step was validated, else NaN."""
        return self.newest[1] if self.newest[0] == step else float("nan")

    def _scores(
        self, networks: dict[str, Params], step: int
    ) -> tuple[dict[str, list[float]], np.ndarray] | None:
        """Mean Dice per foreground class, by network; and which classes some mask has.

        The Dice of a class is NaN if no case has it in mask or answer. None if the run is to stop
        before the last case.
        """
        names = (*networks, "ensemble") if self.twins else tuple(networks)
        rows = np.full((len(self.cases), len(names) + 1, len(self.classes) - 1), np.nan)
        said = time.monotonic()
        for first in range(0, len(self.cases), jax.process_count()):
            if self.asked():
                return None
            index = first + jax.process_index()
            if index < len(rows):
                try:
                    rows[index] = self._case(networks, self.cases[index])
                except _AskedToStop:
                    return None
            if time.monotonic() - said > 8:
                said = time.monotonic()
                logger.info("step %d  validating: case %d of %d", step, first + 1, len(rows))
        if jax.process_count() > 1:
            # Sent as pairs of integers, because JAX would round float64 to float32 on the way.
            parts = multihost_utils.process_allgather(rows.view(np.uint32))
            rows = np.fmax.reduce(np.asarray(parts).view(np.float64))
        dice = {
            name: [_mean(rows[:, i, k]) for k in range(rows.shape[2])]
            for i, name in enumerate(names)
        }
        return dice, np.asarray((rows[:, -1] > 0).any(0))

    @property
    def _how(self) -> dict[str, Any]:
        """What the window is told beside network and scan."""
        return {"fill": self.fill, "progress": self._heed}

    def _heed(self, done: int, tiles: int) -> None:
        """Called after every call of a network: a large scan may take longer than one is given.

        Several processes ask between scans, where all of them do: these have other tiles each.
        """
        if jax.process_count() == 1 and self.asked():
            raise _AskedToStop

    def _case(self, networks: dict[str, Params], case: str) -> np.ndarray:
        """What `_rows` makes of the networks' answers, the twins' ensemble being the last."""
        prepared = self.shards.load(case)
        image = np.asarray(self.normalize(prepared.channels_last))
        assert prepared.label is not None  # validation cases have masks
        reference = np.minimum(prepared.label, 1) if self.binary else prepared.label
        if not self.labels.plain:
            return self._targets(networks, image, prepared.label)
        predicted, together = [], 0.0
        for name, params in networks.items():
            if name not in self.twins:
                predicted.append(self.window.labels([params], image, **self._how))
                continue
            logits = self.window.logits([params], image, **self._how)
            predicted.append(logits.argmax(0).astype(np.uint8))
            together = together + softmax(logits, axis=0)
        if self.twins:
            predicted.append(np.argmax(together, axis=0).astype(np.uint8))
        counts = [overlap.count(reference, each, len(self.classes))[1:] for each in predicted]
        return _rows(counts)

    def _targets(
        self, networks: dict[str, Params], image: np.ndarray, reference: np.ndarray
    ) -> np.ndarray:
        """As `_case`, where outputs are regions or masks leave voxels out."""
        counts = []
        for params in networks.values():
            logits = self.window.logits([params], image, **self._how)
            predicted = self.labels.of_logits(logits)
            counts.append(overlap.count_targets(reference, predicted, self.labels))
        return _rows(counts)


def _rows(counts: Sequence[Sequence[overlap.Counts]]) -> np.ndarray:
    """Dice [network, foreground class], and below it the voxels of each class in the mask."""
    dice = [[each.dice for each in network] for network in counts]
    return np.array([*dice, [each.reference for each in counts[0]]])


def _mean(values: Any) -> float:
    """Mean of the values that are finite; NaN if none is."""
    found = [value for value in values if np.isfinite(value)]
    return float(np.mean(found)) if found else float("nan")


def _local(params: Params) -> Params:
    """The whole network on this process' own devices, however the training spread it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return params
