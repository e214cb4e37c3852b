"""Enhanced CT: the frames of one file, each with a header as a file of its own would have it.

Plain CT that was converted into one file ("legacy converted") is read in the same way.
"""

from collections.abc import Sequence
from typing import Any

from bhsd_jax.ct.dicom import image_kind

# Functional groups, of a frame or shared by all, in which something is looked up.
_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "CTImageFrameTypeSequence",
    "CTReconstructionSequence",
    "SegmentIdentificationSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
    "UnassignedSharedConvertedAttributesSequence",
)
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_RENAMED = {
    "ImageType": "FrameType",
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
}
_OF_ONE = {"NumberOfFrames": 1, "SOPClassUID": image_kind.PLAIN_CT}
TAGS = (
    *(_SHARED, _PER_FRAME),
    *("ConcatenationUID", "SOPInstanceUIDOfConcatenationSource"),
    *("InConcatenationNumber", "InConcatenationTotalNumber"),
)


class Frame:
    """The header of one frame: what its functional groups say, else the shared ones, else the file.

    Asked for by the names that headers of single images have.
    """

    def __init__(self, data: Any, own: Any, shared: Any):
        self._groups = [*_items(own), *_items(shared)]
        self._data = data
        self.file_meta = getattr(data, "file_meta", {})

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where nobody says it."""
        if name in _OF_ONE:
            return _OF_ONE[name]
        for wanted in (_RENAMED.get(name, name), name):
            for part in (*self._groups, self._data):
                value = part.get(wanted)
                if value is not None:
                    return value
        return default

    @property
    def stack(self) -> str:
        """Which stack of frames it is of, if the file says."""
        return str(self.get("StackID") or "")

    @property
    def phase(self) -> str:
        """Its place in time, where the same slices were taken several times."""
        return str(self.get("TemporalPositionIndex") or "")


def of(data: Any) -> list[Frame]:
    """The frames of an enhanced CT image, read with or without its voxels; [] of any other.

    Raises:
        ValueError: If it has another number of frames than of their functional groups.
    """
    own = data.get(_PER_FRAME)
    if str(data.get("SOPClassUID") or "") not in image_kind.ENHANCED_CT or not own:
        return []
    count = int(data.get("NumberOfFrames") or 1)
    if len(own) != count:
        raise ValueError(f"{count} frames with {len(own)} functional groups")
    shared = (data.get(_SHARED) or [None])[0]
    return [Frame(data, item, shared) for item in own]


def concatenation(data: Any) -> tuple[str, tuple[int, int]]:
    """Of an image that was cut into several files: its UID, which part this is, and of how many.

    The latter is 0 where the file does not say; "" and zeros of an image that is whole.
    """
    source = data.get("SOPInstanceUIDOfConcatenationSource") or data.get("ConcatenationUID")
    if not source:
        return "", (0, 0)
    number, total = data.get("InConcatenationNumber"), data.get("InConcatenationTotalNumber")
    return str(source), (int(number or 0), int(total or 0))


def _items(groups: Any) -> Sequence[Any]:
    """The functional groups that are there, each a sequence of one item."""
    if groups is None:
        return []
    return [found[0] for name in _GROUPS if (found := groups.get(name))]
