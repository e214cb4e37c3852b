import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from dicom_files import block, write_series

from bhsd_jax.ct import nifti, scan
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.datasets import bhsd_slices, rsna
from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.datasets.rsna import RSNA, TYPES
from bhsd_jax.defects import Kind
from bhsd_jax.volume import SOME, Volume

PATIENT, STUDY = "ID_0a000001", "ID_00000000a1"
SLICES = [f"ID_0000000{k}{k}" for k in range(6)]  # by position
# EDH, IPH, IVH, SAH, SDH of each slice
ROWS = ((0,) * 5, (0, 1, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 0, 1), (0,) * 5, (0,) * 5)
UNKNOWN = (-1,) * 5


def table(path, rows, more=()):
    lines = ["ID,Label"]
    for name, row in rows.items():
        lines += [f"{name}_{kind},{value}" for kind, value in zip(TYPES, row, strict=True)]
        lines.append(f"{name}_any,{max(row)}")
    path.write_text("\n".join([*lines, *more]) + "\n")


def study(folder, hu=None, patient=PATIENT, study=STUDY, **options):
    hu = block() if hu is None else hu
    options = {"names": [f"{name}.dcm" for name in SLICES], "instances": SLICES} | options
    return write_series(folder, hu, patient=patient, study=study, series=f"{study}_s", **options)


@pytest.fixture
def root(tmp_path):
    """File names and the table in another order than the slices in space."""
    study(tmp_path / "stage_2_train")
    table(tmp_path / "stage_2_train.csv", dict(sorted(zip(SLICES, ROWS, strict=True))))
    return tmp_path


def test_labels_follow_the_positions_of_the_slices(root):
    (case,) = RSNA(root).cases()
    assert (case.id, case.patient, case.split) == (f"{PATIENT}_{STUDY}", PATIENT, "unlabeled")
    assert case.bleeding is True
    assert case.slice_labels == ROWS
    volume, _ = scan.read(case.image)
    assert len(volume.voxels) == len(case.slice_labels)


def test_slices_that_are_not_in_the_table_are_unknown(root):
    table(root / "stage_2_train.csv", dict(zip(SLICES[4:], ROWS[4:], strict=True)))
    (case,) = RSNA(root).cases()
    assert case.slice_labels == (UNKNOWN,) * 4 + ROWS[4:]
    assert case.bleeding is None
    (found,) = RSNA(root).survey().findings
    assert "says nothing of 4 of 6 slices, such as ID_" in found.text
    table(root / "stage_2_train.csv", dict.fromkeys(SLICES, (0,) * 5))
    assert next(RSNA(root).cases()).bleeding is False
    table(root / "stage_2_train.csv", {"ID_other": (0,) * 5})
    (case,) = RSNA(root).cases()
    assert (case.bleeding, case.slice_labels) == (None, None)
    assert "ids, such as ID_other, are of no slice here" in RSNA(root).survey().findings[0].text


def test_a_damaged_slice_is_left_out_and_its_neighbors_keep_their_labels(root):
    path = root / "stage_2_train" / f"{SLICES[2]}.dcm"
    path.write_bytes(path.read_bytes()[:-50])
    (case,) = RSNA(root).cases()
    volume, found = scan.read(case.image)
    assert any("damaged" in finding.text for finding in found)
    assert len(volume.voxels) == len(case.slice_labels) == 6
    assert case.slice_labels[3:] == ROWS[3:]
    assert case.slice_labels[:2] == ROWS[:2]
    assert case.slice_labels[2] == (0, -1, 0, 0, -1)  # IPH below, SDH above
    (case,) = RSNA(root, uneven="refuse").cases()
    assert case.slice_labels is None
    with pytest.raises(ValueError, match="damaged"):
        scan.read(case.image)


