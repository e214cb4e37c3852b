"""Enhanced CT: the same volume as from single-frame files of the same slices."""

import numpy as np
import pytest
from dicom_files import NAME, PATIENT, block, store, write_series
from enhanced_files import write_enhanced
from pydicom import Dataset, dcmread
from pydicom.uid import RLELossless

from bhsd_jax.ct import scan
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.datasets import dicom
from bhsd_jax.defects import Kind, Refusal

ALL = (
    *("PlaneOrientationSequence", "PixelMeasuresSequence"),
    "PixelValueTransformationSequence",
)


def read(root, **options):
    (group,) = dicom_series.find(root)
    wanted = {"uneven": "refuse", "unshear": False} | options
    return scan.read(group.as_series("case", **wanted))


def require_same(one, other):
    for got, want in zip(one, other, strict=True):
        if isinstance(got, list):
            assert [finding.text for finding in got] == [finding.text for finding in want]
            continue
        assert got.voxels.dtype == want.voxels.dtype
        np.testing.assert_array_equal(got.voxels, want.voxels)
        np.testing.assert_array_equal(got.affine, want.affine)


@pytest.mark.parametrize("tilt", [0.0, 18.5])
@pytest.mark.parametrize("shared", [(), ALL])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_frames_are_the_slices_of_single_files(tmp_path, tilt, shared, legacy, parts):
    paths = write_series(tmp_path / "single", block(), tilt_deg=tilt)
    mixed = [paths[k] for k in (3, 0, 5, 1, 4, 2)]  # the order of frames says nothing
    options = {"shared": shared, "legacy": legacy, "parts": parts}
    write_enhanced(tmp_path / "enhanced" / "IM", mixed, **options)
    require_same(read(tmp_path / "enhanced"), read(tmp_path / "single"))
    if tilt:
        unsheared = [read(tmp_path / name, unshear=True) for name in ("enhanced", "single")]
        require_same(*unsheared)


def test_each_frame_has_its_own_factors_padding_and_types(tmp_path):
    head = block() // 2 * 2

    def scale(k, data):
        slope = 2 if k % 2 else 0.5
        store(data, (head[k] + 1000) / slope, slope=slope, intercept=-1000)
        data.add_new(0x00280120, "SS", 0)

    paths = write_series(tmp_path / "single", head, change=scale)
    write_enhanced(tmp_path / "enhanced" / "IM", paths)
    require_same(read(tmp_path / "enhanced"), read(tmp_path / "single"))


def test_the_twelve_bit_overflow_of_frames_is_undone(tmp_path):
    head = np.clip(block(), -1000, 3095)

    def wrap(k, data):
        store(data, head[k] % 4096, bits=12, signed=False)

    paths = write_series(tmp_path / "single", head, change=wrap)
    write_enhanced(tmp_path / "enhanced" / "IM", paths)
    volume, found = read(tmp_path / "enhanced")
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    assert [finding.kind for finding in found] == [Kind.OVERFLOW]


def test_compressed_frames_are_decoded(tmp_path):
    paths = write_series(tmp_path / "single", block())
    compress = {"change": lambda data: data.compress(RLELossless)}
    write_enhanced(tmp_path / "enhanced" / "IM", paths, **compress)
    require_same(read(tmp_path / "enhanced"), read(tmp_path / "single"))


def test_files_of_one_frame_each_are_joined(tmp_path):
    paths = write_series(tmp_path / "single", block())
    for path in paths:
        write_enhanced(tmp_path / "enhanced" / path.name, [path])
    require_same(read(tmp_path / "enhanced"), read(tmp_path / "single"))


def test_uneven_and_missing_frames_are_told_as_slices_are(tmp_path):
    places = np.array([0, 5, 10, 20, 25, 30])
    paths = write_series(tmp_path / "single", block(), places=places)
    write_enhanced(tmp_path / "enhanced" / "IM", paths)
    with pytest.raises(
        Refusal, match=r"1 slice is missing: 10\.00 mm after slice 3 of 6"
    ) as caught:
        read(tmp_path / "enhanced")
    assert caught.value.kind is Kind.MISSING
    resampled = [read(tmp_path / name, uneven="resample") for name in ("enhanced", "single")]
    require_same(*resampled)


def test_a_concatenation_of_which_a_part_is_missing_is_refused_by_name(tmp_path):
    paths = write_series(tmp_path / "single", block())
    for lost in (0, 1, 2):
        parts = write_enhanced(tmp_path / str(lost) / "IM", paths, parts=3)
        parts[lost].unlink()
        for uneven in ("refuse", "resample"):
            with pytest.raises(Refusal, match=f"concatenation.*part {lost + 1} of 3") as caught:
                read(tmp_path / str(lost), uneven=uneven)
            assert caught.value.kind is Kind.MISSING


def test_the_stacks_the_phases_and_the_localizers_of_one_file_come_apart(tmp_path):
    first = write_series(tmp_path / "a", block())
    second = write_series(tmp_path / "b", block(seed=1))

    def phase(k, groups):
        groups.FrameContentSequence[0].TemporalPositionIndex = 1 + k // 6
        if k == 12:
            groups.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_enhanced(tmp_path / "in" / "IM", [*first, *second, first[0]], frame=phase)
    cases = dicom.scans(tmp_path / "in", uneven="refuse", unshear=False)
    assert [case.id for case in cases] == ["in", "in_2"]
    assert len({scan.digest(case.image) for case in cases}) == 2
    for case, name in zip(cases, ("a", "b"), strict=True):
        volume, found = scan.read(case.image)
        want, _ = read(tmp_path / name)
        np.testing.assert_array_equal(volume.voxels, want.voxels)
        np.testing.assert_array_equal(volume.affine, want.affine)
        scan.write(tmp_path / "label.nii", (volume.voxels > 40).astype("u1"), like=case.image)
        texts = [finding.text for finding in found]
        assert ("left out: 1 image a localizer" in texts) == (name == "a")


def by_kernel(number, groups):
    item = Dataset()
    item.ConvolutionKernel = ("H31s", "H60s")[number]
    groups.CTReconstructionSequence = [item]


def by_time(number, groups):
    groups.FrameContentSequence[0].FrameAcquisitionDateTime = f"2020010112000{number}"


@pytest.mark.parametrize("off", [0.0, 2.5])
@pytest.mark.parametrize("tell", [by_kernel, by_time])
def test_kernels_and_times_of_frames_tell_volumes_apart(tmp_path, tell, off):
    heads = block(), block(seed=1)
    paths = [
        path
        for n, head in enumerate(heads)
        for path in write_series(tmp_path / f"{n}", head, places=np.arange(6) * 5 + off * n)
    ]
    write_enhanced(tmp_path / "in" / "IM", paths, frame=lambda k, groups: tell(k // 6, groups))
    cases = dicom.scans(tmp_path / "in", uneven="refuse", unshear=False)
    for case, head in zip(cases, heads, strict=True):
        volume, found = scan.read(case.image)
        np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
        assert [one.kind for one in found] == [Kind.ACQUISITIONS]


def test_damaged_files_are_refused_and_no_name_is_told(tmp_path):
    paths = write_series(tmp_path / "single", block())

    def drop(data):
        del data.PerFrameFunctionalGroupsSequence[-1]

    write_enhanced(tmp_path / "groups" / "IM", paths, change=drop)
    with pytest.raises(ValueError, match="1 image of a header that cannot be read"):
        dicom_series.find(tmp_path / "groups")
    (file,) = write_enhanced(tmp_path / "cut" / NAME, paths)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Refusal, match="1 of 1 files are damaged") as caught:
        read(tmp_path / "cut")
    assert caught.value.kind is Kind.SERIES_DAMAGED
    assert NAME not in str(caught.value)
    assert PATIENT not in str(caught.value)


def test_multi_frame_images_of_other_classes_are_still_refused(tmp_path):
    paths = write_series(tmp_path / "single", block())

    def strip(data):
        del data.PerFrameFunctionalGroupsSequence

    write_enhanced(tmp_path / "bare" / "IM", paths, change=strip)
    with pytest.raises(Refusal, match=r"multi-frame.*dcm2niix") as caught:
        read(tmp_path / "bare")
    assert caught.value.kind is Kind.MULTI_FRAME
    assert dcmread(tmp_path / "bare" / "IM").NumberOfFrames == 6
