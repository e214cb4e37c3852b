"""DICOM SEG: the same voxels in every reader, on the original instances, in a real archive."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import highdicom
import nibabel as nib
import numpy as np
import pytest
from dicom_files import NAME, PATIENT, write_series
from enhanced_files import write_enhanced
from pydicom import Dataset, config, dcmread
from seg_files import KINDS, MAKER, SHAPE, complete, label_of, make, series_of, write

from bhsd_jax.ct import scan
from bhsd_jax.ct.dicom import seg_mask, segment_codes, segmentation
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.experiments.local import free_port
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, Volume

SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where Debian has Orthanc


def reread(path, series, *, fractional=False):
    """Voxels on the series' slices in order, by instance or by frame, as highdicom gives them."""
    seg = highdicom.seg.segread(path)
    slices = dicom_series.arrange(series).slices
    how = {"combine_segments": not fractional, "assert_missing_frames_are_empty": True}
    if slices[0].frame is None:
        return seg.get_pixels_by_source_instance([item.instance for item in slices], **how)
    frames = [item.frame + 1 for item in slices]
    return seg.get_pixels_by_source_frame(slices[0].instance, frames, **how)


def as_mask(path, series):
    """Classes on the series' slices, as masks of `data=dicom` are read."""
    stack = dicom_series.arrange(series)
    own = Volume(np.zeros(stack.own_shape, np.int16), stack.own_affine, "")
    mask = seg_mask.label(seg_mask.outline(path), HEMORRHAGE)
    label, said = scan.read_label(mask, series, own, num_classes=6)
    assert said == []
    return label.voxels


@pytest.mark.parametrize("shape", ["binary", "labelmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_voxel_is_read_back_on_its_instance(tmp_path, kind, shape):
    make(tmp_path / "dicom", kind)
    label = label_of()
    path = write(tmp_path / "dicom", tmp_path / "seg" / "a.dcm", label, kind=shape)
    np.testing.assert_array_equal(reread(path, series_of(tmp_path / "dicom")), label)
    np.testing.assert_array_equal(as_mask(path, series_of(tmp_path / "dicom")), label[:, ::-1])
    assert segmentation.is_whole(path, shape)
    assert not segmentation.is_whole(path, "fractional")
    path.write_bytes(path.read_bytes()[:-40])
    assert not segmentation.is_whole(path, shape)


def test_fractional_has_the_probabilities(tmp_path):
    make(tmp_path / "dicom", "tilted")
    scores = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    scores = np.exp(scores) / np.exp(scores).sum(0)
    before = scores.copy()
    path = write(
        tmp_path / "dicom",
        tmp_path / "a.dcm",
        scores.argmax(0).astype(np.uint8),
        kind="fractional",
        probabilities=scores[:, :, ::-1],
    )
    found = reread(path, series_of(tmp_path / "dicom"), fractional=True)
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), scores[1:], atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(scores, before)


def test_segments_carry_codes_places_and_who_made_them_and_the_patient_of_the_study(tmp_path):
    paths = make(tmp_path / "dicom")
    data = dcmread(write(tmp_path / "dicom", tmp_path / "a.dcm", label_of()))
    source = dcmread(paths[0])
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert data.get(name) == source.get(name), "else it cannot be filed with the study"
    assert data.SeriesInstanceUID != source.SeriesInstanceUID
    assert data.SeriesNumber == 9003
    (referred,) = data.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    instances = {dcmread(path).SOPInstanceUID for path in paths}
    assert {r.ReferencedSOPInstanceUID for r in referred.ReferencedInstanceSequence} == instances
    found = {}
    for item in data.SegmentSequence:
        (category,) = item.SegmentedPropertyCategoryCodeSequence
        (kind,) = item.SegmentedPropertyTypeCodeSequence
        (place,) = item.AnatomicRegionSequence
        assert category.CodeValue == "49755003"
        assert kind.CodingSchemeDesignator == place.CodingSchemeDesignator == "SCT"
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.SegmentAlgorithmName == MAKER.name
        found[item.SegmentLabel] = kind.CodeValue, place.CodeMeaning, item.SegmentDescription
    assert found == {
        "EDH": ("50960005", "Dura mater", "epidural hemorrhage"),
        "IPH": ("50960005", "Brain", "intraparenchymal hemorrhage"),
        "IVH": ("50960005", "Brain ventricle", "intraventricular hemorrhage"),
        "SAH": ("50960005", "Cranial Subarachnoid Space", "subarachnoid hemorrhage"),
        "SDH": ("50960005", "Dura mater", "subdural hemorrhage"),
    }
    assert segment_codes.of("oedema").kind == segment_codes.of("Edema").kind
    assert segment_codes.of("bleeding").description == "intracranial hemorrhage"
    assert segment_codes.of("tumor") == segment_codes.Meaning(
        "tumor", ("52988006", "Lesion"), ("69536005", "Head"), (200, 200, 200)
    )


@pytest.mark.parametrize(
    ("classes", "label", "description"),
    [
        (("background", "any"), "HEMORRHAGE", "Bleeding (AI), research use only"),
        (("background", "subdural", "edema"), "HEMORRHAGE", "Bleeding (AI), research use only"),
        (
            ("background", "IPH", "extra-axial", "edema", "IVH"),
            *("HEMORRHAGE", "Bleeding (AI), research use only"),
        ),
        (("background", "tumor", "edema"), "SEGMENTATION", "Segmentation (AI), research use only"),
    ],
)
def test_an_archive_is_told_of_bleeding_by_networks_that_draw_it(
    tmp_path, classes, label, description
):
    make(tmp_path / "dicom")
    series, path = series_of(tmp_path / "dicom"), tmp_path / "a.dcm"
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 5:9, 5:9] = 1
    segmentation.write(path, series, mask, classes, kind="binary", maker=MAKER)
    data = dcmread(path)
    assert (data.ContentLabel, data.SeriesDescription) == (label, description)
    assert ("bleeding" in data.ContentDescription) == (label == "HEMORRHAGE")
    assert segment_codes.of("subdural") == segment_codes.of("SDH")


