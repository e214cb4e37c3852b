"""Scoring label maps, file by file, against DeepMind's surface-distance and nnU-Net's evaluation.

    python tools/bench_evaluate.py [--cases 8] [--size 512] [--slices 32] [--peer-python PATH]

Both sides read the same pairs of NIfTI files of generated heads. Ours gives every row of
`cases.csv`: overlap, distances of surfaces, volumes and lesions, of each class and of all as one.
The peers give less, so that each is a job of its own: `surfaces` is Dice, the 95 % distance and the
surface Dice of every class by DeepMind's package, `overlap` is nnU-Net's `compute_metrics`. Beside
the times stands how far distances and surface Dice of the two lie apart.

PATH has surface-distance and nnunetv2; "none" measures ours alone.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import bench_pair
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
CLASSES = ("background", "EDH", "IPH", "IVH", "SAH", "SDH")
NSD_MM = 2.0
JOBS = ("surfaces", "overlap")


def main() -> None:
    """Runs ours as a worker, or both sides and prints how they compare."""
    args = parse(sys.argv[1:])
    if args.worker:
        bench_pair.serve(functools.partial(setup, args), lambda: None)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_pairs(args, root)
        options, peer = [*sys.argv[1:], "--folder", folder], None
        ours = bench_pair.Worker(sys.executable, HERE / "bench_evaluate.py", options)
        if args.peer_python != "none":
            peer = bench_pair.Worker(args.peer_python, HERE / "bench_evaluate_peer.py", options)
        print(f"{bench_pair.processor()}; heads of {args.slices} x {args.size} x {args.size}")
        found = {}
        for job in JOBS:
            turns = bench_pair.take_turns(ours, peer, job, args.rounds)
            found[job] = bench_pair.summarize(turns)
            bench_pair.show(f"{args.cases} cases, {job}", found[job])
        ours.close()
        if peer is not None:
            peer.close()
            found["differences"] = differences(root)
            print("largest differences: {hd95_mm:.1e} mm, {nsd:.1e}".format(**found["differences"]))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line, which both workers get too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def make_pairs(args: argparse.Namespace, root: Path) -> None:
    """References, and predictions that miss a slice and lie a few voxels off."""
    from bhsd_jax.ct import nifti
    from bhsd_jax.phantom.case import Options, make_case
    from bhsd_jax.volume import Volume

    affine = np.zeros((4, 4))
    spacing_mm = (5.0, *(2 * (220.0 / args.size,)))
    affine[[2, 1, 0, 3], range(4)] = *spacing_mm, 1
    affine[:2] *= -1
    for index in range(args.cases):
        options = Options(size=args.size, slices=args.slices, classes=(1, 2, 3, 4, 5))
        label = make_case(index, options)[1]
        moved = np.roll(label, (0, 2, -1), (0, 1, 2))
        moved[int(np.flatnonzero(label.any((1, 2)))[0])] = 0
        for part, voxels in (("reference", label), ("predicted", moved)):
            name = f"head_{index}"
            nifti.write_volume(root / part / f"{name}.nii.gz", Volume(voxels, affine, name))


def names(folder: str) -> list[str]:
    """Of the cases."""
    return sorted(path.name for path in (Path(folder) / "reference").glob("*.nii.gz"))


def setup(args: argparse.Namespace) -> tuple[dict, bench_pair.Jobs]:
    """One case is scored before the clock starts."""
    from bhsd_jax.verbs.scoring import Comparison, score_case

    root = Path(args.folder)

    def score(name: str) -> list[tuple[float, float]]:
        job = Comparison(
            case=name,
            patient=name,
            predicted=root / "predicted" / name,
            reference=root / "reference" / name,
            image=None,
            classes=CLASSES,
            modality="ct",
            binary=False,
            nsd_mm=NSD_MM,
            baseline=False,
        )
        return [(row.hd95_mm, row.nsd) for row in score_case(job).rows]

    def every() -> None:
        np.save(root / "ours.npy", [score(name) for name in names(args.folder)])

    score(names(args.folder)[0])
    return {}, dict.fromkeys(JOBS, every)


def differences(root: Path) -> dict[str, float]:
    """The largest between ours and DeepMind's, of the classes that both masks have."""
    ours, theirs = (np.load(root / f"{side}.npy") for side in ("ours", "peer"))
    finite = np.isfinite(ours) & np.isfinite(theirs)
    apart = np.where(finite, np.abs(np.where(finite, ours - theirs, 0)), 0).max((0, 1))
    return {"hd95_mm": float(apart[0]), "nsd": float(apart[1])}


if __name__ == "__main__":
    main()
