import json
from typing import NamedTuple

import pytest

from bhsd_jax.ct.integrity import checkup
from bhsd_jax.datasets import splits, splits_file
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.defects import Kind
from bhsd_jax.platform.errors import UserError

V1 = {
    "name": "Hippocampus",
    "licence": "CC-BY-SA 4.0",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "2": "Posterior", "1": "Anterior"},
}
V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "lesion": 2, "brain": 1},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}


def describe(folder, facts):
    (folder / "dataset.json").write_text(json.dumps(facts))


@pytest.fixture
def decathlon(tmp_path, touch):
    for id in ("h_10", "h_2"):
        touch(tmp_path / "imagesTr" / f"{id}.nii.gz")
        touch(tmp_path / "labelsTr" / f"{id}.nii.gz")
    touch(tmp_path / "imagesTs" / "h_7.nii.gz")
    listed = [{"image": f"./imagesTr/{id}.nii.gz", "label": ""} for id in ("h_2", "h_10")]
    describe(tmp_path, V1 | {"training": listed, "test": ["./imagesTs/h_7.nii.gz"]})
    return tmp_path


@pytest.fixture
def nnunet(tmp_path, touch):
    for id in ("b_2", "a_0001"):
        touch(tmp_path / "imagesTr" / f"{id}_0000.nii.gz")
        touch(tmp_path / "labelsTr" / f"{id}.nii.gz")
    touch(tmp_path / "imagesTr" / "._b_2_0000.nii.gz")
    describe(tmp_path, V2)
    return tmp_path


class Row(NamedTuple):
    id: str
    patient: str
    split: str
    has_label: bool
    bleeding: bool | None

    @classmethod
    def of(cls, case):
        return cls(case.id, case.patient, case.split, case.label is not None, case.bleeding)


def summary(dataset):
    return [(c.id, c.patient, c.split, c.label is not None) for c in dataset.cases()]


def test_a_decathlon_folder_gives_its_pairs_and_test_images_without_masks(decathlon):
    data = MSD(decathlon)
    assert summary(data) == [
        ("h_10", "h_10", "train", True),
        ("h_2", "h_2", "train", True),
        ("h_7", "h_7", "test", False),
    ]
    assert (data.name, data.license, data.modality) == ("Hippocampus", "CC-BY-SA 4.0", "mr")
    assert data.classes == ("background", "Anterior", "Posterior")
    for case in data.cases():
        assert case.image.is_file()
        assert case.label is None or case.label == decathlon / "labelsTr" / case.image.name


def test_an_nnunet_folder_drops_the_channel_suffix_and_hidden_files(nnunet):
    data = MSD(nnunet)
    assert summary(data) == [("a_0001", "a_0001", "train", True), ("b_2", "b_2", "train", True)]
    assert data.classes == ("background", "brain", "lesion")
    assert data.modality == "ct"
    assert data.name == nnunet.name


def test_an_nnunet_folder_may_call_its_channels_modality(nnunet):
    """nnU-Net's fingerprint and planners take either; a Decathlon file has no file_ending."""
    facts = {key: value for key, value in V2.items() if key != "channel_names"}
    describe(nnunet, facts | {"modality": {"0": "CT"}})
    assert [case.id for case in MSD(nnunet).cases()] == ["a_0001", "b_2"]
    assert MSD(nnunet).modality == "ct"


def test_cases_may_be_left_out_by_a_flag(decathlon):
    assert [case.id for case in MSD(decathlon, ignore="h_10, h_7").cases()] == ["h_2"]


