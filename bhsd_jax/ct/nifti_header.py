"""Headers of NIfTI files, believed only after they are checked. Knows nibabel, as `nifti` does."""

import math
from io import BufferedIOBase

import numpy as np
from jaxtyping import Float64
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from bhsd_jax.ct import geometry
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform import files
from bhsd_jax.volume import Shape

_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # xyzt_units: meter, micrometer; all else is taken for mm
_SAME = 1e-3  # of a column's length: how far those of sform and qform may be apart
_LONGEST = 1.01  # of a quaternion, which is of length 1 but for rounding
_LEAST_TILTED, _MOST_TILTED = math.cos(math.radians(0.5)), math.cos(math.radians(45.0))
_KINDS = {348: (Nifti1Header, b"n+1", 352), 540: (Nifti2Header, b"n+2", 544)}


def parse(stream: BufferedIOBase) -> Nifti1Header:
    """Reads a NIfTI-1 or -2 header of either byte order from the start of a file.

    Raises:
        Refusal: If it is another format, of two files, or cut off.
    """
    first = stream.read(4)
    sizes = {"<": int.from_bytes(first, "little"), ">": int.from_bytes(first, "big")}
    endianness = next((key for key, size in sizes.items() if size in _KINDS), None)
    if endianness is None:
        raise Refusal(Kind.NO_NIFTI, f"not a NIfTI file: {_other(first + stream.read(60))}")
    size = sizes[endianness]
    kind, magic, _ = _KINDS[size]
    block = first + stream.read(size - 4)
    if len(block) < size:
        raise Refusal(Kind.FILE_TRUNCATED, f"truncated header: {len(block)} of {size} bytes")
    header = kind(block, endianness=endianness, check=False)
    if bytes(header["magic"])[:3] != magic:
        text = "not a single-file NIfTI: Analyze or .hdr/.img; convert it to .nii.gz"
        raise Refusal(Kind.NO_NIFTI, text)
    return header


def _other(begins: bytes) -> str:
    """What a file is that does not begin as NIfTI does, unpacked if it was packed."""
    if begins.startswith(b"\x1f\x8b"):
        return "packed twice by gzip; unpack it once"
    usual = "the first number is no header size; convert it to .nii.gz"
    return files.stand_in(begins) or usual


def first_offset(header: Nifti1Header) -> int:
    """Where voxels begin if the header has no extension."""
    return _KINDS[int(header["sizeof_hdr"])][2]


def shape(header: Nifti1Header, channels: int = 1) -> Shape:
    """D, H, W; further axes of size 1 or 0 are dropped, and the fourth where it is of channels.

    Raises:
        Refusal: If the scan is not 3D, has another number of channels, or a size is not positive.

    Source: nifticlib 3, in ITK 5.4: a size of 0 is one of 1.
    """
    rank, *sizes = (int(n) for n in header["dim"])
    if rank in range(1, 8):
        # Of axes that were left out some writers state 0.
        sizes = [*sizes[: min(rank, 3)], *(max(n, 1) for n in sizes[3:rank])]
    if channels > 1 and rank == 5 and sizes[3] == 1:
        del sizes[3]  # ITK has the components of a voxel on the fifth axis, after time
    fourth = sizes[3] if len(sizes) >= 4 else 1
    if channels > 1 and fourth != channels:
        text = f"expected {channels} channels along a fourth axis; sizes are {tuple(sizes)}"
        raise Refusal(Kind.AXES, text)
    further = sizes[4:] if channels > 1 else sizes[3:]
    if not 3 <= rank <= 7 or any(n != 1 for n in further):
        # One slice has no thickness in such a file, and networks for scans are given millimeters.
        hint = "; give a slice a third axis of size 1, or save it as .mha or .png" * (rank == 2)
        if channels == 1 and 3 < rank <= 7:
            hint = "; it holds several volumes: save the one that is meant, as by fslroi"
        raise Refusal(Kind.AXES, f"not a 3D scan: dim is {rank}, sizes {tuple(sizes)}{hint}")
    if min(sizes) < 1:
        raise Refusal(Kind.AXES, f"sizes must be positive; got {tuple(sizes)}")
    w, h, d = sizes[:3]
    return d, h, w


