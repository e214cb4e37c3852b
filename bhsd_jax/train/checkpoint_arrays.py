"""What Orbax does for a checkpoint: writes the trees of a step, and reads them back."""

import errno
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Params, TrainState


def saver() -> ocp.AsyncCheckpointer:
    """Writes a tree into a folder in the background, from all processes at once."""
    _keep_quiet()
    mode = ocp.options.AtomicityMode.COMMIT_FILE
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(),
        # Where a folder that is made in the background cannot be made, Orbax's threads wait for it,
        # and with them the end of the process, for five minutes (0.12.8).
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
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
            raise UserError(f"{path}: it is whole, but cannot be read: {cause(error)}") from error


def read(path: Path, names: Sequence[str]) -> dict[str, Params]:
    """Trees of a checkpoint by name; those that it does not have are left out."""
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


def cause(error: BaseException) -> str:
    """What the operating system said, out of what TensorStore and Orbax made of it."""
    text = str(error)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
    for said in map(os.strerror, codes):
        if said in text:
            return said
    return (text.splitlines() or [type(error).__name__])[0]


def _require_fit(stored: Params, abstract: TrainState, path: Path) -> None:
    """Refuses the state of another network or optimizer, naming what differs."""
    saved, here = _leaves(stored), _leaves(abstract)
    odd = [name for name in here | saved if here.get(name) != saved.get(name)]
    if odd:
        told = [
            f"{name} is {saved.get(name, 'not there')}, not {here.get(name, 'there')}"
            for name in odd[:3]
        ]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(
            f"{path} does not fit this config's network or optimizer: {'; '.join(told)}{more}; "
            "use another --workdir or the config the run began with"
        )


def _leaves(tree: Params) -> dict[str, str]:
    """Type and shape by path; of a random key only that it is there."""
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_name(part) for part in path)
        is_key = name == "key" or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        kinds[name] = "a key" if is_key else f"{leaf.dtype}{list(leaf.shape)}"
    return kinds


def _name(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


@cache
def _keep_quiet() -> None:
    """Silences the tracebacks of a failed save: the caller gets the same error, in one line."""
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: not re.search("never retrieved(?s:.*)(orbax|OCDBT)", record.getMessage())
    )
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        # TensorStore reports to an event loop that Orbax has closed after the first error.
        if "Event loop is closed" not in str(what.exc_value):
            before(what)

    sys.unraisablehook = hook
