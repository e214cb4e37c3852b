"""Makes a synthetic data set in the layout of BHSD: `python tools/make_synthetic.py ROOT`."""

import argparse
import logging
import sys
from pathlib import Path

from bhsd_jax.phantom.defects import DEFECTS, spoil
from bhsd_jax.phantom.tree import generate


def main() -> None:
    """Parses the command line and generates what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("root", help="folder to fill; continued if begun with equal arguments")
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
    defects = arguments.pop("defects")
    try:
        if not (Path(arguments["root"]) / DEFECTS).is_file():  # else generating would repair them
            generate(**arguments)
        if defects:
            spoil(arguments["root"])
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
