"""What slice labels could bring at most: from label maps, and the masks of the same scans.

A slice label says whether a slice shows a class. It mends two kinds of mistakes: voxels of a
class in slices that lack it, and slices that show a class of which nothing was found. Mistakes
inside a slice that rightly holds some of the class are beyond it. The table has Dice x 100 as it
is, with the first kind removed, and with the second kind drawn without a fault besides, for the
slices of every plane. A training that gains more has learned more than the labels say of these
scans.

Run:  python tools/slice_bound.py runs/a/predictions /data/Task04_Hippocampus/labelsTr --classes 1,2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from bench_dice import dice
from jaxtyping import Int

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis across it, in RAS order

Map = Int[np.ndarray, "X Y Z"]


def mend(said: Map, true: Map, value: int, axis: int) -> tuple[Map, Map]:
    """The mask of one class without what its slice labels forbid, and with what they miss.

    Both bool, of the shape of `said`. The second is the first with the true mask in every slice
    that shows the class and of which `said` has nothing.
    """
    mask, want = said == value, true == value
    across = tuple(other for other in range(3) if other != axis)
    shown = want.any(across, keepdims=True)
    allowed = mask & shown
    missed = shown & ~mask.any(across, keepdims=True)
    return allowed, np.where(missed, want, allowed)


def bounds(pairs: Sequence[tuple[Map, Map]], classes: Sequence[int], axis: int) -> np.ndarray:
    """Mean Dice over pairs that have the class in either map: [3 kinds, classes]."""
    rows = np.full((len(pairs), 3, len(classes)), np.nan)
    for row, (said, true) in zip(rows, pairs, strict=True):
        for k, value in enumerate(classes):
            want = true == value
            if want.any() or (said == value).any():
                masks = (said == value, *mend(said, true, value, axis))
                row[:, k] = [dice(mask, want) for mask in masks]
    return np.nanmean(rows, 0)


def _load(path: Path) -> tuple[Map, np.ndarray]:
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).astype(np.int16), image.affine


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Bounds of what slice labels bring")
    parser.add_argument("predictions", type=Path, help="folder of label maps, *.nii.gz")
    parser.add_argument("references", type=Path, help="folder of masks of the same names")
    parser.add_argument("--classes", default="1", help="values of the classes, such as 1,2")
    given = parser.parse_args()
    if not all(value.strip().isdecimal() for value in given.classes.split(",")):
        parser.error(f"--classes: values of masks, such as 1,2; got {given.classes}")
    classes = [int(value) for value in given.classes.split(",")]
    names = sorted(path.name for path in given.predictions.glob("*.nii.gz"))
    pairs = []
    for name in names:
        if not (given.references / name).exists():
            parser.error(f"{given.references}: no mask {name}")
        (said, placed), (true, wanted) = (
            _load(folder / name) for folder in (given.predictions, given.references)
        )
        if said.shape != true.shape or not np.allclose(placed, wanted, atol=1e-3):
            parser.error(f"{name}: label map and mask lie on other voxels")
        pairs.append((said, true))
    if not pairs:
        parser.error(f"{given.predictions}: no *.nii.gz in it")
    print(f"{len(pairs)} scans, Dice x 100 of classes {given.classes}, mean in brackets")
    for plane, axis in PLANES.items():
        kinds = ("as it is", "absent classes removed", "missed slices drawn")
        for kind, scores in zip(kinds, 100 * bounds(pairs, classes, axis), strict=True):
            each = "  ".join(f"{value:.2f}" for value in scores)
            print(f"{plane:<9} {kind:<23} {each}  ({scores.mean():.2f})")


if __name__ == "__main__":
    main()
