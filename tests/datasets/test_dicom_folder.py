import csv
import shutil

import numpy as np
import pytest
from dicom_files import NAME, PATIENT, block, write_series
from pydicom import dcmread
from seg_files import complete, label_of, make, write

from bhsd_jax.ct import nifti, scan
from bhsd_jax.datasets import dicom
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.defects import Kind, Refusal, texts
from bhsd_jax.volume import HEMORRHAGE, Series, Volume


@pytest.fixture
def tree(tmp_path):
    """Two studies of one patient and one of another, each in folders with names in them."""
    for index, (patient, study) in enumerate(((PATIENT, "1"), (PATIENT, "2"), ("MRN-2", "3"))):
        write_series(
            tmp_path / "in" / f"{NAME} {index}" / "head",
            block(seed=index),
            study=f"1.2.{study}",
            series=f"1.2.{study}.7",
            patient=patient,
        )
    return tmp_path / "in"


def mask(root, case, path):
    volume, _ = scan.read(case.image)
    path.parent.mkdir(exist_ok=True)
    nifti.write_volume(path, Volume((volume.voxels > 40).astype("u1"), volume.affine, ""))
    return path


def test_cases_are_series_under_salted_names(tree):
    cases = list(DICOM(tree, salt="a").cases())
    assert [case.split for case in cases] == ["unlabeled"] * 3
    assert all(isinstance(case.image, Series) for case in cases)
    assert len({case.id for case in cases}) == 3
    assert len({case.patient for case in cases}) == 2
    assert [case.id for case in cases] == sorted(case.id for case in cases)
    for text in map(repr, cases):
        assert not [secret for secret in (NAME, PATIENT, "1.2.1.7", str(tree)) if secret in text]
    again = [case.id for case in DICOM(tree, salt="a").cases()]
    other = [case.id for case in DICOM(tree, salt="b").cases()]
    assert again == [case.id for case in cases]
    assert not set(other) & set(again)
    shown = [case.id for case in DICOM(tree, show_ids=True).cases()]
    assert shown == [f"{NAME} {index}_head" for index in range(3)]


def test_masks_are_found_by_series_by_folder_and_beside_the_slices(tree):
    first, second, third = DICOM(tree, show_ids=True).cases()
    by_series = mask(tree, first, tree / "masks" / "1.2.1.7.nii.gz")
    by_folder = mask(tree, second, tree / "masks" / f"{second.id}.nii.gz")
    beside = mask(tree, third, tree / f"{NAME} 2" / "head" / "drawn.nii.gz")
    found = list(DICOM(tree, show_ids=True).cases())
    assert [case.label for case in found] == [by_series, by_folder, beside]
    assert {case.split for case in found} == {"train"}
    (tree / "masks" / "head.nii.gz").write_bytes(by_series.read_bytes())
    with pytest.raises(ValueError, match="1 of 3 masks belong to no series") as caught:
        list(DICOM(tree).cases())
    assert NAME not in str(caught.value)
    (tree / "masks" / "head.nii.gz").unlink()
    (tree / f"{NAME} 0" / "head" / "m.nii.gz").write_bytes(by_series.read_bytes())
    with pytest.raises(ValueError, match="series 1 of 3 in the order of paths has 2 masks"):
        list(DICOM(tree).cases())


def test_a_mask_around_its_only_series_is_its_mask(tree):
    first, *_ = DICOM(tree, show_ids=True).cases()
    around = mask(tree, first, tree / f"{NAME} 0" / "drawn.nii.gz")
    cases = list(DICOM(tree, show_ids=True).cases())
    assert [case.label for case in cases] == [around, None, None]
    assert [case.split for case in cases] == ["train", "unlabeled", "unlabeled"]


def test_a_mask_beside_two_series_has_to_say_of_which_it_is(tree):
    first, *_ = DICOM(tree, show_ids=True).cases()
    folder = tree / f"{NAME} 0" / "head"
    write_series(folder, block(), study="1.2.0", series="9", names=[f"z{k}" for k in range(6)])
    drawn = mask(tree, first, folder / "drawn.nii.gz")
    with pytest.raises(ValueError, match=r"series 1 of 4 .* holds 2 series and 1 NIfTI") as caught:
        list(DICOM(tree).cases())
    assert NAME not in str(caught.value)
    named = drawn.rename(folder / "9.nii.gz")
    labels = {case.id: case.label for case in DICOM(tree, show_ids=True).cases()}
    assert {name: path for name, path in labels.items() if path} == {f"{NAME} 0_head_2": named}


