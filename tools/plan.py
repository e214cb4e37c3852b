"""Prints the plan nnU-Net v2.8.1 makes for a data set, as its plans.json.

python tools/plan.py FINGERPRINT.json [--planner resenc_l] [--dataset dataset.json] > plans.json

FINGERPRINT.json holds `spacings` (mm) and `shapes_after_crop` (voxels), one row of three numbers
per training scan, axes z, y, x: nnU-Net's own dataset_fingerprint.json will do, and so will a file
with these under the key `fingerprint`. The other keys of nnU-Net's file are used where present.
A dataset.json, as the Decathlon or nnU-Net has it, says how many classes, channels and training
scans there are, and whether they are CT; the one beside the fingerprint is taken if none is named,
and the options win.

The arguments of a network are where nnU-Net has them, in `architecture.arch_kwargs`, and once more
beside that, in `architecture`. Where the target spacing rests on a few scans, stderr says so.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEYS = ("spacings", "shapes_after_crop")


def main() -> None:
    """Reads, plans, prints; says what is wrong and exits 2 where it cannot."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.nnunet import planner, plans_json
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
        known = described(path) if path else {}
        path = options.fingerprint
        found = read(path)
        given = {name: getattr(options, name) for name in ("classes", "channels", "cases")}
        given["modality"] = options.modality
        known |= {name: value for name, value in given.items() if value is not None}
        plans = planner.make_plans(
            *(found[key] for key in KEYS),
            planner=options.planner,
            modality=known.get("modality", "ct"),
            num_channels=known.get("channels", 1),
            num_classes=known.get("classes", 2),
            cases=known.get("cases"),
            dataset=known.get("name", ""),
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
    found = json.loads(path.read_text())
    if isinstance(found, dict):
        found = found.get("fingerprint", found)
    missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}; a data-set fingerprint has {KEYS}")
    return found


def described(path: Path) -> dict[str, Any]:
    """What a dataset.json says that a plan depends on.

    Raises:
        ValueError: If it is no JSON, or has no labels or channels.
    """
    found = json.loads(path.read_text())
    channels = found.get("channel_names") or found.get("modality")
    if not channels or not found.get("labels"):
        raise ValueError("no labels or no channel_names; is this a dataset.json?")
    known = {"classes": len(found["labels"]), "channels": len(channels)}
    known["modality"] = "ct" if {str(n).casefold() for n in channels.values()} == {"ct"} else "mr"
    return known | {"cases": found.get("numTraining"), "name": found.get("name", "")}


if __name__ == "__main__":
    main()
