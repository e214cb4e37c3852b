"""What slice labels can mend, on masks drawn by hand."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def maps():
    """A true bar of five slices; found: two of them, half of a third, and a slice beyond."""
    true = np.zeros((4, 4, 8), np.uint8)
    true[1:3, 1:3, 1:6] = 1  # 4 voxels in each of five slices
    said = np.zeros_like(true)
    said[1:3, 1:3, 1:3] = 1
    said[1, 1:3, 3] = 1
    said[1:3, 1:3, 7] = 1
    return said, true


def test_removes_what_is_forbidden_and_draws_what_was_missed_and_no_more(tmp_path):
    said, true = maps()
    for folder, voxels in (("said", said), ("true", true)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / folder / "a.nii.gz")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/slice_bound.py", tmp_path / "said", tmp_path / "true"],
        capture_output=True,
        text=True,
        check=True,
    )
    axial = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("axial")]
    want = [2 * 10 / (14 + 20), 2 * 10 / (10 + 20), 2 * 18 / (18 + 20)]
    assert [float(word.strip("()")) / 100 for word in axial] == pytest.approx(want, abs=1e-4)
    coronal = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("coronal")]
    assert len(set(coronal)) == 1  # every coronal slice that shows the bar has some of it


def test_a_missing_mask_is_named(tmp_path):
    (tmp_path / "said").mkdir()
    nib.save(nib.Nifti1Image(maps()[0], np.eye(4)), tmp_path / "said/a.nii.gz")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/slice_bound.py", tmp_path / "said", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no mask a.nii.gz" in done.stderr