def test_the_modality_follows_the_channel_name_unless_given(nnunet):
    describe(nnunet, V2 | {"channel_names": {"0": "T1"}})
    assert MSD(nnunet).modality == "mr"
    assert MSD(nnunet, modality="ct").modality == "ct"
    with pytest.raises(ValueError, match="auto, ct or mr"):
        MSD(nnunet, modality="pet")


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CT", "ct"),
        ("ct", "ct"),
        ("reconstructed T2", "mr"),
        ("SPECT", "mr"),
        ("CTA", "mr"),
        ("zscore", "mr"),
    ],
)
def test_a_channel_is_ct_by_its_whole_name(nnunet, name, modality):
    """As nnU-Net v2.8.1 maps names to normalizations: whole, in either case."""
    describe(nnunet, V2 | {"channel_names": {"0": name}})
    assert MSD(nnunet).modality == modality


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("noNorm", "NoNormalization"),
        ("rescale_to_0_1", "RescaleTo01Normalization"),
        ("rgb_to_0_1", "RGBTo01Normalization"),
    ],
)
def test_a_channel_may_ask_for_another_normalization(nnunet, name, scheme):
    describe(nnunet, V2 | {"channel_names": {"0": name}})
    assert (MSD(nnunet).modality, MSD(nnunet).channels) == ("mr", ((name, scheme),))
    assert MSD(nnunet, modality="mr").channels == (), "unless the user says what it is"
    assert MSD(nnunet).classes == ("background", "brain", "lesion")


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd"])
def test_a_folder_that_states_no_ending_has_that_of_its_files(tmp_path, touch, ending):
    """As MONAI and others read them: only nnU-Net v2 has the key `file_ending`."""
    for name in ("imagesTr/a", "labelsTr/a", "imagesTr/b", "labelsTr/b", "imagesTs/c"):
        touch(tmp_path / f"{name}{ending}")
    describe(tmp_path, V1)
    ids = [("a", "train"), ("b", "train"), ("c", "test")]
    assert [(case.id, case.split) for case in MSD(tmp_path).cases()] == ids
    listed = [{"image": f"./imagesTr/a{ending}", "label": f"./labelsTr/a{ending}"}]
    describe(tmp_path, V1 | {"training": listed})
    assert [(case.id, case.split) for case in MSD(tmp_path).cases()] == [ids[0], ids[2]]


def test_masks_of_test_images_are_used_where_there_are_any(decathlon, touch):
    touch(decathlon / "labelsTs" / "h_7.nii.gz")
    assert ("h_7", "h_7", "test", True) in summary(MSD(decathlon))


def test_only_listed_training_cases_are_taken(decathlon, touch):
    for folder in ("imagesTr", "labelsTr"):
        touch(decathlon / folder / "h_99.nii.gz")
    assert "h_99" not in [case.id for case in MSD(decathlon).cases()]


@pytest.mark.parametrize("tested", ["test", "testing"])
def test_monais_lists_of_validation_and_test_cases_count(decathlon, touch, tested):
    """Of `load_decathlon_datalist`, as in its BTCV tutorials: all images lie in imagesTr.

    Auto3DSeg and `nnUNetV2Runner` call the last list "testing".
    """
    for id in ("h_3", "h_4"):
        touch(decathlon / "imagesTr" / f"{id}.nii.gz")
        touch(decathlon / "labelsTr" / f"{id}.nii.gz")
    by_key = {"training": ("h_2", "h_10"), "validation": ("h_3",), tested: ("h_4",)}
    lists = {
        key: [{"image": f"imagesTr/{i}.nii.gz", "label": f"labelsTr/{i}.nii.gz"} for i in ids]
        for key, ids in by_key.items()
    }
    lists[tested] += ["imagesTs/h_7.nii.gz", "imagesTs/gone.nii.gz", {"input": "x"}]
    describe(decathlon, V1 | lists)
    found = MSD(decathlon)
    assert summary(found) == [
        ("h_10", "h_10", "train", True),
        ("h_2", "h_2", "train", True),
        ("h_3", "h_3", "val", True),
        ("h_4", "h_4", "test", True),
        ("h_7", "h_7", "test", False),
    ]
    roles, _ = splits.roles(list(map(Row.of, found.cases())), fold=0, labeled=None, seed=0)
    assert (roles.train, roles.val) == (("h_10", "h_2"), ("h_3",))
    describe(decathlon, V1 | lists | {"validation": lists["training"][:1]})
    with pytest.raises(ValueError, match="`validation` lists two images called h_2"):
        list(MSD(decathlon).cases())


