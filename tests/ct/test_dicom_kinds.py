"""Images of a study that are no slices: left out by name, what lies beside them is read."""

import numpy as np
import pytest
from dicom_files import block, write_series
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from bhsd_jax.ct import scan
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import Series

SURVEY = ["DERIVED", "SECONDARY", "REF_SURVIEW"]


def typed(*words, sop_class=CTImageStorage, **tags):
    def change(k, data):
        data.ImageType, data.SOPClassUID = list(words), sop_class
        for tag, value in tags.items():
            setattr(data, tag, value)

    return change


def at_one_place(k, data):
    data.ImagePositionPatient = [-20, -30, 40]


def read(group: Group, **options):
    return scan.read(group.as_series("case", uneven="refuse", unshear=False, **options))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (typed("ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"), Kind.LEFT_OUT_LOCALIZER),
        (typed("ORIGINAL", "PRIMARY", "SCOUT"), Kind.LEFT_OUT_LOCALIZER),
        (typed(*SURVEY), Kind.LEFT_OUT_LOCALIZER),
        (typed("DERIVED", "SECONDARY", "DOSE_INFO"), Kind.LEFT_OUT_REPORT),
        (typed("DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"), Kind.LEFT_OUT_REPORT),
        (typed("DERIVED", "SECONDARY", "SCREEN SAVE"), Kind.LEFT_OUT_CAPTURE),
        (
            typed("DERIVED", "SECONDARY", sop_class=SecondaryCaptureImageStorage),
            Kind.LEFT_OUT_CAPTURE,
        ),
        (typed("DERIVED", "SECONDARY", "MIP"), Kind.LEFT_OUT_PROJECTION),
        (typed("DERIVED", "PRIMARY", "AXIAL", "CBF"), Kind.LEFT_OUT_MAP),
        (typed("DERIVED", "SECONDARY", "AXIAL", RescaleType="Z_EFF"), Kind.LEFT_OUT_MAP),
        (typed("DERIVED", "PRIMARY", "AXIAL", RescaleType="mg/ml"), Kind.LEFT_OUT_MAP),
        (typed("ORIGINAL", "PRIMARY", Modality="SR"), Kind.LEFT_OUT_MODALITY),
        (typed("DERIVED", "PRIMARY", Modality="SEG"), Kind.LEFT_OUT_SEG),
        (typed("DERIVED", "PRIMARY", Modality="RTSTRUCT"), Kind.LEFT_OUT_OUTLINE),
        (typed("ORIGINAL", "PRIMARY", "AXIAL", SamplesPerPixel=3), Kind.LEFT_OUT_COLOR),
        (at_one_place, Kind.LEFT_OUT_PLACE),
    ],
)
def test_what_is_no_slice_is_left_out_by_name_and_the_scan_beside_it_is_read(
    tmp_path, change, kind
):
    head = block()
    write_series(tmp_path / "scan", head, series="1.1")
    write_series(tmp_path / "summary", block()[:3], series="1.2", change=change)
    (group,) = dicom_series.find(tmp_path)
    volume, found = read(group)
    np.testing.assert_array_equal(volume.voxels, head[:, ::-1])
    assert [(finding.kind, finding.done) for finding in found] == [(kind, "kept")]
    with pytest.raises(ValueError, match=r"no CT volume in its DICOM files; left out: 3 images "):
        dicom_series.find(tmp_path / "summary")


@pytest.mark.parametrize(
    "words",
    [
        ("ORIGINAL", "SECONDARY", "AXIAL"),
        ("ORIGINAL", "PRIMARY", "AXIAL", "ADD"),
        ("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SEQ"),
        ("DERIVED", "PRIMARY", "MPR"),
        ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"),
    ],
)
def test_slices_of_other_types_are_read_and_reformats_are_said(tmp_path, words):
    write_series(tmp_path, block(), change=typed(*words))
    (group,) = dicom_series.find(tmp_path)
    volume, found = read(group)
    np.testing.assert_array_equal(volume.voxels, block()[:, ::-1])
    derived = words[0] == "DERIVED"
    assert [finding.kind for finding in found] == ([Kind.DERIVED] if derived else [])


@pytest.mark.parametrize("scale", ["HU", "US", "HU_MOD", ""])
def test_a_scale_that_is_hu_or_not_said_is_read(tmp_path, scale):
    write_series(tmp_path, block(), change=typed("ORIGINAL", "PRIMARY", RescaleType=scale))
    (group,) = dicom_series.find(tmp_path)
    np.testing.assert_array_equal(read(group)[0].voxels, block()[:, ::-1])


