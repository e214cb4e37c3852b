"""Weak-to-strong: a moving average labels plain patches for a student that sees changed ones."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from bhsd_jax import losses
from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.common import (
    Ramp,
    SemiSupervised,
    SingleModel,
    Terms,
    follow_average,
    forward_both,
    require_average,
    require_choice,
    require_fraction,
    require_range,
)
from bhsd_jax.platform.errors import UserError


@dataclass(frozen=True)
class WeakToStrong(SemiSupervised, SingleModel):
    """The teacher's sure voxels are labels for intensity-changed, pasted and pierced patches.

    With `pairing="labeled"` a box is pasted both ways between labeled and unlabeled patches
    instead: bidirectional copy-paste, whose pseudo-labels count half and at any confidence.

    Source: Yang et al. 2023, UniMatch, arXiv:2208.09910 (threshold, box, chance, Dice over the sure
    voxels), with the moving-average teacher of its second version, arXiv:2410.10777. Copy-paste:
    Bai et al. 2023, arXiv:2305.00673, without its pre-training and without its restriction to the
    largest component, for bleeds have many. How long the teacher's average may be:
    `mean_teacher.MeanTeacher`.
    """

    ema_decay: float | None = 0.999
    weight: float = 1.0
    ramp: float = 0.4  # share of the training over which the weight rises
    ramp_steps: int = 0  # not 0: over so many steps instead, however long the training is
    staircase: int = 1  # steps for which the rising weight is held
    sure: float = 0.95  # least probability of a voxel called background
    sure_foreground: float = 0.95  # of one called foreground; lower, and foreground grows
    pairing: str = "unlabeled"  # "labeled": bidirectional copy-paste
    chance: float = 0.5  # that a patch is pasted
    covered: tuple[float, float] = (0.02, 0.4)  # share of it that comes from its partner
    holes: float = 0.5  # chance of a hole: a box set to the mean intensity of the patch
    hole: tuple[float, float] = (0.02, 0.1)  # share of the patch that is a hole
    side: float = 2 / 3  # of the copy-paste box, along every axis
    pseudo: float = 0.5  # weight of a pseudo-labeled voxel in copy-paste; a labeled one has 1

    def __post_init__(self):
        Ramp.of(self)  # which refuses what no ramp can be
        require_average("w2s", self.ema_decay, self.ema_t0)
        super().__post_init__()
        require_choice("w2s: pairing", self.pairing, ("unlabeled", "labeled"))
        for name in ("covered", "hole"):
            require_range(f"w2s: {name}", getattr(self, name))
        for name in ("sure", "sure_foreground", "chance", "holes", "side", "pseudo"):
            require_fraction(f"w2s: {name}", getattr(self, name), "share or probability")

    @property
    def has_students(self):
        """Copy-paste learns from patches that show labeled and unlabeled voxels."""
        return self.pairing == "unlabeled"

    def terms(self, learner, batch, key):
        view_key, teacher_key, mix_key = jax.random.split(key, 3)
        strong = learner.view(view_key, batch.unlabeled)
        answer = follow_average(learner, batch.unlabeled, teacher_key)
        learn = self._copy_paste if self.pairing == "labeled" else self._cut_mix
        return learn(learner, batch, strong, answer, mix_key)

    def _cut_mix(self, learner, batch, strong, answer, key):
        box_key, hole_key, student_key = jax.random.split(key, 3)
        count, shape = len(strong), strong.shape[1:4]
        mask = mixing.boxes(box_key, count, shape, self.covered, chance=self.chance)
        hole = mixing.boxes(hole_key, count, shape, self.hole, chance=self.holes)

        pasted = partial(mixing.paste_partners, mask)

        def mixed(slice_labels):
            return mixing.pierce_slices(hole, mixing.paste_partner_slices(mask, slice_labels))

        shown = pasted(strong)
        # Not 0: on CT that is the mean of the lesions, which holes would teach to be background.
        seen = jnp.where(hole[..., None], shown.mean((1, 2, 3), keepdims=True), shown)
        guess, sure = pasted(answer.argmax(-1)), self._is_sure(answer)
        sure = pasted(losses.both(sure, batch.inside))
        labeled, unlabeled = forward_both(learner, learner.params, batch.image, seen, student_key)
        supervised = learner.segmentation(labeled, batch.label)
        follow = losses.cross_entropy(unlabeled[0], guess, sure) + _dice(unlabeled[0], guess, sure)
        said = {"sure": sure.mean()}
        return Terms(supervised, "follow", follow, Ramp.of(self), (unlabeled[0],), mixed, said)

    def _copy_paste(self, learner, batch, strong, answer, key):
        box_key, inward_key, outward_key, plain_key = jax.random.split(key, 4)
        if len(batch.image) != len(strong):
            raise UserError(
                "w2s: copy-paste needs as many unlabeled as labeled patches; "
                f"got {len(strong)} and {len(batch.image)}"
            )
        mask = mixing.cube(box_key, len(strong), strong.shape[1:4], self.side)
        guess = answer.argmax(-1).astype(batch.label.dtype)

        def direction(true, key):
            """Loss where `true` voxels show the labeled patch and the others the unlabeled one."""
            image = mixing.paste(true, batch.image, strong)
            logits = learner.forward(learner.params, image, key)[0]
            return _half(logits, batch.label, true) + self.pseudo * _half(
                logits, guess, losses.both(~true, batch.inside)
            )

        supervised = learner.segmentation(
            learner.forward(learner.params, batch.image, plain_key), batch.label
        )
        # A pasted patch shows true labels and pseudo-labels: slice labels speak through the gate.
        follow = direction(mask, inward_key) + direction(~mask, outward_key)
        return Terms(supervised, "follow", follow, Ramp.of(self))

    def _is_sure(self, logits):
        prob = jax.nn.softmax(logits)
        least = jnp.where(logits.argmax(-1) == 0, self.sure, self.sure_foreground)
        return prob.max(-1) >= least


def _dice(logits, label, valid):
    """One minus soft Dice of the whole batch; with no valid voxel 0 in value and gradient."""
    return 1 - losses.soft_dice(logits, label, valid=valid, batch=True).mean()


def _half(logits, label, valid):
    return (losses.cross_entropy(logits, label, valid) + _dice(logits, label, valid)) / 2
