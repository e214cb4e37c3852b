"""Every further data set, in the layout it is given out in."""

import json

import numpy as np
import pytest
from dicom_files import block, write_series

from bhsd_jax.build import build
from bhsd_jax.configs import common
from bhsd_jax.ct import nifti, scan
from bhsd_jax.datasets.ctich import CTICH
from bhsd_jax.datasets.folder import Folder
from bhsd_jax.datasets.hemorica import Hemorica
from bhsd_jax.datasets.hemseg import HemSeg
from bhsd_jax.datasets.instance import INSTANCE
from bhsd_jax.datasets.label_maps import PRESETS, LabelMap
from bhsd_jax.datasets.mbhseg import MBHSeg
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import HEMORRHAGE, Masks, Series, Volume

BINARY = (0, *(1,) * 255)


def summary(data):
    return [(case.id, case.split, case.label is not None) for case in data.cases()]


@pytest.mark.parametrize("word", sorted(common.DATA))
def test_every_data_word_builds_its_data_set(word):
    spec = common.get_config(f"data={word}").data.to_dict() | {"root": "somewhere"}
    if word != "msd":  # reads its classes from the folder
        assert build("bhsd_jax.datasets", spec).classes[0] == "background"


@pytest.mark.parametrize(
    ("name", "classes", "values"),
    [
        ("bhsd", HEMORRHAGE, (0, 1, 2, 3, 4, 5)),
        ("binary", ("background", "any"), BINARY),
        ("blast-ct", ("background", "IPH", "extra-axial", "edema", "IVH"), (0, 1, 2, 3, 4)),
        ("bhsd-to-blast-ct", ("background", "extra-axial", "IPH", "IVH"), (0, 1, 2, 3, 1, 1)),
    ],
)
def test_label_maps_name_the_class_of_each_value(name, classes, values):
    assert LabelMap.of(name) == LabelMap(classes, values)
    assert LabelMap.of(list(PRESETS[name])) == LabelMap(classes, values)


@pytest.mark.parametrize("names", ["other", (), ("background",), ("a", "b", "a"), ("a", "", "b")])
def test_label_maps_that_make_no_sense_are_refused(names):
    with pytest.raises(ValueError, match="label map"):
        LabelMap.of(names)


def test_instance_trains_on_its_archive_and_knows_no_mask_of_the_evaluation(tmp_path, touch):
    for id in ("001", "002"):
        touch(tmp_path / "train_2" / "data" / f"{id}.nii.gz")
        touch(tmp_path / "train_2" / "label" / f"{id}.nii.gz")
    touch(tmp_path / "evaluation" / "101.nii.gz")
    assert summary(INSTANCE(tmp_path)) == [
        *(("001", "train", True), ("002", "train", True), ("101", "unlabeled", False)),
    ]
    case = next(INSTANCE(tmp_path).cases())
    assert case.label == Masks((tmp_path / "train_2" / "label" / "001.nii.gz",), values=BINARY)
    touch(tmp_path / "train_2" / "data" / "003.nii.gz")
    with pytest.raises(ValueError, match="no mask for 003"):
        list(INSTANCE(tmp_path).cases())
    touch(tmp_path / "train_2" / "label" / "003.nii.gz")
    touch(tmp_path / "evaluation" / "003.nii.gz")
    with pytest.raises(ValueError, match="003 in train_2 and evaluation"):
        list(INSTANCE(tmp_path).cases())


HEAD = "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural,"


