import dataclasses
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.ct.integrity import checkup, doctor, listing, words
from bhsd_jax.ct.prepared import Facts
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.datasets.folder import Folder
from bhsd_jax.datasets.synthetic import Synthetic
from bhsd_jax.defects import Finding, Kind, Refusal, refused
from bhsd_jax.volume import Case, Survey

CLASSES = ("background", "EDH", "IPH")


def facts(case, split="train", findings=(), voxels=(), ml=(), digest="", field=(160, 230, 230)):
    return Facts(
        case=case,
        patient=case,
        split=split,
        bleeding=None,
        shape=(32, 400, 300),
        spacing_mm=(5.0, 0.5, 0.5),
        tilt_deg=0.0,
        intensity=(-1024.0, -990.0, 1800.0),
        voxels=voxels,
        volume_ml=ml,
        foreground=np.zeros(0, np.float32),
        source_sha256="",
        findings=tuple(findings),
        field_mm=tuple(map(float, field)),
        voxels_sha256=digest,
    )


def told(found):
    return [(f.case, f.done) for f in found]


def test_findings_of_the_readers_stay_as_they_are_and_a_text_of_two_kinds_is_said_once():
    text = "clipped to -1024..3071 HU: 9 voxels below, 7 above"
    scan = facts(
        "a",
        findings=(
            Finding(Kind.PADDING, "repaired", text, "a"),
            Finding(Kind.METAL, "repaired", text, "a"),
            Finding(Kind.MASK_MIRRORED, "kept", "label affine has axes", "a"),
        ),
    )
    found = doctor.of_facts([scan], "ct")
    assert found == list(scan.findings)
    assert [(row["defect"], row["done"]) for row in listing.defect_rows(doctor.group(found))] == [
        ("mask that may be mirrored", "kept"),
        ("metal beyond 3071 HU", "repaired"),
        ("padding below -1024 HU", "repaired"),
    ]
    (row,) = listing.rows([scan], ("background",))
    assert row["warnings"] == f"{text}; label affine has axes"


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ((24, 250, 250), ["height of 24 mm in all, expected 80 to 300"]),
        ((91, 190, 190), []),  # the smallest and the largest honest ones of BHSD
        ((230, 350, 350), []),
        ((160, 51, 410), ["rows of 51 mm", "columns of 410 mm"]),
    ],
)
def test_heads_of_impossible_size_are_doubted_in_ct_alone(field, words):
    found = doctor.of_facts([facts("a", field=field)], "ct")
    assert [f.kind for f in found] == ["doubtful size"] * len(words)
    assert {f.case for f in found} <= {"a"}
    assert all(word in f.text for word, f in zip(words, found, strict=True))
    assert doctor.of_facts([facts("a", field=field)], "mr") == []


def test_copies_of_a_test_scan_leave_the_pool_and_are_refused_in_training():
    found = doctor.of_copies(
        [
            facts("a", "train", digest="1"),
            facts("b", "test", digest="1"),
            facts("c", "unlabeled", digest="1"),
            facts("d", "test", digest="1"),
            facts("e", "train", digest="2"),
            facts("f", "train", digest="2"),
            facts("g", "unlabeled", digest="2"),
            facts("h", "unlabeled", digest="3"),
            facts("i"),
            facts("j"),
        ]
    )
    assert sorted(told(found)) == [
        ("a", "refused"),
        ("c", "repaired"),
        ("d", "kept"),
        ("f", "kept"),
        ("g", "kept"),
    ]
    assert "the same voxels as b (test); left out of the pool" in [f.text for f in found]


