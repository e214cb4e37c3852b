"""The networks of the benchmark by short name: class, head CT patch, published training recipe.

Two words of every experiment: `--config=configs/cps.py:backbone=swin_unetr,recipe=nnunet`.
`recipe=published` (the default) is what the authors trained with: optimizer, rate, schedule,
warm-up, weight decay, clipping. CoTr and nnFormer were trained with nnU-Net's, so for them and
for nnU-Net the two are one. `recipe=nnunet` is nnU-Net's for every network, and `recipe=fast` what
reached its Dice in half the steps (`tools/LAB_BOOK.md`; tried on nnU-Net's network alone): Muon,
whose rate rises and then falls to 0, and half the steps. Loss, augmentation, batch and otherwise
length are nnU-Net's for all, as in the benchmark; so the coarsest head has no weight in the loss,
which the authors of nnFormer and CoTr do train. A backbone may also be named by its class,
`backbone=unetr.UNETR`: then nothing but the class and a `recipe=fast` changes.

Source: CoTr 521b4cc, nnFormer d48aaeb, nnU-Net 2.8.1, and MONAI's research-contributions (UNETR
and Swin UNETR on BTCV); the fields named in each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference

from bhsd_jax.platform.errors import UserError

RECIPES = ("published", "nnunet", "fast")
# UNETR and Swin UNETR alike: AdamW, no clipping, 50 of 5000 epochs of warm-up.
_ADAMW = {
    "name": "adamw",
    "lr": 1e-4,
    "momentum": 0.9,  # Adam's beta 1
    "weight_decay": 1e-5,
    "schedule": "warmup_cosine",
    "warmup": 0.01,
}
_FAST = {
    "name": "muon",
    "lr": 0.01,
    "momentum": 0.95,
    "weight_decay": 0.01,  # decoupled, on kernels alone
    "schedule": "cosine",
    "warmup": 0.05,
}
SHORTER = 2  # times, by which `recipe=fast` is
# What nnU-Net plans for BHSD at its spacing; every network's preset for thick slices accepts it.
_PATCH = (20, 320, 256)


@dataclass(frozen=True)
class Backbone:
    """A class in bhsd_jax/models and what differs from nnU-Net's defaults."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the class
    patch: tuple[int, int, int] | None = _PATCH  # at BHSD's spacing; None: the plan's
    optimizer: Mapping[str, Any] | None = None  # as published; None: nnU-Net's


BACKBONES = {
    "unetr": Backbone("unetr.UNETR", {"embedding": "perceptron"}, optimizer=_ADAMW),
    "swin_unetr": Backbone("swin_unetr.SwinUNETR", optimizer=_ADAMW),
    "cotr": Backbone("cotr.CoTr"),
    "nnformer": Backbone("nnformer.NNFormer"),
    "nnunet": Backbone("nnunet.PlainConvUNet", patch=None),
    # One convolution per decoder stage, unless a plan for this network says otherwise.
    "nnunet_resenc": Backbone("nnunet.ResidualEncoderUNet", {"convs_decoder": 1}, patch=None),
}
# Classes that can do without their coarser heads.
DEEPLY_SUPERVISED = (
    "nnunet.PlainConvUNet",
    "nnunet.ResidualEncoderUNet",
    "cotr.CoTr",
    "nnformer.NNFormer",
)
_SMOKE = {  # thin networks that still have every part, by class
    "unetr.UNETR": {
        "feature_size": 4,
        "hidden_size": 24,
        "mlp_dim": 48,
        "heads": 2,
        "layers": 2,
        "taps": (1, 1, 2),
    },
    "swin_unetr.SwinUNETR": {"feature_size": 4, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)},
    "cotr.CoTr": {
        "features": (8, 12, 24),
        "blocks": (1, 1, 1),
        "heads": 2,
        "layers": 1,
        "points": 2,
        "ffn": 32,
    },
    "nnformer.NNFormer": {"embed": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)},
    "primus.Primus": {"width": 24, "heads": 2, "layers": 2},
    "nnunet.PlainConvUNet": {"features": (8, 16)},
    "nnunet.ResidualEncoderUNet": {"features": (8, 16)},
}


def choose(config: ml_collections.ConfigDict, backbone: str, recipe: str, *, head_ct: bool) -> None:
    """Sets the model and the recipe, and for a short name the patch (of `head_ct` scans).

    `head_ct` says that preprocessing is pinned to BHSD's spacing, for which the patch is planned.

    Raises:
        ValueError: If the short name or the recipe is not known; lists the choices.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe={recipe} is not known; choose from {', '.join(RECIPES)}")
    config.model.name = backbone
    if recipe == "fast":
        config.optimizer.update(_FAST)
        config.train.steps //= SHORTER
    if "." in backbone:
        return
    if backbone not in BACKBONES:
        raise UserError(
            f"backbone={backbone} is not known; choose from {', '.join(BACKBONES)}, or name a "
            "class as <module>.<Class>"
        )
    chosen = BACKBONES[backbone]
    config.model.name = chosen.name
    config.model.update(dict(chosen.fields))
    if head_ct and chosen.patch is not None:
        config.input.patch = chosen.patch
    if recipe == "published" and chosen.optimizer is not None:
        config.optimizer.update(dict(chosen.optimizer))
        config.optimizer.clip = FieldReference(None, field_type=object)


def shrink(config: ml_collections.ConfigDict) -> None:
    """Thin features, for smoke runs; other classes keep their own."""
    config.model.update(_SMOKE.get(config.model.name, {}))
