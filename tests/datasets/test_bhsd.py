import json

import pytest

from bhsd_jax.datasets.bhsd import BHSD

OFFICIAL = "dataset.json"


@pytest.fixture
def tree(tmp_path, studies, touch):
    """The archives unpacked: the space in the mask folder, lists of paths that do not exist."""
    for id in (*studies["train"], *studies["test"]):
        touch(tmp_path / "label_192" / "images" / f"{id}.nii.gz")
        touch(tmp_path / "label_192" / "ground truths" / f"{id}.nii.gz")
    for id in studies["any"]:
        touch(tmp_path / "unlabel_2000" / "anybleed" / f"{id}.nii.gz")
    for id in studies["no"]:
        touch(tmp_path / "unlabel_2000" / "nobleed" / f"{id}.nii.gz")
    lists = {
        "training": [
            {"image": f"./imagesTr/{id}.nii.gz", "label": f"./labelsTr/{id}.nii.gz"}
            for id in studies["train"]
        ],
        "test": [f"./imagesTs/{id}.nii.gz" for id in studies["test"]],
    }
    (tmp_path / OFFICIAL).write_text(json.dumps(lists))
    return tmp_path


def summary(tree, **arguments):
    return [
        (c.id, c.split, c.bleeding, c.label is not None) for c in BHSD(tree, **arguments).cases()
    ]


def expected(studies):
    return sorted(
        [(id, "train", None, True) for id in studies["train"]]
        + [(id, "test", None, True) for id in studies["test"]]
        + [(id, "unlabeled", True, False) for id in studies["any"]]
        + [(id, "unlabeled", False, False) for id in studies["no"]]
    )


def test_cases_are_matched_by_base_name_and_sorted(tree, studies):
    assert summary(tree) == expected(studies)
    for case in BHSD(tree).cases():
        assert case.image.is_file()
        assert case.label is None or (case.label.is_file() and case.label.name == case.image.name)
        assert case.patient == case.id[:11]


def test_classes_are_in_the_order_of_the_masks():
    assert BHSD("").classes == ("background", "EDH", "IPH", "IVH", "SAH", "SDH")


@pytest.mark.parametrize("name", ["ground_truths", "labelsTr", "masks"])
def test_mask_folders_of_other_copies_are_found(tree, studies, name):
    (tree / "label_192" / "ground truths").rename(tree / "label_192" / name)
    assert summary(tree) == expected(studies)


def test_any_mask_folder_can_be_named(tree, studies):
    (tree / "label_192" / "ground truths").rename(tree / "mine")
    assert summary(tree, label_dir="mine") == expected(studies)
    assert summary(tree, label_dir=tree / "mine") == expected(studies)


@pytest.mark.parametrize("base", [".", "MBH_train_label", "label_200"])
def test_folders_in_the_words_of_nnunet_are_found_at_the_top_or_one_below(tree, studies, base):
    (tree / base).mkdir(exist_ok=True)
    (tree / "label_192" / "images").rename(tree / base / "imagesTr")
    (tree / "label_192" / "ground truths").rename(tree / base / "labelsTr")
    (tree / "label_192").rmdir()
    assert summary(tree) == expected(studies)


def test_files_that_lost_their_suffix_count_and_others_do_not(tree, studies):
    for folder in ("label_192/images", "label_192/ground truths", "unlabel_2000/anybleed"):
        for path in list((tree / folder).iterdir()):
            path.rename(path.with_name(path.name.removesuffix(".nii.gz")))
        (tree / folder / "notes").write_text("not a scan")
        (tree / folder / "list.csv").write_text("case")
        (tree / folder / f"._{studies['train'][0]}.nii.gz").write_bytes(b"\x1f\x8b")
    assert summary(tree) == expected(studies)


def test_slice_labels_are_read_in_slice_order_with_gaps_unknown(tree, studies):
    first, _ = studies["any"]
    (tree / "slice_labels.csv").write_text(
        "case,slice,any,EDH,IPH,IVH,SAH,SDH\n"
        f"{first},3,1,0,1,0,0,\n"
        f"{first}.nii.gz,0,0,,,,,\n"
        f"{first},1,1,,,,,\n"
    )
    found = {case.id: case.slice_labels for case in BHSD(tree).cases()}
    unknown = (-1,) * 5
    assert found.pop(first) == ((0,) * 5, unknown, unknown, (0, 1, 0, 0, -1))
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [("name,slice\na,0\n", "no column case"), ("case,slice,EDH\na,0,2\n", "line 2: expected 0, 1")],
)
def test_slice_labels_that_make_no_sense_are_refused(tree, text, message):
    (tree / "slice_labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(BHSD(tree).cases())


def test_a_tree_without_masks_without_lists_or_without_anything_says_what_to_do(tree, tmp_path):
    (tree / OFFICIAL).rename(tree / "away.json")
    with pytest.raises(FileNotFoundError, match="official training and test lists"):
        list(BHSD(tree).cases())
    (tree / "label_192" / "ground truths").rename(tree / "away")
    with pytest.raises(FileNotFoundError, match=r"no masks for these images.*'ground truths'"):
        list(BHSD(tree).cases())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="label_192/images"):
        list(BHSD(tmp_path / "empty").cases())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(BHSD(tmp_path / "nowhere").cases())


def test_an_image_without_mask_is_named(tree, studies):
    (tree / "label_192" / "ground truths" / f"{studies['test'][0]}.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"no mask for {studies['test'][0]}; copy it there"):
        list(BHSD(tree).cases())


def test_a_listed_case_that_is_missing_is_an_error_unless_allowed(tree, studies):
    lost = studies["train"][0]
    for folder in ("images", "ground truths"):
        (tree / "label_192" / folder / f"{lost}.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"no image for {lost}.*allow_missing"):
        list(BHSD(tree).cases())
    assert summary(tree, allow_missing=True) == [row for row in expected(studies) if row[0] != lost]


def test_an_image_no_list_names_is_an_error(tree, touch):
    for folder in ("images", "ground truths"):
        touch(tree / "label_192" / folder / "ID_0e000001_ID_00000000e1.nii.gz")
    with pytest.raises(ValueError, match=r"not in dataset\.json: ID_0e000001"):
        list(BHSD(tree).cases())


def test_a_patient_in_training_and_test_is_refused(tree, studies, touch):
    second = studies["test"][0][:11] + "_ID_00000000b9"
    touch(tree / "unlabel_2000" / "anybleed" / f"{second}.nii.gz")
    with pytest.raises(ValueError, match="one patient, ID_0b000001"):
        list(BHSD(tree).cases())


def test_one_scan_in_two_folders_or_in_both_lists_is_refused(tree, studies, touch):
    twice = studies["any"][0]
    touch(tree / "unlabel_2000" / "nobleed" / f"{twice}.nii.gz")
    with pytest.raises(ValueError, match=f"{twice} lies in two folders"):
        list(BHSD(tree).cases())
    lists = json.loads((tree / OFFICIAL).read_text())
    lists["test"].append(lists["training"][0])
    (tree / OFFICIAL).write_text(json.dumps(lists))
    with pytest.raises(ValueError, match="is in 'training' and in 'test'"):
        list(BHSD(tree).cases())
