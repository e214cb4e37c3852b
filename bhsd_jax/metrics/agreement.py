"""How far several answers to one scan agree. NumPy only."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool


def mean_pairwise_dice(masks: Sequence[Bool[np.ndarray, "*_"]]) -> float:
    """Mean Dice over all pairs; two empty masks agree: 1.

    Raises:
        ValueError: If there are fewer than two.

    Source: Roy et al., NeuroImage 195 (2019), section 2.4: their mean Dice of sample pairs.
    """
    if len(masks) < 2:
        raise ValueError(f"agreement: want two masks or more; got {len(masks)}")
    return float(np.mean([_dice(one, other) for one, other in itertools.combinations(masks, 2)]))


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
