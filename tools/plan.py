"""Prints the plan nnU-Net v2.8.1 makes for a data set, as its plans.json.

python tools/plan.py FINGERPRINT.json [--planner resenc_l] [--dataset dataset.json] > plans.json

FINGERPRINT.json holds `spacings` (mm) and `shapes_after_crop` (voxels), one row of three numbers
per training scan, axes z, y, x: nnU-Net's own dataset_fingerprint.json will do, and so will a file
with these under the key `fingerprint`. The other keys of nnU-Net's file are used where present.
A dataset.json, as the Decathlon or nnU-Net has it, says how many classes, channels and training
scans there are, how each channel is normalized, and what reads the files; the one beside the
fingerprint is taken if none is named, and the options win. The plan bears the name of nnU-Net's
folder, Dataset004_Hippocampus, where one of the files lies in such.

The arguments of a network are where nnU-Net has them, in `architecture.arch_kwargs`, and once more
beside that, in `architecture`. Where the target spacing rests on a few scans, stderr says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEYS = ("spacings", "shapes_after_crop")


def main() -> None:
    """Reads, plans, prints; says what is wrong and exits 2 where it cannot."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.nnunet import dataset_json, planner, plans_json
    from bhsd_jax.nnunet.topology import PLANNERS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fingerprint", type=Path, metavar="FINGERPRINT.json")
    parser.add_argument("--planner", choices=PLANNERS, default="default")
    parser.add_argument("--dataset", type=Path, metavar="DATASET.json")
    parser.add_argument("--classes", type=int, help="background included (default 2)")
    parser.add_argument("--channels", type=int, help="of a scan (default 1)")
    parser.add_argument("--modality", choices=("ct", "mr"), help="default ct")
    parser.add_argument("--cases", type=int, help="training scans (default: as in the fingerprint)")
    parser.add_argument(
        "--spacing-mm", type=float, nargs=3, metavar=("Z", "Y", "X"), help="pins the target spacing"
    )
    parser.add_argument("--memory-gb", type=float, help="GPU to plan for (default: the planner's)")
    options = parser.parse_args()
    beside = options.fingerprint.with_name("dataset.json")  # where nnU-Net puts it
    path = options.dataset or (beside if beside.is_file() else None)
    try:
        facts = read_json(path) if path else {}
        known: dict[str, Any] = {"num_channels": options.channels or 1}
        known |= described(facts, options.channels, options.modality) if path else {}
        known["dataset"] = name_of((options.fingerprint, path), facts)
        path = options.fingerprint
        found = read(path)
        given = {"num_classes": options.classes, "cases": options.cases}
        known |= {name: value for name, value in given.items() if value is not None}
        plans = planner.make_plans(
            *(found[key] for key in KEYS),
            planner=options.planner,
            modality=options.modality or "ct",
            reader=dataset_json.reader(facts, slices=of_slices(found)),
            **known,
            spacing_mm=options.spacing_mm,
            memory_gb=options.memory_gb,
            relative_size=found.get("median_relative_size_after_cropping", 1.0),
            foreground=plans_json.intensities(found),
        )
        if options.spacing_mm is None:
            for warning in planner.spacing_warnings(*(found[key] for key in KEYS)):
                print(f"warning: {warning}", file=sys.stderr)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{path}: {error}\n")
    for settings in plans["configurations"].values():
        if "architecture" in settings:  # the cascade's is inherited
            settings["architecture"] |= settings["architecture"]["arch_kwargs"]
    print(json.dumps(plans, indent=4))


def read(path: Path) -> Mapping[str, Any]:
    """The fingerprint in a file.

    Raises:
        ValueError: If it is no JSON, or a key is missing.
    """
    found = read_json(path)
    found = found.get("fingerprint", found)
    missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}; a data-set fingerprint has {KEYS}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: If it is no JSON, or something else.
    """
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, dict):
        raise ValueError(f"no {' and no '.join(KEYS)}, nor labels: holds a {type(found).__name__}")
    return found


def of_slices(found: Mapping[str, Any]) -> bool:
    """Whether the first scan of a fingerprint is a single slice."""
    import numpy as np

    return np.ravel(found["shapes_after_crop"])[:1].tolist() == [1]


def described(
    facts: Mapping[str, Any], channels: int | None, modality: str | None
) -> dict[str, Any]:
    """What a dataset.json says that a plan depends on, as arguments of `make_plans`.

    Raises:
        ValueError: If it has no labels or channels, or others than the options.
    """
    from bhsd_jax.nnunet import dataset_json

    schemes = tuple(scheme for _, scheme in dataset_json.channels(facts, "channels"))
    if not schemes or not facts.get("labels"):
        raise ValueError("no labels or no channel_names; is this a dataset.json?")
    known = {"num_classes": len(facts["labels"]), "cases": facts.get("numTraining")}
    if modality is not None:
        return known | {"num_channels": channels or len(schemes)}
    if channels not in (None, len(schemes)) and len(set(schemes)) > 1:
        raise ValueError(
            f"names {len(schemes)} channels that are normalized in several ways, so that "
            f"--channels={channels} does not tell how: leave it out, or give --modality too"
        )
    return known | {
        "schemes": schemes if channels in (None, len(schemes)) else schemes[:1] * channels
    }


def name_of(paths: Sequence[Path | None], facts: Mapping[str, Any]) -> str:
    """NnU-Net's name of the data set, by which its trainer finds it; else dataset.json's."""
    folders = (path.resolve().parent.name for path in paths if path is not None)
    named = (name for name in folders if re.fullmatch(r"Dataset\d{3}_.+", name))
    return next(named, str(facts.get("name", "")))


if __name__ == "__main__":
    main()
