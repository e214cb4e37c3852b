"""PyTorch weights to linen variables. NumPy in, NumPy out; PyTorch itself is not needed."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights.layout import Weight
from bhsd_jax.torch_weights.recipe import Recipe, recipe_of, shapes_of

# Of DistributedDataParallel, of torch.compile, and what training scripts call their network.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")


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
    arrays, problems = _collect(recipe, of_network(recipe, state))
    flat = {}
    for name, weight in recipe.weights.items():
        if name not in arrays:
            problems.append(f"missing {name}")
            continue
        value, want = laid_out(weight, arrays[name]), shapes[weight.path]
        if value.shape != want:
            problems.append(f"{name}: axes reordered it is {value.shape}, but must be {want}")
        flat[tuple(weight.path.split("/"))] = np.ascontiguousarray(value, dtype=np.float32)
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{reference}: these weights do not fit its constructor:\n  {listed}")
    return recipe.module, traverse_util.unflatten_dict(flat)


def of_network(recipe: Recipe, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the network alone, without the prefixes of what it was wrapped in.

    Lightning calls a network what the module that trains it does, `_model.` say, and keeps weights
    of its loss beside it. Only where one prefix leads to all of the network's weights is it taken.
    """
    plain = unwrapped(state)
    wanted = set(recipe.weights)
    if not wanted or wanted & {recipe.canonical(name) for name in plain}:
        return plain
    first = next(iter(recipe.weights))
    found = {}
    for prefix in {name[: -len(first)] for name in plain if name.endswith(f".{first}")}:
        own = {n.removeprefix(prefix): v for n, v in plain.items() if n.startswith(prefix)}
        if wanted <= {recipe.canonical(name) for name in own}:
            found[prefix] = own
    if len(found) > 1:
        raise UserError(
            f"the file has several networks, {', '.join(sorted(found))}; save the weights of one "
            "alone: torch.save(network.state_dict(), ...)"
        )
    return next(iter(found.values()), plain)


def unwrapped(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict without the prefixes of wrappers around the whole network, however nested."""
    unwrapped = dict(state)
    for wrapper in _WRAPPERS * len(_WRAPPERS):
        if unwrapped and all(name.startswith(wrapper) for name in unwrapped):
            unwrapped = {name.removeprefix(wrapper): value for name, value in unwrapped.items()}
    return unwrapped


def _collect(
    recipe: Recipe, state: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors under their canonical names, and what is wrong with the names."""
    arrays: dict[str, np.ndarray] = {}
    problems = []
    for name, value in state.items():
        main = recipe.canonical(name)
        if main not in recipe.weights:
            if not recipe.unused(main):
                problems.append(f"unknown {name}")
        elif main in arrays and not np.array_equal(arrays[main], value):
            problems.append(f"{name} differs from the same tensor under another name, {main}")
        else:
            arrays[main] = np.asarray(value)
    return arrays, problems


def laid_out(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    """A tensor with its axes in linen's order; one with another number of axes as it is."""
    try:
        return weight.layout.to_linen(tensor)
    except ValueError:  # another number of axes; reported as a wrong shape
        return tensor
