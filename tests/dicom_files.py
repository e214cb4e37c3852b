"""Series written with pydicom, in any of the ways they go wrong."""

import math
import warnings

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

NAME, PATIENT = "Roe^Jane", "MRN-0815-4711"  # must show up nowhere


def block(shape=(6, 12, 10), seed=0):
    """HU [slice, row, column]: a lopsided block of brain in air, like none of its mirrorings."""
    hu = np.full(shape, -1000)
    d, h, w = shape
    inside = hu[1:-1, 2 : h - 3, 2 : w - 2]
    inside[...] = np.random.default_rng(seed).integers(20, 60, inside.shape)
    hu[d // 2, 3, 4] = 900
    return hu


def write_series(
    folder,
    hu,
    *,
    spacing_mm=(5.0, 2.0, 1.5),  # along the normal, between rows, between columns
    tilt_deg=0.0,
    places=None,  # of the slices along the normal, mm; None: even
    names=None,  # of the files; None: in another order than the slices
    study="1.2.3",
    series="1.2.3.4",
    patient=PATIENT,
    instances=None,
    change=None,  # (index, dataset) -> None, before the file is written
):
    """Writes slices; returns their paths in slice order. Slices lie along z however tilted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pseudonyms as the RSNA's are no valid UIDs
        return _write(
            folder,
            hu,
            spacing_mm,
            tilt_deg,
            places,
            names,
            (study, series, patient),
            instances,
            change,
        )


def _write(folder, hu, spacing_mm, tilt_deg, places, names, ids, instances, change):
    folder.mkdir(parents=True, exist_ok=True)
    step, rows_mm, columns_mm = spacing_mm
    tilt = math.radians(tilt_deg)
    if places is None:
        places = np.arange(len(hu)) * step
    if names is None:
        names = [f"IM{(7 * k + 3) % 1000:03d}" for k in range(len(hu))]
    paths = []
    for k, plane in enumerate(hu):
        data = _header(*ids)
        if instances:
            data.SOPInstanceUID = instances[k]
            data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.InstanceNumber = len(hu) - k  # against the order in space
        down = round(math.cos(tilt), 9), round(-math.sin(tilt), 9)
        data.ImageOrientationPatient = [1, 0, 0, 0, *down]
        data.ImagePositionPatient = [-20.25, -31.5, round(7.5 + places[k] / math.cos(tilt), 9)]
        data.PixelSpacing = [rows_mm, columns_mm]
        _voxels(data, plane)
        if change:
            change(k, data)
        path = folder / names[k]
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def store(data, stored, *, bits=16, signed=True, slope=1, intercept=0):
    """Puts other stored values and factors into a dataset."""
    data.Rows, data.Columns = stored.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(signed)
    data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()


def _header(study, series, patient):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID, data.PatientBirthDate = NAME, patient, "19700101"
    data.StudyInstanceUID, data.SeriesInstanceUID = study, series
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesDescription = f"head of {NAME}"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    return data


def _voxels(data, plane):
    store(data, np.asarray(plane) + 1024, signed=False, intercept=-1024)
