"""PyTorch weights to linen variables. NumPy in, NumPy out; PyTorch itself is not needed.

A backbone's file says how its reference names and orders weights: a function
`from_torch(reference, constructor) -> Recipe`. To add one, write that function and its row here.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bhsd_jax.platform.errors import UserError

REFERENCES = {  # name of the reference (before any "/") -> file in models/
    "PlainConvUNet": "nnunet_torch",
    "ResidualEncoderUNet": "nnunet_torch",
    "UNETR": "unetr",
    "SwinUNETR": "swin_unetr",
    "CoTr": "cotr",
    "nnFormer": "nnformer",
}
# Of DistributedDataParallel, of torch.compile, and what training scripts call their network.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")


@dataclass(frozen=True)
class Weight:
    """Where one PyTorch tensor goes, and how its axes are reordered on the way."""

    path: str  # "params/encoder_0/conv_0/conv/kernel"
    layout: Callable[[np.ndarray], np.ndarray] = np.asarray


@dataclass(frozen=True)
class Recipe:
    """What a backbone's file knows of its reference."""

    module: nn.Module
    image: tuple[int, ...]  # [B D H W C] of the smallest input; gives the shapes of the variables
    weights: Mapping[str, Weight]  # by PyTorch name
    canonical: Callable[[str], str] = (
        str  # another name of a shared tensor -> the name in `weights`
    )
    unused: Callable[[str], bool] = lambda name: False  # buffers, and weights without influence


def conv(weight: np.ndarray) -> np.ndarray:
    """(out, in, D, H, W) -> [D H W in out]."""
    return weight.transpose(2, 3, 4, 1, 0)


def conv_transpose(weight: np.ndarray) -> np.ndarray:
    """(in, out, D, H, W) -> [D H W in out]; not mirrored, see `models.conv.conv_transpose`."""
    return weight.transpose(2, 3, 4, 0, 1)


def linear(weight: np.ndarray) -> np.ndarray:
    """(out, in) -> [in out]."""
    return weight.T


def load(
    reference: str, constructor: Mapping[str, Any], state: Mapping[str, np.ndarray]
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the linen twin of a PyTorch network and its variables, float32 NumPy arrays.

    `module.apply(variables, image, train=False)` gives the reference's outputs in its order,
    channels last. A tensor stored under several names must be the same under each.

    Raises:
        ValueError: If the reference or an argument of its constructor is not supported, or the
            tensors do not fit; then one message names every unknown, missing, or misshapen one.
    """
    recipe = recipe_of(reference, constructor)
    shapes = shapes_of(recipe)
    paths = {weight.path for weight in recipe.weights.values()}
    assert paths == set(shapes), f"{reference}: from_torch misses {sorted(paths ^ set(shapes))}"
    found, problems = _collect(recipe, _unwrapped(state))
    flat = {}
    for name, weight in recipe.weights.items():
        if name not in found:
            problems.append(f"missing {name}")
            continue
        value, want = _laid_out(weight, found[name]), shapes[weight.path]
        if value.shape != want:
            problems.append(f"{name}: axes reordered it is {value.shape}, but must be {want}")
        flat[tuple(weight.path.split("/"))] = np.ascontiguousarray(value, dtype=np.float32)
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{reference}: these weights do not fit its constructor:\n  {listed}")
    return recipe.module, traverse_util.unflatten_dict(flat)


def recipe_of(reference: str, constructor: Mapping[str, Any]) -> Recipe:
    """The linen twin of a PyTorch network, and where its weights go.

    Raises:
        ValueError: If the reference or an argument of its constructor is not supported.
    """
    module = REFERENCES.get(reference.partition("/")[0])
    if module is None:
        raise UserError(
            f"no importer for reference {reference!r}; there is one for {', '.join(REFERENCES)}"
        )
    return importlib.import_module(f"bhsd_jax.models.{module}").from_torch(reference, constructor)


def shapes_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Of every variable, by path."""
    image = jax.ShapeDtypeStruct(recipe.image, jnp.float32)
    init = functools.partial(recipe.module.init, train=False)
    tree = jax.eval_shape(init, jax.random.key(0), image)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape for p, leaf in leaves}


def _unwrapped(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the prefixes of wrappers around the whole network, however nested."""
    unwrapped = dict(state)
    for wrapper in _WRAPPERS * len(_WRAPPERS):
        if unwrapped and all(name.startswith(wrapper) for name in unwrapped):
            unwrapped = {name.removeprefix(wrapper): value for name, value in unwrapped.items()}
    return unwrapped


def _collect(
    recipe: Recipe, state: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors under their canonical names, and what is wrong with the names."""
    found: dict[str, np.ndarray] = {}
    problems = []
    for name, value in state.items():
        main = recipe.canonical(name)
        if main not in recipe.weights:
            if not recipe.unused(main):
                problems.append(f"unknown {name}")
        elif main in found and not np.array_equal(found[main], value):
            problems.append(f"{name} differs from the same tensor under another name, {main}")
        else:
            found[main] = np.asarray(value)
    return found, problems


def _laid_out(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    try:
        return weight.layout(tensor)
    except ValueError:  # another number of axes; reported as a wrong shape
        return tensor
