"""One process decides, and all processes of a run do the same."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bhsd_jax.platform.errors import UserError

_MOST_BYTES = 2000  # of what a process says to the others


def agree(decide: Callable[[], Any]) -> Any:
    """What process 0 decides, in every process; as JSON has it where there are several.

    Raises:
        ValueError: With the words of its ValueError or OSError.
    """
    if jax.process_count() == 1:
        return decide()
    told, failure = {}, None
    if jax.process_index() == 0:
        try:
            told["value"] = decide()
        except (ValueError, OSError) as error:
            told["error"], failure = str(error), error
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    told = json.loads(np.asarray(text, np.uint8).tobytes())
    if "error" in told:
        raise failure or UserError(told["error"])
    return told["value"]


def gather_words(text: str) -> list[str]:
    """What every process says, in every process; by their numbers, and cut where it is long."""
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(_MOST_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MOST_BYTES], np.uint8)
    mine[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(mine), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
