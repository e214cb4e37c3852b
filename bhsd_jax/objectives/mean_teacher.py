"""Mean teacher (Tarvainen and Valpola 2017, arXiv:1703.01780)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

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
    require_least,
)


@dataclass(frozen=True)
class MeanTeacher(SemiSupervised, SingleModel):
    """On unlabeled patches the student's probabilities follow those of its own moving average.

    Without dropout and batch statistics the two differ by their inputs alone, so the views matter:
    by default the teacher sees the plain patch and the student a draw of the intensity
    augmentation. The fields default to the `recommended` preset; `ssl4mis` is in
    `configs/mean_teacher.py`.

    Source: SSL4MIS `train_mean_teacher_3D.py` (`ssl4mis`). Its teacher begins as a network of its
    own; as the first update forgets what it was, ours begins as a copy. With `ema_t0` 1, the
    authors' rule, the copy stays in the average.

    An average over 1 / (1 - `ema_decay`) steps must be far shorter than the training: of 400 steps
    on MSD Hippocampus a teacher of decay 0.999 reached Dice 0.605 where its student had 0.719, one
    of 0.95 0.730 against 0.727. `train` warns and says which decay would fit.
    """

    ema_decay: float | None = 0.999
    weight: float = 2.0  # against nnU-Net's CE + Dice (SSL4MIS' 0.1 is 0.2 in these units)
    ramp: float = 0.4  # share of the training over which the weight rises
    ramp_steps: int = 0  # not 0: over so many steps instead, however long the training is
    staircase: int = 1  # steps for which the rising weight is held
    views: str = "weak_strong"  # "shared": both see one intensity draw
    noise: float = 0.0  # standard deviation added to the teacher's input, normalized units
    noise_clip: float = 0.2  # largest noise
    deep: bool = False  # local averages of the teacher's answer also teach the coarser heads

    def __post_init__(self):
        Ramp.of(self)  # which refuses what no ramp can be
        require_average("mean_teacher", self.ema_decay, self.ema_t0)
        super().__post_init__()
        for name in ("noise", "noise_clip"):
            require_least(f"mean_teacher: {name}", getattr(self, name), 0)
        require_choice("mean_teacher: views", self.views, ("weak_strong", "shared"))

    def terms(self, learner, batch, key):
        view_key, noise_key, student_key, teacher_key = jax.random.split(key, 4)
        strong = learner.view(view_key, batch.unlabeled)
        plain = strong if self.views == "shared" else batch.unlabeled
        if self.noise > 0:
            plain = plain + bounded_noise(noise_key, plain, self.noise, self.noise_clip)
        target = jax.nn.softmax(follow_average(learner, plain, teacher_key))
        labeled, unlabeled = forward_both(learner, learner.params, batch.image, strong, student_key)
        supervised = learner.segmentation(labeled, batch.label)
        consistency = follow_target(unlabeled, target, batch.inside, self.deep)
        return Terms(supervised, "consistency", consistency, Ramp.of(self), (unlabeled[0],))


def bounded_noise(key: jax.Array, image: jax.Array, std: float, limit: float) -> jax.Array:
    """Normal noise of the image's shape, clipped at plus and minus `limit`."""
    return jnp.clip(std * jax.random.normal(key, image.shape, image.dtype), -limit, limit)