def test_test_cases_that_also_train_or_validate_are_not_tested(decathlon, caplog):
    """Auto3DSeg predicts whatever "testing" lists, as once more the scans of a fold."""
    items = [
        {"image": f"imagesTr/{id}.nii.gz", "label": f"labelsTr/{id}.nii.gz"}
        for id in ("h_2", "h_10")
    ]
    describe(decathlon, V1 | {"training": items, "testing": [*items[:1], "imagesTs/h_7.nii.gz"]})
    assert summary(MSD(decathlon)) == [
        ("h_10", "h_10", "train", True),
        ("h_2", "h_2", "train", True),
        ("h_7", "h_7", "test", False),
    ]
    assert "imagesTr/h_2.nii.gz of the list of test cases" in caplog.text


def test_a_list_pairs_images_and_masks_of_other_names(tmp_path, touch):
    """As those of BTCV, img0035 and label0035; what no list names is still told to be alone."""
    ids = {"0035": "training", "0036": "validation", "0037": "test"}
    lists = {key: [] for key in ids.values()}
    for id, key in ids.items():
        item = {"image": f"imagesTr/img{id}.nii.gz", "label": f"labelsTr/label{id}.nii.gz"}
        lists[key].append(item)
        for name in item.values():
            touch(tmp_path / name)
    describe(tmp_path, V1 | lists)
    found = [(case.id, case.label.name, case.split) for case in MSD(tmp_path).cases()]
    assert found == [
        ("img0035", "label0035.nii.gz", "train"),
        ("img0036", "label0036.nii.gz", "val"),
        ("img0037", "label0037.nii.gz", "test"),
    ]
    touch(tmp_path / "labelsTr" / "label0038.nii.gz")
    with pytest.raises(ValueError, match=r"label0038 \(no image\)"):
        list(MSD(tmp_path).cases())


def test_a_list_pairs_test_images_and_masks_of_other_names(decathlon, touch):
    touch(decathlon / "labelsTs" / "label7.nii.gz")
    listed = [{"image": "imagesTs/h_7.nii.gz", "label": "labelsTs/label7.nii.gz"}]
    describe(decathlon, V1 | {"test": listed})
    (tested,) = [case for case in MSD(decathlon).cases() if case.split == "test"]
    assert (tested.id, tested.label.name) == ("h_7", "label7.nii.gz")


@pytest.mark.parametrize("root", ["", "./", "cases/train/"])
def test_cases_in_folders_of_their_own_are_called_by_them(tmp_path, touch, root):
    """As in data sets with a folder for each case, whose files all have one name."""
    listed = [
        {"image": f"{root}s{n}/ct.nii", "label": f"{root}s{n}/bleed.nii", "fold": n} for n in (1, 0)
    ]
    for item in listed:
        touch(tmp_path / item["image"])
        touch(tmp_path / item["label"])
    describe(tmp_path, V1 | {"training": listed})
    found = MSD(tmp_path)
    cases = [(case.id, case.image.parent.name, case.label.name) for case in found.cases()]
    assert cases == [("s0_ct", "s0", "bleed.nii"), ("s1_ct", "s1", "bleed.nii")]
    first, second = (("s0_ct",), ("s1_ct",))
    assert splits_file.beside(found, list(found.cases())) == ((second, first), (first, second))


def test_folds_that_monais_list_numbers_are_the_users(decathlon, touch):
    """Of Auto3DSeg: a case validates in the fold of its number; one without trains in all.

    A table that lacks a number has the others as floats.
    """
    numbers = {"h_2": 0, "h_10": 2.0, "h_3": "0", "h_4": None}
    listed = []
    for id, number in numbers.items():
        touch(decathlon / "imagesTr" / f"{id}.nii.gz")
        touch(decathlon / "labelsTr" / f"{id}.nii.gz")
        item = {"image": f"imagesTr/{id}.nii.gz", "label": [f"labelsTr/{id}.nii.gz"]}
        listed.append(item if number is None else item | {"fold": number})
    describe(decathlon, V1 | {"training": listed})
    found = MSD(decathlon)
    assert splits_file.beside(found, list(found.cases())) == (
        (("h_10", "h_4"), ("h_2", "h_3")),
        (("h_10", "h_2", "h_3", "h_4"), ()),
        (("h_2", "h_3", "h_4"), ("h_10",)),
    )
    own = folds(decathlon, [{"train": ["h_2"], "val": ["h_3"]}])
    assert own == ((("h_2",), ("h_3",)),)


