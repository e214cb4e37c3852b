"""Makes a synthetic data set in the layout of BHSD: `python tools/make_synthetic.py ROOT`.

With `--check` it makes none, but prints figures of its heads beside those of real scans.
"""

import argparse
import logging
import sys
from pathlib import Path

from bhsd_jax.phantom import check
from bhsd_jax.phantom.defects import DEFECTS, spoil
from bhsd_jax.phantom.tree import generate


def main() -> None:
    """Parses the command line and generates what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "root", nargs="?", help="folder to fill; continued if begun with equal arguments"
    )
    parser.add_argument(
        "--check",
        type=int,
        nargs="?",
        const=check.SCANS,
        metavar="SCANS",
        help="compare with real scans instead, in BHSD's size; minutes",
    )
    parser.add_argument("--train", type=int, default=24, help="training scans with masks")
    parser.add_argument("--test", type=int, default=12, help="test scans with masks")
    parser.add_argument("--bleeding", type=int, default=24, help="scans without masks that bleed")
    parser.add_argument("--nonbleeding", type=int, default=12, help="likewise, that do not")
    parser.add_argument("--size", type=int, default=128, help="rows and columns; BHSD has 512")
    parser.add_argument("--slices", type=int, default=24, help="over 160 mm; BHSD has about 32")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other heads")
    parser.add_argument("--difficulty", default="default", help="or large, easy")
    parser.add_argument("--plain", dest="scaled", action="store_false", help="store HU unscaled")
    parser.add_argument("--metal", type=float, default=0.0, help="share of scans with a coil")
    parser.add_argument("--rater_noise", action="store_true", help="outlines a pixel off")
    parser.add_argument("--defects", action="store_true", help="afterwards every known defect")
    parser.add_argument("--processes", type=int, default=0, help="0: one per core")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = vars(parser.parse_args())
    scans = arguments.pop("check")
    if scans is not None:
        sys.exit(_check(scans, arguments["difficulty"], arguments["processes"]))
    if arguments["root"] is None:
        parser.error("root: name the folder to fill")
    defects = arguments.pop("defects")
    try:
        if not (Path(arguments["root"]) / DEFECTS).is_file():  # else generating would repair them
            generate(**arguments)
        if defects:
            spoil(arguments["root"])
    except ValueError as error:
        sys.exit(str(error))


def _check(scans: int, difficulty: str, processes: int) -> int:
    """Prints the comparison; 1 if a figure is off."""
    figures = check.measure(scans, difficulty=difficulty, processes=processes)
    rows = check.compare(figures)
    print(check.text(rows))
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