def test_a_scan_without_any_bleed_has_a_seg_that_says_so(tmp_path):
    make(tmp_path / "dicom")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", np.zeros(SHAPE, np.uint8))
    assert not reread(path, series_of(tmp_path / "dicom")).any()


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jürgen"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO 2022 IR 100", "Müller^Jürgen"),
        ("", "Roe^Jane"),
    ],
)
def test_a_name_in_another_alphabet_arrives_whole(tmp_path, charset, name):
    """And so does what is nested; sexes that the standard does not have are left out."""

    def named(k, data):
        complete(k, data)
        data.SpecificCharacterSet, data.PatientName, data.PatientSex = charset, name, "U"
        other = Dataset()
        other.PatientID, other.TypeOfPatientID = "7", "TEXT"
        other.IssuerOfPatientID = name.split("=")[-1]
        data.OtherPatientIDsSequence = [other]

    make(tmp_path / "dicom", change=named)
    label = label_of()
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label)
    data = dcmread(path)
    assert (data.PatientName, data.PatientSex) == (name, "")
    assert data.OtherPatientIDsSequence[0].IssuerOfPatientID == name.split("=")[-1]
    np.testing.assert_array_equal(reread(path, series_of(tmp_path / "dicom")), label)


@pytest.mark.parametrize(
    ("tag", "text", "kept"),
    [
        ("PatientBirthDate", "19700000", ""),  # day and month hidden
        ("PatientBirthDate", "REMOVED", ""),
        ("PatientBirthDate", "19700102", "19700102"),
        ("StudyDate", "20200000", ""),
        ("StudyTime", "12:30:15", "123015"),  # as ACR-NEMA wrote it
        ("StudyTime", "123015.0000001", ""),
    ],
)
def test_dates_that_are_none_are_left_empty(tmp_path, tag, text, kept):
    def change(k, data):
        complete(k, data)
        with config.disable_value_validation():
            setattr(data, tag, text)

    make(tmp_path / "dicom", change=change)
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    assert str(dcmread(path)[tag].value) == kept


def test_cosines_that_differ_in_a_last_digit_do_not_prevent_a_seg(tmp_path):
    def change(k, data):
        complete(k, data)
        data.ImageOrientationPatient = [1, 1e-4 * (k % 2), 0, 0, 1, 0]
        if k == 3:
            del data.SOPClassUID

    make(tmp_path / "dicom", change=change)
    label = label_of()
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label)
    np.testing.assert_array_equal(reread(path, series_of(tmp_path / "dicom")), label)


def test_headers_that_nothing_can_refer_to_are_refused_without_a_name(tmp_path):
    def lose(k, data):
        complete(k, data)
        del data.FrameOfReferenceUID

    make(tmp_path / NAME, change=lose)
    with pytest.raises(ValueError, match="series 1: its headers lack FrameOfReferenceUID") as no:
        write(tmp_path / NAME, tmp_path / "a.dcm", label_of())

    def odd(k, data):
        complete(k, data)
        data.PatientName = [NAME, NAME]

    make(tmp_path / "odd", change=odd)
    with pytest.raises(ValueError, match="no SEG can refer to its headers") as strange:
        write(tmp_path / "odd", tmp_path / "a.dcm", label_of())

    paths = write_series(tmp_path / "plain", np.full(SHAPE, 30), change=complete)
    write_enhanced(tmp_path / "parts" / "x", paths, parts=2)
    with pytest.raises(ValueError, match=r"several files \(a concatenation\) takes no SEG"):
        write(tmp_path / "parts", tmp_path / "a.dcm", label_of())
    assert not (tmp_path / "a.dcm").exists()
    for error in (no, strange):
        assert not any(word in str(error.value) for word in (NAME, PATIENT, str(tmp_path)))
        assert error.value.__cause__ is None
    with pytest.raises(ValueError, match="one of binary, labelmap, fractional; got 'both'"):
        write(tmp_path / "odd", tmp_path / "a.dcm", label_of(), kind="both")