def test_who_has_copies_of_one_scan_is_one_patient():
    """Else the copy of a validation scan would train, with its mask or without."""

    def scan(case, patient, digest, split="train"):
        return dataclasses.replace(facts(case, split, digest=digest), patient=patient)

    found = doctor.patients(
        [
            scan("a1", "A", "1"),
            scan("a2", "A", "2"),
            scan("b1", "B", "1"),  # a copy of a1
            scan("b2", "B", "3"),
            scan("u", "U", "3", "unlabeled"),  # a copy of b2
            scan("c", "C", "4"),
            scan("d", "D", ""),
            scan("e", "E", ""),
        ]
    )
    assert len({found[case] for case in ("a1", "a2", "b1", "b2", "u")}) == 1
    assert [found[case] for case in "cde"] == ["C", "D", "E"]
    cases = [Case(name, name.upper(), Path(name), None, "train") for name in ("a1", "b1", "x")]
    named, same = checkup.with_patients(cases, [scan("a1", "A", "1"), scan("b1", "B", "1")])
    assert [case.patient for case in named] == ["A", "A", "X"]  # x could not be read
    assert [fact.patient for fact in same] == ["A", "A"]


def test_errors_of_one_kind_are_one_defect():
    errors = {
        "a": Refusal(Kind.FILE_TRUNCATED, "/x/a.nii.gz: truncated: 5 of 9 bytes"),
        "b": Refusal(Kind.FILE_TRUNCATED, "/x/b.nii.gz: truncated header: 3 of 348 bytes"),
        "c": OSError("disk\ngone"),
        "d": FileNotFoundError("/x/d.nii.gz: no such file"),
        "e": ValueError("/truncated/e: of no kind that is known"),
    }
    found = [refused(error, case) for case, error in errors.items()]
    assert [(f.case, f.kind, f.done) for f in found] == [
        ("a", "truncated file", "refused"),
        ("b", "truncated file", "refused"),
        ("c", "unreadable file", "refused"),
        ("d", "file that is not there", "refused"),
        ("e", "unreadable file", "refused"),
    ]
    assert found[2].text == "disk gone"
    grouped = doctor.group(found)
    assert [(g.kind, g.cases) for g in grouped] == [
        ("truncated file", ("a", "b")),
        ("unreadable file", ("c", "e")),
        ("file that is not there", ("d",)),
    ]


def test_a_refusal_keeps_its_kind_on_its_way_from_another_process():
    there = Refusal(Kind.SPACING, "spacing must be positive")
    back = pickle.loads(pickle.dumps(there))
    assert (back.kind, str(back)) == (there.kind, str(there))
    assert isinstance(back, ValueError)


def test_kinds_have_words_of_their_own():
    assert len(set(Kind.__members__)) == len({kind.value for kind in Kind})


def test_groups_begin_with_what_needs_the_reader():
    done = ["repaired", "kept", "refused", "kept"]
    kinds = [Kind.METAL, Kind.NO_AIR, Kind.AFFINE, Kind.NO_AIR]
    found = [Finding(kinds[i], done[i], "", f"c{i}") for i in range(4)]
    assert [(g.done, len(g.cases)) for g in doctor.group(found)] == [
        ("refused", 1),
        ("kept", 2),
        ("repaired", 1),
    ]


def test_the_page_counts_per_split_and_names_a_few_of_many():
    scans = [
        facts("a", voxels=(9, 4, 0), ml=(9.0, 4.0, 0.0)),
        facts("b", voxels=(9, 2, 6), ml=(9.0, 2.0, 6.5)),
        facts("c", "test", voxels=(9, 0, 1), ml=(9.0, 0.0, 1.25)),
        facts("d", "unlabeled"),
    ]
    findings = [Finding(Kind.NO_AIR, "kept", f"text {i}", f"s{i}") for i in range(9)]
    findings += [Finding(Kind.AXES, "refused", f"/x/r{i}: bad", f"r{i}") for i in range(8)]
    defects = doctor.group(findings)
    totals = listing.summary(scans, CLASSES, defects)
    page = words.page("Set", "ct", totals, CLASSES, defects).splitlines()
    assert page[0] == "Set: 4 scans can be used, 8 are refused"
    cells = {line.split("  ")[0]: line.split("  ")[1:] for line in page}
    counts = {name: [c.strip() for c in row if c.strip()] for name, row in cells.items()}
    assert counts["Scans"] == ["train", "test", "unlabeled", "all"]
    assert counts["usable"] == ["2", "1", "1", "4"]
    assert counts["with a mask"] == ["2", "1", "0", "3"]
    assert counts["EDH"] == ["2", "6.0", "3.00", "0", "0.0", "-"]
    assert counts["IPH"] == ["1", "6.5", "6.50", "1", "1.2", "1.25"]
    assert counts["slice field of view, mm"] == ["160.0"] * 5
    assert counts["lowest HU, as stored"] == ["-1024"] * 5
    at = page.index("  not three axes (8 scans)")
    assert page[at - 1] == "refused: left out, to be repaired by you"
    assert page[at + 1 : at + 8] == [
        *(f"    /x/r{i}: bad" for i in range(6)),
        "    and 2 more, in defects.csv",
    ]
    at = page.index("  no air: windowed, or no CT (9 scans)")
    assert page[at + 1 : at + 3] == ["    s0, s1, s2, s3 and 5 more", "    such as: text 0"]


