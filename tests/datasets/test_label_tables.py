"""What tables say of whole scans and of slices, in the data sets that read them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NAME, PATIENT, block, write_series

from bhsd_jax.ct import slice_labels
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.datasets.folder import Folder
from bhsd_jax.defects import Kind
from bhsd_jax.volume import SOME, Masks


@pytest.fixture
def folder(tmp_path, touch):
    for name in ("a", "b", "c", "d"):
        touch(tmp_path / "images" / f"{name}.nii.gz")
    touch(tmp_path / "masks" / "d.nii.gz")
    return tmp_path


def known(data):
    return {case.id: (case.bleeding, case.absent, case.slice_labels) for case in data.cases()}


NOTHING = (None, (), None)


def test_a_table_of_scans_says_who_bleeds_and_what_each_lacks(folder):
    """A CSV of scan and classes, or of scan and any; other columns say nothing."""
    (folder / "scan_labels.csv").write_text(
        "Scan,age,EDH,iph,IVH,SAH,subdural\nimages/a.nii.gz,60,0,1,0,,0\nb,,0,0,0,0,0\nc,7,,,,,\n"
    )
    assert known(Folder(folder)) == {
        "a": (True, (1, 3, 5), None),
        "b": (False, (1, 2, 3, 4, 5), None),
        "c": NOTHING,
        "d": NOTHING,
    }
    (folder / "scan_labels.csv").write_text("scan;any\na;1\nb;FALSE\nd;1,0\n")
    assert known(Folder(folder)) == {
        "a": (True, (), None),
        "b": (False, (1, 2, 3, 4, 5), None),
        "c": NOTHING,
        "d": (True, (), None),
    }


def test_a_table_of_slices_is_read_beside_a_plain_folder(folder):
    (folder / "slice_labels.csv").write_text("case,slice,any,SDH\na,0,0,\na,1,1,1\na,2,1,\n")
    rows = ((0,) * 5, (-1, -1, -1, -1, 1), (SOME,) * 5)
    assert known(Folder(folder)) == {"a": (None, (), rows)} | dict.fromkeys("bcd", NOTHING)
    assert not Folder(folder).survey().findings


def test_of_one_class_of_any_bleeding_columns_of_kinds_say_what_they_say(folder):
    (folder / "scan_labels.csv").write_text(
        "case,EDH,IPH,IVH,SAH,SDH\na,0,0,0,0,1\nb,0,0,0,0,0\nc,0,0,0,0,\n"
    )
    (folder / "slice_labels.csv").write_text("case,slice,any,IPH\na,0,1,0\na,1,0,\nb,0,,0\n")
    assert known(Folder(folder, labels="binary")) == {
        "a": (True, (), ((1,), (0,))),
        "b": (False, (1,), ((-1,),)),
        "c": NOTHING,
        "d": NOTHING,
    }


def test_names_of_kinds_go_with_ones_own_classes_by_name_and_not_by_number(folder):
    (folder / "scan_labels.csv").write_text("case,epidural,intraventricular\na,1,0\n")
    found = known(Folder(folder, classes="tumor,IVH"))
    assert found["a"] == (None, (2,), None)


def test_rows_without_a_scan_are_told_of(folder):
    (folder / "scan_labels.csv").write_text("case,any\na,1\nx,0\ny,0\n")
    (finding,) = Folder(folder).survey().findings
    assert finding.kind is Kind.SLICE_LABELS_ALONE
    assert "scan_labels.csv: rows of 2 scans that are not used, such as x" in finding.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan,any\na,1\na,0\n", "line 3: contradicts an earlier line of that scan"),
        ("name,any\na,1\n", "no column case; expected case, any, EDH, .* got name, any; a table"),
        ("scan,age\na,1\n", "no column says what a case shows"),
        ("scan,EDH\na,3\n", "line 2: expected 0, 1 or -1 per class, .* got EDH '3'"),
        ("scan,any,EDH\na,0,1\n", "line 2: any is 0, and of the classes .* one is 1"),
    ],
)
def test_tables_of_scans_that_make_no_sense_are_refused(folder, text, message):
    (folder / "scan_labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(Folder(folder).cases())


@pytest.fixture
def dicom(tmp_path):
    """A series in a folder of a name of its own, and two in folders that are called alike."""
    for index, place in enumerate(("P 1/head", "P 2/head", "P 3/ct")):
        instances = [f"1.2.{index}.7.{k}" for k in range(6)]
        ids = {"series": f"1.2.{index}.7", "study": f"1.2.{index}", "patient": f"{PATIENT}{index}"}
        write_series(tmp_path / place, block(seed=index), instances=instances, **ids)
    return tmp_path


def test_series_are_called_in_a_table_as_their_masks_are(dicom):
    (dicom / "scan_labels.csv").write_text("scan,any,EDH\n1.2.0.7,1,0\nP 2/head,0,\nct,1,1\n")
    found = known(DICOM(dicom, show_ids=True))
    assert found == {
        "P 1_head": (True, (1,), None),
        "P 2_head": (False, (1, 2, 3, 4, 5), None),
        "P 3_ct": (True, (), None),
    }
    assert set(known(DICOM(dicom, salt="a")).values()) == set(found.values())


def test_slices_of_dicom_are_called_by_their_instances(dicom):
    """In the order of space, whatever that of the files or of the instance numbers."""
    lines = [f"{NAME},1.2.0.7.{k},{int(k == 4)}" for k in (5, 4, 3, 2, 1)]
    (dicom / "slice_labels.csv").write_text("\n".join(["case,slice,any", *lines]))
    found = known(DICOM(dicom, show_ids=True, classes=("any",)))
    rows = ((-1,), (0,), (0,), (0,), (1,), (0,))
    assert found == {"P 1_head": (None, (), rows), "P 2_head": NOTHING, "P 3_ct": NOTHING}


def test_what_is_wrong_with_tables_of_dicom_names_nobody(dicom):
    (dicom / "scan_labels.csv").write_text(f"scan,any\n{NAME},1\n1.2.0.7,1\nhead,0\n")
    (dicom / "slice_labels.csv").write_text(f"slice,any\n{NAME},1\n1.2.0.7.1,1\n")
    found = [f for f in DICOM(dicom).survey().findings if f.kind is Kind.SLICE_LABELS_ALONE]
    assert [f.text.split(": ")[1][:36] for f in found] == [
        "2 of 3 lines are of scans that are n",
        "1 of 2 lines are of slices that are ",
    ]
    for text, message in (
        (f"scan,any\n{NAME},5\n", "line 2: expected 0, 1"),
        ("scan,any\n1.2.0.7,1\nP 1_head,0\n", "two lines, one by folder and one by UID"),
    ):
        (dicom / "scan_labels.csv").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            list(DICOM(dicom).cases())
        assert NAME not in str(caught.value)
    assert not any(NAME in f.text for f in found)


def test_a_mask_of_a_series_that_contradicts_a_table_is_not_named(dicom):
    """Files of hospitals are called as patients are."""
    (dicom / "scan_labels.csv").write_text("scan,any\n1.2.0.7,1\n")
    case = next(case for case in DICOM(dicom).cases() if case.bleeding)
    for label in (Path(f"{NAME}.nii.gz"), Masks((Path(f"{NAME}.dcm"),))):
        drawn = replace(case, label=label)
        with pytest.raises(ValueError, match=f"^{case.id}: the mask is empty, but") as caught:
            slice_labels.bleeding(drawn, np.zeros((6, 2, 2), np.uint8), "ct", 6)
        assert NAME not in str(caught.value)