def voxel_type(header: Nifti1Header) -> np.dtype:
    """Type and byte order of the voxels.

    Raises:
        Refusal: If voxels are colors, complex, or of an unknown type.
    """
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        dtype = np.dtype("V0")
    if dtype.kind not in "iuf":
        text = f"voxels must be integers or real numbers; datatype is {int(header['datatype'])}"
        raise Refusal(Kind.NO_NUMBERS, text)
    return dtype


def offset(header: Nifti1Header) -> int:
    """Bytes before the first voxel.

    Raises:
        Refusal: If voxels would begin inside the header or nowhere.
    """
    first = first_offset(header)
    start = float(header["vox_offset"])
    if start == 0:  # written by tools that trust the default
        return first
    if not first <= start < np.inf or start != int(start):
        text = f"vox_offset must be an integer of at least {first}; got {start:g}"
        raise Refusal(Kind.FILE_START, text)
    return int(start)


def affine(header: Nifti1Header) -> Float64[np.ndarray, "4 4"]:
    """From (d, h, w, 1) to RAS+ mm: the sform if there is one, else the qform, as nibabel has it.

    A sheared sform whose slice step dcm2niix made too short gets the true one.

    Raises:
        Refusal: If it is singular or not finite, or the voxel size is and no sform makes up for it.

    Source: dcm2niix 1.0.20260724 on tilted series: the step's direction is the table's, but its
    length the distance between the slices, which pixdim and the upright qform beside it have.
    """
    header = _settled(header)
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    # A sform says all by itself; ITK's writers leave negative spacings beside it, others zeros
    # or NaN.
    needed = int(header["sform_code"]) <= 0
    if needed and not (np.isfinite(spacing).all() and spacing.min() > 0):
        text = (
            f"spacing must be positive and finite; pixdim is {spacing.tolist()}: write the size of "
            "a voxel there, or a sform"
        )
        raise Refusal(Kind.SPACING, text)
    matrix = np.array(header.get_best_affine(), np.float64)
    matrix[:3, 2] *= _lengthened(header)
    matrix[:3] *= _mm_per_unit(header)
    require_affine(matrix)
    return matrix[:, [2, 1, 0, 3]]


def _settled(header: Nifti1Header) -> Nifti1Header:
    """The header as its geometry is read: without what it states of it and cannot mean.

    A sform that puts all voxels into a plane or nowhere counts for none where there is a qform. A
    quaternion that is too long by rounding is brought to its length.

    Source: ITK 5.4, `itkNiftiImageIO.cxx`; nifticlib 3, `nifti_quatern_to_mat44`.
    """
    header = header.copy()
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # the standard's reading of 0
    if int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0 and _is_flat(header):
        header["sform_code"] = 0
    names = [f"quatern_{letter}" for letter in "bcd"]
    length = float(np.linalg.norm([float(header[name]) for name in names]))
    if 1 < length <= _LONGEST:
        for name in names:
            header[name] = float(header[name]) / length
    return header


def _is_flat(header: Nifti1Header) -> bool:
    """Whether a sform is no affine."""
    try:
        require_affine(np.asarray(header.get_sform(), np.float64))
    except Refusal:
        return True
    return False


def require_affine(matrix: Float64[np.ndarray, "4 4"]) -> None:
    """Refuses an affine that puts voxels nowhere, or all of them in a plane.

    Raises:
        Refusal: If it is singular or not finite.
    """
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or lengths.min() <= 0:
        text = f"affine is not finite or has a zero axis: {matrix[:3].tolist()}"
        raise Refusal(Kind.AFFINE, text)
    if abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-6:
        raise Refusal(Kind.AFFINE, f"affine is singular: {matrix[:3].tolist()}")


def has_position(header: Nifti1Header) -> bool:
    """Whether it says where in the patient voxels lie: without, `affine` is but a custom."""
    coded = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    return coded and not _is_identity(header)


