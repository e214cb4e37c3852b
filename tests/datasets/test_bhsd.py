import gzip
import json
import os

import pytest

from bhsd_jax.datasets.bhsd import BHSD, scans
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import SOME

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
        [(id, "train", True, True) for id in studies["train"]]
        + [(id, "test", True, True) for id in studies["test"]]
        + [(id, "unlabeled", True, False) for id in studies["any"]]
        + [(id, "unlabeled", False, False) for id in studies["no"]]
    )


def findings(tree, **arguments):
    """Case, kind and outcome of all that is neither the layout of every copy nor small change."""
    usual = ("dead paths", "space in", "folder that holds")
    found = BHSD(tree, **arguments).survey().findings
    return [(f.case, f.kind, f.done) for f in found if not f.kind.startswith(usual)]


def text_of(tree, case, **arguments):
    return next(f.text for f in BHSD(tree, **arguments).survey().findings if f.case == case)


def without(studies, *gone):
    return [row for row in expected(studies) if row[0] not in gone]


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
    assert findings(tree, label_dir="mine") == []
    assert summary(tree, label_dir=tree / "mine") == expected(studies)


@pytest.mark.parametrize("base", [".", "MBH_train_label", "label_200"])
def test_folders_in_the_words_of_nnunet_are_found_at_the_top_or_one_below(tree, studies, base):
    (tree / base).mkdir(exist_ok=True)
    (tree / "label_192" / "images").rename(tree / base / "imagesTr")
    (tree / "label_192" / "ground truths").rename(tree / base / "labelsTr")
    (tree / "label_192").rmdir()
    assert summary(tree) == expected(studies)


