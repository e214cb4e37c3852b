#!/usr/bin/env bash
# SimpleITK's Resample of a scan of integers onto its own grid, one axis reversed, puts many voxels
# off by one.
#
# All sampling points are voxel centers, so linear interpolation should return the voxels as they
# are. But the points are computed in millimeters and come out at 2.9999999999 or 3.0000000001, the
# interpolated value is 99.99999999, and the conversion to an integer type cuts the fraction off: 99.
# The error is one unit toward zero, never more. Floats are right to rounding, and so is
# the nearest neighbor; sitk.Flip and sitk.DICOMOrient move voxels without arithmetic.
#
# It matters because reorienting by Resample is common (BLAST-CT does it before its network), and a
# threshold in HU or a parity test sees it.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 numpy==2.4.6
cd "$folder" && "$folder/venv/bin/python" - <<'PROGRAM'
import sys

import numpy as np
import SimpleITK as sitk

print(f"SimpleITK {sitk.Version().VersionString()}")
voxels = np.random.default_rng(0).integers(-1000, 1500, (8, 64, 64)).astype(np.int16)
spacing, size = (0.957, 0.957, 1.5), (64, 64, 8)
found = {}
for kind in (np.int16, np.float32):
    image = sitk.GetImageFromArray(voxels.astype(kind))
    image.SetSpacing(spacing)
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    grid = sitk.Image(size, image.GetPixelID())
    grid.SetSpacing(spacing)
    grid.SetOrigin((0, -63 * spacing[1], 0))
    moved = sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear))
    off = np.abs(moved.astype(np.float64) - voxels[:, ::-1])
    found[kind] = float((off >= 0.5).mean()), float(off.max())
    print(f"{np.dtype(kind)}: {found[kind][0]:.1%} of the voxels are off, at most by {off.max():.2g}")
(share, most), (_, rounding) = found.values()
same = share > 0.1 and most == 1 and rounding < 0.01
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM
