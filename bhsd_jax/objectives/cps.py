"""Cross pseudo supervision (Chen et al. 2021, arXiv:2106.01226)."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bhsd_jax import losses
from bhsd_jax.objectives.common import (
    Ramp,
    SemiSupervised,
    Terms,
    forward_both,
    over_heads,
    require_choice,
    require_fraction,
    unmixed,
)
from bhsd_jax.types import Params


@dataclass(frozen=True)
class CrossPseudoSupervision(SemiSupervised):
    """Two copies of the model, differently initialized, label the unlabeled patches for each other.

    Hard pseudo-labels from the full-resolution head, cross entropy only, unlabeled patches only:
    what SSL4MIS does and what nnU-Net's own supervised loss combines with best. The fields
    default to the `recommended` preset; `ssl4mis` is in `configs/cps.py`.

    Source: SSL4MIS `train_cross_pseudo_supervision_3D.py` for preset `ssl4mis`.
    """

    # Of the class, and so without a type: with one they would be fields of a config.
    twins = ("a", "b")
    uses_unlabeled = True
    ema_decay = None  # no average of a twin teaches or is deployed
    ema_t0 = 0
    weight: float = 0.5  # against nnU-Net's CE + Dice (SSL4MIS' 0.1 is 0.2 in these units)
    ramp: float = 0.4  # share of the training over which the weight rises
    ramp_steps: int = 0  # not 0: over so many steps instead, however long the training is
    staircase: int = 1  # steps for which the rising weight is held
    views: str = "independent"  # "shared": both twins see one intensity draw
    confidence: float = 0.0  # voxels whose supervising twin is less sure are left out
    twin_init: str = "model"  # "kaiming_xavier": a Kaiming-normal, b Xavier-normal convolutions
    deep: bool = False  # pseudo-labels, shrunk as masks are, also teach the coarser heads

    def __post_init__(self):
        Ramp.of(self)  # which refuses what no ramp can be
        require_fraction("cps: confidence", self.confidence, "probability")
        require_choice("cps: views", self.views, ("independent", "shared"))
        require_choice("cps: twin_init", self.twin_init, ("model", "kaiming_xavier"))

    @property
    def one_view(self) -> bool:
        """Whether both twins see the same patches."""
        return self.views == "shared"

    def init(self, model, image, key):
        keys: dict[str, jax.Array] = dict(zip(self.twins, jax.random.split(key), strict=True))
        params = {twin: model.init(keys[twin], image, train=False)["params"] for twin in self.twins}
        if self.twin_init == "kaiming_xavier":
            ups = _transposed(model, image)
            kaiming = nn.initializers.variance_scaling(2, "fan_in", "normal")
            xavier = nn.initializers.variance_scaling(1, "fan_avg", "normal")
            for twin, init in (("a", kaiming), ("b", xavier)):
                params[twin] = _redraw(params[twin], init, keys[twin], ups)
        return params

    def terms(self, learner, batch, key):
        view_a, view_b, key_a, key_b = jax.random.split(key, 4)
        free_a = learner.view(view_a, batch.unlabeled)
        free_b = free_a if self.views == "shared" else learner.view(view_b, batch.unlabeled)

        def network(params, free, key):
            return forward_both(learner, params, batch.image, free, key)

        outputs = learner.each_twin(
            network, learner.params, {"a": free_a, "b": free_b}, {"a": key_a, "b": key_b}
        )
        (a, guess_a), (b, guess_b) = outputs["a"], outputs["b"]

        supervised = learner.segmentation(a, batch.label) + learner.segmentation(b, batch.label)
        answer_a, answer_b = (learner.gate(g[0]) for g in (guess_a, guess_b))
        inside = batch.inside
        cross = self._teach(guess_a, answer_b, inside) + self._teach(guess_b, answer_a, inside)
        return self._summed(supervised, cross, (guess_a[0], guess_b[0]))

    def deployable(self, params, ema):
        return {twin: params[twin] for twin in self.twins}

    def _summed(self, supervised, cross, students, mixed=unmixed):
        """The terms, and how often the two networks disagree."""
        disagree = (students[0].argmax(-1) != students[1].argmax(-1)).mean()
        said = {"disagree": disagree}
        return Terms(supervised, "cross", cross, Ramp.of(self), students, mixed, said)

    def _teach(self, heads, teacher, inside=None):
        """Cross entropy of the heads with the other twin's answer."""
        return over_heads(lambda logits: self._follow(logits, teacher, inside), heads, self.deep)

    def _follow(self, logits, teacher, inside=None):
        """Cross entropy of `logits` with the other twin's answer.

        The answer gets no gradient: only its classes and comparisons with it are used.
        """
        guess, size, sure = teacher.argmax(-1), logits.shape[1:4], inside
        if self.confidence > 0:
            sure = losses.both(jax.nn.softmax(teacher).max(-1) >= self.confidence, inside)
        if sure is not None:
            sure = losses.shrink_label(sure.astype(jnp.int8), size) > 0
        return losses.cross_entropy(logits, losses.shrink_label(guess, size), sure)


def _transposed(model: nn.Module, image: jax.Array) -> frozenset[tuple[str, ...]]:
    """Paths of the transposed convolutions: Flax's own, and those whose class says so."""
    paths = set()

    def note(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, nn.ConvTranspose) or getattr(type(layer), "transposed", False) is True:
            paths.add(layer.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return frozenset(paths)


def _redraw(
    params: Params,
    init: nn.initializers.Initializer,
    key: jax.Array,
    transposed: frozenset[tuple[str, ...]],
) -> Params:
    """Draws convolution kernels anew; transposed ones and kernels of other ranks stay."""
    flat: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
    for i, (path, value) in enumerate(sorted(flat.items())):
        if path[-1] == "kernel" and value.ndim == 5 and path[:-1] not in transposed:
            flat[path] = init(jax.random.fold_in(key, i), value.shape, jnp.float32)
    return traverse_util.unflatten_dict(flat)