def test_masks_lie_where_the_list_says(decathlon, touch):
    listed = []
    for id in ("h_2", "h_10"):
        touch(decathlon / "masks of a second rater" / f"{id}.nii.gz")
        label = f"./masks of a second rater/{id}.nii.gz"
        listed.append({"image": f"./imagesTr/{id}.nii.gz", "label": label})
    describe(decathlon, V1 | {"training": listed})
    masks = {case.id: case.label for case in MSD(decathlon).cases() if case.split == "train"}
    folder = decathlon / "masks of a second rater"
    assert masks == {id: folder / f"{id}.nii.gz" for id in ("h_2", "h_10")}
    (folder / "h_2.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=r"lists \./masks of a second rater/h_2.nii.gz, which is not"
    ):
        list(MSD(decathlon).cases())


@pytest.mark.parametrize("named", ["./imagesTr/{}.nii.gz", "imagesTr/{}_0000.nii.gz"])
def test_a_folder_of_nnunet_v1_is_known_by_its_files(nnunet, touch, named):
    """Its dataset.json is the Decathlon's, and its list may leave out the number of the channel."""
    listed = [
        {"image": named.format(id), "label": f"./labelsTr/{id}.nii.gz"} for id in ("a_0001", "b_2")
    ]
    touch(nnunet / "imagesTs" / "c_0000.nii.gz")
    both = ["./imagesTr/a_0001_0000.nii.gz", "./imagesTs/c_0000.nii.gz"]
    describe(nnunet, V1 | {"training": [{"image": both}]})
    with pytest.raises(ValueError, match=r"a_0001 has 2 files \(a_0001_.*the channels MRI;"):
        _ = [*MSD(nnunet).cases()]
    describe(nnunet, V1 | {"training": listed})
    images = {case.id: case.image.name for case in MSD(nnunet).cases()}
    assert images == {id: f"{id}_0000.nii.gz" for id in ("a_0001", "b_2", "c")}
    describe(nnunet, V1 | {"modality": {"0": "CT", "1": "PET"}, "training": listed})
    for id in ("a_0001", "b_2", "c"):
        touch(nnunet / ("imagesTs" if id == "c" else "imagesTr") / f"{id}_0001.nii.gz")
    assert [(case.id, len(case.image.files)) for case in MSD(nnunet).cases()] == [
        ("a_0001", 2),
        ("b_2", 2),
        ("c", 2),
    ]


def test_cases_that_nnunets_list_leaves_out_are_left_out(nnunet, touch, monkeypatch):
    elsewhere = nnunet.parent / "elsewhere"
    touch(elsewhere / "c.nii.gz")
    monkeypatch.setenv("MASKS", str(elsewhere))
    listed = {"b_2": {"images": ["imagesTr/b_2_0000.nii.gz"], "label": "$MASKS/c.nii.gz"}}
    describe(nnunet, V2 | {"dataset": listed})
    (case,) = MSD(nnunet).cases()
    assert (case.id, case.label) == ("b_2", elsewhere / "c.nii.gz")
    assert case.image == nnunet / "imagesTr" / "b_2_0000.nii.gz"
    listed["a_0001"] = {"images": ["a.nii.gz", "b.nii.gz"], "label": "c.nii.gz"}
    describe(nnunet, V2 | {"dataset": listed})
    with pytest.raises(ValueError, match="'a_0001' of `dataset` has 2 images"):
        list(MSD(nnunet).cases())
    assert [case.id for case in MSD(nnunet, ignore=("a_0001",)).cases()] == ["b_2"]