@pytest.fixture
def ctich(tmp_path, touch):
    for id in ("049", "050"):
        touch(tmp_path / "ct_scans" / f"{id}.nii")
        touch(tmp_path / "masks" / f"{id}.nii")
    lines = [HEAD + "No_Hemorrhage,Fracture_Yes_No", "49,1,0,0,0,0,0,1,0", "49,2,1,0,0,1,0,0,0"]
    lines += ["50,2,0,0,0,0,0,1,0", "50,1,0,0,0,0,0,1,1"]
    path = tmp_path / "hemorrhage_diagnosis_raw_ct.csv"
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_ctich_has_one_outlined_class_or_five_known_by_slice(ctich):
    binary = list(CTICH(ctich).cases())
    assert CTICH(ctich).classes == ("background", "any")
    assert [(c.id, c.split, c.bleeding, c.slice_labels) for c in binary] == [
        ("049", "train", True, ((0,), (1,))),
        ("050", "train", False, ((0,), (0,))),
    ]
    typed = list(CTICH(ctich, masks="types").cases())
    assert [(c.id, c.split, c.label) for c in typed] == [
        *(("049", "unlabeled", None), ("050", "unlabeled", None)),
    ]
    # EDH, IPH, IVH, SAH, SDH
    assert typed[0].slice_labels == ((0, 0, 0, 0, 0), (1, 0, 1, 0, 0))
    with pytest.raises(ValueError, match="binary or types; got 'all'"):
        CTICH(ctich, masks="all")


def test_ctich_slices_without_a_row_are_not_known_to_bleed(ctich):
    with (ctich / "hemorrhage_diagnosis_raw_ct.csv").open("a") as file:
        file.write("49,5,0,0,0,0,0,1,0\n50,4,0,0,0,0,0,1,0\n")
    for masks, unknown in (("binary", (-1,)), ("types", (-1,) * 5)):
        bleeds, may_bleed = CTICH(ctich, masks=masks).cases()
        assert (bleeds.bleeding, may_bleed.bleeding) == (True, None)
        assert may_bleed.slice_labels[2] == unknown