def _is_identity(header: Nifti1Header) -> bool:
    """Whether all that a header states of its place is the identity: `nibabel` with `np.eye(4)`.

    No scan has voxels of 1 mm to the last bit and the world's origin in the middle of its first.
    """
    stated = []
    try:
        if int(header["sform_code"]) > 0:
            stated.append(np.asarray(header.get_sform()))
        if int(header["qform_code"]) > 0:
            stated.append(np.asarray(header.get_qform()))
    except (ValueError, HeaderDataError):  # a quaternion that is none
        return False
    return bool(stated) and all(np.array_equal(matrix, np.eye(4)) for matrix in stated)


def repairs(header: Nifti1Header) -> list[Finding]:
    """What `affine` has changed, or has taken though the header contradicts it or says nothing."""
    settled = _settled(header)
    if int(settled["sform_code"]) != int(header["sform_code"]):
        text = "sform that is no affine (sform_code is set): the qform is taken, as ITK does"
        return [Finding(Kind.NO_SFORM, "repaired", text)]
    header = settled
    if _is_identity(header):
        text = (
            "no position in the header (its affine is the identity, as tools write that have lost "
            "it): right and left may be exchanged, and volumes in mL take voxels for 1 mm3"
        )
        return [Finding(Kind.NO_POSITION, "kept", text)]
    if not has_position(header):
        text = (
            "no position in the header (sform_code and qform_code are 0): axes are taken to run to "
            "the left, the front and the top, as nibabel does; right and left may be exchanged"
        )
        return [Finding(Kind.NO_POSITION, "kept", text)]
    longer = _lengthened(header)
    if longer == 1:
        return [*_contradictions(header), *_directions(header)]
    step = float(np.linalg.norm(np.asarray(header.get_sform())[:3, 2]))
    text = f"sheared sform of dcm2niix: slice step {step:.3f} mm, in truth {step * longer:.3f}"
    return [Finding(Kind.SHEAR_SHORT, "repaired", text)]


def _contradictions(header: Nifti1Header) -> list[Finding]:
    """Whether pixdim states other steps than the sform, which is taken.

    Registration to a template leaves such files, and so do tools that change only one of the two.
    Of a sheared sform, pixdim may state the distance between the slices or the step along them.
    """
    stated = np.asarray(header["pixdim"][1:4], np.float64)
    columns = np.asarray(header.get_sform(), np.float64)[:3, :3]
    usable = np.isfinite([*stated, *columns.flat]).all() and stated.min() > 0
    if int(header["sform_code"]) <= 0 or not usable:
        return []
    steps = np.linalg.norm(columns, axis=0)
    normal = np.cross(columns[:, 0], columns[:, 1])
    apart = abs(normal @ columns[:, 2]) / max(float(np.linalg.norm(normal)), 1e-30)
    off = np.abs(np.array([*steps, apart]) / stated[[0, 1, 2, 2]] - 1)
    if max(off[0], off[1], min(off[2:])) <= geometry.SAME_SPACING:
        return []
    per_unit = _mm_per_unit(header)
    said = [" x ".join(f"{value:.4g}" for value in each * per_unit) for each in (steps, stated)]
    text = (
        f"sform has steps of {said[0]} mm, pixdim {said[1]}: the sform is taken, and volumes in mL "
        "follow it"
    )
    return [Finding(Kind.TWO_SPACINGS, "kept", text)]


def has_sides(header: Nifti1Header) -> bool:
    """Whether it says which side of a scan is the patient's right, and in one way."""
    header = _settled(header)
    letters = _letters(header)
    sides = ["".join(letter for letter in each if letter in "RL") for each in letters]
    places = [each.find(side) for each, side in zip(letters, sides, strict=True)]
    return has_position(header) and len(set(sides)) < 2 and len(set(places)) < 2


def _directions(header: Nifti1Header) -> list[Finding]:
    """Whether the qform runs in other directions than the sform, which is taken.

    Tools that turn a scan or state its sides anew, and change only one of the two, leave such
    files. One that was moved to a template has two places, but hardly two directions.

    Source: ITK 5.4, `itkNiftiImageIO.cxx`: the qform is preferred unless sform_code is 1.
    """
    letters = _letters(header)
    if len(set(letters)) < 2:
        return []
    text = (
        f"sform runs to {letters[0]}, qform to {letters[1]}: the sform is taken, as nibabel does; "
        "ITK takes the qform, unless sform_code is 1"
    )
    if not has_sides(header):
        text += "; right and left may be exchanged"
    return [Finding(Kind.TWO_DIRECTIONS, "kept", text)]


