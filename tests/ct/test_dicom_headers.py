"""Headers that leave something out, or write it otherwise than the standard has it."""

import numpy as np
import pytest
from dicom_files import block, store, write_series
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.defects import Kind


def read(root):
    (group,) = dicom_series.find(root)
    return dicom_series.read(group.as_series("case", uneven="refuse", unshear=False))


def written(name, vr, text):
    """Puts bytes into a header that pydicom would not write."""

    def change(index, data):
        tag, value = Tag(tag_for_keyword(name)), text(index).encode()
        value += b" " * (len(value) % 2)
        data._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)

    return change


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ImagePositionPatient", lambda k: f"-20,25\\-31,5\\{7 + 5 * k},50"),
        ("ImageOrientationPatient", lambda k: "1,0\\0,0\\0,0\\0,0\\1,0\\0,0"),
        ("PixelSpacing", lambda k: "2,000\\1,500"),
        ("SliceThickness", lambda k: "5,0"),
        ("RescaleSlope", lambda k: "1,0"),
        ("RescaleIntercept", lambda k: "-1024,0"),
    ],
)
def test_a_decimal_comma_is_a_point(tmp_path, name, text):
    head = block()
    write_series(tmp_path / "points", head)
    write_series(tmp_path / "commas", head, change=written(name, "DS", text))
    volume, found = read(tmp_path / "commas")
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    np.testing.assert_allclose(volume.affine, read(tmp_path / "points")[0].affine, atol=1e-9)
    assert not found


@pytest.mark.parametrize(
    "name",
    [
        *("SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation"),
        *("BitsAllocated", "BitsStored", "HighBit"),
    ],
)
def test_a_header_need_not_say_how_values_of_ct_are_stored(tmp_path, name):
    """SimpleITK 2.5 and dcm2niix 1.0 read these files so; the former needs BitsAllocated."""
    head = block()
    write_series(tmp_path, head, change=lambda index, data: delattr(data, name))
    volume, found = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    assert not found


def test_padding_of_unsigned_values_may_be_stated_as_a_negative_number(tmp_path):
    head = block()

    def pad(index, data):
        stored = head[index].astype(np.int32) + 1024
        stored[0] = 63536
        store(data, stored, signed=False, intercept=-1024)
        data.add_new(0x00280120, "SS", -2000)

    write_series(tmp_path, head, change=pad)
    volume, found = read(tmp_path)
    assert (volume.voxels[:, -1] == -1024).all()
    np.testing.assert_array_equal(volume.voxels[:, -2::-1], head[:, 1:])
    assert [one.kind for one in found] == [Kind.PADDING_VALUE]


def test_a_rescale_slope_of_0_is_taken_for_1(tmp_path):
    """SimpleITK 2.5 reads the same; by the slope as it stands every voxel would be one."""
    head = block()
    write_series(tmp_path, head, change=lambda index, data: setattr(data, "RescaleSlope", 0))
    volume, found = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    assert [(one.kind, one.done) for one in found] == [(Kind.FLATTENED, "repaired")]


def test_of_rescale_factors_that_are_stated_twice_the_first_count(tmp_path):
    """As for SimpleITK 2.5 and dcm2niix 1.0; the series was called damaged."""
    head = block()
    write_series(
        tmp_path,
        head,
        change=lambda index, data: data.update(
            {"RescaleSlope": [1, 1], "RescaleIntercept": [-1024, -1024]}
        ),
    )
    volume, found = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    assert not found


def test_values_of_32_bits_are_read(tmp_path):
    """As by SimpleITK 2.5 and dcm2niix 1.0; they were called damaged."""
    head = block()

    def widen(index, data):
        store(data, head[index])
        data.BitsAllocated, data.BitsStored, data.HighBit = 32, 32, 31
        data.PixelData = head[index].astype("<i4").tobytes()

    write_series(tmp_path, head, change=widen)
    volume, found = read(tmp_path)
    np.testing.assert_array_equal(volume.voxels[:, ::-1], head)
    assert not found


def test_a_padding_value_may_be_stated_as_words_or_twice(tmp_path):
    """GDCM and dcm2niix read such slices; they were called damaged."""
    head = block()
    for kind, value in (("OW", (63536).to_bytes(2, "little")), ("US", [63536, 63536])):

        def pad(index, data, kind=kind, value=value):
            stored = head[index].astype(np.int32) + 1024
            stored[0] = 63536
            store(data, stored, signed=False, intercept=-1024)
            data.add_new(0x00280120, kind, value)

        write_series(tmp_path / kind, head, change=pad)
        volume, found = read(tmp_path / kind)
        assert (volume.voxels[:, -1] == -1024).all()
        assert [one.kind for one in found] == [Kind.PADDING_VALUE]
