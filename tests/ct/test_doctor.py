import numpy as np
import pytest

from bhsd_jax.ct.integrity import doctor, listing, words
from bhsd_jax.ct.prepare import Facts
from bhsd_jax.volume import Finding

CLASSES = ("background", "EDH", "IPH")


def facts(case, split="train", warnings=(), voxels=(), ml=(), digest="", field=(160, 230, 230)):
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
        warnings=tuple(warnings),
        field_mm=tuple(map(float, field)),
        voxels_sha256=digest,
    )


def told(found):
    return [(f.case, f.done) for f in found]


def test_words_of_repairs_become_defects_and_unknown_words_stay_as_they_are():
    scan = facts(
        "a",
        warnings=(
            "clipped to -1024..3071 HU: 0 voxels below, 7 above",
            "clipped to -1024..3071 HU: 9 voxels below, 0 above",
            "label affine is up to 3 mm off the image's, which is taken",
            "label affine has axes that run the other way than the image's; look",
            "3 slices of 12 are odd",
        ),
    )
    found = doctor.of_facts([scan], "ct")
    assert [(f.defect, f.done) for f in found] == [
        ("metal beyond 3071 HU", "repaired"),
        ("padding below -1024 HU", "repaired"),
        ("mask that lies elsewhere than its image", "repaired"),
        ("mask that may be mirrored", "kept"),
        ("# slices of # are odd", "kept"),
    ]
    assert [f.text for f in found] == list(scan.warnings)


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
    assert [f.defect for f in found] == ["doubtful size"] * len(words)
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


def test_errors_of_one_kind_are_one_defect():
    reasons = {
        "b": "/x/b.nii.gz: truncated header: 3 of 348 bytes",
        "a": "/x/a.nii.gz: truncated: 5 of 9 bytes",
        "c": "disk gone",
    }
    found = doctor.of_refusals(reasons)
    assert [(f.case, f.defect) for f in found] == [
        ("a", "truncated file"),
        ("b", "truncated file"),
        ("c", "unreadable file"),
    ]
    grouped = doctor.group(found)
    assert [(g.defect, g.cases) for g in grouped] == [
        ("truncated file", ("a", "b")),
        ("unreadable file", ("c",)),
    ]


def test_groups_begin_with_what_needs_the_reader():
    kinds = [("x", "repaired"), ("y", "kept"), ("z", "refused"), ("y", "kept")]
    found = [Finding(defect, done, f"c{i}", "") for i, (defect, done) in enumerate(kinds)]
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
    findings = [Finding("odd", "kept", f"s{i}", f"text {i}") for i in range(9)]
    findings += [Finding("broken", "refused", f"r{i}", f"/x/r{i}: bad") for i in range(8)]
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
    at = page.index("  broken (8 scans)")
    assert page[at - 1] == "refused: left out, to be repaired by you"
    assert page[at + 1 : at + 8] == [
        *(f"    /x/r{i}: bad" for i in range(6)),
        "    and 2 more, in defects.csv",
    ]
    at = page.index("  odd (9 scans)")
    assert page[at + 1 : at + 3] == ["    s0, s1, s2, s3 and 5 more", "    such as: text 0"]


def test_a_set_without_defects_says_so():
    totals = listing.summary([facts("a")], CLASSES, [])
    page = words.page("Set", "mr", totals, CLASSES, [])
    assert page.endswith("Defects: none found")
    assert "lowest intensity, as stored" in page
    assert "gantry tilt" not in page
    assert "In the masks" not in page
    nothing = words.page("Set", "mr", listing.summary([], CLASSES, []), CLASSES, [])
    assert nothing.startswith("Set: 0 scans can be used, 0 are refused")
