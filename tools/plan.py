"""Prints the plan nnU-Net v2.8.1 makes for a data set, as its plans.json.

python tools/plan.py FINGERPRINT.json [--planner resenc_l] > plans.json

FINGERPRINT.json holds `spacings` (mm) and `shapes_after_crop` (voxels), one row of three numbers
per training scan, axes z, y, x: nnU-Net's own dataset_fingerprint.json will do, and so will a file
with these under the key `fingerprint`. The other keys of nnU-Net's file are used where present.
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
    from bhsd_jax.ct import plan
    from bhsd_jax.ct.topology import PLANNERS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fingerprint", type=Path, metavar="FINGERPRINT.json")
    parser.add_argument("--planner", choices=PLANNERS, default="default")
    parser.add_argument("--classes", type=int, default=2, help="background included (default 2)")
    parser.add_argument("--channels", type=int, default=1, help="of a scan (default 1)")
    parser.add_argument("--modality", choices=("ct", "mr"), default="ct", help="default ct")
    parser.add_argument(
        "--spacing-mm", type=float, nargs=3, metavar=("Z", "Y", "X"), help="pins the target spacing"
    )
    parser.add_argument("--memory-gb", type=float, help="GPU to plan for (default: the planner's)")
    options = parser.parse_args()
    try:
        found = read(options.fingerprint)
        plans = plan.make_plans(
            *(found[key] for key in KEYS),
            planner=options.planner,
            modality=options.modality,
            num_channels=options.channels,
            num_classes=options.classes,
            spacing_mm=options.spacing_mm,
            memory_gb=options.memory_gb,
            relative_size=found.get("median_relative_size_after_cropping", 1.0),
            foreground=found.get("foreground_intensity_properties_per_channel"),
        )
    except (OSError, ValueError) as error:
        parser.exit(2, f"{options.fingerprint}: {error}\n")
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


if __name__ == "__main__":
    main()