def test_without_highdicom_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    path = tmp_path / "a.dcm"
    path.write_bytes(b"")
    for call in (segmentation.require, lambda: segmentation.is_whole(path, "binary")):
        with pytest.raises(UserError, match=r"pip install '\.\[dicom\]'"):
            call()


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="no dciodvfy (Debian's dicom3tools)")
@pytest.mark.parametrize("shape", ["binary", "fractional"])
@pytest.mark.parametrize("kind", ["tilted, uneven", "enhanced"])
def test_dciodvfy_finds_no_error(tmp_path, kind, shape):
    make(tmp_path / "dicom", kind)
    label = label_of()
    scores = np.stack([label == k for k in range(6)]).astype(np.float32)
    path = tmp_path / "a.dcm"
    write(tmp_path / "dicom", path, label, kind=shape, probabilities=scores[:, :, ::-1])
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if line.startswith("Error")] == []
    assert "Segmentation" in said


@pytest.mark.skipif(not shutil.which("segimage2itkimage"), reason="no dcmqi (pip install dcmqi)")
@pytest.mark.parametrize("shape", ["binary", "labelmap"])
def test_dcmqi_reads_the_same_voxels(tmp_path, shape):
    """Of an upright, even series: dcmqi makes volumes, and refuses what is none."""
    make(tmp_path / "dicom")
    label = label_of()
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label, kind=shape)
    words = ["--inputDICOM", path, "--outputDirectory", tmp_path, "--outputType", "nii"]
    subprocess.run(["segimage2itkimage", "--mergeSegments", *map(str, words)], check=True)
    (made,) = tmp_path.glob("*.nii.gz")
    found = nib.load(made)
    voxels = np.asanyarray(found.dataobj).T
    first = dcmread(next(iter(sorted((tmp_path / "dicom").iterdir()))))
    assert voxels.shape[1:] == (int(first.Rows), int(first.Columns))
    counts = np.bincount(label.ravel(), minlength=6)[1:]
    np.testing.assert_array_equal(np.bincount(voxels.ravel(), minlength=6)[1:], counts)
    ours = dicom_series.arrange(series_of(tmp_path / "dicom")).affine
    for k in range(1, 6):
        if counts[k - 1]:
            middle = np.append(np.argwhere(label[:, ::-1] == k).mean(0), 1)
            theirs = np.append(np.argwhere(voxels == k).mean(0)[::-1], 1)
            np.testing.assert_allclose((found.affine @ theirs)[:3], (ours @ middle)[:3], atol=1e-3)


@pytest.fixture
def archive(tmp_path):
    """A running Orthanc; what it answers to a path."""
    program = shutil.which("Orthanc", path=SBIN)
    if program is None:
        pytest.skip("no Orthanc (Debian's package orthanc)")
    ports = [free_port(), free_port()]
    settings = {
        "StorageDirectory": str(tmp_path / "storage"),
        "IndexDirectory": str(tmp_path / "storage"),
        "HttpPort": ports[0],
        "DicomPort": ports[1],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))

    def ask(path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{ports[0]}/{path}", data=body)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [program, str(tmp_path / "orthanc.json")], stdout=log, stderr=log
        )
        try:
            for _ in range(3000):
                try:
                    ask("system")
                    break
                except OSError:
                    assert running.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.1)
            yield ask
        finally:
            running.terminate()
            running.wait(120)


@pytest.mark.parametrize("shape", ["binary", "labelmap"])
def test_orthanc_files_it_with_the_study_and_gives_it_back(tmp_path, archive, shape):
    paths = make(tmp_path / "dicom", "tilted, uneven")
    label = label_of()
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label, kind=shape)
    stored = [json.loads(archive("instances", file.read_bytes())) for file in (*paths, path)]
    assert {one["Status"] for one in stored} == {"Success"}
    assert len({one["ParentStudy"] for one in stored}) == 1, "one study with that of the scanner"
    study = json.loads(archive(f"studies/{stored[0]['ParentStudy']}"))
    assert len(study["Series"]) == 2
    kinds = {
        json.loads(archive(f"series/{one}"))["MainDicomTags"]["Modality"] for one in study["Series"]
    }
    assert kinds == {"CT", "SEG"}
    (tmp_path / "back.dcm").write_bytes(archive(f"instances/{stored[-1]['ID']}/file"))
    found = reread(tmp_path / "back.dcm", series_of(tmp_path / "dicom"))
    np.testing.assert_array_equal(found, label)
