"""Interpolation consistency training (Verma et al. 2019, arXiv:1903.03825)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.common import (
    Ramp,
    SemiSupervised,
    SingleModel,
    Terms,
    follow_average,
    follow_target,
    forward_both,
    require_average,
    require_choice,
)
from bhsd_jax.platform.errors import UserError


@dataclass(frozen=True)
class InterpolationConsistency(SemiSupervised, SingleModel):
    """The student's answer to a blend of two patches follows the blend of the teacher's answers.

    The shares are drawn from Beta(a, a); with a = 0.2 more than half of them leave one patch
    almost alone, which is a mean teacher without noise. The fields default to the `recommended`
    preset; `ssl4mis` is in `configs/ict.py`.

    Source: SSL4MIS `train_interpolation_consistency_training_3D.py` (`ssl4mis`). The authors' own
    code blends logits, `mix="logit"`; their text and all others blend probabilities. How long the
    teacher's average may be: `mean_teacher.MeanTeacher`.
    """

    ema_decay: float | None = 0.999
    weight: float = 2.0  # against nnU-Net's CE + Dice (SSL4MIS' 0.1 is 0.2 in these units)
    ramp: float = 0.4  # share of the training over which the weight rises
    ramp_steps: int = 0  # not 0: over so many steps instead, however long the training is
    staircase: int = 1  # steps for which the rising weight is held
    views: str = "weak_strong"  # "shared": both see one intensity draw
    beta: float = 0.5  # a of Beta(a, a)
    fold: bool = True  # the larger share goes to the patch itself
    pairs: str = "each"  # "half": one blend of every two patches, as SSL4MIS does
    mix: str = "prob"  # "logit": the teacher's logits are blended
    deep: bool = False  # local averages of the teacher's answers also teach the coarser heads

    def __post_init__(self):
        Ramp.of(self)  # which refuses what no ramp can be
        require_average("ict", self.ema_decay, self.ema_t0)
        super().__post_init__()
        require_choice("ict: views", self.views, ("weak_strong", "shared"))
        require_choice("ict: pairs", self.pairs, ("each", "half"))
        require_choice("ict: mix", self.mix, ("prob", "logit"))
        if not self.beta > 0:
            raise UserError(f"ict: beta is the a of Beta(a, a), above 0; got {self.beta}")

    def terms(self, learner, batch, key):
        view_key, share_key, student_key, teacher_key = jax.random.split(key, 4)
        strong = learner.view(view_key, batch.unlabeled)
        plain = strong if self.views == "shared" else batch.unlabeled
        answer = follow_average(learner, plain, teacher_key)

        ours, theirs = self._paired(strong)
        share = mixing.beta(share_key, self.beta, len(ours))
        share = jnp.maximum(share, 1 - share) if self.fold else share
        blended = mixing.blend(share, ours, theirs)
        target = self._target(share, answer)
        labeled, unlabeled = forward_both(
            learner, learner.params, batch.image, blended, student_key
        )
        supervised = learner.segmentation(labeled, batch.label)
        consistency = follow_target(unlabeled, target, self._inside(batch.inside), self.deep)
        students, mixed = (unlabeled[0],), self._blended_slices
        return Terms(supervised, "consistency", consistency, Ramp.of(self), students, mixed)

    def _paired(self, rows):
        """The two patches of every blend."""
        if self.pairs == "each":
            return rows, mixing.partners(rows)
        both = mixing.pairs(rows)
        return both[:, 0], both[:, 1]

    def _target(self, share, answer):
        """Probabilities [N D H W K] from the teacher's logits on all patches."""
        if self.mix == "logit":
            return jax.nn.softmax(mixing.blend(share, *self._paired(answer)))
        return mixing.blend(share, *self._paired(jax.nn.softmax(answer)))

    def _blended_slices(self, slice_labels):
        """Slice labels of a blend: it lacks a class if both patches do."""
        ours, theirs = self._paired(slice_labels)
        return jnp.where((ours == 0) & (theirs == 0), 0, -1).astype(slice_labels.dtype)

    def _inside(self, inside):
        """Voxels that lie in both scans of a blend."""
        return jax.tree.map(lambda rows: jnp.logical_and(*self._paired(rows)), inside)
