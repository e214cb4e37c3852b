"""Entropy minimization (Grandvalet and Bengio 2005; Vu et al. 2019, ADVENT's "MinEnt")."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bhsd_jax import losses
from bhsd_jax.objectives.common import (
    Ramp,
    SemiSupervised,
    SingleModel,
    Terms,
    forward_both,
    require_choice,
    require_least,
)

_VOXELS = ("all", "balanced", "foreground")
_PATCHES = ("unlabeled", "all")
_MEASURES = ("entropy", "max_square")


@dataclass(frozen=True)
class EntropyMinimization(SemiSupervised, SingleModel):
    """Segmentation loss plus the mean entropy of the predictions, as a share of log K.

    It pushes every voxel toward the class it already prefers, most where the logits of two classes
    differ by 1.5. With a hundredth of the voxels foreground that class is mostly background: a
    large weight erodes lesions, and the paper's entropy row lies below its supervised one. The
    fields default to the `recommended` preset; `ssl4mis` is in `configs/entropy.py`.

    Source: SSL4MIS `train_entropy_minimization_3D.py` (`ssl4mis`); ADVENT, arXiv:1811.12833, whose
    weight is 0.001 on target images only. `max_square` is Chen et al. 2019, arXiv:1909.13589.
    """

    weight: float = 0.005
    ramp: float = 1.0  # share of the training over which the weight rises
    ramp_steps: int = 0  # not 0: over so many steps instead, however long the training is
    staircase: int = 1  # steps for which the rising weight is held
    patches: str = "unlabeled"  # "all": of the labeled patches too, as SSL4MIS does
    voxels: str = "all"  # "balanced": every predicted class weighs the same; "foreground": it alone
    epsilon: float = 0.0  # added to probabilities before the logarithm: 1e-6 in SSL4MIS
    measure: str = "entropy"  # "max_square": one minus the sum of squares, gentler when nearly sure

    def __post_init__(self):
        Ramp.of(self)  # which refuses what no ramp can be
        super().__post_init__()
        require_least("entropy: epsilon", self.epsilon, 0)
        require_choice("entropy: patches", self.patches, _PATCHES)
        require_choice("entropy: voxels", self.voxels, _VOXELS)
        require_choice("entropy: measure", self.measure, _MEASURES)

    def terms(self, learner, batch, key):
        view_key, key = jax.random.split(key)
        free = learner.view(view_key, batch.unlabeled)
        labeled, unlabeled = forward_both(learner, learner.params, batch.image, free, key)
        supervised = learner.segmentation(labeled, batch.label)
        entropy = self._mean(learner.gate(unlabeled[0]), batch.inside)
        if self.patches == "all":
            ours, theirs = len(batch.image), len(batch.unlabeled)
            entropy = (ours * self._mean(labeled[0]) + theirs * entropy) / (ours + theirs)
        return Terms(supervised, "entropy", entropy, Ramp.of(self), (unlabeled[0],))

    def _mean(
        self, logits: Float[Array, "B D H W K"], inside: Bool[Array, "B D H W"] | None = None
    ) -> Array:
        if self.measure == "entropy":
            unsure = losses.entropy(logits, self.epsilon)
        else:
            unsure = (1 - (jax.nn.softmax(logits.astype(jnp.float32)) ** 2).sum(-1)) / 2
        if self.voxels == "all":
            return losses.valid_mean(unsure, inside)
        guess = logits.argmax(-1)
        if self.voxels == "foreground":
            return losses.valid_mean(unsure, losses.both(guess > 0, inside))
        among = jax.nn.one_hot(guess, logits.shape[-1], dtype=jnp.float32)
        among = among if inside is None else among * inside[..., None]
        count = among.sum((0, 1, 2, 3))
        per_class = (unsure[..., None] * among).sum((0, 1, 2, 3)) / jnp.maximum(count, 1)
        return per_class.sum() / jnp.maximum((count > 0).sum(), 1)
