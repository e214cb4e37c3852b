#!/usr/bin/env bash
# nnU-Net reads a NIfTI file whose fourth axis is the channels, and cannot write its label map.
#
# SimpleITKIO, the reader of .nii.gz, takes such a file (the Decathlon's brain tumors are of this
# kind) for an image of several channels, and planning, preprocessing and training run on it. What it
# keeps for the way back has four axes as well, and write_seg stops with an AssertionError that has
# no text: a network is trained for hours before its first prediction is refused.
#
# It matters to whoever prepares such a data set for nnU-Net: one file per channel (_0000, _0001)
# trains and predicts. Seen with nnunetv2 2.8.1 and SimpleITK 2.5.2.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.2.6 SimpleITK==2.5.2 nibabel==5.3.2
"$folder/venv/bin/pip" install --quiet --no-deps nnunetv2==2.8.1
cat > "$folder/program.py" <<'PROGRAM'
import sys

import nibabel
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

voxels = np.arange(6 * 7 * 8 * 2, dtype=np.float32).reshape(6, 7, 8, 2)
reader, written = SimpleITKIO(), []
nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), "four_axes.nii.gz")
nibabel.save(nibabel.Nifti1Image(voxels[..., 0], np.eye(4)), "one_0000.nii.gz")
nibabel.save(nibabel.Nifti1Image(voxels[..., 1], np.eye(4)), "one_0001.nii.gz")
for files in (["four_axes.nii.gz"], ["one_0000.nii.gz", "one_0001.nii.gz"]):
    image, kept = reader.read_images(files)
    try:
        reader.write_seg(np.zeros(image.shape[1:], np.uint8), "label.nii.gz", kept)
        written.append("label map written")
    except AssertionError as error:
        written.append(f"AssertionError({str(error)!r})")
    print(f"{len(files)} file(s): read as {image.shape}, {written[-1]}")
sys.exit(0 if written == ["AssertionError('')", "label map written"] else 1)
PROGRAM
cd "$folder"
status=0
venv/bin/python program.py || status=1
[ "$status" = 0 ] && echo "as before" || echo "the behavior has changed"
exit "$status"
