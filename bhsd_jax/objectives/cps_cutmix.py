"""Cross pseudo supervision on pasted patches (Chen et al. 2021, section 3.4 with CutMix)."""

from dataclasses import dataclass
from functools import partial

import jax

from bhsd_jax.objectives import mixing
from bhsd_jax.objectives.common import (
    forward_both,
    require_fraction,
    require_least,
    require_range,
)
from bhsd_jax.objectives.cps import CrossPseudoSupervision


@dataclass(frozen=True)
class CrossPseudoSupervisionCutMix(CrossPseudoSupervision):
    """The answers of each twin on two plain patches, pasted, are labels for the other on the paste.

    Both twins see one mask, and the plain patches without intensity changes. `views` is about the
    patches pasted.

    Source: CPS' authors, TorchSemiSeg 5e0c29c (3 boxes over a quarter to half of the image,
    unlabeled images only, weight 1 against cross entropy alone; ours is half of that for their
    ratio to nnU-Net's CE + Dice).
    """

    covered: tuple[float, float] = (0.25, 0.5)  # share of the patch that comes from its partner
    number: int = 3  # of boxes
    chance: float = 1.0  # that a patch is pasted at all

    def __post_init__(self):
        super().__post_init__()
        require_range("cps_cutmix: covered", self.covered)
        require_fraction("cps_cutmix: chance", self.chance, "probability")
        require_least("cps_cutmix: number", self.number, 1)

    def terms(self, learner, batch, key):
        view_a, view_b, box_key, key_a, key_b, plain_a, plain_b = jax.random.split(key, 7)
        plain = batch.unlabeled
        strong_a = learner.view(view_a, plain)
        strong_b = strong_a if self.views == "shared" else learner.view(view_b, plain)
        mask = mixing.boxes(
            box_key,
            len(plain),
            plain.shape[1:4],
            self.covered,
            number=self.number,
            chance=self.chance,
        )

        pasted = partial(mixing.paste_partners, mask)
        mixed = partial(mixing.paste_partner_slices, mask)

        def network(params, seen, key, plain_key):
            labeled, guess = forward_both(learner, params, batch.image, seen, key)
            logits = learner.forward(params, plain, plain_key)[0]
            return labeled, guess, logits

        outputs = learner.each_twin(
            network,
            learner.params,
            {"a": pasted(strong_a), "b": pasted(strong_b)},
            {"a": key_a, "b": key_b},
            {"a": plain_a, "b": plain_b},
        )
        (labeled_a, guess_a, answer_a), (labeled_b, guess_b, answer_b) = outputs["a"], outputs["b"]
        supervised = sum(learner.segmentation(x, batch.label) for x in (labeled_a, labeled_b))
        inside = pasted(batch.inside)
        answer_a, answer_b = (pasted(learner.gate(logits)) for logits in (answer_a, answer_b))
        cross = self._teach(guess_a, answer_b, inside) + self._teach(guess_b, answer_a, inside)
        return self._summed(supervised, cross, (guess_a[0], guess_b[0]), mixed)