def test_a_directory_of_a_medium_is_no_image_whatever_it_is_called(tmp_path):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.FileSetID = "CD"
    (tmp_path / "a").mkdir()
    data.save_as(tmp_path / "a" / "DIRFILE", enforce_file_format=True)
    assert dicom_series.find(tmp_path) == []
    write_series(tmp_path / "a", block())
    assert dicom_series.survey(tmp_path).findings == ()


def test_what_is_left_out_is_said_of_its_own_study_or_of_none(tmp_path):
    def report(k, data):
        data.Modality = "SR"

    def nameless(k, data):
        report(k, data)
        del data.StudyInstanceUID

    def nameless_slice(k, data):
        del data.StudyInstanceUID, data.SeriesInstanceUID

    write_series(tmp_path / "a", block(), study="1.1", series="1.1.1")
    write_series(tmp_path / "b", block(), study="1.2", series="1.2.1")
    write_series(tmp_path / "c", block(), change=nameless_slice)
    write_series(tmp_path / "d", block(seed=1), change=nameless_slice)
    one = block()[:1]
    write_series(tmp_path / "b", one, study="1.2", series="1.2.2", names=["r"], change=report)
    write_series(tmp_path / "c", block()[:2], names=["r", "s"], change=nameless)
    write_series(tmp_path / "e", block()[:3], change=nameless)
    write_series(tmp_path / "f", block()[:4], study="1.3", series="1.3.1", change=report)
    found = dicom_series.survey(tmp_path)
    said = {group.folder.name: [f.text for f in group.findings] for group in found.groups}
    assert said == {
        "a": [],
        "b": ["left out: 1 image of another kind than CT"],
        "c": ["left out: 2 images of another kind than CT"],
        "d": [],
    }
    assert [f.text for f in found.findings] == ["left out: 7 images of another kind than CT"]
    assert DICOM(tmp_path).survey().findings == found.findings


def refusal(root, **options) -> Refusal:
    (group,) = dicom_series.find(root)
    with pytest.raises(Refusal) as caught:
        read(group, **options)
    return caught.value


def thick(mm):
    def change(k, data):
        data.SliceThickness = mm[k]

    return change


@pytest.mark.parametrize(
    ("places", "change"),
    [
        ([0, 4, 8, 12, 16, 23, 30, 37], None),
        ([0, 4, 8, 12, 16, 20, 28, 36, 44], None),
        ([0, 2.5, 5, 7.5, 10, 15, 20], thick([2.5] * 4 + [5] * 3)),
    ],
)
def test_a_protocol_of_two_steps_misses_nothing(tmp_path, places, change):
    write_series(tmp_path, block((len(places), 8, 8)), places=np.array(places), change=change)
    for settings in ("config.data", "config.predict.dicom"):
        error = refusal(tmp_path, settings=settings)
        assert error.kind is Kind.UNEVEN
        assert "slices at uneven steps" in str(error)
        assert f"; set --{settings}.uneven=resample to interpolate" in str(error)
        assert "fetch" not in str(error)


@pytest.mark.parametrize("mm", [None, 5.0])
def test_a_slice_that_is_missing_is_to_be_fetched(tmp_path, mm):
    places = np.array([0, 5, 10, 20, 25, 30])
    write_series(tmp_path, block(), places=places, change=mm and thick([mm] * 6))
    error = refusal(tmp_path)
    assert error.kind is Kind.MISSING
    assert "1 slice is missing: 10.00 mm after slice 3 of 6" in str(error)
    assert "fetch what is missing, or set --config.data.uneven=resample" in str(error)


def test_every_refusal_of_a_series_has_a_kind_of_its_own(tmp_path):
    def shift(k, data):
        data.ImagePositionPatient[0] += 3 * (k == 2)

    def no_spacing(k, data):
        del data.PixelSpacing

    write_series(tmp_path / "shifted", block(), change=shift)
    assert refusal(tmp_path / "shifted").kind is Kind.SHIFTED
    paths = write_series(tmp_path / "cut", block())
    paths[1].write_bytes(paths[1].read_bytes()[:-10])
    error = refusal(tmp_path / "cut")
    assert error.kind is Kind.SERIES_DAMAGED
    assert "set --config.data.uneven=resample to do without" in str(error)
    write_series(tmp_path / "twice", block())
    write_series(tmp_path / "twice", block(seed=1), names=list("abcdef"))
    assert refusal(tmp_path / "twice").kind is Kind.ONE_PLACE
    for change, kind in ((no_spacing, Kind.NO_SLICE), (None, Kind.TOO_FEW_SLICES)):
        paths = write_series(tmp_path / kind.name, block()[:1], change=change)
        with pytest.raises(Refusal) as caught:
            scan.read(Series(tuple(paths), "case"))
        assert caught.value.kind is kind
