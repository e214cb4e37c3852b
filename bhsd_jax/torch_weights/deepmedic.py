"""How BLAST-CT names DeepMedic's weights.

Source: commit ccfa6ef of biomedia-mira/blast-ct, `models/deepmedic.py`, `models/base.py`.
"""

from collections.abc import Mapping
from typing import Any

from bhsd_jax.models.deepmedic import DeepMedic
from bhsd_jax.models.norms import NormSpec, norm_options
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import layout, monai
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("DeepMedic",)
MODULES = (DeepMedic,)
_REQUIRED = ("input_channels", "num_classes")
_FIELDS = {
    "scale_factors": "scales",
    "feature_maps": "features",
    "fully_connected": "joined",
    "dropout": "dropout",
}


def from_torch(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Twin of BLAST-CT's `DeepMedic`; its images bring their margin along, as there.

    Raises:
        ValueError: Lists every argument that has no counterpart here.
    """
    wrong = [f"{n} is not known" for n in constructor if n not in (*_REQUIRED, *_FIELDS)]
    wrong += [f"{name} is missing" for name in _REQUIRED if name not in constructor]
    if wrong:
        raise UserError(f"{reference}: constructor not supported: {'; '.join(wrong)}")
    given = {_FIELDS[k]: files.tuples(v) for k, v in constructor.items() if k in _FIELDS}
    module = DeepMedic(constructor["num_classes"], norm="batch", context="given", **given)
    return recipe(module, constructor["input_channels"])


def recipe(module: DeepMedic, channels: int) -> Recipe:
    """Names of the weights of a network that there is."""
    d, h, w = (n + 2 * m for n, m in zip(module.stride, module.margin, strict=True))
    image = (1, d, h, w, channels)
    weights: dict[str, Weight] = {}
    for i, scale in enumerate(module.scales):
        for k in range(len(module.features)):  # number 0 takes every n-th voxel
            source = f"path({', '.join(map(str, scale))}){i}.path.{k + 1}"
            norm = module.norm if k or norm_options(module.norm)[0] == "batch" else ""
            weights |= _unit(norm, source, f"path_{i}/unit_{k}")
    for k in range(len(module.joined) + 1):
        weights |= _unit(module.norm, f"fully_connected.{k}", f"joined_{k}")
    return Recipe(module, image, weights, unused=monai.is_unused)


def _unit(norm: NormSpec, source: str, target: str) -> dict[str, Weight]:
    weights = monai.norm(norm, f"{source}.bn", f"{target}/norm")
    weights[f"{source}.prelu.weight"] = Weight(f"params/{target}/slope")
    weights[f"{source}.conv.weight"] = Weight(f"params/{target}/kernel", layout.CONV)
    return weights
