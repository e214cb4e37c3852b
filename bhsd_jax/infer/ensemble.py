"""Logits of several groups of networks on one prepared scan to those of all of them together."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy import special


def mean_of_probabilities(
    parts: Iterable[tuple[Float[np.ndarray, "K D H W"], int]],
) -> Float[np.ndarray, "K D H W"]:
    """The logarithm of the mean of the parts' softmax, each as often as it stands for networks.

    What `SlidingWindow.logits` does with the networks of one window, for those of several. One
    part is returned as it is. Parts are taken one after the other, so that at most three arrays of
    their size are in memory: the sum, a part, and the next one.

    Raises:
        ValueError: If there is no part.
    """
    return _mean_of(parts, partial(special.softmax, axis=0), _log)


def mean_of_regions(
    parts: Iterable[tuple[Float[np.ndarray, "R D H W"], int]],
) -> Float[np.ndarray, "R D H W"]:
    """As `mean_of_probabilities`, for regions, whose probabilities are a sigmoid each."""
    return _mean_of(parts, special.expit, _logit)


def _mean_of(
    parts: Iterable[tuple[np.ndarray, int]],
    probability: Callable[[np.ndarray], np.ndarray],
    inverse: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    total, count, first = None, 0, None
    for logits, networks in parts:
        if total is None and first is None:
            first, count = logits, networks
            continue
        if total is None:
            assert first is not None  # the part before this one
            total = np.zeros_like(first)
            _add(total, probability, first, count)
            first = None
        _add(total, probability, logits, networks)
        count += networks
    if total is None:
        if first is None:
            raise ValueError("mean of probabilities: no networks")
        return first
    for plane in range(total.shape[1]):
        total[:, plane] = inverse(total[:, plane] / count)
    return total


def _add(
    total: np.ndarray,
    probability: Callable[[np.ndarray], np.ndarray],
    logits: np.ndarray,
    networks: int,
) -> None:
    """Plane by plane, since every step of a softmax makes an array."""
    for plane in range(total.shape[1]):
        total[:, plane] += probability(logits[:, plane]) * networks


def mean_of_logits(
    parts: Iterable[tuple[Float[np.ndarray, "K D H W"], int]],
) -> Float[np.ndarray, "K D H W"]:
    """The mean of the parts, each as often as it stands for networks; as nnU-Net has it for folds.

    Raises:
        ValueError: If there is no part.
    """
    total, count = None, 0
    for logits, networks in parts:
        if total is None:
            total = logits * networks
        else:
            _add(total, np.positive, logits, networks)
        count += networks
    if total is None:
        raise ValueError("mean of logits: no networks")
    total /= np.float32(count)
    return total


MEANS = {"probabilities": mean_of_probabilities, "logits": mean_of_logits}


def mean_for(combine: str, *, regions: bool) -> Callable[..., np.ndarray]:
    """The function of `MEANS` by its name, for classes or for regions."""
    return mean_of_regions if regions and combine == "probabilities" else MEANS[combine]


def _log(mean: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(mean, np.finfo(np.float32).tiny))


def _logit(mean: np.ndarray) -> np.ndarray:
    least = np.finfo(np.float32).eps  # so that the logits stay finite
    return special.logit(np.clip(mean, least, 1 - least))