def test_images_lie_where_the_list_says(decathlon, touch, tmp_path, monkeypatch):
    """In another folder, at an absolute path, behind a variable; or as ever, by their names."""
    monkeypatch.setenv("SCANS", str(tmp_path / "scans"))
    for place in ("other/h_2.nii.gz", "scans/h_10.nii.gz", "far/h_3.nii.gz", "far/m_3.nii.gz"):
        touch(tmp_path / place)
    far = tmp_path / "far"
    listed = [
        {"image": "./other/h_2.nii.gz", "label": "./labelsTr/h_2.nii.gz"},
        {"image": "$SCANS/h_10.nii.gz"},
        {"image": str(far / "h_3.nii.gz"), "label": str(far / "m_3.nii.gz")},
    ]
    describe(decathlon, V1 | {"training": listed})
    found = {c.id: (c.image, c.label) for c in MSD(decathlon).cases() if c.split == "train"}
    labels = decathlon / "labelsTr"
    assert found == {
        "h_2": (decathlon / "other" / "h_2.nii.gz", labels / "h_2.nii.gz"),
        "h_10": (tmp_path / "scans" / "h_10.nii.gz", labels / "h_10.nii.gz"),
        "h_3": (far / "h_3.nii.gz", far / "m_3.nii.gz"),
    }
    describe(decathlon, V1 | {"training": [*listed, {"image": "./imagesTr/h_2.nii.gz"}]})
    with pytest.raises(ValueError, match="lists two images called h_2"):
        list(MSD(decathlon).cases())


def test_nnunets_list_stands_above_the_decathlons(nnunet, touch):
    far = nnunet / "far" / "x.nii.gz"
    touch(far)
    described = {"b_2": {"images": [str(far)], "label": "labelsTr/b_2.nii.gz"}}
    listed = [{"image": "./imagesTr/a_0001.nii.gz", "label": "./labelsTr/a_0001.nii.gz"}]
    describe(nnunet, V2 | {"training": listed})
    assert [(c.id, c.image.name) for c in MSD(nnunet).cases()] == [("a_0001", "a_0001_0000.nii.gz")]
    describe(nnunet, V2 | {"training": listed, "dataset": described})
    assert [(c.id, c.image) for c in MSD(nnunet).cases()] == [("b_2", far)]


@pytest.mark.parametrize(
    "entry", [[], {"b_2": []}, {"b_2": {"images": "b_2.nii.gz", "label": "x"}}, {"b_2": {}}]
)
def test_a_list_of_another_shape_is_refused_by_name(nnunet, entry):
    describe(nnunet, V2 | {"dataset": entry})
    with pytest.raises(ValueError, match=r"dataset\.json: .*`dataset`"):
        list(MSD(nnunet).cases())


@pytest.mark.parametrize(("folder", "lack"), [("imagesTr", "mask"), ("labelsTr", "image")])
def test_a_file_without_partner_is_an_error_unless_ignored(decathlon, touch, folder, lack):
    touch(decathlon / folder / "h_118.nii.gz")
    with pytest.raises(ValueError, match=rf"h_118 \(no {lack}\).*data\.ignore"):
        list(MSD(decathlon).cases())
    assert len(list(MSD(decathlon, ignore=("h_118",)).cases())) == 3


def test_a_listed_case_that_is_not_there_is_an_error_unless_ignored(decathlon):
    for folder in ("imagesTr", "labelsTr"):
        (decathlon / folder / "h_2.nii.gz").unlink()
    with pytest.raises(ValueError, match="lists h_2, not in imagesTr"):
        list(MSD(decathlon).cases())
    assert len(list(MSD(decathlon, ignore=("h_2",)).cases())) == 2


