"""Validation in the loop: whole volumes by sliding window, Dice per class on the prepared grid."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bhsd_jax.ct.shards import Shards
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.metrics import overlap
from bhsd_jax.train.log import Log
from bhsd_jax.types import Metrics, Params, TrainState
from bhsd_jax.verbs import setup, wiring
from bhsd_jax.verbs.recipe import Recipe
from bhsd_jax.verbs.setup import Config

logger = logging.getLogger(__name__)


@dataclass
class Validation:
    """Scores every network the objective could deploy; the first gives the headline."""

    window: SlidingWindow
    deployable: Callable[[Params, Params | None], dict[str, Params]]
    normalize: Callable[[Any], Any]
    fill: tuple[float, ...]
    shards: Shards
    cases: Sequence[str]
    classes: tuple[str, ...]
    binary: bool
    log: Log
    newest: tuple[int, float] = field(default=(-1, float("nan")))

    @classmethod
    def of(
        cls,
        config: Config,
        shards: Shards,
        cases: Sequence[str],
        recipe: Recipe,
        log: Log,
    ) -> "Validation":
        """As the config says; each process scores every so manyth case."""
        model = recipe.parts.model

        def forward(params: Params, image: jax.Array) -> Any:
            return model.apply({"params": params}, image, train=False)

        window = SlidingWindow(
            forward,
            recipe.cut.patch,
            step=config.infer.step,
            mirror=False,
            tiles_per_call=config.infer.tiles,
        )
        chosen = tuple(cases)[: config.train.validate_cases]
        return cls(
            window=window,
            deployable=recipe.parts.objective.deployable,
            normalize=jax.jit(wiring.normalization(config, shards.plan)),
            fill=wiring.normalization(config, shards.plan).fill(config.input.pad),
            shards=shards,
            cases=chosen,
            classes=setup.classes(config, shards.plan),
            binary=config.split.binary,
            log=log,
        )

    def __call__(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes `val/dice/<class>` and their mean, per network; case Dice by nnU-Net's rule."""
        if not self.cases:
            return
        begun = time.monotonic()
        values = {}
        for index, (name, params) in enumerate(self.deployable(state.params, state.ema).items()):
            dice = self._score(_local(params), step)
            prefix = "val/dice" if index == 0 else f"val_{name}/dice"
            found = [value for value in dice if np.isfinite(value)]
            mean = float(np.mean(found)) if found else float("nan")
            values |= {f"{prefix}/{c}": v for c, v in zip(self.classes[1:], dice, strict=True)}
            values[f"{prefix}/mean"] = mean
            if index == 0:
                self.newest = (step, mean)
        seconds = time.monotonic() - begun
        self.log.pause(seconds)
        self.log.write(step, values | {"time/validation_s": seconds})
        logger.info(
            "step %d  validation Dice %.4f on %d cases (%s)  %.0f s",
            step,
            self.newest[1],
            len(self.cases),
            ", ".join(f"{c} {values[f'val/dice/{c}']:.3f}" for c in self.classes[1:]),
            seconds,
        )

    def dice_at(self, step: int) -> float:
        """Mean Dice if this very step was validated, else NaN."""
        return self.newest[1] if self.newest[0] == step else float("nan")

    def _score(self, params: Params, step: int) -> list[float]:
        """Mean Dice per foreground class; NaN for a class in no case."""
        rows = np.full((len(self.cases), len(self.classes) - 1), np.nan)
        said = time.monotonic()
        for index in range(jax.process_index(), len(self.cases), jax.process_count()):
            rows[index] = self._case(params, self.cases[index])
            if time.monotonic() - said > 8:
                said = time.monotonic()
                logger.info("step %d  validating: case %d of %d", step, index + 1, len(rows))
        if jax.process_count() > 1:
            rows = np.nanmax(multihost_utils.process_allgather(rows), axis=0)
        scored = np.isfinite(rows)
        sums = np.where(scored, rows, 0).sum(0)
        return [
            float(s / n) if n else float("nan") for s, n in zip(sums, scored.sum(0), strict=True)
        ]

    def _case(self, params: Params, case: str) -> np.ndarray:
        prepared = self.shards.load(case)
        image = np.asarray(self.normalize(prepared.image[..., None]))
        predicted = self.window.labels([params], image, fill=self.fill)
        assert prepared.label is not None  # validation cases have masks
        reference = np.minimum(prepared.label, 1) if self.binary else prepared.label
        return overlap.dice_per_class(predicted, reference, len(self.classes))


def _local(params: Params) -> Params:
    """The whole network on this process' own devices, however the training spread it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return params