def test_a_set_without_defects_says_so():
    totals = listing.summary([facts("a")], CLASSES, [])
    page = words.page("Set", "mr", totals, CLASSES, [])
    assert page.endswith("Defects: none found")
    assert "lowest intensity, as stored" in page
    assert "gantry tilt" not in page
    assert "In the masks" not in page
    assert "bleed" not in page, "of MR nobody has said whether it bleeds"
    assert "known to bleed" in words.page("Set", "ct", totals, CLASSES, [])
    nothing = words.page("Set", "mr", listing.summary([], CLASSES, []), CLASSES, [])
    assert nothing.startswith("Set: 0 scans can be used, 0 are refused")


def test_masks_of_0_and_1_are_asked_about_unless_classes_were_given(tmp_path, caplog):
    """The first of six classes, or any bleeding: only the user knows."""
    scans = [
        facts("a", voxels=(9, 4, 0, 0, 0, 0), ml=(9.0, 4.0, 0, 0, 0, 0)),
        facts("b", voxels=(9, 0, 0, 0, 0, 0), ml=(9.0, 0, 0, 0, 0, 0)),
        facts("c", "unlabeled"),
    ]
    other = facts("d", voxels=(9, 0, 1, 0, 0, 0), ml=(9.0, 0, 1.0, 0, 0, 0))

    def page(dataset, scans):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            checkup.conclude(tmp_path, dataset, Survey((), ()), scans, {})
        return caplog.text

    own = ("EDH", "IPH", "IVH", "SAH", "SDH")
    asked = "1 is taken for EDH; if it means any bleeding, set --data."
    assert f"{asked}labels=binary" in page(Folder("x"), scans)
    assert "no mask holds another value than 1" in (tmp_path / "defects.csv").read_text()
    assert f"{asked}classes=any" in page(DICOM("x"), scans)
    assert "Defects: none found" in page(Folder("x"), [*scans, other])
    assert "Defects: none found" in page(Folder("x"), scans[1:])
    assert "Defects: none found" in page(Folder("x", classes=own), scans)
    assert "Defects: none found" in page(Synthetic("x"), scans), "masks that are not a user's"
    assert Folder("x", labels="binary").classes == DICOM("x", classes=("any",)).classes
    assert DICOM("x", classes=("background,a,b",)).classes == ("background", "a", "b")


def test_a_data_set_of_mr_given_as_ct_is_refused_in_one_line():
    odd = {
        f"s{i}": Finding(kind, "refused", f"s{i}.nii.gz: what it is", f"s{i}")
        for i, kind in enumerate((Kind.NOT_HU, Kind.NO_HU, Kind.OFFSET, Kind.FILE_EMPTY))
    }
    checkup.require_ct("folder", 7, odd)
    checkup.require_ct("folder", 0, {})
    with pytest.raises(ValueError, match=r"3 of 6 scans are no CT in HU.*s0: s0\.nii"):
        checkup.require_ct("folder", 6, odd)
