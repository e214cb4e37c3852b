"""How the comparison with nnU-Net's trainer scores and compares, on cases known by hand."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_dice
import bench_time_to_dice as bench


def write(folder, case, array, affine=None):
    folder.mkdir(exist_ok=True)
    image = nib.Nifti1Image(array.astype(np.uint8), np.eye(4) if affine is None else affine)
    nib.save(image, folder / f"{case}.nii.gz")


def test_dice_by_class_and_case(tmp_path):
    true, said = np.zeros((2, 4, 4, 4))
    true[0, 0], said[0, 0, 1:], said[1, 0, 0] = 1, 1, 1  # 4; 3 of them and one beside
    true[2, :2], said[2] = 2, 2  # 8; all of them and as many more
    write(tmp_path / "true", "a", true)
    write(tmp_path / "said", "a", said)
    write(tmp_path / "true", "b", np.zeros((3, 3, 3)))
    write(tmp_path / "said", "b", np.zeros((3, 3, 3)))
    found = bench_dice.score(tmp_path / "said", tmp_path / "true", ["a", "b"], [1, 2])
    np.testing.assert_allclose(found, [[6 / 8, 16 / 24], [1, 1]])


def test_a_label_map_on_other_voxels_is_refused(tmp_path):
    write(tmp_path / "true", "a", np.zeros((3, 3, 3)))
    write(tmp_path / "said", "a", np.zeros((3, 3, 3)), np.diag([1, 1, 2, 1]))
    with pytest.raises(ValueError, match="other voxels"):
        bench_dice.score(tmp_path / "said", tmp_path / "true", ["a"], [1])


def test_a_level_is_reached_on_the_line_between_two_steps():
    found = bench_dice.time_to([10, 20, 40], [50, 60, 58], [50, 55, 60, 61])
    assert found == [None, 15, 20, None], "before the first point nothing is known"


def test_the_interval_is_paired_over_cases():
    rng = np.random.default_rng(0)
    hard = rng.normal(80, 10, 40)  # cases differ by 10 points, the sides by 1 on each of them
    peer = np.stack([hard, hard])
    low, high = bench_dice.interval(peer + 1, peer, seeds=False)
    assert (low, high) == pytest.approx((1, 1))


def test_the_interval_grows_with_what_seeds_differ_by():
    peer = np.zeros((3, 40))
    ours = np.array([[-1.0], [0.0], [1.0]]) + np.zeros((3, 40))
    assert bench_dice.interval(ours, peer, seeds=False) == pytest.approx((0, 0))
    low, high = bench_dice.interval(ours, peer, seeds=True)
    # The mean of three draws from -1, 0, 1 has a deviation of 0.47.
    assert low == pytest.approx(-1, abs=0.35)
    assert high == pytest.approx(1, abs=0.35)


def test_both_sides_get_the_same_cases_under_their_own_names(tmp_path):
    data = tmp_path / "data"
    for case in [f"case_{i}" for i in range(10)]:
        data.mkdir(exist_ok=True)
        write(data / "imagesTr", case, np.zeros((2, 2, 2)))
        write(data / "labelsTr", case, np.zeros((2, 2, 2)))
    facts = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    (data / "dataset.json").write_text(json.dumps(facts))
    folder = tmp_path / "raw" / "Dataset104_Study"
    for _ in range(2):  # as when the first try ended soon afterwards
        bench.lay_out(data, folder, None, early=1)
    fold = json.loads((folder / "splits_final.json").read_text())[0]
    assert (len(fold["train"]), len(fold["val"])) == (8, 2)
    assert not set(fold["train"]) & set(fold["val"])
    images = {path.name for path in (folder / "imagesTr").iterdir()}
    assert images == {f"case_{i}_0000.nii.gz" for i in range(10)}
    for name, count in (("all", 2), ("early", 1)):
        files = sorted((tmp_path / "raw" / name).iterdir())
        assert [path.name for path in files] == [f"{c}.nii.gz" for c in fold["val"][:count]]
        assert all(path.is_file() for path in files)


def test_swapped_runs_come_last_and_start_with_the_others_weights():
    args = bench.parse(["--study", "s", "--seeds", "0,1", "--swapped", "1"])
    assert bench.runs(args) == [
        ("ours_0", "ours", 0, None),
        ("peer_0", "peer", 0, None),
        ("ours_1", "ours", 1, None),
        ("peer_1", "peer", 1, None),
        ("ours_1_swapped", "ours", 1, "peer_1"),
        ("peer_1_swapped", "peer", 1, "ours_1"),
    ]


def test_a_shorter_training_is_scored_at_as_many_points_of_its_own():
    args = bench.parse(["--study", "s", "--points", "4", "--epoch", "50"])
    assert bench.length(3000, args) == {"steps": 3000, "curve": [750, 1500, 2250, 3000]}
    assert bench.length(1500, args) == {"steps": 1500, "curve": [400, 750, 1100, 1500]}


def test_a_curve_ends_with_the_last_step_and_has_none_before_the_first():
    args = bench.parse(["--study", "s", "--points", "4", "--epoch", "50"])
    assert bench.length(1990, args) == {"steps": 1950, "curve": [500, 1000, 1450, 1950]}
    assert bench.length(149, args) == {"steps": 100, "curve": [50, 100]}
    with pytest.raises(SystemExit, match="at least one --epoch, 50 steps; got 49"):
        bench.length(49, args)


@pytest.fixture
def program(tmp_path):
    """Writes a program of the shell; returns its path."""

    def write(lines):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_a_preparation_that_was_stopped_begins_anew(tmp_path, program):
    data, study = tmp_path / "data", tmp_path / "study"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"modality": {}, "labels": {}}))
    for index in range(5):
        write(data / "imagesTr", f"case_{index}", np.zeros((2, 2, 2)))
        write(data / "labelsTr", f"case_{index}", np.zeros((2, 2, 2)))
    (study / "shards").mkdir(parents=True)  # empty, as `preprocess` leaves it when it is stopped
    peer = program("exit 3")
    args = bench.parse(["--study", str(study), "--data", str(data), "--peer-python", peer])
    for _ in range(2):
        with pytest.raises(SystemExit, match="prepare_peer ended with 3"):
            bench.prepare(args, study)
    (study / "shards" / "index.json").touch()
    bench.prepare(args, study)


def test_a_training_that_was_stopped_begins_anew(tmp_path, program, monkeypatch):
    """Else the verb would go on, and what is kept as its initial weights would be trained ones."""
    study, run = tmp_path / "study", tmp_path / "study" / "runs" / "ours_0"
    (run / "checkpoints").mkdir(parents=True)
    lengths = {"steps": 100, "curve": [100]}
    setup = {"ours": lengths, "epoch": 50, "recipe": "nnunet"}
    (study / "setup.json").write_text(json.dumps(setup))
    args = bench.parse(["--study", str(study)])
    trains = '[ "$2" = predict ] || { [ ! -e "$4" ] && mkdir -p "$4" && touch "$4/trained"; }'
    monkeypatch.setattr(sys, "executable", program(trains))
    bench.train(args, study, "ours_0", "ours", 0, None)
    assert {path.name for path in run.iterdir()} == {"trained", "done.json"}
    monkeypatch.setattr(sys, "executable", program("exit 1"))
    bench.train(args, study, "ours_0", "ours", 0, None)  # is there


def test_every_run_compiles_for_itself_and_on_cpus(tmp_path):
    asked = "import os; print(*map(os.getenv, ('JAX_ENABLE_COMPILATION_CACHE', 'JAX_PLATFORMS')))"
    bench.call(tmp_path, "asked", [sys.executable, "-c", asked])
    assert (tmp_path / "logs" / "asked.txt").read_text().split() == ["false", "cpu"]