def _letters(header: Nifti1Header) -> list[str]:
    """Where i, j and k run by the sform and the qform, such as LAS; of one alone nothing."""
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return []
    try:
        both = [np.array(header.get_sform()), np.array(header.get_qform())]
    except (ValueError, HeaderDataError):  # a quaternion or a spacing that is none
        return []
    columns = np.stack([matrix[:3, :3] for matrix in both])
    if not np.isfinite(columns).all() or np.linalg.norm(columns, axis=1).min() <= 0:
        return []
    return ["".join(map(str, aff2axcodes(matrix))) for matrix in both]


def _mm_per_unit(header: Nifti1Header) -> float:
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def _lengthened(header: Nifti1Header) -> float:
    """By how much the slice step of a sform is too short; 1 where it is not known to be.

    It is where the sform is sheared, and a perpendicular qform beside it has the same rows, columns
    and length of the step: that length is then the distance between the slices. Of a tilted
    enhanced CT dcm2niix states the feed instead, in a file that cannot be told from the others.
    """
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return 1.0
    try:
        upright = np.array(header.get_qform(), np.float64)[:3, :3]
    except (ValueError, HeaderDataError):  # a quaternion that is none
        return 1.0
    sheared = np.array(header.get_sform(), np.float64)[:3, :3]
    lengths = np.linalg.norm(upright, axis=0)
    if not np.isfinite([*sheared.flat, *upright.flat]).all() or lengths.min() <= 0:
        return 1.0
    off = np.abs(sheared - upright)[:, :2] / lengths[:2]
    stretched = abs(float(np.linalg.norm(sheared[:, 2]) / lengths[2]) - 1)
    if off.max() > _SAME or stretched > _SAME:
        return 1.0
    cosine = abs(float(sheared[:, 2] @ upright[:, 2])) / float(lengths[2] ** 2)
    return 1 / cosine if _MOST_TILTED < cosine < _LEAST_TILTED else 1.0


def scale(header: Nifti1Header) -> tuple[float, float]:
    """Slope and intercept of the voxels; 1 and 0 where the header has none that can be used.

    Raises:
        Refusal: If there is a slope, but its intercept is not finite.
    """
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise Refusal(Kind.SCALE_IMPOSSIBLE, str(error)) from error
    return (1.0, 0.0) if slope is None or intercept is None else (slope, intercept)


def rounding(header: Nifti1Header) -> float:
    """How far from the truth voxels may lie, since they were rounded to integers of the file.

    That is half the slope, as of whole numbers saved as floating point under a header of integers;
    0 if voxels are stored as they are, or a step is 1 or more and does not hide whole numbers.

    Raises:
        Refusal: As by `scale` and `voxel_type`.
    """
    slope = abs(scale(header)[0])
    if voxel_type(header).kind == "f" or not 0 < slope < 1:
        return 0.0
    return slope / 2 * (1 + 1e-4) + 1e-6  # what float32 adds


def remarks(header: Nifti1Header, *, is_label: bool) -> list[Finding]:
    """What is odd about a header, though it can be read."""
    if is_label:
        dtype = header.get_data_dtype()
        text = f"mask stored as {dtype.name}, not uint8"
        return [Finding(Kind.MASK_TYPE, "repaired", text)] if dtype.itemsize > 1 else []
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    found = []
    if not np.isfinite(slope):
        found.append(Finding(Kind.SCALE_IGNORED, "kept", f"scale factor {slope:g} ignored"))
    elif slope != 0 and (slope, intercept) != (1.0, 0.0):
        text = f"scale factors applied: {slope:.6g} x + {intercept:.6g}"
        found.append(Finding(Kind.SCALED, "repaired", text))
    if int(header["sform_code"]) <= 0 and has_position(header):
        found.append(Finding(Kind.QFORM_ONLY, "repaired", "position from the qform, no sform"))
    return found
