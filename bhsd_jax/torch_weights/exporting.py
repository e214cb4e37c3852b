"""Linen variables to PyTorch weights: the way of `importing`, backwards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights.recipe import recipe_of, shapes_of


def dump(
    reference: str, constructor: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A state dict, float32, that `importing.load` turns into the same variables.

    For nnU-Net's networks every name is there that PyTorch's own has, so that
    `load_state_dict(strict=True)` takes it; for the others tensors without influence are left out.

    Raises:
        ValueError: If reference or constructor are not supported, or the variables not its own.
    """
    recipe = recipe_of(reference, constructor)
    flat: Any = traverse_util.flatten_dict(variables, sep="/")
    shapes = shapes_of(recipe)
    odd = [name for name in flat | shapes if name not in flat or name not in shapes]
    odd += [n for n, shape in shapes.items() if n not in odd and np.shape(flat[n]) != shape]
    if odd:
        raise UserError(f"{reference}: variables do not fit its constructor: {', '.join(odd)}")
    state = {
        name: np.ascontiguousarray(
            weight.layout.to_torch(np.asarray(flat[weight.path], np.float32))
        )
        for name, weight in recipe.weights.items()
    }
    return recipe.completed(state)
