"""Compares preprocessing with nnU-Net v2's, on one core, in turns.

    python tools/bench_preprocess.py [--data FOLDER] [--cases N] [--rounds 5] [--crop-hu -200]

Without --data, 8 generated head CTs of 32 x 512 x 512 voxels are taken (`--size` in the plane);
FOLDER is a task of the Medical Segmentation Decathlon (`imagesTr`, `labelsTr`, `dataset.json`).
Each side reads the same files, plans the same target spacing and writes what its training reads, in
a process of its own that is held to one core, twice over: `look` is nnU-Net's fingerprint and our
integrity check, `prepare` nnU-Net's DefaultPreprocessor and our shards. Rounds alternate between
the two; `--alone` leaves nnU-Net's out. CPU time is what other work on the machine disturbs least.
The memory is the largest resident set; what was resident after the imports is shown beside it.

Both must be in one environment; nnU-Net is imported nowhere else:

    uv venv both && uv pip install --python both/bin/python -e . nnunetv2==2.8.1
    both/bin/python tools/bench_preprocess.py
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_pair import processor

sys.path.insert(0, str(Path(__file__).parents[1]))
SIDES = ("nnunet", "ours")
STAGES = ("look", "prepare")


def main() -> None:
    """Measures in rounds; prints a table and the ratios."""
    options = arguments()
    if options.side:
        print(json.dumps(measure(options)))
        return
    if not options.alone and importlib.util.find_spec("nnunetv2") is None:
        sys.exit("bench_preprocess: nnunetv2 is not in this environment; see --help, or --alone")
    sides = SIDES[1:] if options.alone else SIDES
    with tempfile.TemporaryDirectory() as folder:
        options.scratch = Path(folder)
        options.data = options.data or make_phantoms(Path(folder) / "data", options)
        make_plans(options)
        rounds = [{side: turn(options, side) for side in sides} for _ in range(options.rounds)]
    report(rounds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="default: generated head CTs")
    parser.add_argument("--cases", type=int, help="the first so many; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crop-hu", type=float, help="our crop of CT; default nnU-Net's, non-zero")
    parser.add_argument("--size", type=int, default=512, help="of the generated heads")
    parser.add_argument("--alone", action="store_true", help="ours, without nnU-Net's")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def turn(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """One process of one side over all cases."""
    command = [sys.executable, __file__, f"--side={side}", f"--data={options.data}"]
    command += [f"--scratch={options.scratch}"]
    if options.cases:
        command.append(f"--cases={options.cases}")
    if options.crop_hu is not None:
        command.append(f"--crop-hu={options.crop_hu}")
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "BLOSC")}
    done = subprocess.run(
        command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both stages of one side, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    stages = ours(options) if options.side == "ours" else nnunet(options)
    found: dict[str, Any] = {"imports_mb": peak_mb()}
    for name, stage in zip(STAGES, stages, strict=True):
        wall, cpu = time.perf_counter(), time.process_time()
        found["cases"] = stage()
        found[name] = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "mb": peak_mb(),
        }
    return found


def ours(options: argparse.Namespace) -> tuple[Callable[[], int], Callable[[], int]]:
    """Our two passes over a data set."""
    from bhsd_jax.ct.prepare import fingerprint_case, prepare_case
    from bhsd_jax.shards.store import write_shard
    from bhsd_jax.volume import Plan

    dataset, cases = read_cases(options)
    plan = Plan.load(options.scratch / "plan.json")

    def look() -> int:
        settings = {"modality": dataset.modality, "crop_hu": options.crop_hu}
        for case in cases:
            fingerprint_case(case, num_classes=len(dataset.classes), **settings)
        return len(cases)

    def prepare() -> int:
        path = options.scratch / "ours.arrayrecord"
        return len(write_shard(path, (prepare_case(case, plan) for case in cases)))

    return look, prepare


def nnunet(options: argparse.Namespace) -> tuple[Callable[[], int], Callable[[], int]]:
    """NnU-Net's fingerprint and preprocessor, as its workers call them."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(options.scratch)
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset, cases = read_cases(options)
    plans = PlansManager(json.loads((options.scratch / "nnunet.json").read_text()))
    configuration = plans.get_configuration("3d_fullres")
    labels = {name: value for value, name in enumerate(dataset.classes)}
    about = {"labels": labels, "channel_names": {"0": dataset.modality}, "file_ending": ".nii.gz"}

    def look() -> int:
        for case in cases:
            DatasetFingerprintExtractor.analyze_case(
                [str(case.image)], str(case.label), SimpleITKIO, int(10e7 // len(cases))
            )
        return len(cases)

    def prepare() -> int:
        preprocessor = DefaultPreprocessor(verbose=False)
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:  # it overwrites no file
            for case in cases:
                out = str(Path(folder) / case.id)
                files = [str(case.image)], str(case.label)
                preprocessor.run_case_save(out, *files, plans, configuration, about)
        return len(cases)

    return look, prepare


def read_cases(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The data set and its cases with masks."""
    from bhsd_jax.datasets.msd import MSD

    dataset = MSD(options.data)
    return dataset, [case for case in dataset.cases() if case.label][: options.cases]


def make_plans(options: argparse.Namespace) -> None:
    """One plan for both, each in its own words."""
    from bhsd_jax.ct.prepare import fingerprint_case
    from bhsd_jax.nnunet import planner
    from bhsd_jax.nnunet.dataset_plan import make_plan

    dataset, cases = read_cases(options)
    known = {"modality": dataset.modality, "crop_hu": options.crop_hu}
    look = partial(fingerprint_case, num_classes=len(dataset.classes), **known)
    facts = [look(case) for case in cases]
    plan = make_plan(
        facts,
        dataset=dataset.name,
        classes=dataset.classes,
        license="",
        source_sha256="",
        **known,
    )
    (options.scratch / "plan.json").write_text(json.dumps(plan.to_json()))
    low, mean, std, high = plan.foreground
    theirs = planner.make_plans(
        [fact.spacing_mm for fact in facts],
        [fact.shape for fact in facts],
        modality=dataset.modality,
        num_classes=len(dataset.classes),
        foreground={
            "0": {"percentile_00_5": low, "mean": mean, "std": std, "percentile_99_5": high}
        },
    )
    (options.scratch / "nnunet.json").write_text(json.dumps(theirs))
    moved = sum(fact.spacing_mm != plan.spacing_mm for fact in facts)
    print(
        f"{dataset.name}: {len(cases)} cases, median {'x'.join(map(str, plan.median_shape))} at "
        f"{'x'.join(f'{mm:.4g}' for mm in plan.spacing_mm)} mm; {moved} are resampled"
    )


def make_phantoms(root: Path, options: argparse.Namespace) -> Path:
    """Head CTs of 32 slices with masks, stored as BHSD stores them."""
    from bhsd_jax.phantom.case import Options, make_case
    from bhsd_jax.phantom.files import write_image, write_label
    from bhsd_jax.volume import HEMORRHAGE

    for index in range(options.cases or 8):
        voxels, label, truth = make_case(index, Options(size=options.size, slices=32))
        affine = truth.scan.stored_affine
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        name = f"head_{index}.nii.gz"
        write_image(root / "imagesTr" / name, voxels, affine, scaled=True)
        write_label(root / "labelsTr" / name, label, affine)
    labels = {str(value): name for value, name in enumerate(HEMORRHAGE)}
    about = {"name": "generated heads", "modality": {"0": "CT"}, "labels": labels}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def report(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Medians with the least and the largest of the rounds, by side; last the ratio."""
    cases, names = rounds[0]["ours"]["cases"], {"nnunet": "nnU-Net", "ours": "ours"}
    sides = list(rounds[0])
    headings = [names[side] for side in sides] + ["nnU-Net / ours"] * (len(sides) - 1)
    print(f"{processor()}; {len(rounds)} rounds, seconds per case: median [least, largest]")
    print(f"{'':<16}" + "".join(f"{heading:>24}" for heading in headings))

    def line(name: str, value: Callable[[dict[str, Any]], float], digits: int = 3) -> None:
        columns = [[value(each[side]) for each in rounds] for side in sides]
        ratio = [[a / b for a, b in zip(*columns, strict=True)]] if len(columns) == 2 else []
        shown = [spread(column, digits) for column in columns] + [spread(each) for each in ratio]
        print(f"{name:<16}" + "".join(shown))

    for stage in (*STAGES, "both"):
        for clock in ("cpu", "wall"):
            line(f"{stage}, {clock}", lambda side, s=stage, c=clock: seconds(side, s, c) / cases)
    line("peak MB", lambda side: side["prepare"]["mb"], 0)
    line("  imports", lambda side: side["imports_mb"], 0)


def seconds(side: dict[str, Any], stage: str, clock: str) -> float:
    """Of one stage, or of both."""
    return sum(side[name][clock] for name in STAGES if stage in (name, "both"))


def spread(values: Any, digits: int = 3) -> str:
    """Median, least, largest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{f'{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]':>24}"


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the parent held when it made this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
