"""Dice of written label maps, with nibabel and numpy alone, and how two sides compare by it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

_DRAWS = 10_000


def score(folder: Path, truths: Path, cases: Sequence[str], classes: Sequence[int]) -> np.ndarray:
    """Dice of every case and class, [cases classes]; 1 where neither map has the class.

    Raises:
        ValueError: If a label map does not lie on the voxels of its truth.
    """
    rows = []
    for case in cases:
        said, true = (nib.load(place / f"{case}.nii.gz") for place in (folder, truths))
        if said.shape != true.shape or not np.allclose(said.affine, true.affine, atol=1e-3):
            raise ValueError(f"{folder / case}: other voxels than its truth's")
        a, b = (np.asarray(image.dataobj) for image in (said, true))
        rows.append([dice(a == value, b == value) for value in classes])
    return np.array(rows)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks; 1 where both are empty."""
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else 1.0


def print_curves(
    runs: Path,
    curves: Mapping[str, Mapping[int, np.ndarray]],
    classes: Mapping[int, str],
    count: int,
) -> None:
    """A line per run and step: Dice x 100, and the CPU seconds that the training took until then.

    Then the CPU seconds until each whole multiple of 5 points, on straight lines between steps.
    """
    print(f"\nthe first {count} validation cases\nrun                step   Dice", end="")
    print("".join(f"{name:>11}" for name in classes.values()), "  CPU s  ms a step")
    for name, curve in curves.items():
        spent = _spent(runs / name)
        for step, dice in curve.items():
            each = "".join(f"{100 * value:>11.2f}" for value in dice.mean(0))
            cost = f"{spent[step]:>8.1f} {1000 * spent[step] / step:>10.1f}"
            print(f"{name:<17} {step:>5} {100 * dice.mean():>6.2f}{each}{cost}")
    print("\nCPU s of the training until a Dice of")
    levels = range(5, 100, 5)
    for name, curve in curves.items():
        spent = _spent(runs / name)
        reached = time_to(
            [spent[step] for step in curve], [100 * dice.mean() for dice in curve.values()], levels
        )
        told = "  ".join(f"{a}: {b:.0f}" for a, b in zip(levels, reached, strict=True) if b)
        print(f"{name:<17} {told}")
    print("\nall of it, predictions included")
    for name in curves:
        print(f"{name:<17} {json.loads((runs / name / 'done.json').read_text())}")


def _spent(run: Path) -> dict[int, float]:
    points = json.loads((run / "curve.json").read_text())
    return {point["step"]: point["cpu_s"] for point in points}


def time_to(
    seconds: Sequence[float], dice: Sequence[float], levels: Sequence[float]
) -> list[float | None]:
    """When a curve first reaches each level, on straight lines between its points.

    None where it never does, or has reached it by its first point, before which nothing is known.
    """
    found: list[float | None] = []
    for level in levels:
        first = next((i for i, value in enumerate(dice) if value >= level), 0)
        if not first:
            found.append(None)
            continue
        share = (level - dice[first - 1]) / (dice[first] - dice[first - 1])
        found.append(seconds[first - 1] + share * (seconds[first] - seconds[first - 1]))
    return found


def print_difference(ours: np.ndarray, peer: np.ndarray, classes: Mapping[int, str]) -> None:
    """The difference of mean Dice, [seeds cases classes] each, in points, and its intervals."""
    print(f"\nDice x 100 after the last step, {ours.shape[0]} seeds, {ours.shape[1]} cases")
    for name, part in [("mean", slice(None)), *((c, i) for i, c in enumerate(classes.values()))]:
        a, b = (
            100 * side[..., part].reshape(*side.shape[:2], -1).mean(-1) for side in (ours, peer)
        )
        cases, both = (interval(a, b, seeds=seeds) for seeds in (False, True))
        means = " ".join(f"{x:.2f}" for x in a.mean(1)), " ".join(f"{x:.2f}" for x in b.mean(1))
        print(
            f"{name:<10} ours {a.mean():.2f} ({means[0]})   nnU-Net {b.mean():.2f} ({means[1]})   "
            f"difference {a.mean() - b.mean():+.2f}, 95 % [{cases[0]:+.2f}, {cases[1]:+.2f}] over "
            f"cases, [{both[0]:+.2f}, {both[1]:+.2f}] over cases and seeds"
        )


def interval(ours: np.ndarray, peer: np.ndarray, *, seeds: bool) -> tuple[float, float]:
    """95 % bootstrap interval of the difference of means, [seeds cases] each.

    Cases are drawn once for both sides, which makes it paired. With `seeds`, each side's trainings
    are drawn as well, apart from each other since a seed means nothing across the sides.
    """
    rng = np.random.default_rng(0)
    count, cases = ours.shape
    drawn = []
    for _ in range(_DRAWS):
        pick = rng.integers(cases, size=cases)
        rows = [rng.integers(count, size=count) if seeds else np.arange(count) for _ in range(2)]
        drawn.append(ours[rows[0]][:, pick].mean() - peer[rows[1]][:, pick].mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
