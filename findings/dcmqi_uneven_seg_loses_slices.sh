#!/usr/bin/env bash
# dcmqi reads the DICOM SEG of slices at uneven steps as even ones; slices vanish, exit code 0.
#
# Eleven slices, the upper ones 7 mm thick and apart and the lower ones 4 mm, get a BINARY SEG that
# highdicom reads back voxel by voxel. segimage2itkimage takes the one SliceThickness of the SEG, 7 mm,
# for the step of all slices, puts each frame on the plane nearest to it, and of frames that meet on
# one plane keeps one, with no error and exit code 0. The same SEG on even steps comes back whole.
#
# It matters to whoever measures what it wrote: voxels are missing, and those that are left count 7 mm
# of height instead of 4. Read such a SEG by instance, or hand on a label map that was interpolated to
# even steps beside it.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dcmqi==1.5.7 highdicom==0.28.2 nibabel==5.4.2
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import highdicom
import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (11, 40, 48)  # slices, rows, columns
EVEN = np.arange(50.0, -1, -5), [5] * 11  # from the top, where they lie and how thick they are
UNEVEN = np.array([55, 48, 41, 34, 27, 20, 16, 12, 8, 4, 0.0]), [7] * 6 + [4] * 5
label = np.zeros(SHAPE, np.uint8)
label[3:9, 10:25, 12:30] = 1
label[5, 12, 14] = 0
lesion = Code("50960005", "SCT", "Hemorrhage")
altered = Code("49755003", "SCT", "Morphologically Altered Structure")


def headers(places, thick):
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    made = []
    for place, mm in zip(places, thick):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "", "1", "", ""
        data.AccessionNumber, data.StudyID, data.StudyDate, data.StudyTime = "", "", "", ""
        data.Modality, data.Rows, data.Columns = "CT", *SHAPE[1:]
        data.PixelSpacing, data.SliceThickness = [0.5, 0.5], mm
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-12, -10, float(place)]
        made.append(data)
    return made


def read(slices, folder):
    """Whether highdicom reads the same voxels; dcmqi's exit code, voxels, slice step and what it said."""
    folder.mkdir()
    sources = headers(*slices)
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
    image = nibabel.load(next(folder.glob("*.nii*")))
    step = round(float(image.header.get_zooms()[2]), 3)
    return bool((back == label).all()), done.returncode, int((image.get_fdata() > 0).sum()), step, said


folder = Path(sys.argv[1])
found = {name: read(slices, folder / name) for name, slices in (("even", EVEN), ("uneven", UNEVEN))}
whole = int((label > 0).sum())
for name, (same, code, voxels, step, said) in found.items():
    print(f"{name}: highdicom reads the same: {same}; dcmqi: exit code {code}, step {step} mm, {voxels} of {whole} voxels {said}")
print(f"dcmqi {version('dcmqi')}, highdicom {version('highdicom')}")
ok = found["even"] == (True, 0, whole, 5.0, []) and found["uneven"][:2] == (True, 0)
ok = ok and found["uneven"][2] < whole and not found["uneven"][4]
print("as before" if ok else "the behavior has changed")
sys.exit(0 if ok else 1)
PROGRAM
