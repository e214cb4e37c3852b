"""Enhanced CT written with pydicom: files of single slices put together into one, or into parts."""

import copy

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage, generate_uid

_MACROS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_MOVED = {tag for tags in _MACROS.values() for tag in tags} | {"AcquisitionNumber", "PixelData"}


def write_enhanced(path, slices, *, shared=(), parts=1, legacy=False, change=None, frame=None):
    """Writes the files `slices` as one of frames in the same order; returns the paths.

    `shared` names functional groups that are written once for all frames; `parts` above 1 makes a
    concatenation. `frame(k, groups)` may change the functional groups of a frame, `change(data)`
    each file before it is written.
    """
    sources = [dcmread(file) for file in slices]
    whole, uid = generate_uid(), generate_uid()
    paths = []
    for number, chosen in enumerate(np.array_split(np.arange(len(sources)), parts), start=1):
        data = copy.deepcopy(sources[0])
        for tag in _MOVED:
            if tag in data:
                delattr(data, tag)
        kind = LegacyConvertedEnhancedCTImageStorage if legacy else EnhancedCTImageStorage
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.NumberOfFrames = len(chosen)
        data.SharedFunctionalGroupsSequence = [_groups(sources[0], set(shared))]
        own = []
        for k in chosen:
            groups = _groups(sources[k], set(_MACROS) - set(shared))
            content = Dataset()
            content.FrameAcquisitionNumber = int(sources[k].get("AcquisitionNumber") or 1)
            content.StackID, content.InStackPositionNumber = "1", int(k) + 1
            groups.FrameContentSequence = [content]
            kinds = Dataset()
            kinds.FrameType = [*sources[k].ImageType, "NONE"]
            groups.CTImageFrameTypeSequence = [kinds]
            if frame:
                frame(int(k), groups)
            own.append(groups)
        data.PerFrameFunctionalGroupsSequence = own
        if parts > 1:
            data.ConcatenationUID, data.SOPInstanceUIDOfConcatenationSource = uid, whole
            data.InConcatenationNumber, data.InConcatenationTotalNumber = number, parts
            data.ConcatenationFrameOffsetNumber = int(chosen[0])
        data.PixelData = b"".join(sources[k].PixelData for k in chosen)
        data["PixelData"].VR = "OW"
        if change:
            change(data)
        file = path if parts == 1 else path.with_name(f"{path.name}{number}")
        file.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(file, enforce_file_format=True)
        paths.append(file)
    return paths


def _groups(source, names):
    groups = Dataset()
    for name in sorted(names):
        item = Dataset()
        for tag in _MACROS[name]:
            if tag in source:
                setattr(item, tag, getattr(source, tag))
        setattr(groups, name, [item])
    return groups
