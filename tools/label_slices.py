"""Writes BHSD's `slice_labels.csv` from the RSNA 2019 challenge it was taken from.

`python tools/label_slices.py BHSD RSNA`: BHSD is the folder as unpacked, RSNA that of the
challenge's slices with `stage_2_train.csv` in it.
"""

import argparse
import sys
from pathlib import Path

from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.datasets import bhsd_slices, rsna
from bhsd_jax.datasets.bhsd import BHSD


def main() -> None:
    """Matches scans with studies and writes the table beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bhsd", type=Path)
    parser.add_argument("rsna", type=Path)
    parser.add_argument("--csv", default="stage_2_train.csv")
    parser.add_argument(
        "--counts-only", action="store_true", help="compare numbers of slices, not their voxels"
    )
    chosen = parser.parse_args()
    try:
        data, found = match(chosen)
        if found.rows:  # else a table of before would be lost
            bhsd_slices.write(chosen.bhsd / bhsd_slices.FILE, found.rows, data.classes[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"label_slices: {error}")
    print(f"\n{len(found.rows)} scans labeled, {len(found.refused)} not")
    for case, reason in sorted(found.refused.items()):
        print(f"  {case}: {reason}")
    if not found.rows:
        sys.exit(f"label_slices: no scan of {chosen.bhsd} was labeled, and no table is written")


def match(chosen: argparse.Namespace) -> tuple[BHSD, bhsd_slices.Matches]:
    """The data set, and what is known of its slices.

    Raises:
        FileNotFoundError: If a folder or the table is not there, or has nothing in it.
        ValueError: If the table or the data set makes no sense.
    """
    data = BHSD(chosen.bhsd)
    labels = rsna.read_table(chosen.rsna / chosen.csv)
    groups = dicom_series.find(chosen.rsna)
    if not groups:
        raise FileNotFoundError(f"{chosen.rsna}: no DICOM slices in it or below")
    found = bhsd_slices.match(
        data,
        groups,
        labels,
        compare=not chosen.counts_only,
        progress=lambda done, total: print(f"\r{done} of {total}", end=""),
    )
    return data, found


if __name__ == "__main__":
    main()