def test_every_channel_has_a_file_of_its_own(nnunet, touch):
    touch(nnunet / "imagesTr" / "b_2_0001.nii.gz")
    with pytest.raises(ValueError, match=r"b_2_0001\.nii\.gz: expected <case>_0000"):
        list(MSD(nnunet).cases())
    describe(nnunet, V2 | {"channel_names": {"0": "FLAIR", "1": "CT", "2": "T1"}})
    assert MSD(nnunet).modality == "mr", "normalized before it is resampled"
    assert MSD(nnunet).channels == (
        ("FLAIR", "ZScoreNormalization"),
        ("CT", "CTNormalization"),
        ("T1", "ZScoreNormalization"),
    )
    with pytest.raises(ValueError, match=r"b_2 has 2 files \(b_2_0000.*names the channels"):
        list(MSD(nnunet).cases())
    touch(nnunet / "imagesTr" / "b_2_0002.nii.gz")
    one, two = MSD(nnunet).cases()
    names = [f"b_2_000{number}.nii.gz" for number in range(3)]
    assert [path.name for path in two.image.files] == names
    assert (len(one.image.files), one.image.count) == (1, 3), "along the fourth axis of its file"
    facts = V2 | {"channel_names": {"0": "FLAIR", "1": "CT", "2": "T1"}}
    for place in ("./imagesTr", str(nnunet / "labelsTr" / ".." / "imagesTr")):
        image = f"{place}/b_2_0000.nii.gz"
        describe(nnunet, facts | {"training": [{"image": image}]})
        (listed,) = MSD(nnunet).cases()
        assert listed == two, "one channel of it stands for the scan"
    describe(nnunet, facts | {"training": [{"image": [f"imagesTr/{name}" for name in names]}]})
    assert list(MSD(nnunet).cases()) == [two]
    touch(nnunet / "all" / "b_2.nii.gz")
    describe(nnunet, facts | {"training": [{"image": "./all/b_2.nii.gz"}]})
    (listed,) = MSD(nnunet).cases()
    assert listed.image.files == (nnunet / "all" / "b_2.nii.gz",), "but for one elsewhere"
    describe(nnunet, facts)
    touch(nnunet / "imagesTr" / "b_2_0003.nii.gz")
    with pytest.raises(ValueError, match=r"_0000\.nii\.gz, to _0002, the"):
        list(MSD(nnunet).cases())
    with pytest.raises(ValueError, match=r"leave data\.modality out"):
        MSD(nnunet, modality="ct")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "a": 2}, "without gaps"),
        ({"background": 0, "a": 1, "ignore": 3}, "the value after the highest, 2"),
        ({"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order"),
        ({"background": 0, "whole": [1, "x"]}, "or lists of them"),
        ({"background": 0} | {f"c{n}": n for n in range(1, 257)}, "go up to 255"),
        ({}, "without gaps"),
    ],
)
def test_labels_that_nnunet_would_not_take_are_refused(nnunet, labels, message):
    describe(nnunet, V2 | {"labels": labels})
    with pytest.raises(ValueError, match=message):
        _ = MSD(nnunet).classes


def test_missing_descriptions_and_images_say_where_to_point(tmp_path, nnunet):
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        MSD(tmp_path / "nowhere")
    describe(nnunet, V2 | {"file_ending": ".nii"})
    with pytest.raises(FileNotFoundError, match=r"no images that end in \.nii"):
        list(MSD(nnunet).cases())
    (nnunet / "imagesTr").rename(nnunet / "gt_segmentations")
    with pytest.raises(FileNotFoundError, match="folder of nnUNet_preprocessed: name that of nnU"):
        list(MSD(nnunet).cases())
    (nnunet / "dataset.json").rename(nnunet / "dataset_0.json")
    with pytest.raises(FileNotFoundError, match=r"list of cases \(dataset_0\.json\?\)"):
        MSD(nnunet)
    describe(nnunet, V2 | {"file_ending": ".npy"})
    with pytest.raises(ValueError, match="only NIfTI"):
        list(MSD(nnunet).cases())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": {"background": 0},}', "is no JSON"),
        ('{"labels": {"backgr', "is no JSON"),
        ("[]", r"expected \{"),
        ('{"channel_names": {"0": "CT"}, "training": 3}', "`training` is a list"),
        ('{"channel_names": ["CT"]}', r"channel_names is \{.*; got \['CT'\]"),
        ('{"channel_names": {"0": "CT"}, "labels": ["a"]}', r"labels is \{.*; got \['a'\]"),
    ],
)
def test_a_description_with_a_typing_error_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=rf"dataset\.json: .*{message}"):
        _ = MSD(tmp_path).classes


