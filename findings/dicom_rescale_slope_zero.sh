#!/usr/bin/env bash
# A CT image that states a rescale slope of 0 is flat by pydicom, and the scan by SimpleITK.
#
# One 16-bit CT slice has stored values 0 to 255, RescaleSlope 0 and RescaleIntercept -1024. pydicom's
# `apply_rescale` does as the header says: every voxel is -1024. SimpleITK, which reads by GDCM, takes
# a slope of 0 for 1 and gives -1024 to -769.
#
# It matters to whoever reads with one library and checks with the other: by pydicom the scan is air
# everywhere, in which a network finds no bleeding, without an error anywhere.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.1 SimpleITK==2.5.2 numpy
"$folder/venv/bin/python" - "$folder/slice.dcm" <<'PROGRAM'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_rescale
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

image = Dataset()
image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, generate_uid()
image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
image.Modality, image.PatientID = "CT", "nobody"
image.Rows = image.Columns = 16
image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
image.PixelSpacing, image.SliceThickness = [1, 1], 5
image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
image.RescaleSlope, image.RescaleIntercept = 0, -1024
image.PixelData = np.arange(256, dtype="<u2").tobytes()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.save_as(sys.argv[1], enforce_file_format=True)

by_pydicom = apply_rescale(image.pixel_array, image)
by_itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(sys.argv[1]))
seen = [(float(one.min()), float(one.max())) for one in (by_pydicom, by_itk)]
print(f"pydicom {version('pydicom')}: {seen[0][0]:g} to {seen[0][1]:g}")
print(f"SimpleITK {version('SimpleITK')}: {seen[1][0]:g} to {seen[1][1]:g}")
sys.exit(seen != [(-1024.0, -1024.0), (-1024.0, -769.0)])
PROGRAM
