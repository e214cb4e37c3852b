"""Supervised training on the labeled patches."""

from dataclasses import dataclass
from typing import ClassVar

from bhsd_jax.objectives.common import SingleModel


@dataclass(frozen=True)
class Supervised(SingleModel):
    """Segmentation loss alone."""

    uses_unlabeled: ClassVar[bool] = False

    def loss(self, learner, batch, key):
        logits = learner.forward(learner.params, batch.image, key)
        loss = learner.segmentation(logits, batch.label)
        return loss, {"supervised": loss}