def test_one_mask_is_not_given_to_two_series_of_one_uid(tree):
    first, *_ = DICOM(tree, show_ids=True).cases()
    write_series(tree / "copy", block(), study="1.2.1", series="1.2.1.7", patient="MRN-3")
    mask(tree, first, tree / "masks" / "1.2.1.7.nii.gz")
    with pytest.raises(ValueError, match="1 of 1 masks belong to no series"):
        list(DICOM(tree).cases())


def test_nifti_files_that_are_no_masks_are_told(tree, tmp_path):
    first, *_ = DICOM(tree, show_ids=True).cases()
    mask(tree, first, tree / "nifti" / "drawn.nii.gz")
    (tree / "masks").mkdir()
    mask(tree, first, tree / "masks" / "patient" / "drawn.nii.gz")
    found = DICOM(tree).survey()
    assert not [case for case in found.cases if case.label]
    (finding,) = found.findings
    assert finding.kind is Kind.MASK_UNUSED
    assert finding.text.startswith("2 NIfTI files belong to no series")
    with pytest.raises(
        FileNotFoundError, match=r"no NIfTI file and no DICOM SEG in it.*data\.masks"
    ):
        DICOM(tree, masks=tree / "masks").survey()


@pytest.mark.parametrize(
    ("patient", "people"),
    [
        *(("ANONYMOUS", 2), ("anon.", 2), ("000000", 2), ("XXXX", 2), ("NOID", 2), ("", 2)),
        *(("Patient", 2), ("anon-0815", 1), ("0815", 1), ("PAT01", 1)),
    ],
)
def test_a_patient_id_that_was_written_over_is_of_nobody(tmp_path, patient, people):
    for study in ("1", "2"):
        ids = {"study": f"1.2.{study}", "series": f"1.2.{study}.7", "patient": patient}
        write_series(tmp_path / study, block(), **ids)
    found = DICOM(tmp_path).survey()
    assert len({case.patient for case in found.cases}) == people
    told = [finding.kind for finding in found.findings]
    assert told == ([Kind.PATIENT_NOBODY] if people == 2 and patient else [])


