#!/usr/bin/env bash
# medpy's average symmetric surface distance is another quantity since 0.5 under the same name.
#
# medpy.metric.binary.assd was the mean of the two directed averages up to 0.4.0; in 0.5.2 it is the
# mean over the distances of both directions together, so that the longer surface counts for more.
# A cube of 5 voxels against its middle voxel: 2.317 becomes 2.627. asd and hd95 are as they were.
#
# It matters because published ASSD (and code that pins no version) stems from either; figures of the
# two are not to be compared. Where both are wanted: the old one is (asd(a, b) + asd(b, a)) / 2.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.4.0 0.5.2; do
  python3 -m venv "$folder/$version"
done
"$folder/0.4.0/bin/pip" install --quiet numpy==1.23.5 scipy==1.10.1 setuptools==69.5.1 wheel==0.43.0
"$folder/0.4.0/bin/pip" install --quiet --no-deps --no-build-isolation medpy==0.4.0
"$folder/0.5.2/bin/pip" install --quiet numpy==2.2.6 scipy==1.15.3 medpy==0.5.2
cat > "$folder/program.py" <<'PROGRAM'
import sys
import warnings

import numpy as np

warnings.simplefilter("ignore")
from medpy.metric import binary

cube, middle = np.zeros((2, 9, 9, 9), bool)
cube[2:7, 2:7, 2:7] = True
middle[4, 4, 4] = True
there, back = binary.asd(cube, middle), binary.asd(middle, cube)
assd, want = binary.assd(cube, middle), float(sys.argv[1])
print(f"asd {there:.4f} and {back:.4f}, assd {assd:.4f} (seen before: {want})")
sys.exit(0 if abs(assd - want) < 1e-4 and abs(there - 2.6337) < 1e-4 and back == 2 else 1)
PROGRAM
cd "$folder"
status=0
echo "medpy 0.4.0" && 0.4.0/bin/python program.py 2.3169 || status=1
echo "medpy 0.5.2" && 0.5.2/bin/python program.py 2.6273 || status=1
[ "$status" = 0 ] && echo "as before" || echo "the behavior has changed"
exit "$status"
