"""Files that no scanner wrote: each by the name of its case, with words of what is said of it."""

import gzip
import os

import nibabel as nib
import numpy as np

SHAPE = (16, 16, 6)  # i, j, k
AFFINE = np.diag([10.0, 10.0, 20.0, 1.0])


def head():
    """A block of brain in air, and a mask with every class."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[3:13, 3:13, 1:5] = 40
    label = np.zeros(SHAPE, np.uint8)
    label[5:10, 6, 3] = np.arange(1, 6)
    return hu, label


def nifti(voxels, kind=nib.Nifti1Image, **fields):
    """The bytes of a file, header fields set by hand."""
    image = kind(voxels, AFFINE)
    data = bytearray(image.to_bytes())
    size = int(image.header["sizeof_hdr"])
    block = type(image.header)(bytes(data[:size]), check=False)
    for field, value in fields.items():
        block[field] = value
    return bytes(block.binaryblock + data[size:])


def dim(*sizes):
    return {"dim": [len(sizes), *sizes, *[1] * (7 - len(sizes))]}


def flip(data, at):
    data = bytearray(data)
    data[at] ^= 4
    return bytes(data)


HU, LABEL = head()
SCAN, MASK = nifti(HU), nifti(LABEL)
BRIGHT = HU.astype(np.float32)
BRIGHT[4, 4, 4] = np.nan
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
VALUES = {
    "seven": LABEL + np.uint8(7) * (LABEL > 0),
    "half": LABEL + 0.5 * (LABEL > 0),
    "minus": -1.0 * LABEL,
}

IMAGES = {  # case: the bytes of its file, what is said
    "empty": (b"", "the file is empty"),
    "empty_gzip": (gzip.compress(b""), "truncated header: 0 of|first number is no header size"),
    "text": (b"case,slice\n" * 90, "not a NIfTI file"),
    "packed_text": (gzip.compress(b"case,slice\n" * 90), "not a NIfTI file"),
    "two_bytes": (b"\x1f\x8b", "damaged gzip stream"),
    "cut_header": (gzip.compress(SCAN[:200]), "truncated header: 200 of 348 bytes"),
    "cut_gzip": (gzip.compress(SCAN)[:-60], "damaged gzip stream"),
    "cut_voxels": (gzip.compress(SCAN[:-500]), "truncated: 2572 of 3072 bytes"),
    "cut_plain": (SCAN[:-500], "truncated: header claims 3072 bytes"),
    "flipped_bit": (flip(gzip.compress(SCAN), -6), "damaged gzip stream (CRC"),
    "flipped_voxel": (flip(gzip.compress(SCAN, 0), 1000), "damaged gzip stream (CRC"),
    "terabytes": (gzip.compress(nifti(HU, **dim(*[32767] * 3))), "the limit is 4294967296"),
    "eight_gigabytes": (gzip.compress(nifti(HU, **dim(2048, 2048, 1024))), "the limit is"),
    "two_gigabytes": (  # of which two megabytes are there, so that its size alone says nothing
        gzip.compress(nifti(HU, **dim(1024, 1024, 1024)) + os.urandom(2**21), 0),
        "truncated: 2100224 of 2147483648 bytes",
    ),
    "bomb": (gzip.compress(SCAN + bytes(2**26), 6), "goes on for more than 1048576 bytes"),
    "zero_size": (nifti(HU, **dim(16, 0, 6)), "sizes must be positive"),
    "negative_size": (nifti(HU, **dim(16, -16, 6)), "sizes must be positive"),
    "four_axes": (nifti(np.stack([HU, HU], 3)), "not a 3D scan"),
    "two_axes": (nifti(HU[..., 0]), "not a 3D scan"),
    "nine_axes": (nifti(HU, dim=[9, 16, 16, 6, 1, 1, 1, 1]), "not a 3D scan"),
    "colors": (nifti(RGB), "datatype is 128"),
    "complex": (nifti(HU.astype(np.complex64)), "datatype is 32"),
    "unknown_type": (nifti(HU, datatype=7777), "datatype is 7777"),
    "zero_spacing": (
        nifti(HU, pixdim=[1, 10, 0, 20, 1, 1, 1, 1], sform_code=0),
        "spacing must be positive",
    ),
    "negative_spacing": (
        nifti(HU, pixdim=[1, 10, -9, 20, 1, 1, 1, 1], sform_code=0),
        "spacing must be positive",
    ),
    "nan_spacing": (
        nifti(HU, pixdim=[1, np.nan, 9, 9, 1, 1, 1, 1], sform_code=0),
        "spacing must be positive",
    ),
    "nan_affine": (nifti(HU, srow_y=[np.nan] * 4), "affine is not finite"),
    "zero_affine": (
        nifti(HU, srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4),
        "affine is not finite or has a zero axis",
    ),
    "flat_affine": (nifti(HU, srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), "affine is singular"),
    "huge_spacing": (
        nifti(HU, srow_x=[9e4, 0, 0, 0], srow_y=[0, 9e4, 0, 0]),
        "more than fit; look at the spacing",
    ),
    "huge_slope": (nifti(HU, scl_slope=1e38, scl_inter=0), "not finite numbers"),
    "large_slope": (nifti(HU, scl_slope=1e9, scl_inter=0), "no HU: values -1e+12 to 4e+10"),
    "nan_intercept": (nifti(HU, scl_slope=2, scl_inter=np.nan), "intercept"),
    "nan_voxel": (nifti(BRIGHT), "1 of 1536 voxels are not finite numbers"),
    "start_beyond": (nifti(HU, vox_offset=1e6), "truncated"),
    "start_before": (nifti(HU, vox_offset=-9), "vox_offset must be"),
    "start_nowhere": (nifti(HU, vox_offset=np.nan), "vox_offset must be"),
    "pair": (nifti(HU, magic=b"ni1"), "single-file NIfTI: Analyze or .hdr/.img"),
    "wrong_magic": (nifti(HU, magic=b"xyz"), "single-file NIfTI"),
    "dicom": (bytes(128) + b"DICM" + bytes(400), "not a NIfTI file"),
}
MASKS = {
    "mask_empty_file": (b"", "the file is empty"),
    "mask_text": (b"left,right\n" * 90, "not a NIfTI file"),
    "mask_cut": (gzip.compress(MASK)[:-30], "damaged gzip stream"),
    "mask_shape": (nifti(LABEL[:, :, :4]), "label has shape (4, 16, 16)"),
    "mask_four_axes": (nifti(np.stack([LABEL, LABEL], 3)), "not a 3D scan"),
    "mask_value_seven": (nifti(VALUES["seven"]), "in 0..5; got 8, 9, 10, 11, 12"),
    "mask_value_half": (nifti(VALUES["half"]), "in 0..5; got 1.5, 2.5, 3.5, 4.5, 5.5"),
    "mask_value_minus": (nifti(VALUES["minus"]), "in 0..5; got -5, -4, -3, -2, -1"),
    "mask_terabytes": (gzip.compress(nifti(LABEL, **dim(*[32767] * 3))), "the limit is"),
    "mask_all_zero": (nifti(LABEL * 0), "the mask is empty, but the scan is known to bleed"),
    "mask_colors": (nifti(RGB), "datatype is 128"),
}
KEPT = {  # odd, but read: the case must come through, with this said of it
    "good": (SCAN, ""),
    "nan_slope": (nifti(HU, scl_slope=np.nan, scl_inter=0), "scale factor nan ignored"),
    "infinite_slope": (nifti(HU, scl_slope=np.inf, scl_inter=0), "scale factor inf ignored"),
    "one_frame": (nifti(HU[..., None]), ""),
    "big_endian": (nib.Nifti1Image(HU, AFFINE, nib.Nifti1Header(endianness=">")).to_bytes(), ""),
    "version_two": (nifti(HU, kind=nib.Nifti2Image), ""),
    "no_position": (nifti(HU, sform_code=0, qform_code=0), "no position in the header"),
    "all_air": (nifti(HU * 0 - 1000), ""),
    "one_voxel": (nifti(HU[:1, :1, :1]), "doubtful size"),
    "no_air": (nifti(np.clip(HU, 0, 80)), "no air: nothing below -500 HU"),
}


def fill(root):
    """BHSD's folders: hostile images in the pool, hostile masks beside good images."""
    pool, images, masks = (
        root / name for name in ("unlabel_1/anybleed", "label_1/images", "label_1/ground truths")
    )
    for folder in (pool, images, masks):
        folder.mkdir(parents=True)
    for name, (content, _) in (IMAGES | KEPT).items():
        (pool / f"{name}.nii.gz").write_bytes(content)
    for name, (content, _) in MASKS.items():
        (images / f"{name}.nii.gz").write_bytes(SCAN)
        (masks / f"{name}.nii.gz").write_bytes(content)
    for name in ("whole", "mask_nan_affine"):
        (images / f"{name}.nii.gz").write_bytes(SCAN)
    (masks / "whole.nii.gz").write_bytes(MASK)
    (masks / "mask_nan_affine.nii.gz").write_bytes(nifti(LABEL, srow_y=[np.nan] * 4))
    (pool / "circle.nii.gz").symlink_to("circle.nii.gz")
    (pool / "nowhere.nii.gz").symlink_to(root / "gone")
    (pool / "folder.nii.gz").mkdir()
    os.mkfifo(pool / "pipe.nii.gz")
    (pool / "new\nline.nii.gz").write_bytes(SCAN)
    named = [f"./imagesTr/{path.name}" for path in sorted(images.iterdir())]
    return [*named, "../../../etc/passwd.nii.gz"]


