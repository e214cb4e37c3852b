"""Our training beside nnU-Net's own: the Dice that each reaches, and the CPU time until then.

    python tools/bench_time_to_dice.py --data FOLDER --study FOLDER --peer-python PYTHON

Both sides get the same files, folds, plan and number of steps, each its own preprocessing,
sampling, augmentation, loss, optimizer and sliding window, on one core. `--data` is a folder of the
Medical Segmentation Decathlon; PYTHON has torch and nnunetv2. After the seeds of both sides each
starts once with the weights that the other side drew. Label maps of the validation cases are
written at several steps and scored with nibabel and numpy alone. `--recipe fast --our-steps N`
gives our side another recipe and length; the curves then say what time that saves. A study that was
stopped goes on where the last finished run ended; a run that was stopped begins anew. `--report`
prints what there is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench_dice
import numpy as np
from bench_pair import processor

ROOT = Path(__file__).parents[1]
TOOLS = Path(__file__).parent
DATASET = "Dataset104_Study"
SIDES = ("ours", "peer")


def main() -> None:
    """Prepares the data, trains what is not there yet, prints the tables."""
    args = parse(sys.argv[1:])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and all that it starts
    study = args.study.absolute()
    study.mkdir(parents=True, exist_ok=True)
    if not args.report:
        prepare(args, study)
        for name, side, seed, initial in runs(args):
            train(args, study, name, side, seed, initial)
    report(args, study)


def parse(words: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with dataset.json, imagesTr, labelsTr")
    parser.add_argument("--study", type=Path, required=True, help="where everything is written")
    parser.add_argument("--peer-python", default=sys.executable, help="has torch and nnunetv2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--swapped", default="0", help="seeds that start with the other's weights")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--our-steps", type=int, help="of ours; default: as many as nnU-Net's")
    parser.add_argument("--recipe", default="nnunet", choices=("nnunet", "fast"), help="of ours")
    parser.add_argument("--points", type=int, default=4, help="of the curve, evenly over the steps")
    parser.add_argument(
        "--early-cases", type=int, default=14, help="predicted before the last step"
    )
    parser.add_argument("--epoch", type=int, default=50, help="steps per epoch of nnU-Net")
    parser.add_argument("--spacing", default="1.5,1.5,1.5", help="mm")
    parser.add_argument("--patch", default="24,32,24", help="voxels")
    parser.add_argument("--features", default="8,16,32", help="per stage")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cases", type=int, help="the first so many; None: all")
    parser.add_argument("--report", action="store_true", help="only the tables of what is there")
    parser.add_argument("more", nargs="*", help="flags of our verb `train`, after --")
    return parser.parse_args(words)


def runs(args: argparse.Namespace) -> list[tuple[str, str, int, str | None]]:
    """Name, side, seed and whose initial weights, in the order in which they are trained."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    plain = [(f"{side}_{seed}", side, seed, None) for seed in seeds for side in SIDES]
    other = dict(zip(SIDES, reversed(SIDES), strict=True))
    swapped = [int(seed) for seed in args.swapped.split(",") if seed]
    return plain + [
        (f"{side}_{seed}_swapped", side, seed, f"{other[side]}_{seed}")
        for seed in swapped
        for side in SIDES
    ]


def prepare(args: argparse.Namespace, study: Path) -> None:
    """One folder of raw data for both, nnU-Net's plan, and each side's preprocessed cases."""
    numbers = {
        key: [type_(n) for n in getattr(args, option).split(",")]
        for key, option, type_ in (
            ("spacing_mm", "spacing", float),
            ("patch", "patch", int),
            ("features", "features", int),
        )
    }
    setup = numbers | {
        "dataset": DATASET,
        "batch": args.batch,
        "epoch": args.epoch,
        "peer": length(args.steps, args),
        "ours": length(args.our_steps or args.steps, args),
        "recipe": args.recipe,
        "early_cases": args.early_cases,
        "machine": processor(),
    }
    if (study / "setup.json").is_file():
        there = json.loads((study / "setup.json").read_text())
        if {**there, "machine": ""} != {**setup, "machine": ""}:
            sys.exit(f"{study} holds a study of another setup: {there}; choose another --study")
    if (study / "shards" / "index.json").is_file():  # the last file of complete shards
        return
    lay_out(args.data, study / "raw" / DATASET, args.cases, args.early_cases)
    (study / "setup.json").write_text(json.dumps(setup))
    call(
        study, "prepare_peer", [args.peer_python, TOOLS / "bench_trainer_peer.py", "prepare", study]
    )
    plans = study / "preprocessed" / DATASET / "nnUNetPlans.json"
    (study / "plans.json").write_text(plans.read_text())
    ours = [*verb("preprocess", study, args.recipe), f"--workdir={study / 'ours'}"]
    call(study, "prepare_ours", ours)


def length(steps: int, args: argparse.Namespace) -> dict:
    """Steps of a training in whole epochs, and those after which its weights are scored.

    Raises:
        SystemExit: If there are fewer steps than one epoch has.
    """
    epochs = steps // args.epoch
    if not epochs:
        sys.exit(f"--steps, --our-steps: at least one --epoch, {args.epoch} steps; got {steps}")
    points = {round(point) for point in np.linspace(0, epochs, args.points + 1)} | {epochs}
    return {
        "steps": epochs * args.epoch,
        "curve": [point * args.epoch for point in sorted(points - {0})],
    }