def test_interpolated_slices_have_the_labels_of_the_nearest_or_what_both_agree_on(tmp_path):
    """Slices at 0, 4.833, 9.667, 14.5, 19.333, 24.167, 29; the last but two is halfway."""
    study(tmp_path, places=np.array([0, 5, 10, 15, 22, 29]))
    table(tmp_path / "stage_2_train.csv", dict(zip(SLICES, ROWS, strict=True)))
    (case,) = RSNA(tmp_path).cases()
    volume, _ = scan.read(case.image)
    assert len(volume.voxels) == 7
    assert case.slice_labels == (*ROWS[:4], (0, 0, 0, 0, -1), ROWS[4], ROWS[5])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([f"{SLICES[1]}_epidural,1"], "contradicts an earlier line"),
        (["ID_x_subdural,0.5"], "expected ID_<slice>_<type>"),
        (["ID_x_other,1"], "expected ID_<slice>_<type>"),
        (["ID_x_any,0", "ID_x_subdural,1"], "ID_x: 'any' is not the union"),
        ([f"ID_x_{kind},0" for kind in TYPES] + ["ID_x_any,1"], "ID_x: 'any' is not the union"),
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path, more, message):
    table(tmp_path / "t.csv", dict(zip(SLICES, ROWS, strict=True)), more)
    with pytest.raises(ValueError, match=message):
        rsna.read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text",
    [
        "ID,Label\nID_a_any,1.0\nID_a_epidural,1.0\nID_a_subdural,0.0\n",  # of a column with gaps
        "ID;Label\r\nID_a_any;1\r\nID_a_epidural;1\r\nID_a_subdural;0\r\n",
        ",Label,ID\n0,1,ID_a_any\n1,1,ID_a_epidural\n2,0,ID_a_subdural\n",  # with pandas' index
        "ID,any,epidural,subdural\nID_a,1,1,0\n",
        "id;subdural;epidural\nID_a.dcm;0;1\n",
        "ID,any,epidural,intraventricular,subdural\nID_a,NA,1.0,,0.0\nID_b,,,,\n",
        "ID,Label\nID_a_epidural,TRUE\nID_a_subdural,FALSE\nID_a_subarachnoid,\n",
    ],
)
def test_tables_that_others_have_made_of_the_challenges_are_read(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    assert rsna.read_table(tmp_path / "t.csv") == {"ID_a": (1, -1, -1, -1, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "first line must be ID,Label, or ID and the names of types"),
        ("ID,epidural\nID_a,2\n", r"line 2: expected a slice and 0\|1"),
        ("ID,epidural\nID_a\n", "line 2: expected a slice"),
    ],
)
def test_tables_of_other_columns_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        rsna.read_table(tmp_path / "t.csv")


def test_repeated_lines_are_dropped_and_any_alone_says_what_it_can(tmp_path):
    more = [f"{SLICES[1]}_epidural,0", "ID_a_any,0", "ID_b_any,1", "ID_b_subdural,0"]
    table(tmp_path / "t.csv", dict(zip(SLICES, ROWS, strict=True)), more)
    found = rsna.read_table(tmp_path / "t.csv")
    assert [found[name] for name in SLICES] == list(ROWS)
    assert found["ID_a"] == (0,) * 5
    assert found["ID_b"] == (SOME, SOME, SOME, SOME, 0)


def test_a_table_of_any_alone_says_which_scans_bleed(root):
    lines = [f"{name},{max(row)}" for name, row in zip(SLICES, ROWS, strict=True)]
    (root / "stage_2_train.csv").write_text("\n".join(["ID,any", *lines]) + "\n")
    (case,) = RSNA(root).cases()
    assert case.bleeding is True
    assert case.slice_labels == tuple((SOME if 1 in row else 0,) * 5 for row in ROWS)


def bhsd_tree(root, volume, ids):
    """BHSD's layout, stored as its files are: L, A, S."""
    (root / "unlabel_1" / "anybleed").mkdir(parents=True)
    for id, changed in ids.items():
        nifti.write_volume(root / "unlabel_1" / "anybleed" / f"{id}.nii.gz", changed or volume)
    return root


def test_patients_outlined_in_bhsd_are_left_out_of_the_pool(root, tmp_path):
    study(
        root / "stage_2_train" / "more",
        patient="ID_0b000002",
        study="ID_00000000b2",
        instances=[f"x{k}" for k in range(6)],
    )
    base = tmp_path / "bhsd"
    for folder in ("images", "ground truths"):
        (base / "label_1" / folder).mkdir(parents=True)
    volume = Volume(np.zeros((2, 4, 4), np.uint8), np.diag([5.0, 1, 1, 1])[:, [2, 1, 0, 3]], "")
    outlined = f"{PATIENT}_ID_00000000ff"
    for folder in ("images", "ground truths"):
        nifti.write_volume(base / "label_1" / folder / f"{outlined}.nii.gz", volume)
    (base / "dataset.json").write_text(f'{{"training": ["{outlined}.nii.gz"]}}')
    bhsd_tree(base, volume, {"ID_0d000004_ID_00000000d4": None})  # BHSD's own pool is not used
    found = RSNA(root, bhsd=base).survey()
    assert [(case.id, case.split) for case in found.cases] == [
        (outlined, "train"),
        ("ID_0b000002_ID_00000000b2", "unlabeled"),
    ]
    # Who wants scans with masks need not look at the slices: here, there are none.
    assert list(RSNA(root / "none", bhsd=base).outlined()) == [found.cases[0]]
    assert not list(RSNA(root).outlined())
    # A test scan without its mask is refused; its patient stays out of the pool.
    refused = "ID_0b000002_ID_00000000b2"
    lists = {"training": [f"{outlined}.nii.gz"], "test": [f"{refused}.nii.gz"]}
    (base / "dataset.json").write_text(json.dumps(lists))
    nifti.write_volume(base / "label_1" / "images" / f"{refused}.nii.gz", volume)
    found = RSNA(root, bhsd=base).survey()
    assert [case.id for case in found.cases] == [outlined]
    assert [(f.kind, f.case) for f in found.findings if f.done == "refused"] == [
        (Kind.MASK_MISSING, refused)
    ]
    assert not [f for f in found.findings if "unlabel_1" in f.text]
    (base / "label_1" / "images" / f"{refused}.nii.gz").unlink()
    found = RSNA(root, bhsd=base, allow_missing=True).survey()
    assert [case.id for case in found.cases] == [outlined]
    assert (Kind.IMAGE_MISSING, "kept") in [(f.kind, f.done) for f in found.findings]


