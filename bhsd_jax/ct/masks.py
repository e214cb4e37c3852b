"""One label map of several, and label maps with other class values."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.platform.errors import UserError

WAYS = ("first", "majority", "union", "intersection")


def reclass(
    label: UInt8[np.ndarray, "D H W"], values: Sequence[int], num_classes: int | None, name: str
) -> UInt8[np.ndarray, "D H W"]:
    """Puts `values[v]` for v; () changes nothing.

    Raises:
        Refusal: If the label holds a value that has no class.
    """
    known = values or range(256 if num_classes is None else num_classes)
    if int(label.max()) >= len(known):
        odd = [value for value in np.unique(label).tolist() if value >= len(known)]
        raise Refusal(
            Kind.MASK_VALUES,
            f"{name}: label values {', '.join(map(str, odd[:10]))} have no class; the label map "
            f"knows 0..{len(known) - 1}",
        )
    return np.asarray(known, np.uint8)[label]


def combine(labels: Sequence[UInt8[np.ndarray, "D H W"]], way: str) -> UInt8[np.ndarray, "D H W"]:
    """One label map of several raters', voxel by voxel.

    "first" takes the first; "majority" the class with most votes, background being one, the lowest
    in a tie; "union" the foreground class with most votes wherever there is any; "intersection"
    the class that all agree on, else background.

    Raises:
        ValueError: If the way is another word.
    """
    if way not in WAYS:
        raise UserError(f"masks are combined by {', '.join(WAYS)}; got {way!r}")
    first = labels[0]
    if way == "first" or len(labels) == 1:
        return first
    if way == "intersection":
        agreed = np.all([label == first for label in labels[1:]], axis=0)
        return np.where(agreed, first, 0).astype(np.uint8)
    best: np.ndarray = np.zeros(first.shape, np.uint8)
    most: np.ndarray = np.zeros(first.shape, np.uint8)
    if way == "majority":
        most += np.sum([label == 0 for label in labels], axis=0, dtype=np.uint8)
    for index in range(1, max(int(label.max()) for label in labels) + 1):
        votes = np.sum([label == index for label in labels], axis=0, dtype=np.uint8)
        np.copyto(best, index, where=votes > most)
        np.maximum(most, votes, out=most)
    return best
