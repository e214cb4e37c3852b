"""Supervised training on the labeled patches."""

from dataclasses import dataclass

import jax

from bhsd_jax.objectives.common import SemiSupervised, SingleModel, Terms, forward_both


@dataclass(frozen=True)
class Supervised(SingleModel):
    """Segmentation loss alone."""

    uses_unlabeled = False

    def loss(self, learner, batch, key):
        logits = learner.forward(learner.params, batch.image, key)
        loss = learner.segmentation(logits, batch.label)
        return loss, {"supervised": loss}


@dataclass(frozen=True)
class WeaklySupervised(SemiSupervised, SingleModel):
    """Segmentation loss, for what the slice labels of the unlabeled patches add; no pseudo-labels.

    With every term of `config.slice_loss` off it is `Supervised` at twice the price.
    """

    def terms(self, learner, batch, key):
        view_key, key = jax.random.split(key)
        free = learner.view(view_key, batch.unlabeled)
        labeled, unlabeled = forward_both(learner, learner.params, batch.image, free, key)
        supervised = learner.segmentation(labeled, batch.label)
        return Terms(supervised, students=(unlabeled[0],))