def test_bhsd_gets_the_labels_of_the_study_that_its_slices_match(root, tmp_path):
    (case,) = RSNA(root).cases()
    volume, _ = scan.read(case.image)
    shorter = Volume(volume.voxels[:-1], volume.affine, "")
    tree = bhsd_tree(
        tmp_path / "bhsd", volume, {case.id: None, "ID_0c000003_ID_00000000c3": shorter}
    )
    groups, labels = dicom_series.find(root), rsna.read_table(root / "stage_2_train.csv")
    found = bhsd_slices.match(BHSD(tree), groups, labels)
    assert found.rows == {case.id: ROWS}
    assert found.refused == {"ID_0c000003_ID_00000000c3": "its study is not among the slices"}
    bhsd_slices.write(tree / bhsd_slices.FILE, found.rows, BHSD(tree).classes[1:])
    labeled = {c.id: c.slice_labels for c in BHSD(tree).cases()}
    assert labeled == {case.id: ROWS, "ID_0c000003_ID_00000000c3": None}
    with (tree / bhsd_slices.FILE).open() as file:
        assert [row["any"] for row in csv.DictReader(file)] == list("011100")


def test_labeling_no_scan_leaves_the_table_of_before(root, tmp_path, monkeypatch):
    """As where the wrong folder was named; each mistake is one line."""
    path = Path(__file__).parents[2] / "tools" / "label_slices.py"
    main = runpy.run_path(str(path))["main"]
    volume, _ = scan.read(next(RSNA(root).cases()).image)
    tree = bhsd_tree(tmp_path / "bhsd", volume, {"ID_0c000003_ID_00000000c3": None})
    (tree / bhsd_slices.FILE).write_text("case,slice,any\n")
    for words, message in (
        ([tree, root, "--counts-only"], "no scan of .* was labeled, and no table is written"),
        ([tree, tree], "stage_2_train.csv: not there"),
        ([tree / "none", root], "no such folder"),
    ):
        monkeypatch.setattr("sys.argv", ["label_slices", *map(str, words)])
        with pytest.raises(SystemExit, match=message):
            main()
    assert (tree / bhsd_slices.FILE).read_text() == "case,slice,any\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:-1], "5 slices, but its series has 6"),
        (lambda v: v[:, ::-1], "correlates with its original by"),
        (lambda v: v[::-1], "correlates with its original by"),
    ],
)
def test_bhsd_scans_that_are_not_the_study_get_no_labels(root, tmp_path, change, message):
    (case,) = RSNA(root).cases()
    volume, _ = scan.read(case.image)
    other = Volume(np.ascontiguousarray(change(volume.voxels)), volume.affine, "")
    tree = bhsd_tree(tmp_path / "bhsd", other, {case.id: None})
    groups, labels = dicom_series.find(root), rsna.read_table(root / "stage_2_train.csv")
    found = bhsd_slices.match(BHSD(tree), groups, labels)
    assert not found.rows
    assert message in found.refused[case.id]


def test_a_bhsd_scan_stored_from_the_top_down_gets_its_rows_in_file_order(root, tmp_path):
    (case,) = RSNA(root).cases()
    volume, _ = scan.read(case.image)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0] * 5
    affine[:3, 0] *= -1
    turned = Volume(np.ascontiguousarray(volume.voxels[::-1]), affine, "")
    tree = bhsd_tree(tmp_path / "bhsd", turned, {case.id: None})
    groups, labels = dicom_series.find(root), rsna.read_table(root / "stage_2_train.csv")
    found = bhsd_slices.match(BHSD(tree), groups, labels)
    assert found.rows == {case.id: ROWS[::-1]}
