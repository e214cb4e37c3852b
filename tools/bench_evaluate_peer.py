"""The peers' side of `bench_evaluate.py`, which starts it; needs surface-distance and nnunetv2."""

import functools
import sys
from pathlib import Path

import bench_pair
import nibabel as nib
import numpy as np
import surface_distance
from bench_evaluate import CLASSES, NSD_MM, names, parse
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

VALUES = range(1, len(CLASSES))


def main() -> None:
    """Serves as the peer."""
    args = parse(sys.argv[1:])
    bench_pair.serve(functools.partial(setup, args), lambda: None)


def setup(args) -> tuple[dict, bench_pair.Jobs]:
    """One case is scored by both before the clock starts."""
    root, reader = Path(args.folder), SimpleITKIO()
    paths = [[root / part / name for part in ("reference", "predicted")] for name in names(root)]

    def surfaces(pairs=paths) -> None:
        np.save(root / "peer.npy", [_surfaces(*pair) for pair in pairs])

    def overlap(pairs=paths) -> None:
        for pair in pairs:
            compute_metrics(*map(str, pair), reader, list(VALUES))

    surfaces(paths[:1])
    overlap(paths[:1])
    return {}, {"surfaces": surfaces, "overlap": overlap}


def _surfaces(reference: Path, predicted: Path) -> list[tuple[float, float]]:
    true, said = nib.load(reference), nib.load(predicted)
    spacing_mm = tuple(map(float, true.header.get_zooms()))
    true, said = np.asarray(true.dataobj), np.asarray(said.dataobj)
    rows = []
    for value in VALUES:
        pair = true == value, said == value
        surface_distance.compute_dice_coefficient(*pair)
        found = surface_distance.compute_surface_distances(*pair, spacing_mm)
        rows.append(
            (
                surface_distance.compute_robust_hausdorff(found, 95),
                surface_distance.compute_surface_dice_at_tolerance(found, NSD_MM),
            )
        )
    return rows


if __name__ == "__main__":
    main()
