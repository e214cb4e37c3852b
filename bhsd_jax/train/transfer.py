"""Weights of one training as the beginning of another: taken by name, where the shapes agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Params

_Flat = dict[tuple[str, ...], Any]


@dataclass(frozen=True)
class Transfer:
    """Parameters that begin with another network's, and what became of each."""

    params: Params
    taken: tuple[str, ...]  # names, "encoder_0/conv_0/kernel"
    drawn: tuple[str, ...]  # that stay as they were drawn: left on purpose, absent or of other size


def transfer(
    params: Params, given: Params, *, twins: Sequence[str] = (), leave: Sequence[str] = ()
) -> Transfer:
    """Replaces drawn parameters by those of one other network with equal names and shapes.

    Args:
        params: As drawn; a network, or one per twin.
        given: Of one network.
        twins: Keys of `params` that are networks of their own; each takes the same.
        leave: Beginnings of the names of modules that stay as drawn, such as "head".

    Raises:
        ValueError: If no parameter agrees: another kind of network.
    """
    theirs = _flat(given)
    found: _Flat = {}
    taken, drawn = [], []
    for path, own in _flat(params).items():
        name = path[1:] if twins else path
        other = theirs.get(name)
        fits = other is not None and other.shape == own.shape
        if fits and not any(name[0].startswith(start) for start in leave):
            found[path] = np.asarray(other, own.dtype)
            taken.append("/".join(path))
        else:
            found[path] = own
            drawn.append("/".join(path))
    if not taken:
        raise UserError(
            "train.weights: not one parameter has the name and the shape of one of this network; "
            f"theirs begin with {_some(theirs)}, ours with {_some(_flat(params))}"
        )
    return Transfer(traverse_util.unflatten_dict(found), tuple(taken), tuple(drawn))


def _flat(params: Params) -> _Flat:
    return dict(traverse_util.flatten_dict(params))


def _some(flat: _Flat) -> str:
    return ", ".join(f"{'/'.join(path)} {value.shape}" for path, value in sorted(flat.items())[:2])