def test_two_scans_of_one_uid_are_told_apart_in_the_table_of_series(tmp_path):
    for name, kernel in (("a", "H31s"), ("b", "H60s")):

        def change(index, data, kernel=kernel):
            data.ConvolutionKernel, data.SliceThickness, data.SeriesNumber = kernel, 5, 3

        names = [f"{name}{k}" for k in range(6)]
        paths = write_series(tmp_path / "in", block(), names=names, change=change)
    cases = dicom.scans(tmp_path / "in", uneven="refuse", unshear=False)
    dicom.write_series(tmp_path, cases, {case.id: case.id for case in cases})
    with (tmp_path / "series.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["SeriesInstanceUID"] for row in rows] == ["1.2.3.4"] * 2
    assert [row["ConvolutionKernel"] for row in rows] == ["H31s", "H60s"]
    assert rows[1]["SOPInstanceUID"] == dcmread(paths[0]).SOPInstanceUID
    assert rows[1]["files"] == "6"


@pytest.mark.parametrize("ending", [".seg.nrrd", ".mha", ".hdr"])
def test_masks_in_other_formats_are_refused_and_not_passed_over(tree, ending):
    first, *_ = DICOM(tree, show_ids=True).cases()
    mask(tree, first, tree / "masks" / "1.2.2.7.nii.gz")
    for path, place in (
        (tree / "masks" / f"{first.id}{ending}", str(tree / "masks")),
        (tree / f"{NAME} 0" / "head" / f"{NAME}{ending}", "the folder of series 1 of 3"),
    ):
        path.touch()
        with pytest.raises(
            Refusal, match=r": files that cannot be used as masks: 1 .*\.nii\.gz"
        ) as said:
            list(DICOM(tree).cases())
        assert str(said.value).startswith(place)
        assert NAME not in str(said.value)
        assert said.value.kind is Kind.NO_NIFTI
        path.unlink()


def test_a_folder_without_series_says_so(tmp_path):
    for root, message in ((tmp_path / "no", "no such folder"), (tmp_path, "no DICOM CT series")):
        with pytest.raises(FileNotFoundError, match=message):
            list(DICOM(root).cases())
    write_series(tmp_path / "x", block())
    with pytest.raises(FileNotFoundError, match=r"data\.masks"):
        list(DICOM(tmp_path, masks=tmp_path / "none").cases())


def test_series_to_predict_are_numbered_in_the_order_of_their_paths(tree):
    write_series(
        tree / f"{NAME} 0" / "head", block(), series="9", names=[f"z{k}" for k in range(6)]
    )
    cases = dicom.scans(tree, uneven="resample", unshear=True)
    assert [case.id for case in cases] == [
        *(f"{NAME} 0_head", f"{NAME} 0_head_2", f"{NAME} 1_head", f"{NAME} 2_head"),
    ]
    series = [case.image for case in cases]
    assert [s.name for s in series] == [f"series {n}" for n in (1, 2, 3, 4)]
    assert {(s.uneven, s.unshear) for s in series} == {("resample", True)}


def test_no_two_series_have_one_name(tmp_path):
    """A folder of two series beside one that is called as the second of them would be."""
    places = {"P01": ("1", "2"), "P01_2": ("3",), "a/b": ("4",), "a_b": ("5",), "a_b_2": ("6",)}
    for folder, numbers in places.items():
        for number in numbers:
            names = [f"{number}_{k}" for k in range(6)]
            write_series(tmp_path / folder, block(), series=f"1.2.{number}", names=names)
    cases = dicom.scans(tmp_path, uneven="refuse", unshear=False)
    found = {case.id: case.image.files[0].parent.relative_to(tmp_path) for case in cases}
    assert len(found) == 6
    assert {str(found[name]) for name in ("P01", "P01_3")} == {"P01"}
    assert str(found["P01_2"]) == "P01_2"
    assert str(found["a_b_2"]) == "a_b_2"


def outlined(folder, series, path, classes=HEMORRHAGE, kind="binary"):
    """A series in a folder of its own, and a SEG that is drawn on it."""
    make(folder, series=series)
    label = np.minimum(label_of(), len(classes) - 1).astype(np.uint8)
    return write(folder, path, label, classes=classes, kind=kind)


def test_a_dicom_seg_is_the_mask_of_the_series_it_refers_to(tmp_path):
    """Among its slices, in masks/, in a folder of masks elsewhere, or anywhere in the study."""
    root, elsewhere = tmp_path / "in", tmp_path / "drawn"
    outlined(root / NAME, "1.2.3.1", tmp_path / "a.dcm").rename(root / NAME / "a.dcm")
    outlined(root / "b", "1.2.3.2", root / "masks" / "x", kind="labelmap")
    outlined(root / "c", "1.2.3.3", root / "study" / "y.dcm")
    outlined(root / "d", "1.2.3.4", elsewhere / "z.dcm")
    make(root / "e", series="1.2.3.5")
    found = DICOM(root, show_ids=True).survey()
    cases = {case.id: case for case in found.cases}
    assert {name for name, case in cases.items() if case.label} == {NAME, "b", "c"}
    assert {case.split for case in cases.values() if case.label} == {"train"}
    for name in (NAME, "b", "c"):
        volume, said = scan.read(cases[name].image)
        assert said == []
        mask = cases[name].label
        label, _ = scan.read_label(mask, cases[name].image, volume, num_classes=6)
        np.testing.assert_array_equal(label.voxels, label_of()[:, ::-1])
    (told,) = found.findings
    assert told.kind is Kind.MASK_AUTOMATIC
    assert told.text.startswith("3 masks are DICOM SEG that an algorithm drew")
    more = list(DICOM(root, masks=elsewhere, show_ids=True).cases())
    assert {case.id for case in more if case.label} == {NAME, "b", "c", "d"}


def test_a_seg_of_no_series_is_told_and_of_two_neither_is_taken(tmp_path):
    root = tmp_path / "in"
    outlined(root / NAME, "1.2.3.1", root / "a.dcm")
    outlined(tmp_path / "gone", "1.2.3.9", root / "b.dcm")
    make(root / "z", series="1.2.3.2")
    case, *_ = DICOM(root, show_ids=True).survey().cases
    kinds = [one.kind for one in DICOM(root).survey().findings]
    assert kinds == [Kind.MASK_UNUSED, Kind.MASK_AUTOMATIC]
    copy = shutil.copy(root / "a.dcm", root / "masks_a.dcm")
    survey = DICOM(root, show_ids=True).survey()
    assert {one.label and one.label.files for one in survey.cases} == {(root / "a.dcm",), None}
    assert "1 DICOM SEG are not used: they are copies of others" in texts(survey.findings)
    copy.unlink()
    again = write(root / NAME, tmp_path / "c.dcm", label_of()).rename(root / "c.dcm")
    survey = DICOM(root).survey()
    assert len(survey.cases) == 1, "the other series is used"
    (told,) = [one for one in survey.findings if one.done == "refused"]
    assert told.kind is Kind.MASK_VALUES
    assert told.text.startswith("series 1 of 2 in the order of paths has several masks (DICOM SEG)")
    assert NAME not in str(survey)
    data = dcmread(again)
    for item in data.SegmentSequence:
        item.SegmentAlgorithmType = "MANUAL"
    data.save_as(again)
    cases = {one.id: one for one in DICOM(root, show_ids=True).cases()}
    assert cases[NAME].label.files == (again,), "drawn by hand"
    drawn = mask(root, case, root / "masks" / "1.2.3.1.nii.gz")
    found = DICOM(root, show_ids=True).survey()
    assert {one.label for one in found.cases} == {drawn, None}, "it may be the SEG, converted"
    assert [one.kind for one in found.findings] == [Kind.MASK_UNUSED]
    assert found.findings[0].text.startswith("3 DICOM SEG are not used: they refer to no series")


def test_a_seg_is_of_the_slices_it_refers_to_or_of_the_only_series_in_its_coordinates(tmp_path):
    root = tmp_path / "in"
    first = outlined(root / "a", "1.2.3.1", tmp_path / "first.dcm")
    make(root / "b", series="1.2.3.1", change=other_number)
    first.rename(root / "first.dcm")
    assert [bool(case.label) for case in DICOM(root, show_ids=True).cases()] == [True, False]
    data = dcmread(root / "first.dcm")
    del data.ReferencedSeriesSequence
    data.save_as(root / "first.dcm")
    assert not [case for case in DICOM(root).cases() if case.label]
    shutil.rmtree(root / "b")
    (case,) = DICOM(root).cases()
    assert case.label


def other_number(k, data):
    """Of another patient, whose tool has made the same UIDs."""
    complete(k, data)
    data.PatientID, data.StudyInstanceUID = "MRN-9", "1.2.9"


def relabel(path, labels, **tags):
    data = dcmread(path)
    for item, text in zip(data.SegmentSequence, labels, strict=True):
        item.SegmentLabel = text
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)


