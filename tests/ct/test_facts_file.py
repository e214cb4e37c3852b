"""What is kept of a first look, and when it is looked at again."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import bhsd_jax
from bhsd_jax.ct import plausibility, prepare
from bhsd_jax.ct.integrity import facts_file
from bhsd_jax.defects import Finding, Kind, refused
from bhsd_jax.volume import Case, Series

SETTINGS = {"num_classes": 2, "modality": "ct", "crop_hu": None}


@pytest.fixture
def case(tmp_path):
    hu = np.full((8, 8, 6), -1000, np.int16)
    hu[2:6, 2:6, 1:5] = 40
    hu[3, 3, 3] = -2000
    hu[4, 4, 4] = 20000
    path = tmp_path / "a.nii"
    nib.Nifti1Image(hu, np.diag([10.0, 10.0, 20.0, 1.0])).to_filename(path)
    return Case("a", "a", path, None, "train")


def test_findings_come_back_with_their_kinds(case, tmp_path):
    facts = prepare.fingerprint_case(case, **SETTINGS)
    assert [finding.kind for finding in facts.findings] == [Kind.PADDING, Kind.METAL]
    assert len(facts.warnings) == 1
    facts_file.save(tmp_path, case, "key", facts)
    back = facts_file.load(tmp_path, case, "key")
    assert back.findings == facts.findings
    assert all(type(finding.kind) is Kind for finding in back.findings)


def test_a_refusal_comes_back_with_its_kind(case, tmp_path):
    case.image.write_bytes(case.image.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated") as caught:
        prepare.fingerprint_case(case, **SETTINGS)
    facts_file.save(tmp_path, case, "key", refused(caught.value, case.id))
    back = facts_file.load(tmp_path, case, "key")
    assert back == Finding(Kind.FILE_TRUNCATED, "refused", str(caught.value), "a")


@pytest.mark.parametrize("head", [{"refused": "truncated"}, {"facts": {"warnings": ["odd"]}}])
def test_what_another_version_has_kept_is_found_anew_and_no_error(case, tmp_path, head, caplog):
    """Its key is another; and were it not, its fields are."""
    facts_file.save(tmp_path, case, "key", prepare.fingerprint_case(case, **SETTINGS))
    (path,) = tmp_path.rglob("*.npz")
    stored = {"key": "key", "case": "a", **head}
    np.savez(path, head=np.array(facts_file.json.dumps(stored)), foreground=np.zeros(0))
    assert facts_file.load(tmp_path, case, "another") is None
    assert path.exists()
    assert facts_file.load(tmp_path, case, "key") is None
    assert f"{path}: damaged (" in caplog.text


def test_all_code_that_facts_are_made_by_is_in_their_key():
    """Whatever a look at a case imports of this package, files and workers of the machine aside."""
    code = "import sys, bhsd_jax.ct.prepare; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    root = Path(bhsd_jax.__file__).parent
    used = {name.split(".", 1)[1] for name in done.stdout.split() if name.startswith("bhsd_jax.")}
    used = {name for name in used if not name.startswith("platform")}
    paths = {root.joinpath(*name.split(".")) for name in used}
    files = {path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths}
    assert {"ct.hu", "ct.dicom.stack", "defects", "volume"} <= used
    assert not files - set(facts_file.sources())


def test_code_counts_and_comments_do_not(case, monkeypatch):
    before = facts_file.key(case, SETTINGS)
    text = Path(plausibility.__file__).read_text()
    trees = []
    for changed in (text, text + "# more\n", text.replace("-500.0", "-501.0")):
        trees.append(ast.dump(facts_file._without_docstrings(ast.parse(changed))))
    assert trees[0] == trees[1] != trees[2]
    monkeypatch.setattr(facts_file, "_code", lambda: "after a fix")
    assert facts_file.key(case, SETTINGS) != before


def test_a_decoder_that_was_installed_since_counts(case, monkeypatch):
    before = facts_file.key(case, SETTINGS)
    installed = facts_file._decoders()
    assert {"nibabel", "pydicom"} <= set(installed)
    monkeypatch.setattr(facts_file, "_decoders", lambda: installed | {"pyjpegls": "1.5"})
    assert facts_file.key(case, SETTINGS) != before


def test_all_that_a_data_set_says_of_a_case_is_in_the_key(case):
    """So its own code need not be."""
    changed = {
        "id": "b",
        "patient": "b",
        "image": Series((case.image,), "a"),
        "label": case.image,
        "split": "test",
        "bleeding": True,
        "slice_labels": ((1,),),
        "table_feed": True,
        "sorted_by": "b",
        "previous": case.image,
        "absent": (1,),
    }
    assert set(changed) == {field.name for field in dataclasses.fields(Case)}
    made = [dataclasses.replace(case, **{name: value}) for name, value in changed.items()]
    found = Finding(Kind.LEFT_OUT_ALONE, "kept", "left out: 1 image alone in its series")
    series = [Series((case.image,), "a", "resample"), Series((case.image,), "a", findings=(found,))]
    made += [dataclasses.replace(case, image=image) for image in series]
    keys = {facts_file.key(one, SETTINGS) for one in (case, *made)}
    assert len(keys) == 1 + len(made)
