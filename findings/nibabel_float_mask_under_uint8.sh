#!/usr/bin/env bash
# A mask of whole numbers comes back from nibabel with other numbers, where its array was float and
# its header says uint8.
#
# Nifti1Image(mask_as_float, affine, header_of_a_uint8_file) keeps the header's type and scales the
# values over its whole range: the highest class becomes 255, and the others are rounded to steps
# of highest / 255. Classes 0..5 survive (255 is a multiple of 5); of 0..4 and 0..7 none but 0 and
# the highest is a whole number any more, and a comparison `mask == 2` finds nothing.
#
# It matters because masks are often made with float arithmetic and saved with the header of another
# file. Rounding to whole numbers after reading mends it: no value is off by more than half a step.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nibabel==5.4.2 numpy==2.4.6
cd "$folder" && "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import nibabel
import numpy as np

header = nibabel.Nifti1Header()
header.set_data_dtype(np.uint8)
before = {4: 3, 5: 0, 6: 3, 7: 6}  # classes of 1..highest that are no whole numbers
same = True
print(f"nibabel {nibabel.__version__}")
for highest, broken in before.items():
    mask = np.arange(highest + 1, dtype=np.float64).reshape(-1, 1, 1)
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4), header), "mask.nii.gz")
    back = nibabel.load("mask.nii.gz")
    values = back.get_fdata().ravel()
    now = int(np.sum(np.abs(values - np.rint(values)) > 1e-6))
    slope = float(back.dataobj.slope)
    off = np.abs(values - mask.ravel()).max()
    print(
        f"classes 0..{highest}: {np.round(values, 4).tolist()}, {now} not whole "
        f"(seen before: {broken}), at most {off / slope:.2f} of a step off"
    )
    same &= now == broken and off <= slope / 2 + 1e-6
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM
