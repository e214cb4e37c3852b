#!/usr/bin/env bash
# dcmqi cannot read the DICOM SEG of a tilted CT, writes no image, and ends with exit code 0.
#
# Nine slices of a gantry tilted by 18.5 degrees, feed 5 mm, get a BINARY SEG that highdicom reads
# back voxel by voxel. segimage2itkimage takes the first frame's corner and a grid at right angles to
# the slices, finds the next frame outside of it ("outside image geometry"), and stops: there is a
# meta.json and no image. The same SEG without the tilt becomes an image.
#
# It matters to whoever runs it in a pipeline: the exit code says done. Look for the image, and hand
# on a label map that was moved upright beside the SEG.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dcmqi==1.5.7 highdicom==0.28.2
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import highdicom
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (9, 40, 48)  # slices, rows, columns
label = np.zeros(SHAPE, np.uint8)
label[2:7, 10:25, 12:30] = 1
label[4, 12, 14] = 0
lesion = Code("50960005", "SCT", "Hemorrhage")
altered = Code("49755003", "SCT", "Morphologically Altered Structure")


def headers(tilt_deg):
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    tilt = math.radians(tilt_deg)
    made = []
    for k in range(SHAPE[0]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "", "1", "", ""
        data.AccessionNumber, data.StudyID, data.StudyDate, data.StudyTime = "", "", "", ""
        data.Modality, data.Rows, data.Columns = "CT", *SHAPE[1:]
        data.PixelSpacing, data.SliceThickness = [0.5, 0.5], 5
        data.ImageOrientationPatient = [1, 0, 0, 0, math.cos(tilt), -math.sin(tilt)]
        data.ImagePositionPatient = [-12, -10, 5.0 * k]
        made.append(data)
    return made


def read(tilt_deg, folder):
    """Whether highdicom reads the same voxels; dcmqi's exit code, whether it wrote an image, and its error."""
    folder.mkdir()
    sources = headers(tilt_deg)
    segment = highdicom.seg.SegmentDescription(1, "bleed", altered, lesion, "MANUAL")
    one = {"instance_number": 1, "series_number": 1, "software_versions": "1"}
    one |= {"manufacturer": "m", "manufacturer_model_name": "m", "device_serial_number": "1"}
    uids = {"series_instance_uid": generate_uid(), "sop_instance_uid": generate_uid()}
    seg = highdicom.seg.Segmentation(sources, label, "BINARY", [segment], **uids, **one)
    path = folder / "seg.dcm"
    seg.save_as(path)
    instances = [data.SOPInstanceUID for data in sources]
    back = highdicom.seg.segread(path).get_pixels_by_source_instance(
        instances, combine_segments=True, assert_missing_frames_are_empty=True
    )
    words = ["--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nii"]
    done = subprocess.run(
        ["segimage2itkimage", *map(str, words)], capture_output=True, text=True, check=False
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line]
    return bool((back == label).all()), done.returncode, bool(list(folder.glob("*.nii*"))), said[:1]


folder = Path(sys.argv[1])
found = {tilt: read(tilt, folder / str(tilt)) for tilt in (0.0, 18.5)}
for tilt, (same, code, image, said) in found.items():
    print(f"tilt {tilt}: highdicom reads the same voxels: {same}; dcmqi: exit code {code}, image: {image} {said}")
print(f"dcmqi {version('dcmqi')}, highdicom {version('highdicom')}")
ok = found[0.0][:3] == (True, 0, True) and found[18.5][:3] == (True, 0, False)
print("as before" if ok else "the behavior has changed")
sys.exit(0 if ok else 1)
PROGRAM
