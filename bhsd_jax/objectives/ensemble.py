"""Several networks trained side by side on the same masks, for the mean of their answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from bhsd_jax.platform.errors import UserError


@dataclass(frozen=True)
class Ensemble:
    """Copies of the model that differ in their first weights and dropout; the loss is their sum.

    Imported folds are such copies too. `predict.networks=("ensemble",)` averages them all.

    Raises:
        ValueError: If there is no member, or two have one name.

    Source: Lakshminarayanan et al. 2017, arXiv:1612.01474, without its adversarial patches.
    """

    members: Sequence[str] = ("a", "b", "c")

    # Of the class, and so without a type: with one they would be fields of a config.
    uses_unlabeled = False
    ema_decay = None
    ema_t0 = 0

    def __post_init__(self):
        if not self.members or len(set(self.members)) != len(self.members):
            raise UserError(
                f"ensemble: members are one or more names, each once; got {self.members}"
            )

    @property
    def twins(self) -> tuple[str, ...]:
        """All members: each is a network of its own."""
        return tuple(self.members)

    @property
    def one_view(self) -> bool:
        """All members see the same patches."""
        return True

    def init(self, model, image, key):
        keys = dict(zip(self.twins, jax.random.split(key, len(self.twins)), strict=True))
        return {name: model.init(one, image, train=False)["params"] for name, one in keys.items()}

    def loss(self, learner, batch, key):
        keys = dict(zip(self.twins, jax.random.split(key, len(self.twins)), strict=True))

        def network(params, key):
            return learner.segmentation(learner.forward(params, batch.image, key), batch.label)

        each = learner.each_twin(network, learner.params, keys)
        loss = sum(each[name] for name in self.twins)
        return loss, {"supervised": loss}

    def deployable(self, params, ema):
        return {name: params[name] for name in self.twins}