def lay_out(data: Path, folder: Path, count: int | None, early: int) -> None:
    """The Decathlon's files as nnU-Net names them, and five folds that both sides read."""
    facts = json.loads((data / "dataset.json").read_text())
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").glob("[!.]*"))
    cases = cases[:count]
    for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for case in cases:
            place = folder / part / f"{case}{suffix}.nii.gz"
            place.unlink(missing_ok=True)
            place.symlink_to((data / part / f"{case}.nii.gz").absolute())
    labels = {name: int(value) for value, name in facts["labels"].items()}
    wanted = {
        "channel_names": facts["modality"],
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(wanted))
    held = np.array_split(np.random.default_rng(12345).permutation(cases), 5)
    folds = [
        {"train": sorted(set(cases) - set(part)), "val": sorted(map(str, part))} for part in held
    ]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    for name, some in (("all", folds[0]["val"]), ("early", folds[0]["val"][:early])):
        (folder.parent / name).mkdir(exist_ok=True)
        for case in some:  # under the names that the label maps are to have
            place = folder.parent / name / f"{case}.nii.gz"
            place.unlink(missing_ok=True)
            place.symlink_to((data / "imagesTr" / place.name).absolute())


def verb(name: str, study: Path, recipe: str) -> list[str]:
    """A verb with what all of ours have in common."""
    return [sys.executable, "-m", "bhsd_jax.main", name, *flags(study, recipe)]


def flags(study: Path, recipe: str) -> list[str]:
    """The config of our side."""
    return [
        f"--config=configs/supervised.py:data=msd,recipe={recipe}",
        f"--config.data.root={study / 'raw' / DATASET}",
        f"--config.preprocess.plan={study / 'plans.json'}",
        f"--config.preprocess.shards={study / 'shards'}",
        "--config.preprocess.processes=1",
        "--config.split.fold=0",
    ]


def train(
    args: argparse.Namespace, study: Path, name: str, side: str, seed: int, initial: str | None
) -> None:
    """One training and its label maps, unless they are there."""
    run = study / "runs" / name
    if (run / "done.json").is_file():
        return
    if run.exists():  # begun before: our verb would go on with weights that are trained already
        shutil.rmtree(run)
    begun = time.monotonic()
    given = study / "runs" / initial / "initial.npz" if initial else None
    if side == "peer":
        script = [args.peer_python, TOOLS / "bench_trainer_peer.py", "train", study, run, seed]
        used = call(study, name, [*script, *([given] if given else [])])
    else:
        setup = json.loads((study / "setup.json").read_text())
        steps, script = setup["ours"]["steps"], [sys.executable, TOOLS / "bench_trainer_ours.py"]
        own = [
            f"--config.seed={seed}",
            f"--config.train.steps={steps}",
            f"--config.train.log_every={setup['epoch']}",
            f"--config.train.save_every={10 * steps}",
            f"--config.train.validate_every={10 * steps}",
            "--config.train.validate_cases=0",
            "--config.input.threads=1",
        ]
        words = ["train", study, run, given or "-", *flags(study, setup["recipe"]), *own]
        words += args.more
        used = call(study, name, [*script, *words])
        used += call(study, f"{name}_predict", [*script, "predict", study, run])
    facts = {"wall_s": time.monotonic() - begun, "cpu_s": used}
    (run / "done.json").write_text(json.dumps(facts))
    print(f"{name}: {facts}", flush=True)


def call(study: Path, name: str, command: list) -> float:
    """Runs a command with one thread and a log; returns its CPU seconds.

    What JAX compiles counts in every run: nothing of a run before, or of the user's, is taken.
    """
    (study / "logs").mkdir(exist_ok=True)
    log = study / "logs" / f"{name}.txt"
    alike = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    alike |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    begun = os.times()
    with log.open("w") as file:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | alike | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(
            f"{name} ended with {done.returncode}; the end of {log}:\n{log.read_text()[-2000:]}"
        )
    ended = os.times()
    return ended.children_user + ended.children_system - begun.children_user - begun.children_system


def report(args: argparse.Namespace, study: Path) -> None:
    """Scores every label map that is there and prints the tables."""
    setup = json.loads((study / "setup.json").read_text())
    print(setup)
    truths = study / "raw" / DATASET / "labelsTr"
    names = json.loads((truths.parent / "dataset.json").read_text())["labels"]
    classes = {value: name for name, value in names.items() if value}
    cases = json.loads((truths.parent / "splits_final.json").read_text())[0]["val"]
    early = cases[: setup["early_cases"]]
    curves, final = {}, {}
    for name, side, *_ in runs(args):
        run = study / "runs" / name
        if not (run / "done.json").is_file():
            continue
        maps = {
            step: run / f"at_{step}" / ("predictions" if side == "ours" else "")
            for step in setup[side]["curve"]
        }
        last = maps[setup[side]["steps"]]
        final[name] = bench_dice.score(last, truths, cases, list(classes))
        curves[name] = {
            step: bench_dice.score(folder, truths, early, list(classes))
            for step, folder in maps.items()
        }
    bench_dice.print_curves(study / "runs", curves, classes, len(early))
    both = [seed for seed in args.seeds.split(",") if {f"ours_{seed}", f"peer_{seed}"} <= {*final}]
    if both:
        sides = (np.stack([final[f"{side}_{seed}"] for seed in both]) for side in SIDES)
        bench_dice.print_difference(*sides, classes)
    for name in final:
        if name.endswith("_swapped"):
            change = final[name] - final[name.removesuffix("_swapped")]
            told = " ".join(f"{100 * value:.2f}" for value in final[name].mean(0))
            print(
                f"{name}: {100 * final[name].mean():.2f} ({told}), "
                f"{100 * change.mean():+.2f} against its own weights"
            )


if __name__ == "__main__":
    main()
