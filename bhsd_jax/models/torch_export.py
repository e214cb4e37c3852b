"""Linen variables to PyTorch weights: the way of `torch_import`, backwards."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from bhsd_jax.models import nnunet_torch, torch_import, unetr, unetr_torch
from bhsd_jax.platform.errors import UserError

Layout = Callable[[np.ndarray], np.ndarray]

_BACK: dict[Callable[..., np.ndarray], Layout] = {
    np.asarray: np.asarray,
    torch_import.conv: lambda kernel: kernel.transpose(4, 3, 0, 1, 2),
    torch_import.conv_transpose: lambda kernel: kernel.transpose(3, 4, 0, 1, 2),
    torch_import.linear: lambda kernel: kernel.T,
    unetr_torch.pointwise: lambda kernel: kernel.T[..., None, None, None],
    unetr.block_kernel: lambda kernel: kernel.reshape(-1, kernel.shape[-1]).T,
}


def dump(
    reference: str, constructor: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A state dict, float32, that `torch_import.load` turns into the same variables.

    For nnU-Net's networks every name is there that PyTorch's own has, so that
    `load_state_dict(strict=True)` takes it; for the others tensors without influence are left out.

    Raises:
        ValueError: If reference or constructor are not supported, or the variables not its own.
    """
    recipe = torch_import.recipe_of(reference, constructor)
    flat: Any = traverse_util.flatten_dict(variables, sep="/")
    shapes = torch_import.shapes_of(recipe)
    odd = [name for name in flat | shapes if name not in flat or name not in shapes]
    odd += [n for n, shape in shapes.items() if n not in odd and np.shape(flat[n]) != shape]
    if odd:
        raise UserError(f"{reference}: variables do not fit its constructor: {', '.join(odd)}")
    state = {
        name: np.ascontiguousarray(_back(weight.layout)(np.asarray(flat[weight.path], np.float32)))
        for name, weight in recipe.weights.items()
    }
    if reference in nnunet_torch.REFERENCES:
        return nnunet_torch.completed(recipe.module, state)
    return state


def _back(layout: Layout) -> Layout:
    return _BACK[layout.func if isinstance(layout, functools.partial) else layout]