def test_a_copy_with_nnunets_numbers_of_channels_is_the_same(tree, studies):
    before = summary(tree)
    for path in (tree / "label_192" / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    assert summary(tree) == before == expected(studies)


def test_files_that_lost_their_suffix_count_and_others_do_not(tree, studies):
    for folder in ("label_192/images", "label_192/ground truths", "unlabel_2000/anybleed"):
        for path in list((tree / folder).iterdir()):
            path.rename(path.with_name(path.name.removesuffix(".nii.gz")))
        (tree / folder / "notes").write_text("not a scan")
        (tree / folder / "list.csv").write_text("case")
        for other in ("a.img", "a.raw", "a.png", "a.tar.gz", "a.json"):
            (tree / folder / other).write_bytes(b"\x1f\x8b")
        (tree / folder / "a.mha").mkdir()
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
    rows = ((0,) * 5, (SOME,) * 5, (-1,) * 5, (0, 1, 0, 0, -1))
    assert found.pop(first) == rows
    assert set(found.values()) == {None}


def test_slice_labels_of_a_spreadsheet_say_what_they_say(tree, studies):
    """0.0 in `any` lacks all classes, as 0 does."""
    first, _ = studies["any"]
    (tree / "slice_labels.csv").write_text(
        f"case;slice;any;EDH;IPH;IVH;SAH;SDH\n{first};0;0.0;;;;;\n{first};1;1,0;0.0;1.0;0;0;0\n"
    )
    found = {case.id: case.slice_labels for case in BHSD(tree).cases()}
    assert found[first] == ((0,) * 5, (0, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("head", "lines", "rows"),
    [
        ("Case,Slice,Any,edh,iph,ivh,sah,sdh", ["0,1,0,1,0,0,0"], [(0, 1, 0, 0, 0)]),
        (
            "case,slice,subdural,epidural,subarachnoid,Intraventricular,Intraparenchymal",
            ["0,1,0,0,0,0"],
            [(0, 0, 0, 0, 1)],
        ),
        ("case,slice,any", ["0,FALSE", "1,True"], [(0,) * 5, (SOME,) * 5]),
        ("case,slice,EDH,IPH", ["0,NA,1", "1,nan,0"], [(-1, 1, -1, -1, -1), (-1, 0, -1, -1, -1)]),
        ("case,slice,any,EDH", ["0,1,0"], [(0, SOME, SOME, SOME, SOME)]),
    ],
)
def test_slice_labels_in_other_words_say_the_same(tree, studies, head, lines, rows):
    """Names of RSNA and in small letters, pandas' booleans, what R writes, and `any` alone."""
    first, _ = studies["any"]
    text = "".join(f"{first},{line}\n" for line in lines)
    (tree / "slice_labels.csv").write_text(f"{head}\n{text}")
    found = {case.id: case.slice_labels for case in BHSD(tree).cases()}
    assert found[first] == tuple(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,slice,EDH\na,0,0\na,0,1\n", "line 3: contradicts an earlier line"),
        ("name,slice\na,0\n", "no column case"),
        ("case,slice,EDH\na,0,2\n", "line 2: expected 0, 1"),
        ("case,slice,any\na,1000000000,0\n", "line 2: .*below 10000"),
        ("case,slice,any,EDH\na,0,0,1\n", "line 2: any is 0, and of the classes EDH, .* one is 1"),
        ("case,slice,any,EDH,IPH,IVH,SAH,SDH\na,0,1,0,0,0,0,0\n", "any is 1, .* none is; correct"),
        ("case,slice,bleed\na,0,1\n", "no column says what a slice shows; .* got case, slice, bl"),
        ("case,slice,EDH,epidural\na,0,1,0\n", "columns EDH and epidural are one"),
        ("case,slice,EDH\na,0,x\n", "line 2: expected 0, 1"),
    ],
)
def test_slice_labels_that_make_no_sense_are_refused(tree, text, message):
    (tree / "slice_labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(BHSD(tree).cases())


def test_a_table_of_scans_that_contradicts_their_folder_refuses_those_alone(tree, studies):
    first, second = studies["any"]
    (none,) = studies["no"]
    (tree / "scan_labels.csv").write_text(f"scan,any,IPH\n{first},0,\n{second},1,0\n{none},0,0\n")
    found = BHSD(tree).survey()
    known = {case.id: (case.bleeding, case.absent) for case in found.cases}
    assert first not in known
    assert (known[second], known[none]) == ((True, (2,)), (False, (1, 2, 3, 4, 5)))
    (finding,) = [f for f in found.findings if f.case == first]
    assert (finding.kind, finding.done) == (Kind.BLEEDS_AND_NOT, "refused")
    assert "is known to bleed, as by the folder it lies in" in finding.text


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


def test_what_every_copy_has_is_said_and_handled(tree):
    found = {(f.kind, f.done): f.text for f in BHSD(tree).survey().findings}
    assert set(found) == {
        ("dead paths in dataset.json", "repaired"),
        ("space in a folder's name", "repaired"),
        ("folder that holds another number than its name says", "kept"),
    }
    assert (
        "3 paths such as ./imagesTr/ID_0a000001" in found["dead paths in dataset.json", "repaired"]
    )
    held = [f.text for f in BHSD(tree).survey().findings if f.done == "kept"]
    assert [text.partition(": ")[2].split(";")[0] for text in held] == [
        "holds 3 scans",
        "holds 3 scans",
    ]


def test_a_folder_of_scans_that_is_not_used_is_named(tree, studies, touch):
    for name in ("a", "b"):
        touch(tree / "FirstStage_test" / f"{name}.nii.gz")
    (tree / "notes").mkdir()
    assert findings(tree) == [("", "folder that is not used", "kept")]
    assert "FirstStage_test: 2 scans" in BHSD(tree).survey().findings[-1].text
    assert summary(tree) == expected(studies)


def test_an_image_without_mask_is_refused_alone(tree, studies):
    lost = studies["test"][0]
    (tree / "label_192" / "ground truths" / f"{lost}.nii.gz").unlink()
    assert findings(tree) == [(lost, "mask that is not there", "refused")]
    assert f"no mask for {lost}; copy it there" in text_of(tree, lost)
    assert summary(tree) == without(studies, lost)


def test_a_listed_case_that_is_missing_is_refused_unless_allowed(tree, studies):
    lost = studies["train"][0]
    for folder in ("images", "ground truths"):
        (tree / "label_192" / folder / f"{lost}.nii.gz").unlink()
    assert findings(tree) == [(lost, "image that is not there", "refused")]
    assert "allow_missing=True" in text_of(tree, lost)
    assert findings(tree, allow_missing=True) == [(lost, "image that is not there", "kept")]
    assert summary(tree, allow_missing=True) == summary(tree) == without(studies, lost)


def test_a_mask_without_image_is_a_missing_image(tree, studies):
    lost = studies["train"][0]
    (tree / "label_192" / "images" / f"{lost}.nii.gz").unlink()
    assert findings(tree) == [(lost, "image that is not there", "refused")]


def test_an_image_no_list_names_is_refused_alone(tree, studies, touch):
    stray = "ID_0e000001_ID_00000000e1"
    for folder in ("images", "ground truths"):
        touch(tree / "label_192" / folder / f"{stray}.nii.gz")
    assert findings(tree) == [(stray, "in no official list", "refused")]
    assert "add it to 'training' or 'test'" in text_of(tree, stray)
    assert summary(tree) == expected(studies)


def test_an_unlabeled_scan_of_a_test_patient_leaves_the_pool(tree, studies, touch):
    second = studies["test"][0][:11] + "_ID_00000000b9"
    touch(tree / "unlabel_2000" / "anybleed" / f"{second}.nii.gz")
    assert findings(tree) == [(second, "unlabeled scan of a test patient", "repaired")]
    assert summary(tree) == expected(studies)


def test_a_training_scan_of_a_test_patient_is_refused(tree, studies, touch):
    second = studies["test"][0][:11] + "_ID_00000000b9"
    for folder in ("images", "ground truths"):
        touch(tree / "label_192" / folder / f"{second}.nii.gz")
    lists = json.loads((tree / OFFICIAL).read_text())
    lists["training"].append({"image": f"{second}.nii.gz"})
    (tree / OFFICIAL).write_text(json.dumps(lists))
    assert findings(tree) == [(second, "training scan of a tested one", "refused")]
    assert summary(tree) == expected(studies)


def test_a_patient_scanned_twice_is_named_and_keeps_both_scans(tree, studies, touch):
    second = studies["train"][0][:11] + "_ID_00000000f9"
    for folder in ("images", "ground truths"):
        touch(tree / "label_192" / folder / f"{second}.nii.gz")
    lists = json.loads((tree / OFFICIAL).read_text())
    lists["training"].append({"image": f"{second}.nii.gz"})
    (tree / OFFICIAL).write_text(json.dumps(lists))
    assert findings(tree) == [(second, "patient scanned twice", "repaired")]
    patients = {case.id: case.patient for case in BHSD(tree).cases()}
    assert patients[second] == patients[studies["train"][0]]


@pytest.mark.parametrize("place", [".", "unlabelled", "Unlabel-1980", "unlabel_2000/unlabel_2000"])
def test_the_pool_is_known_by_its_two_folders(tree, studies, place):
    """Under any name, or unpacked into a folder of its own; it went without a word."""
    (tree / "unlabel_2000").rename(tree / "away")
    (tree / place).mkdir(parents=True, exist_ok=True)
    for name in ("anybleed", "nobleed"):
        (tree / "away" / name).rename(tree / place / name)
    assert summary(tree) == expected(studies)
    kinds = [f.kind for f in BHSD(tree).survey().findings]
    assert kinds.count(Kind.FOLDER_COUNT) == (1 + place.startswith("unlabel_"))


def test_labeled_scans_unpacked_into_a_folder_of_their_own_are_found(tree, studies):
    (tree / "label_192").rename(tree / "away")
    (tree / "label_192").mkdir()
    (tree / "away").rename(tree / "label_192" / "label_192")
    assert summary(tree) == expected(studies)


def test_a_scan_in_two_folders_keeps_its_better_place_or_is_refused(tree, studies, touch):
    labeled, torn = studies["train"][0], studies["any"][0]
    for path in (f"anybleed/{labeled}.nii.gz", f"nobleed/{torn}.nii.gz"):
        touch(tree / "unlabel_2000" / path)
    touch(tree / "unlabel_again" / "anybleed" / f"{studies['any'][1]}.nii.gz")
    assert sorted(findings(tree)) == sorted(
        [
            (labeled, "labeled scan in the pool", "repaired"),
            (torn, "scan that bleeds and does not", "refused"),
            (studies["any"][1], "one scan in two folders", "repaired"),
        ]
    )
    assert summary(tree) == without(studies, torn)


def test_a_scan_in_both_lists_is_refused_alone(tree, studies):
    lists = json.loads((tree / OFFICIAL).read_text())
    lists["test"].append(lists["training"][0])
    (tree / OFFICIAL).write_text(json.dumps(lists))
    both = studies["train"][0]
    assert findings(tree) == [(both, "in both official lists", "refused")]
    assert "'training' and in 'test'" in text_of(tree, both)
    assert summary(tree) == without(studies, both)


def test_two_files_of_one_name_are_one_scan_if_they_are_equal(tree, studies):
    equal, other = studies["any"]
    folder = tree / "unlabel_2000" / "anybleed"
    for id in (equal, other):
        (folder / id).write_bytes((folder / f"{id}.nii.gz").read_bytes())
    with (folder / other).open("ab") as file:
        file.write(b"more")
    found = findings(tree)
    assert (equal, "one scan in two files", "repaired") in found
    assert (other, "two scans of one name", "refused") in found
    assert summary(tree) == without(studies, other)


def test_a_scan_and_its_unpacked_copy_are_one(tmp_path):
    """As `gunzip --keep` leaves them; one that is damaged is equal to none."""
    whole = gzip.compress(b"voxels" * 100)
    (tmp_path / "a.nii.gz").write_bytes(whole)
    (tmp_path / "a.nii").write_bytes(b"voxels" * 100)
    assert [path.name for path in scans(tmp_path).values()] == ["a.nii"]
    (tmp_path / "a.nii.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"a\.nii and a\.nii\.gz are one case but differ"):
        scans(tmp_path)


def test_links_in_a_circle_pipes_and_names_with_control_characters_are_refused(tree, studies):
    folder = tree / "unlabel_2000" / "anybleed"
    circle, gone = folder / "ID_0e000001_ID_01.nii.gz", folder / "ID_0e000002_ID_02.nii.gz"
    circle.symlink_to(circle.name)
    gone.symlink_to(tree / "nowhere")
    os.mkfifo(folder / "ID_0e000003_ID_03.nii.gz")
    (folder / "ID_0e000004_ID_04.nii.gz").mkdir()
    (folder / "ID_0e000005\n1,2.nii.gz").write_bytes(b"")
    assert findings(tree) == [
        ("ID_0e000001_ID_01", "link that leads nowhere", "refused"),
        ("ID_0e000002_ID_02", "link that leads nowhere", "refused"),
        ("ID_0e000003_ID_03", "not a regular file", "refused"),
        ("ID_0e000004_ID_04", "folder with the name of a scan", "refused"),
        ("ID_0e000005\\n1,2", "unsafe file name", "refused"),
    ]
    assert all(f.text.isprintable() for f in BHSD(tree).survey().findings)
    assert summary(tree) == expected(studies)


@pytest.mark.parametrize(
    "ending",
    [
        *(".hdr", ".mhd", ".nhdr", ".NRRD", ".mha", ".mgz", ".gipl.gz", ".hdr.gz"),
        *(".HEAD", ".nii.bz2", ".nii.xz", ".nii.zip", ".nii.zst"),
    ],
)
def test_volumes_in_other_formats_are_refused_by_name(tree, studies, touch, ending):
    lost = studies["train"][0]
    path = tree / "label_192" / "ground truths" / f"{lost}.nii.gz"
    path.rename(path.with_name(lost + ending))
    assert findings(tree) == [(lost, "no NIfTI file", "refused")]
    assert f"{lost}{ending}: {ending.lower()} is not read here; convert it" in text_of(tree, lost)
    assert summary(tree) == without(studies, lost)
    folder = tree / "unlabel_2000" / "anybleed"
    touch(folder / f"a{ending}")
    with pytest.raises(Refusal, match=rf"(?i)a\{ending}: .* is not read here; convert it"):
        scans(folder)


def test_a_link_to_a_scan_elsewhere_is_followed(tree, studies, tmp_path):
    path = tree / "unlabel_2000" / "anybleed" / f"{studies['any'][0]}.nii.gz"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert summary(tree) == expected(studies)
    assert findings(tree) == []


def test_names_in_the_lists_that_lead_out_of_the_tree_read_nothing_there(tree, studies, tmp_path):
    lists = json.loads((tree / OFFICIAL).read_text())
    lists["test"] = ["../../../etc/" + studies["test"][0] + ".nii.gz", "/etc/passwd"]
    (tree / OFFICIAL).write_text(json.dumps(lists))
    assert findings(tree) == [
        ("", "path that leads out of the data set", "repaired"),
        ("", "path that leads out of the data set", "repaired"),
        ("passwd", "image that is not there", "refused"),
    ]
    assert summary(tree) == expected(studies)
    assert all(tree in case.image.parents for case in BHSD(tree).cases())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected {'training'"),
        ('{"training": {}}', "expected {'training'"),
        ('{"test": [7]}', "in 'test': expected a file name; got 7"),
        ('{"training": [{"label": "x"}]}', "in 'training': expected a file name"),
        ('{"labels": {"1": "epidural", "2": "subdural"}}', "numbers the classes.*subdural': '2'"),
        ('{"labels": {"epidural": 2}}', "numbers the classes.*epidural': '2'"),
        ('{"labels": {"background": 0, "SDH": 1, "EDH": 2}}', "numbers the classes.*sdh': '1'"),
        (
            '{"labels": {"3": "Subarachnoid Hemorrhage (SAH)"}}',
            r"numbers the classes.*\(sah\)': '3'",
        ),
    ],
)
def test_lists_that_make_no_sense_are_refused_by_name(tree, text, message):
    (tree / OFFICIAL).write_text(text)
    with pytest.raises(ValueError, match=rf"dataset\.json: {message}"):
        list(BHSD(tree).cases())


def test_a_tree_of_which_nothing_is_left_says_why(tree, studies):
    for folder in ("label_192/images", "label_192/ground truths", "unlabel_2000"):
        for path in (tree / folder).rglob("*.nii.gz"):
            path.unlink()
    with pytest.raises(ValueError, match=r"no scan can be used, 3 refused: .*no image for"):
        list(BHSD(tree).cases())


def test_empty_masks_are_expected_only_if_allowed(tree):
    assert {case.bleeding for case in BHSD(tree).cases() if case.label} == {True}
    assert {case.bleeding for case in BHSD(tree, allow_empty=True).cases() if case.label} == {None}


def test_files_of_a_folder_are_given_only_if_all_can_be_used(tree, studies):
    folder = tree / "unlabel_2000" / "anybleed"
    assert list(scans(folder)) == list(studies["any"])
    (folder / "ID_0e000001_ID_01.nii.gz").symlink_to("ID_0e000001_ID_01.nii.gz")
    with pytest.raises(ValueError, match=r"ID_0e000001_ID_01\.nii\.gz: a link in a circle"):
        scans(folder)