def test_channels_may_be_written_as_labels_are(nnunet):
    """The two run opposite ways in nnU-Net's file: {"0": "CT"}, but {"lesion": 1}."""
    for number in (0, "0"):
        describe(nnunet, V2 | {"channel_names": {"CT": number}})
        assert (MSD(nnunet).modality, MSD(nnunet).channels) == ("ct", ())
    describe(nnunet, V2 | {"channel_names": {"CT": 1, "T2": 0}})
    assert [name for name, _ in MSD(nnunet).channels] == ["T2", "CT"]
    describe(nnunet, V2 | {"channel_names": {"0": "0", "1": "1"}})
    assert [name for name, _ in MSD(nnunet).channels] == ["0", "1"]


def test_channels_that_have_no_numbers_keep_their_order(nnunet):
    """nnU-Net 2.8.1 takes them as they are listed."""
    describe(nnunet, V2 | {"channel_names": {"channel_0": "CT"}})
    assert MSD(nnunet).modality == "ct"
    describe(nnunet, V2 | {"channel_names": {"b": "T2", "a": "T1"}})
    assert [name for name, _ in MSD(nnunet).channels] == ["T2", "T1"]
    many = {str(number): f"c{number}" for number in reversed(range(11))}
    describe(nnunet, V2 | {"channel_names": many})
    assert [name for name, _ in MSD(nnunet).channels] == [f"c{number}" for number in range(11)]


def test_another_number_of_training_cases_than_stated_is_told(nnunet, touch):
    """nnU-Net's verify_dataset_integrity stops there: a copy may have ended early."""

    def told(dataset):
        return [(one.kind, one.done) for one in checkup.survey(dataset).findings]

    odd = [(Kind.LIST_COUNT, "kept")]
    assert told(MSD(nnunet)) == []
    for stated, want in ((5, odd), (1, odd), ("5", []), (None, [])):
        describe(nnunet, V2 | {"numTraining": stated})
        assert told(MSD(nnunet)) == want
    describe(nnunet, V2 | {"numTraining": 5})
    (finding,) = MSD(nnunet).survey().findings
    assert "numTraining is 5, and there are 2 training cases" in finding.text
    assert told(MSD(nnunet, ignore=("c", "d", "e"))) == []
    touch(nnunet / "imagesTr" / "c_0000.nii.gz")
    touch(nnunet / "labelsTr" / "c.nii.gz")
    listed = [{"image": f"./imagesTr/{id}.nii.gz"} for id in ("a_0001", "b_2")]
    for stated, want in ((1, odd), (2, []), (3, []), (4, odd)):
        describe(nnunet, V2 | {"numTraining": stated, "training": listed})
        assert told(MSD(nnunet)) == want


def test_one_id_in_training_and_test_is_refused(decathlon, touch):
    touch(decathlon / "imagesTs" / "h_2.nii.gz")
    with pytest.raises(ValueError, match="h_2 in imagesTr and imagesTs"):
        list(MSD(decathlon).cases())


def folds(root, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "splits_final.json").write_text(text)
    data = MSD(root)
    return splits_file.beside(data, list(data.cases()))


def test_folds_beside_the_data_set_are_the_users(nnunet, tmp_path):
    data = MSD(nnunet)
    assert splits_file.beside(data, list(data.cases())) == ()
    given = [
        {"train": ["b_2"], "val": ["a_0001"]},
        {"train": ["a_0001", "b_2"], "val": []},
        {"train": ["a_0001"], "val": ["b_2"]},
    ]
    found = folds(nnunet, given)
    assert found == (
        (("b_2",), ("a_0001",)),
        (("a_0001", "b_2"), ()),
        (("a_0001",), ("b_2",)),
    )
    shards = tmp_path / "shards"
    shards.mkdir()
    splits_file.keep(shards, found)
    assert splits_file.load(shards / splits_file.NAME) == found
    splits_file.keep(shards, ())
    assert splits_file.load(shards / splits_file.NAME) == ()
    ignoring = MSD(nnunet, ignore=("a_0001",))
    assert splits_file.beside(ignoring, list(ignoring.cases()))[0] == (("b_2",), ())