def test_a_table_of_ctich_that_excel_has_saved_is_the_same(ctich):
    before = [case.slice_labels for case in CTICH(ctich, masks="types").cases()]
    path = ctich / "hemorrhage_diagnosis_raw_ct.csv"
    text = path.read_text(encoding="utf-8-sig").replace("Fracture", "Schädel").replace(",", ";")
    path.write_bytes(f"{text};;;;;;;;\n".encode("cp1252"))
    assert [case.slice_labels for case in CTICH(ctich, masks="types").cases()] == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("49,1,0,0,1,0,0,1,0", "contradicts"),
        ("49,0,0,0,0,0,0,1,0", "0 or 1"),
        ("49,3,0,2,0,0,0,1,0", "0 or 1"),
    ],
)
def test_ctich_tables_that_make_no_sense_are_refused(ctich, line, message):
    with (ctich / "hemorrhage_diagnosis_raw_ct.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        list(CTICH(ctich).cases())
    (ctich / "hemorrhage_diagnosis_raw_ct.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="no column Epidural"):
        list(CTICH(ctich).cases())


STUDIES = {"bf7891541c": "ID_00e394df", "d580615f5f": "ID_015d2c2c", "f2a6636a59": "ID_015d2c2c"}


@pytest.fixture
def hemseg(tmp_path, touch):
    lines = []
    for index, (study, patient) in enumerate(STUDIES.items()):
        touch(tmp_path / "label" / f"{study}.nii.gz")
        slices = [f"{index}0000000{k}" for k in range(6)]
        lines.append(json.dumps({"patient": patient, "scan_": study, "slice_list": slices}))
    (tmp_path / "annotion_file_info.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "train_set.csv").write_text("filename,label\nd580615f5f,1\nf2a6636a59,0\n")
    (tmp_path / "test_set.csv").write_text("filename,label\nbf7891541c,1\n")
    return tmp_path


def test_hemseg_takes_converted_images_and_its_lists(hemseg, touch):
    with pytest.raises(FileNotFoundError, match=r"no image of study bf7891541c.*data\.dicom"):
        list(HemSeg(hemseg).cases())
    for study, patient in STUDIES.items():
        touch(hemseg / "images" / f"{patient}_ID_{study}.nii.gz")
    found = list(HemSeg(hemseg).cases())
    assert [(c.id, c.patient, c.split) for c in found] == [
        ("bf7891541c", "ID_00e394df", "test"),
        ("d580615f5f", "ID_015d2c2c", "train"),
        ("f2a6636a59", "ID_015d2c2c", "train"),
    ]
    (hemseg / "train_set.csv").write_text("filename,label\nd580615f5f,1\n")
    (hemseg / "test_set.csv").write_text("filename,label\nbf7891541c,1\nf2a6636a59,0\n")
    with pytest.raises(ValueError, match="scans of one patient, ID_015d2c2c"):
        list(HemSeg(hemseg).cases())


def test_hemseg_finds_the_slices_of_the_challenge(hemseg, tmp_path):
    slices = tmp_path / "rsna"
    for index in range(3):
        write_series(slices, block(), names=[f"ID_{index}0000000{k}.dcm" for k in range(6)])
    found = list(HemSeg(hemseg, dicom=slices).cases())
    assert all(isinstance(case.image, Series) for case in found)
    assert scan.read(found[1].image)[0].voxels.shape[0] == 6
    (slices / "ID_200000003.dcm").unlink()
    with pytest.raises(FileNotFoundError, match=r"no ID_200000003\.dcm and 0 more"):
        list(HemSeg(hemseg, dicom=slices).cases())


@pytest.fixture
def mbhseg(tmp_path, touch):
    raters = {
        "MBH_train_label_2025/ID_0a000001_ID_00000000a1": (1, 2, 3, 4),
        "MBH_train_label_2025/ID_0a000002_ID_00000000a2": (2, 3),
        "MBH_Test_label_2025/ID_0b000001_ID_00000000b1": (1, 5),
        "MBH_case_level/ID_0c000001_ID_00000000c1": (),
    }
    for folder, numbers in raters.items():
        touch(tmp_path / folder / "image.nii.gz")
        for number in numbers:
            touch(tmp_path / folder / f"label_annot_{number}.nii.gz")
    touch(tmp_path / next(iter(raters)) / "label_consensus_staple.nii.gz")
    return tmp_path


def test_folders_of_mbhseg_are_parts_by_whole_words(tmp_path, touch):
    """ "latest" holds a "test", and "interval" a "val"."""
    parts = {"latest": "train", "interval": "train", "Val_set": "val", "test_2": "test"}
    parts |= {"evaluation": "val", "train_valid": "val", "MBHSegTest": "test", "labelVal": "val"}
    parts |= {"TESTING": "test", "EVAL": "val", "Evaluation": "val", "MBH-Seg25test": "test"}
    for number, folder in enumerate(parts):
        for name in ("image", "label_annot_1"):
            touch(tmp_path / folder / f"c{number:02}" / f"{name}.nii.gz")
    assert [c.split for c in MBHSeg(tmp_path).cases()] == list(parts.values())


def test_mbhseg_combines_the_raters_there_are(mbhseg):
    found = list(MBHSeg(mbhseg).cases())
    assert [(c.id[:11], c.patient, c.split) for c in found] == [
        ("ID_0a000001", "ID_0a000001", "train"),
        ("ID_0a000002", "ID_0a000002", "train"),
        ("ID_0b000001", "ID_0b000001", "test"),
        ("ID_0c000001", "ID_0c000001", "unlabeled"),
    ]
    assert [len(c.label.files) for c in found[:3]] == [4, 2, 2]
    assert {c.label.combine for c in found[:3]} == {"majority"}
    first = [c.label.name for c in MBHSeg(mbhseg, rater="first").cases() if c.label]
    assert first == ["label_annot_1.nii.gz", "label_annot_2.nii.gz", "label_annot_1.nii.gz"]
    with pytest.raises(ValueError, match="not outlined by rater 1, but by 2, 3; combine"):
        list(MBHSeg(mbhseg, rater="1").cases())
    one = list(MBHSeg(mbhseg, rater="1", allow_missing=True).cases())
    assert [c.split for c in one] == ["train", "unlabeled", "test", "unlabeled"]
    staple = list(MBHSeg(mbhseg, rater="staple", allow_missing=True).cases())
    assert [c.label is not None for c in staple] == [True, False, False, False]
    with pytest.raises(ValueError, match="rater is first, majority"):
        MBHSeg(mbhseg, rater="random")


def test_images_named_as_by_nnunet_pair_with_masks_that_are_not_numbered(tmp_path, touch):
    for name in ("images/a_0000", "images/b_0000", "masks/a"):
        touch(tmp_path / f"{name}.nii.gz")
    assert summary(Folder(tmp_path)) == [("a", "train", True), ("b", "unlabeled", False)]
    (tmp_path / "images" / "b_0000.nii.gz").rename(tmp_path / "images" / "a_0001.nii.gz")
    with pytest.raises(ValueError, match=r"no image for a; image"):
        list(Folder(tmp_path).cases())
    (tmp_path / "images" / "a_0001.nii.gz").unlink()
    touch(tmp_path / "masks" / "c.nii.gz")
    with pytest.raises(ValueError, match=r"no image for c; image and mask have one name"):
        list(Folder(tmp_path).cases())


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("img{}", "label{}"),  # BTCV
        ("volume-{}", "segmentation-{}"),  # LiTS
        ("{}_image", "{}_mask"),
        ("{}_CT", "{}_seg"),
        ("{}", "{}_seg"),
    ],
)
def test_images_and_masks_pair_where_a_word_alone_tells_them_apart(tmp_path, touch, image, mask):
    names = ("p1", "p2", "p10")
    for name in names:
        touch(tmp_path / "images" / f"{image.format(name)}.nii.gz")
    for name in names[1:]:
        touch(tmp_path / "masks" / f"{mask.format(name)}.nii.gz")
    found = {case.id: case.label and case.label.name for case in Folder(tmp_path).cases()}
    want = {image.format(name): f"{mask.format(name)}.nii.gz" for name in names[1:]}
    assert found == {image.format("p1"): None} | want
    touch(tmp_path / "masks" / f"{mask.format('p3')}.nii.gz")
    with pytest.raises(ValueError, match=r"no image for .*; image and mask have one name"):
        list(Folder(tmp_path).cases())


def test_names_of_rsna_and_bids_say_whose_scan_it_is(tmp_path, touch):
    """Else one scan of a patient validates what another has trained."""
    names = {
        "ID_0a000001_ID_00000000a1": "ID_0a000001",
        "ID_0a000001_ID_00000000a2": "ID_0a000001",
        "sub-07_ses-1_ct": "sub-07",
        "sub-07_ses-2_ct": "sub-07",
        "sub-08": "sub-08",
        "submandibular_1": "submandibular_1",
        "case-1_2": "case-1_2",
    }
    for name in names:
        for folder in ("images", "masks", "imagesTr", "labelsTr"):
            touch(tmp_path / folder / f"{name}.nii.gz")
    facts = {"labels": {"0": "background", "1": "a"}, "modality": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    for data in (Folder(tmp_path), MSD(tmp_path)):
        assert {case.id: case.patient for case in data.cases()} == names


def test_folders_without_images_or_masks_say_where_they_are_looked_for(tmp_path, touch):
    with pytest.raises(FileNotFoundError, match="images: no such folder of NIfTI images"):
        list(Folder(tmp_path).cases())
    touch(tmp_path / "images" / "s1" / "ct.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"in folders below it, such as s1/ct\.nii\.gz"):
        list(Folder(tmp_path).cases())
    touch(tmp_path / "images" / "a.nii.gz")
    assert summary(Folder(tmp_path)) == [("a", "unlabeled", False)]
    with pytest.raises(FileNotFoundError, match=r"labels: no such folder; look at data\.masks"):
        list(Folder(tmp_path, masks="labels").cases())


def test_plain_folders_pair_by_name(tmp_path, touch):
    for name in ("a", "b", "c"):
        touch(tmp_path / "images" / f"{name}.nii.gz")
    touch(tmp_path / "masks" / "b.nii.gz")
    assert summary(Folder(tmp_path)) == [
        *(("a", "unlabeled", False), ("b", "train", True), ("c", "unlabeled", False)),
    ]
    assert next(Folder(tmp_path, images="masks").cases()).label == tmp_path / "masks/b.nii.gz"
    merged = Folder(tmp_path, labels=("background", "in", "out", "in"), split="test")
    assert merged.classes == ("background", "in", "out")
    assert [c.label for c in merged.cases()][1].values == (0, 1, 2, 1)
    for own in ("in,out", "background,in,out", "('in', 'out')", ("in", "out"), ["in", "out"]):
        named = Folder(tmp_path, classes=own)
        assert named.classes == ("background", "in", "out")
        assert [c.label for c in named.cases()][1] == tmp_path / "masks/b.nii.gz"
    for odd in ("in,", "in,background", ","):
        with pytest.raises(ValueError, match="label map: want the background"):
            Folder(tmp_path, classes=odd)
    assert Folder(tmp_path).classes == HEMORRHAGE
    touch(tmp_path / "masks" / "d.nii.gz")
    with pytest.raises(ValueError, match="no image for d"):
        list(Folder(tmp_path).cases())
    (tmp_path / "masks" / "d.nii.gz").rename(tmp_path / "masks" / "c.nrrd")
    with pytest.raises(Refusal, match=r"masks/c\.nrrd: \.nrrd is not read here; convert it"):
        list(Folder(tmp_path).cases())
    with pytest.raises(ValueError, match="modality is ct or mr"):
        Folder(tmp_path, modality="pet")


@pytest.fixture
def hemorica(tmp_path, touch):
    for id in ("p1", "p2"):
        touch(tmp_path / "images" / f"{id}.nii.gz")
        touch(tmp_path / "masks" / f"{id}.nii.gz")
    return tmp_path


PAPER = "EPH, SDH, SAH, IPH, IVH"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (PAPER, None),
        ("", {"background": 0, "EPH": 1, "SDH": 2, "SAH": 3, "IPH": 4, "IVH": 5}),
        ("", {str(k): n for k, n in enumerate(("background", *PAPER.split(", ")))}),
    ],
)
def test_hemorica_has_the_classes_that_its_values_are_said_to_mean(hemorica, values, labels):
    if labels:
        (hemorica / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = Hemorica(hemorica, values=values)
    assert summary(data) == [("p1", "train", True), ("p2", "train", True)]
    case = next(data.cases())
    assert case.label == Masks((hemorica / "masks" / "p1.nii.gz",), values=(0, 1, 5, 4, 2, 3))
    assert data.classes == HEMORRHAGE
    assert not case.table_feed


def test_hemorica_takes_nothing_for_granted_that_the_paper_does_not_say(hemorica, touch):
    with pytest.raises(ValueError, match=r"which value .* is not known.*config\.data\.values"):
        list(Hemorica(hemorica).cases())
    for odd in ("EPH,SDH", "EPH,EDH,SAH,IPH,IVH", "a,b,c,d,e"):
        with pytest.raises(ValueError, match=f"each once, by mask value from 1; got {odd[0]}"):
            list(Hemorica(hemorica, values=odd).cases())
    (hemorica / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="no labels as nnU-Net has them"):
        list(Hemorica(hemorica).cases())
    touch(hemorica / "images" / "p3.nii.gz")
    with pytest.raises(ValueError, match="no mask for p3; every scan is taken to have one"):
        list(Hemorica(hemorica, values=PAPER).cases())
    touch(hemorica / "masks" / "p3_EPH.nii.gz")
    with pytest.raises(ValueError, match="p3_EPH seem to be masks of one type each"):
        list(Hemorica(hemorica, values=PAPER).cases())
    with pytest.raises(FileNotFoundError, match=r"no folder scans in it.*config\.data\.images"):
        list(Hemorica(hemorica, images="scans", values=PAPER).cases())
    touch(hemorica / "b" / "images" / "a.nii")
    with pytest.raises(FileNotFoundError, match="no folder masks, mask, labels, labelsTr"):
        list(Hemorica(hemorica / "b").cases())


def test_a_value_of_hemorica_beyond_the_five_types_is_refused(tmp_path):
    voxels, affine = block().astype("i2"), np.eye(4)
    for folder, array in (("images", voxels), ("masks", (voxels == 900).astype("u1") * 6)):
        nifti.write_volume(tmp_path / folder / "a.nii.gz", Volume(array, affine, ""))
    (case,) = Hemorica(tmp_path, values=PAPER).cases()
    with pytest.raises(Refusal, match="label values 6 have no class") as caught:
        scan.read_label(case.label, case.image, scan.read(case.image)[0], num_classes=6)
    assert caught.value.kind is Kind.MASK_VALUES
