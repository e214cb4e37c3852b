#!/usr/bin/env bash
# The NIfTI of a gantry-tilted CT says two sizes of a voxel, and its sform, which most readers take,
# says the wrong one.
#
# Of a series tilted by 18 degrees, with a table feed of 5 mm and pixels of 1 mm, a voxel holds
# 1 x 1 x 5 cos 18 = 4.755 mm3. dcm2niix writes a plain file and one named _Tilt_. The plain file's
# pixdim and its qform (orthogonal) say 4.755. Its sform is sheared, as it must be, but its slice
# vector is as long as the slices are apart, 4.755 mm, where along the shear it has to be 5 mm: its
# determinant is 4.523 mm3. SimpleITK's series reader gives the same files 5.000. The _Tilt_ file is
# right, and resampled.
#
# It matters because nibabel, ANTs and most tools take the sform: a bleed is 5 % smaller than it is.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 \
  SimpleITK==2.5.7 numpy==2.4.6
cd "$folder" && PATH="$folder/venv/bin:$PATH" python - <<'PROGRAM'
import glob
import math
import os
import subprocess
import sys

import nibabel
import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

FEED_MM, TILT = 5.0, math.radians(18)
STUDY, SERIES, FRAME = generate_uid(), generate_uid(), generate_uid()
os.makedirs("series")
os.makedirs("out")
for index in range(12):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = STUDY, SERIES, FRAME
    data.Modality, data.Manufacturer, data.PatientPosition = "CT", "NONE", "HFS"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientName, data.PatientID, data.SeriesNumber = "A", "1", 2
    data.StudyDate, data.SeriesDate, data.SeriesTime = "20200101", "20200101", "120000"
    data.InstanceNumber, data.AcquisitionNumber = index + 1, 1
    data.ImageOrientationPatient = [1, 0, 0, 0, math.cos(TILT), -math.sin(TILT)]
    data.ImagePositionPatient = [0, 0, index * FEED_MM]
    data.PixelSpacing, data.SliceThickness = [1, 1], FEED_MM
    data.GantryDetectorTilt = math.degrees(TILT)
    data.Rows = data.Columns = 64
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleIntercept, data.RescaleSlope = -1024, 1
    data.PixelData = np.full((64, 64), 1024 + index, np.int16).tobytes()
    data.save_as(f"series/{index:02d}.dcm", enforce_file_format=True)

subprocess.run(
    ["dcm2niix", "-o", "out", "-f", "x", "series"], check=True, stdout=subprocess.DEVNULL
)
(tilted,) = glob.glob("out/*Tilt*.nii*")
(plain,) = set(glob.glob("out/*.nii*")) - {tilted}
reader = SimpleITK.ImageSeriesReader()
reader.SetFileNames(sorted(glob.glob("series/*.dcm")))
itk = np.prod(reader.Execute().GetSpacing())
header = nibabel.load(plain).header


def volume(affine):
    return abs(np.linalg.det(affine[:3, :3]))


seen = {
    "plain, pixdim": (np.prod(header["pixdim"][1:4]), 4.755),
    "plain, qform": (volume(header.get_qform()), 4.755),
    "plain, sform": (volume(header.get_sform()), 4.523),
    "_Tilt_, sform": (volume(nibabel.load(tilted).header.get_sform()), 4.755),
    "SimpleITK, series": (itk, 5.0),
}
print(f"true voxel {FEED_MM * math.cos(TILT):.3f} mm3; dcm2niix 1.0.20260724, SimpleITK 2.5.7")
for name, (now, before) in seen.items():
    print(f"{name}: {now:.3f} mm3 (seen before: {before:.3f})")
same = all(abs(now - before) < 0.002 for now, before in seen.values())
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM
