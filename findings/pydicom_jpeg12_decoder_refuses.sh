#!/usr/bin/env bash
# pydicom says that it has a decoder for 12-bit JPEG, and then does not decode 12-bit JPEG.
#
# JPEG Extended (Process 2 and 4, 1.2.840.10008.1.2.4.51) is the lossy JPEG of images deeper than 8
# bits, in which older archives hand out CT. With Pillow installed, as whatever depends on highdicom or
# matplotlib has it, `get_decoder(JPEGExtended12Bit).is_available` is true and the plug-ins that would
# decode such files are listed as merely missing. Reading the voxels of a 12-bit file then ends in a
# RuntimeError. The plug-in takes 8 bits alone, which the syntax allows and which no CT has; whether a
# plug-in can be used is asked without the depth. With pylibjpeg-libjpeg the same file is decoded.
#
# It matters to whoever asks `is_available` first, to tell a file that is damaged from one that only
# wants another package: these whole files look damaged. Seen with pydicom 3.0.2 and Pillow 13.0.0, on
# a file that pydicom brings for its own tests.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 pillow==13.0.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import pydicom
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGExtended12Bit

decoder = get_decoder(JPEGExtended12Bit)
data = pydicom.dcmread(get_testdata_file("JPGExtended.dcm", download=False))
assert data.file_meta.TransferSyntaxUID == JPEGExtended12Bit
print(f"bits stored: {data.BitsStored}")
print(f"decoder available: {decoder.is_available}, plug-ins: {', '.join(decoder.available_plugins)}")
try:
    voxels = data.pixel_array
    print(f"decoded: {voxels.dtype} {voxels.shape}")
except RuntimeError as error:
    print("not decoded:", next(line for line in str(error).splitlines() if "bit" in line).strip())
    voxels = None
wanted = sys.argv[1] == "decoded"
sys.exit(data.BitsStored != 12 or not decoder.is_available or (voxels is not None) != wanted)
PROGRAM
echo "with Pillow:"
"$folder/venv/bin/python" "$folder/program.py" refused
"$folder/venv/bin/pip" install --quiet pylibjpeg==2.1.0 pylibjpeg-libjpeg==2.5.0
echo "with pylibjpeg-libjpeg as well:"
"$folder/venv/bin/python" "$folder/program.py" decoded
echo "as before"