def test_folds_beside_nnunets_plan_are_taken_where_they_are_of_the_data_set(
    nnunet, tmp_path, caplog
):
    """nnU-Net keeps both in the folder of a data set in nnUNet_preprocessed."""
    plan = tmp_path / "preprocessed" / "nnUNetPlans.json"
    plan.parent.mkdir()
    kept = plan.with_name(splits_file.NAME)
    kept.write_text(json.dumps([{"train": ["b_2"], "val": ["a_0001"]}]))
    data = MSD(nnunet)
    cases = list(data.cases())
    assert splits_file.beside(data, cases) == ()
    assert splits_file.beside(data, cases, plan) == ((("b_2",), ("a_0001",)),)
    kept.write_text(json.dumps([{"train": ["c_1"], "val": ["c_2"]}]))
    assert splits_file.beside(data, cases, plan) == ()
    assert "splits_final.json: is of another data set (c_1, c_2)" in caplog.text
    assert folds(nnunet, [{"train": ["a_0001"], "val": ["b_2"]}]) == ((("a_0001",), ("b_2",)),)
    assert splits_file.beside(data, cases, plan) == ((("a_0001",), ("b_2",)),)


def test_folds_of_nnunets_first_version_are_told_to_be_unread(nnunet, touch):
    touch(nnunet / "splits_final.pkl")
    (found,) = MSD(nnunet).survey().findings
    assert (found.kind, found.done) == (Kind.FOLDS_UNREAD, "kept")
    assert "splits_final.pkl: is not read" in found.text
    folds(nnunet, [{"train": ["b_2"], "val": ["a_0001"]}])
    assert MSD(nnunet).survey().findings == ()


def test_folds_are_offered_to_nnunet_where_the_layout_is_its_own(nnunet, tmp_path):
    patients = {f"c_{i}": f"c_{i}" for i in range(12)}
    path = tmp_path / splits_file.NAME
    splits_file.offer(tmp_path, MSD(nnunet), (), patients)
    assert splits_file.load(path) == tuple(splits.kfold(patients))
    own = ((("a",), ("b",)),)
    splits_file.offer(tmp_path, MSD(nnunet), own, patients)
    assert splits_file.load(path) == own
    splits_file.offer(tmp_path, MSD(nnunet), (), {"c_1": "c_1"})
    assert not path.exists()
    splits_file.offer(tmp_path, object(), own, patients)
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["b_2", "c_9"], "val": ["a_0001"]}], "fold 0 names c_9, no training case"),
        ([{"train": ["b_2"], "val": []}, {"train": ["b_2"], "val": ["d"]}], "fold 1 names d, no"),
        ([{"train": ["b_2"], "val": ["b_2"]}], "fold 0: names b_2 twice"),
        ([{"train": [], "val": ["b_2"]}], "fold 0: 'train' is empty"),
        ([{"train": ["b_2"]}], "fold 0: expected a list with one"),
        ([{"train": "b_2", "val": []}], "fold 0: 'train' is a list of case names"),
        ([], "expected a list with one"),
        ({"train": ["b_2"], "val": ["a_0001"]}, "expected a list with one"),
        ("[", "is no JSON"),
    ],
)
def test_folds_that_cannot_be_are_refused(nnunet, content, message):
    with pytest.raises(ValueError, match=rf"splits_final\.json: .*{message}"):
        folds(nnunet, content)


def test_a_test_image_is_no_case_of_a_fold(decathlon):
    with pytest.raises(ValueError, match="fold 0 names h_7, no training case"):
        folds(decathlon, [{"train": ["h_2"], "val": ["h_7"]}])
