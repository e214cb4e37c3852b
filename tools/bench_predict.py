"""Files to files: `bhsd predict` against `nnUNetv2_predict`, each as a whole process, in turns.

    python tools/bench_predict.py [--volume 16,256,256] [--scans 5] [--peer-python PATH]

Both have the same network with the same drawn weights, ours as `tools/import_torch.py` would import
it, and predict the same generated head CTs, which have the plan's spacing unless `--zoom` says how
many times wider theirs is. Start, compiling, reading, the network, resampling and writing all
count. What ours has compiled is kept between runs as it is for users: the first run of each side is
told apart and is in no ratio. `--mirrors` averages over the eight mirrored versions, too. Memory is
the largest resident set of any process of a side: ours is one, the peer's are several.

`--peer-python` names an interpreter that has nnunetv2, with its commands beside it; "none" measures
ours alone. Of several GPUs both use the first one, or the first that CUDA_VISIBLE_DEVICES names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_pair
import numpy as np
from bench_networks import PRESETS, Preset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
SPACING_MM = (5.0, 0.9, 0.9)
NAME, CONFIGURATION = "Dataset001_Bench", "3d_fullres"
SIDES = ("ours", "peer")
_BACKGROUND = 9.0  # bias of its logits: one voxel in hundreds is then of another class


def main() -> None:
    """Measures, and prints a line per side, the ratio and how alike the label maps are."""
    args = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_scans(args, root)
        make_networks(args, root)
        sides = SIDES[: 1 + (args.peer_python != "none")]
        first = {side: turn(args, side, root) for side in sides}
        rounds = []
        for index in range(args.rounds):
            order = sides if index % 2 == 0 else sides[::-1]
            runs = {side: turn(args, side, root) for side in order}
            rounds.append(tuple(runs[side] for side in sides))
        found: dict[str, Any] = bench_pair.summarize(rounds) | {"first": first}
        title = f"{args.preset}, {args.scans} of {args.volume}, ours in {args.dtype}"
        print(f"{bench_pair.processor()}; {args.rounds} rounds")
        bench_pair.show(title + (", mirrored" if args.mirrors else ""), found)
        for side, run in first.items():
            print(
                f"  first run of {side}: {run['wall']:.4g} s wall, {run['cpu']:.4g} s of CPU time"
            )
        if len(sides) == 2:
            found["equal"] = agreement(root)
            print(f"  {found['equal']:.3%} of the labels are equal")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plain = [name for name, preset in PRESETS.items() if preset.family == "plain"]
    parser.add_argument("--preset", choices=plain, default="small")
    parser.add_argument("--volume", default="16,256,256", help="D,H,W of a scan")
    parser.add_argument("--scans", type=int, default=5)
    parser.add_argument("--zoom", type=float, default=1.0, help="spacing of scans over the plan's")
    parser.add_argument("--mirrors", action="store_true")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="ours")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args(words)


def make_scans(args: argparse.Namespace, root: Path) -> None:
    """The same files for both, under the names that each expects."""
    from bhsd_jax.ct import nifti
    from bhsd_jax.phantom.case import Options, make_case
    from bhsd_jax.volume import Volume

    depth, height, width = size(args)
    # From (d, h, w, 1) to mm: slices to the top, rows to the back, columns to the left.
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], range(4)] = *(mm * args.zoom for mm in SPACING_MM), 1
    affine[:2] *= -1
    for index in range(args.scans):
        head, _, _ = make_case(index, Options(size=max(height, width), slices=depth))
        voxels = head[:, :height, :width].astype(np.int16)
        for place in (f"images/head_{index}.nii.gz", f"peer/head_{index}_0000.nii.gz"):
            nifti.write_volume(root / place, Volume(voxels, affine, f"head_{index}"))


def make_networks(args: argparse.Namespace, root: Path) -> None:
    """The run that ours predicts with, and the peer's folder of a trained model."""
    from bhsd_jax.configs import common
    from bhsd_jax.torch_weights.weights_file import WeightsFile
    from bhsd_jax.verbs import import_weights

    preset = PRESETS[args.preset]
    model = root / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    (model / "fold_0").mkdir(parents=True)
    files = {"plans": plans(args, preset), "dataset": about(preset)}
    for name, content in files.items():
        (model / f"{name}.json").write_text(json.dumps(content))
    beside = {
        "init_args": {"configuration": CONFIGURATION, "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    path = model / "plans.json"  # the file beside which the others are looked for
    source = import_weights.from_nnunet(WeightsFile({}, beside), path)
    state = draw(source.reference, source.constructor)
    import_weights.write_run(common.get_config(), source, {"network": state}, root / "run")
    if args.peer_python != "none":
        np.savez(root / "weights.npz", **state)
        checkpoint = model / "fold_0" / "checkpoint_final.pth"
        command = [HERE / "bench_predict_peer.py", root / "weights.npz", checkpoint]
        subprocess.run([args.peer_python, *map(str, command), json.dumps(beside)], check=True)


def plans(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """nnU-Net's plans for such scans, with the preset's network in place of the planned one."""
    from bhsd_jax.nnunet import planner

    fraction = {"percentile_00_5": 0.0, "mean": 40.0, "std": 20.0, "percentile_99_5": 90.0}
    made = planner.make_plans(
        [SPACING_MM],
        [size(args)],
        modality="ct",
        num_classes=preset.classes,
        spacing_mm=SPACING_MM,
        foreground={"0": fraction},
        dataset=NAME,
    )
    settings = made["configurations"][CONFIGURATION]
    settings["patch_size"], settings["batch_size"] = preset.patch, preset.batch
    depth = len(preset.features)
    settings["architecture"]["arch_kwargs"] |= {
        "n_stages": depth,
        "features_per_stage": preset.features,
        "kernel_sizes": preset.kernels,
        "strides": preset.strides,
        "n_conv_per_stage": [2] * depth,
        "n_conv_per_stage_decoder": [2] * (depth - 1),
    }
    return made


def about(preset: Preset) -> dict[str, Any]:
    """nnU-Net's dataset.json."""
    labels = {"background": 0} | {f"class_{value}": value for value in range(1, preset.classes)}
    return {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }


def draw(reference: str, constructor: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights by PyTorch's names: kernels by He's law, norms that scale by one, no bias but one.

    The background's of every head leaves few voxels to the other classes, as in a scan. Without it
    the label map is noise of tens of thousands of lesions, which ours would measure one by one.
    """
    from flax import traverse_util

    from bhsd_jax.torch_weights import exporting
    from bhsd_jax.torch_weights.recipe import recipe_of, shapes_of

    random, classes = np.random.default_rng(0), constructor["num_classes"]

    def one(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if shape == (classes,) and path.endswith("bias"):
            return np.array([_BACKGROUND, *[0.0] * (classes - 1)], np.float32)
        if len(shape) == 1:
            return np.full(shape, float(path.endswith("scale")), np.float32)
        spread = np.sqrt(2 / np.prod(shape[:-1]))
        return random.normal(0, spread, shape).astype(np.float32)

    shapes = shapes_of(recipe_of(reference, constructor))
    flat = {path: one(path, shape) for path, shape in shapes.items()}
    return exporting.dump(reference, constructor, traverse_util.unflatten_dict(flat, sep="/"))


def turn(args: argparse.Namespace, side: str, root: Path) -> bench_pair.Run:
    """One whole process of a side, from files to files.

    Raises:
        SystemExit: If it fails; with what it printed last.
    """
    log = root / f"{side}.txt"
    begun = time.monotonic()
    from bhsd_jax.platform import machine

    with log.open("w") as out:
        child = subprocess.Popen(
            command(args, side, root),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | environment(args, root),
            cwd=HERE.parent,
        )
        _, status, used = os.wait4(child.pid, 0)
    wall = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"bench_predict: {side} failed:\n{log.read_text()[-2000:]}")
    peak = machine.resident_bytes(used.ru_maxrss)
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": peak}


def environment(args: argparse.Namespace, root: Path) -> dict[str, str]:
    """Variables of both sides: where nnU-Net looks for things, our cache, and one device."""
    found = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    found["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    if args.device == "cpu":
        return found | {"JAX_PLATFORMS": "cpu"}
    # Ours would share a scan among all that there are; the peer takes the first.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return found | {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0]}


def command(args: argparse.Namespace, side: str, root: Path) -> list[str]:
    """As a user would type it; nnU-Net's number of workers is its default."""
    if side == "ours":
        words = [sys.executable, "-m", "bhsd_jax.main", "predict", root / "run", root / "images"]
        words += [root / "ours", f"--precision={args.dtype}", f"--infer.mirror={args.mirrors}"]
    else:
        words = [Path(args.peer_python).parent / "nnUNetv2_predict", "-i", root / "peer"]
        words += ["-o", root / "theirs", "-d", NAME, "-c", CONFIGURATION, "-f", "0"]
        words += ["-device", {"cpu": "cpu", "gpu": "cuda"}[args.device], "--disable_progress_bar"]
        words += [] if args.mirrors else ["--disable_tta"]
    return list(map(str, words))


def agreement(root: Path) -> float:
    """Share of voxels with the same label, of all scans."""
    from bhsd_jax.ct import nifti

    equal = [
        nifti.read(path).voxels == nifti.read(root / "theirs" / path.name).voxels
        for path in sorted((root / "ours").glob("*.nii.gz"))
    ]
    return float(np.mean([each.mean() for each in equal]))


def size(args: argparse.Namespace) -> tuple[int, int, int]:
    """D H W of a scan."""
    depth, height, width = map(int, args.volume.split(","))
    return depth, height, width


if __name__ == "__main__":
    main()