def test_segs_that_are_no_masks_are_told_and_harm_nothing(tmp_path):
    """As of other organs, of probabilities or of surfaces, beside the mask of the same series."""
    root = tmp_path / "in"
    reader = outlined(root / NAME, "1.2.3.1", root / "a.dcm")
    others = [write(root / NAME, tmp_path / f"{n}.dcm", label_of()) for n in range(4)]
    others = [path.rename(root / f"{NAME} {path.name}") for path in others]
    relabel(others[0], ["skull", "brain", "scalp", "eye", "neck"])
    relabel(others[1], HEMORRHAGE[1:], SegmentationType="FRACTIONAL")
    relabel(others[2], HEMORRHAGE[1:], SOPClassUID="1.2.840.10008.5.1.4.1.1.66.5")
    data = dcmread(others[3])
    del data.SegmentSequence[0].SegmentNumber
    data.save_as(others[3])
    survey = DICOM(root).survey()
    (case,) = survey.cases
    assert case.label.files == (reader,)
    told = [one.text for one in survey.findings if one.kind is Kind.MASK_UNUSED]
    assert len(told) == 4
    for words in ("labeled as one of the classes EDH", "type FRACTIONAL", "surfaces", "cannot be"):
        (text,) = [text for text in told if words in text]
        assert text.startswith("1 DICOM SEG are not used: ")
        assert NAME not in text


def test_a_seg_with_segments_of_no_class_is_refused_with_its_series_alone(tmp_path):
    root = tmp_path / "in"
    path = outlined(root / NAME, "1.2.3.1", root / "a.dcm")
    relabel(path, ["EDH", "tumor", "IVH", "SAH", "edema"])
    refusal = r"no series can be used, 1 refused: .* segments 2, 5 "
    with pytest.raises(ValueError, match=refusal) as said:
        DICOM(root).survey()
    assert "--data.classes" in str(said.value)
    assert NAME not in str(said.value).replace(str(root), "")
    make(root / "z", series="1.2.3.2")
    survey = DICOM(root).survey()
    assert len(survey.cases) == 1
    (told,) = [one for one in survey.findings if one.done == "refused"]
    assert told.text.startswith("the DICOM SEG of series 1 of 2 in the order of paths: its ")
    named = ("edema,tumor,EDH,IVH,SAH",)
    case, _ = sorted(DICOM(root, classes=named).cases(), key=lambda case: case.label is None)
    assert case.label.values == (0, 3, 2, 4, 5, 1)
