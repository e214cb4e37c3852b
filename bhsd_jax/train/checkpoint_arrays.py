"""What Orbax does for a checkpoint: writes the trees of a step, and reads them back."""

import json
import logging
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bhsd_jax.types import Params, TrainState


def saver() -> ocp.AsyncCheckpointer:
    """Writes a folder in the background, from all processes at once.

    A folder without its commit mark is unfinished, whatever it holds.
    """
    logging.getLogger("absl").addFilter(_is_no_failed_save)
    mode = ocp.options.AtomicityMode.COMMIT_FILE
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    )


def restore(path: Path, abstract: TrainState) -> TrainState:
    """The state of a step, on the shardings of `abstract`.

    Raises:
        ValueError: If it is of another network or optimizer; names what differs.
    """
    state: Any = path / "state"  # Any: Orbax declares a kind of path of its own
    with closing(ocp.StandardCheckpointHandler()) as handler:
        _require_fit(handler.metadata(state).tree, abstract, path)
        try:
            return handler.restore(state, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: it is whole, but cannot be read: {cause(error)}") from error


def read(path: Path, names: Sequence[str]) -> dict[str, Params]:
    """Those of the trees that a checkpoint has."""
    state: Any = path / "state"
    with closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(state).tree
        wanted = {name: tree[name] for name in names if tree.get(name) is not None}
        if not wanted:
            return {}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=host, partial_restore=True)
        return handler.restore(state, args=args)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON part of a step."""
    return json.loads((path / "metadata").read_text())


def cause(error: BaseException) -> str:
    """What the operating system said, out of what TensorStore and Orbax made of it."""
    text = str(error)
    if found := re.search(r"OS error \d+: ([^\]\n]+)", text):
        return found[1]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})"
    return (text.splitlines() or [type(error).__name__])[0]


def _require_fit(stored: Params, abstract: TrainState, path: Path) -> None:
    """Refuses the state of another network or optimizer, naming what differs."""
    there, here = _leaves(stored), _leaves(abstract)
    odd = [name for name in here | there if here.get(name) != there.get(name)]
    if odd:
        told = [
            f"{name} is {there.get(name, 'not there')}, not {here.get(name, 'there')}"
            for name in odd[:3]
        ]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            f"{path} does not fit this config's network or optimizer: {'; '.join(told)}{more}; "
            "use another --workdir or the config the run began with"
        )


def _leaves(tree: Params) -> dict[str, str]:
    """Type and shape by path; of a random key only that it is there."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_name(part) for part in path)
        is_key = name == "key" or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[name] = "a key" if is_key else f"{leaf.dtype}{list(leaf.shape)}"
    return found


def _name(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save with its traceback; the caller has the same in one line."""
    return not (record.exc_info and "orbax" in record.pathname)
