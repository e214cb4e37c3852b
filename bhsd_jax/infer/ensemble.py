"""Logits of several groups of networks on one prepared scan to those of all of them together."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float


def mean_of_probabilities(
    parts: Iterable[tuple[Float[np.ndarray, "K D H W"], int]],
) -> Float[np.ndarray, "K D H W"]:
    """The logarithm of the mean of the parts' softmax, each as often as it stands for networks.

    What `SlidingWindow.logits` does with the networks of one window, for those of several. One
    part is returned as it is. Parts are taken one after the other, so that only two are in memory.

    Raises:
        ValueError: If there is no part.
    """
    total, count, first = None, 0, None
    for logits, networks in parts:
        if total is None and first is None:
            first, count = logits, networks
            continue
        if total is None:
            assert first is not None  # the part before this one
            total, first = _softmax(first) * count, None
        total += _softmax(logits) * networks
        count += networks
    if total is None:
        if first is None:
            raise ValueError("mean of probabilities: no networks")
        return first
    return np.log(np.maximum(total / count, np.finfo(np.float32).tiny))


def mean_of_logits(
    parts: Iterable[tuple[Float[np.ndarray, "K D H W"], int]],
) -> Float[np.ndarray, "K D H W"]:
    """The mean of the parts, each as often as it stands for networks; as nnU-Net has it for folds.

    Raises:
        ValueError: If there is no part.
    """
    total, count = None, 0
    for logits, networks in parts:
        total = logits * networks if total is None else total + logits * networks
        count += networks
    if total is None:
        raise ValueError("mean of logits: no networks")
    return total / np.float32(count)


MEANS = {"probabilities": mean_of_probabilities, "logits": mean_of_logits}


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=0))
    return raised / raised.sum(axis=0)