ENTRIES = {  # what is wrong with an entry of a folder or of the lists, not with bytes
    "circle": "a link in a circle or to a file that is gone",
    "nowhere": "a link in a circle or to a file that is gone",
    "folder": "expected a file",
    "pipe": "a pipe, socket or device",
    "new\\nline": "its name holds control characters",
    "passwd": "no image for passwd",
}

KINDS = {  # of what the first pass refuses, as the integrity page calls them
    "no NIfTI file": (
        *("dicom", "empty_gzip", "mask_text", "packed_text", "pair", "text", "wrong_magic"),
    ),
    "not three axes": (
        *("four_axes", "mask_four_axes", "negative_size", "nine_axes", "two_axes", "zero_size"),
    ),
    "damaged gzip stream": ("cut_gzip", "flipped_bit", "flipped_voxel", "mask_cut", "two_bytes"),
    "truncated file": (
        *("cut_header", "cut_plain", "cut_voxels", "start_beyond", "two_gigabytes"),
    ),
    "voxels that are no numbers": ("colors", "complex", "mask_colors", "unknown_type"),
    "header that claims too much": ("eight_gigabytes", "mask_terabytes", "terabytes"),
    "impossible affine": ("flat_affine", "nan_affine", "zero_affine"),
    "impossible spacing": ("nan_spacing", "negative_spacing", "zero_spacing"),
    "label values out of range": ("mask_value_half", "mask_value_minus", "mask_value_seven"),
    "empty file": ("empty", "mask_empty_file"),
    "impossible start of the voxels": ("start_before", "start_nowhere"),
    "link that leads nowhere": ("circle", "nowhere"),
    "voxels that are not finite": ("huge_slope", "nan_voxel"),
    "bytes after the last voxel": ("bomb",),
    "empty mask of a scan that bleeds": ("mask_all_zero",),
    "folder with the name of a scan": ("folder",),
    "image that is not there": ("passwd",),
    "impossible scale factors": ("nan_intercept",),
    "mask of another shape than its image": ("mask_shape",),
    "not a regular file": ("pipe",),
    "unsafe file name": ("new\\nline",),
    "values that are no HU": ("large_slope",),
}
