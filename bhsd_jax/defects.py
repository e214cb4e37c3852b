"""What can be wrong with a scan or with a data set: kinds, findings and refusals.

Whoever notices a defect says its kind there and then, in a `Finding` or a `Refusal`; nobody has to
recognize it later by the words of a message.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bhsd_jax.platform.errors import UserError

Outcome = Literal["repaired", "kept", "refused"]
"""What was done: undone, nothing, or the scan is not used (the verb then ends non-zero)."""


class Kind(enum.StrEnum):
    """Kinds of defects, in the words of the integrity page; # stands for a number."""

    # Of the intensities of a scan.
    OVERFLOW = "12-bit overflow"
    WRAP = "16-bit wrap of metal"
    PADDING = "padding below -1024 HU"
    METAL = "metal beyond 3071 HU"
    NO_AIR = "no air: windowed, or no CT"
    BLANK = "scan without an image"
    BLANK_SLICES = "slices without an image between others"
    NO_HU = "values that are no HU"
    NOT_HU = "no CT, or a CT that is not in HU"
    OFFSET = "rescale intercept lost, or applied twice"
    UNSIGNED = "negative values read as unsigned"
    NO_NUMBERS = "voxels that are no numbers"
    NOT_FINITE = "voxels that are not finite"
    SCALED = "HU behind scale factors"
    SCALE_IGNORED = "scale factor that makes no sense"
    SCALE_IMPOSSIBLE = "impossible scale factors"

    # Of its place in space.
    FIELD_OF_VIEW = "doubtful size"
    QFORM_ONLY = "position in the qform only"
    NO_POSITION = "no position in the header"
    NO_SPACING = "no spacing in the header"
    NO_SFORM = "sform that is no affine"
    TILT_AMBIGUOUS = "turned affine: oblique, or a tilted gantry drawn upright"
    TWO_SPACINGS = "sform and pixdim that state different spacings"
    TWO_DIRECTIONS = "sform and qform that run in different directions"
    SHEAR_SHORT = "slice step too short in a sheared sform"
    AXES = "not three axes"
    SPACING = "impossible spacing"
    AFFINE = "impossible affine"
    TOO_LARGE = "spacing that makes a scan too large"
    CHANNELS = "channels that do not go together"
    TURNED = "axes in another order than the scan's, turned to it"

    # Of a mask.
    MASK_EMPTY = "empty mask"
    MASK_EMPTY_BLEEDS = "empty mask of a scan that bleeds"
    MASK_OF_NO_BLEED = "mask of a scan that does not bleed"
    MASK_SHAPE = "mask of another shape than its image"
    MASK_VALUES = "label values out of range"
    MASK_TYPE = "mask not stored in 8 bits"
    MASK_ROUNDED = "mask values rounded by a scale factor"
    MASK_ONE_VALUE = "no mask holds another value than 1"
    MASK_MOVED = "mask that lies elsewhere than its image"
    MASK_SPACING = "mask of another spacing than its image"
    MASK_MIRRORED = "mask that may be mirrored"
    MASK_GEOMETRY = "mask without usable geometry"
    MASK_UNEVEN = "mask on slices at uneven steps; planes between them have the nearest one's"
    MASK_UNUSED = "files that are no mask of any series"
    MASK_AUTOMATIC = "mask that an algorithm drew"
    MASK_OUTSIDE = "mask beyond the head"
    MASK_UPRIGHT = "mask of a converter that hides the gantry's tilt; the series' is taken"
    SLICE_LABELS = "slice labels that do not fit"
    SLICE_LABELS_TURNED = "slice labels that fit the mask better from the other end"
    SLICE_LABELS_UNUSED = "slice labels of a scan whose slices are not axial"

    # Of a file.
    FILE_MISSING = "file that is not there"
    FILE_EMPTY = "empty file"
    FILE_TRUNCATED = "truncated file"
    FILE_GZIP = "damaged gzip stream"
    FILE_CLAIMS = "header that claims too much"
    FILE_START = "impossible start of the voxels"
    FILE_LONGER = "bytes after the last voxel"
    NO_NIFTI = "no NIfTI file"
    UNREADABLE = "unreadable file"
    COMPRESSED = "compressed files without a decoder"

    # Of a DICOM series.
    TILTED = "gantry tilt of # degrees, kept as shear in the affine"
    UNSHEARED = "unsheared: slices moved over each other, and set upright"
    PADDING_VALUE = "# voxels of padding set to # HU"
    PADDING_IN_TISSUE = "the padding value is among tissue: not believed"
    UNSCALED = "no rescale factors in # of # slices; taken for # and #"
    FLATTENED = "rescale slope of # in # of # slices; taken for #"
    FILES_DAMAGED = (
        "# of # files are damaged, the first is file # in the order of their names; left out"
    )
    SLICES_TWICE = "copies of slices left out: #"
    SLICES_MISSING = (
        "# slices are missing: # mm after slice # of # by position, # mm elsewhere; "
        "interpolated to # slices at steps of # mm"
    )
    SLICES_UNEVEN = (
        "slices at uneven steps, # to # mm, mostly # mm; interpolated to # slices at steps of # mm"
    )
    ACQUISITIONS = "acquisitions or reconstructions of one series: a volume each"
    SERIES_PARTS = (
        "one of # volumes of its series, which differ in orientation, matrix or pixel size"
    )
    LEFT_OUT_HEADER = "left out: # images of a header that cannot be read"
    LEFT_OUT_MODALITY = "left out: # images of another kind than CT"
    LEFT_OUT_SEG = "left out: # images a DICOM SEG, which is a mask and no scan"
    LEFT_OUT_OUTLINE = "left out: # images of outlines (RTSTRUCT), which are not read"
    LEFT_OUT_LOCALIZER = "left out: # images a localizer"
    LEFT_OUT_COLOR = "left out: # images in color"
    LEFT_OUT_POSITION = "left out: # images without a usable position"
    LEFT_OUT_SPACING = "left out: # images without a pixel spacing"
    LEFT_OUT_SIZE = "left out: # images of a pixel spacing of # or less"
    LEFT_OUT_ORIENTATION = "left out: # images without a usable orientation"
    LEFT_OUT_EMPTY = "left out: # images without voxels"
    LEFT_OUT_ALONE = "left out: # images alone in its series"
    LEFT_OUT_REPORT = "left out: # images a page of a report"
    LEFT_OUT_CAPTURE = "left out: # images a secondary capture"
    LEFT_OUT_PROJECTION = "left out: # images a projection of a volume"
    LEFT_OUT_MAP = "left out: # images a map of another measure than HU"
    LEFT_OUT_PLACE = "left out: # images at one place with all others of its series"
    NO_DICOM = (
        "# named like slices but no DICOM, the first is file # in the order of names: look at it; "
        "if it was a slice, fetch the series again, for the scan lacks it"
    )
    DERIVED = "images derived from others, such as a reformat"
    # Why a series becomes no volume.
    NO_SLICE = "file that is no slice of a CT volume"
    MULTI_FRAME = "multi-frame image that is not read"
    SERIES_DAMAGED = "damaged files in a series"
    TOO_FEW_SLICES = "slices too few for a volume"
    ONE_PLACE = "different slices at one place"
    MISSING = "missing slices"
    UNEVEN = "slices at uneven steps"
    SHIFTED = "slices shifted sideways"

    # Of the folders and lists of a data set.
    MACOS = "leftover of macOS"
    NO_SUFFIX = "file without .nii.gz"
    NAME_UNSAFE = "unsafe file name"
    NAME_TWICE = "two scans of one name"
    FILE_TWICE = "one scan in two files"
    LINK = "link that leads nowhere"
    NOT_REGULAR = "not a regular file"
    FOLDER_AS_SCAN = "folder with the name of a scan"
    FOLDER_SPACE = "space in a folder's name"
    FOLDER_UNUSED = "folder that is not used"
    FOLDER_COUNT = "folder that holds another number than its name says"
    LIST_DEAD_PATHS = "dead paths in dataset.json"
    LIST_OUTSIDE = "path that leads out of the data set"
    LIST_COUNT = "numTraining that is not the number of training cases"
    LIST_BOTH = "in both official lists"
    LIST_NONE = "in no official list"
    FOLDS_UNREAD = "folds in a file that is not read"
    IMAGE_MISSING = "image that is not there"
    MASK_MISSING = "mask that is not there"
    SLICE_LABELS_ALONE = "labels in a table without a scan"
    SLICES_UNTOLD = "slices of which the table of slice labels says nothing"

    # Of scans that have to do with each other.
    COPY = "one scan under two names"
    COPY_IN_FOLDERS = "one scan in two folders"
    COPY_LABELED = "labeled scan in the pool"
    BLEEDS_AND_NOT = "scan that bleeds and does not"
    PATIENT_NOBODY = "PatientID that was written over: studies count as patients"
    PATIENT_TWICE = "patient scanned twice"
    PATIENT_TESTED_POOL = "unlabeled scan of a test patient"
    PATIENT_TESTED = "training scan of a tested one"


