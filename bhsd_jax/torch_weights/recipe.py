"""The linen twin of a network of PyTorch, and where its weights go.

A network's file in this folder names its classes in `REFERENCES` and has a function
`from_torch(reference, constructor) -> Recipe`. It is found by existing. Where it names the twins in
`MODULES`, its `recipe(module, channels) -> Recipe` tells the names of a network that there is.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bhsd_jax.build import names
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights.layout import Weight

_PACKAGE = "bhsd_jax.torch_weights"


@dataclass(frozen=True)
class Recipe:
    """A network with PyTorch's names for its variables."""

    module: nn.Module
    image: tuple[int, ...]  # [B D H W C] of the smallest input; gives the shapes of the variables
    weights: Mapping[str, Weight]  # by PyTorch name
    # Another name of a shared tensor -> the name in `weights`.
    canonical: Callable[[str], str] = str
    unused: Callable[[str], bool] = lambda name: False  # buffers, and weights without influence
    # A state dict of the names in `weights` -> one with every name that PyTorch's own has.
    completed: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict


def references() -> Mapping[str, ModuleType]:
    """The file of every class of PyTorch that there is one for, by the name of the class."""
    files = [importlib.import_module(f"{_PACKAGE}.{name}") for name in names(_PACKAGE)]
    return {name: file for file in files for name in getattr(file, "REFERENCES", ())}


def recipe_of(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """Looks the class up; what follows a "/" in its name is a variant.

    Raises:
        ValueError: If the reference or an argument of its constructor is not supported.
    """
    file = references().get(reference.partition("/")[0])
    if file is None:
        raise UserError(
            f"no importer for reference {reference!r}; there is one for {', '.join(references())}"
        )
    return file.from_torch(reference, constructor)


def recipe_for(module: nn.Module, channels: int) -> Recipe:
    """PyTorch's names for the variables of a network that there is.

    Raises:
        ValueError: If no file in this folder has its class among its `MODULES`.
    """
    for file in dict.fromkeys(references().values()):
        if type(module) in getattr(file, "MODULES", ()):
            return file.recipe(module, channels)
    raise UserError(f"{type(module).__name__}: no network of PyTorch is known to be its twin")


def shapes_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Of every variable, by path."""
    image = jax.ShapeDtypeStruct(recipe.image, jnp.float32)
    init = functools.partial(recipe.module.init, train=False)
    tree = jax.eval_shape(init, jax.random.key(0), image)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape for p, leaf in leaves}