@dataclass(frozen=True)
class Finding:
    """One thing about a scan, or about a whole data set, that is not as it should be."""

    kind: Kind
    done: Outcome
    text: str  # what was found where, what was done about it or is to be done
    case: str = ""  # "": the data set as a whole; or the scan that is being read

    def __str__(self) -> str:
        return self.text


class Refusal(UserError):  # noqa: N818 - it says no to a file; nothing has gone wrong
    """A scan or a file that cannot be used, and the kind of its defect."""

    def __init__(self, kind: Kind, text: str):
        super().__init__(text)
        self.kind = kind

    def __reduce__(self):  # an exception is copied by its arguments, which lack the kind
        return type(self), (self.kind, str(self))


def texts(findings: Iterable[Finding]) -> list[str]:
    """The sentences of findings, each once."""
    return list(dict.fromkeys(finding.text for finding in findings))


def kind_of(error: BaseException) -> Kind:
    """The kind of a refusal; of an error that carries none, the file could not be read."""
    if isinstance(error, Refusal):
        return error.kind
    return Kind.FILE_MISSING if isinstance(error, FileNotFoundError) else Kind.UNREADABLE


def said_of(place: object, error: BaseException) -> Refusal:
    """The same refusal with the place it concerns put before its text."""
    return Refusal(kind_of(error), f"{place}: {error}")


def in_line(error: BaseException) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def refused(error: BaseException, case: str) -> Finding:
    """The finding that stands for a refused case in tables."""
    return Finding(kind_of(error), "refused", in_line(error), case)
