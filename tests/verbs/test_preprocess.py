import csv
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.configs import common
from bhsd_jax.ct import nifti, prepare
from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.platform import machine, workers
from bhsd_jax.platform.errors import UserError
from bhsd_jax.shards import store
from bhsd_jax.verbs import preprocess
from bhsd_jax.volume import Volume

CASES = 5
UPRIGHT = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # canonical axes


@pytest.fixture
def data(tmp_path):
    """A Decathlon folder of five small MR scans, one of them without mask in `imagesTs`."""
    random = np.random.default_rng(0)
    for index in range(CASES):
        is_test = index == CASES - 1
        folder = tmp_path / "data" / ("imagesTs" if is_test else "imagesTr")
        folder.mkdir(parents=True, exist_ok=True)
        shape = (12 + index, 17, 15)
        voxels = random.normal(100, 20, shape).astype(np.float32)
        label = np.zeros(shape, np.uint8)
        label[4:7, 5:9, 5:8] = 1 + (index % 2)
        nifti.write_volume(folder / f"h_{index}.nii.gz", Volume(voxels, UPRIGHT, ""))
        if not is_test:
            masks = tmp_path / "data" / "labelsTr"
            masks.mkdir(exist_ok=True)
            nifti.write_volume(masks / f"h_{index}.nii.gz", Volume(label, UPRIGHT, ""))
    facts = {
        "name": "Small",
        "license": "free",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left", "2": "right"},
    }
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(facts))
    return tmp_path / "data"


def configure(root, word="msd", **settings):
    config = common.get_config(f"data={word}")
    config.data.root = str(root)
    config.preprocess.update(cases_per_shard=2, processes=1)
    config.preprocess.update(settings)
    return config


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def shard(index, count=3):
    return f"shard-{index:05d}-of-{count:05d}.arrayrecord"


def test_every_case_is_in_the_shards_as_the_plan_says(data, tmp_path):
    preprocess.run(configure(data), tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    assert [entry.id for entry in found.entries] == [f"h_{i}" for i in range(CASES)]
    assert [entry.shard for entry in found.entries] == [shard(i // 2) for i in range(CASES)]
    assert [entry.split for entry in found.entries] == ["train"] * (CASES - 1) + ["test"]
    plan = found.plan
    assert (plan.dataset, plan.license, plan.modality) == ("Small", "free", "mr")
    assert plan.classes == ("background", "left", "right")
    assert plan.spacing_mm == pytest.approx((1.0, 1.0, 1.0))
    assert plan.median_shape == (14, 17, 15)  # of the training cases: 12, 13, 14, 15 -> 13.5
    for case in MSD(data).cases():
        expected, got = prepare.prepare_case(case, plan), found.load(case.id)
        assert got.image.tobytes() == expected.image.tobytes()
        assert (got.label is None) == (case.label is None)
        assert got.grid == expected.grid
        assert got.source_sha256 == expected.source_sha256


def test_the_plan_counts_no_test_masks_and_no_unlabeled_scans(tmp_path):
    """BHSD's layout, CT: bright test lesions do not move the training statistics."""
    root = tmp_path / "bhsd"
    matrix = UPRIGHT @ np.diag([5.0, 1, 1, 1])
    names = {"train": "ID_0a000001_ID_01", "test": "ID_0b000001_ID_02", "no": "ID_0d000001_ID_03"}
    for split, id in names.items():
        voxels = np.full((10, 24, 24), -1000, np.int16)
        voxels[2:9, 4:20, 4:20] = 40
        label = np.zeros(voxels.shape, np.uint8)
        label[5, 8:12, 8:12] = 2
        voxels[label > 0] = 90 if split == "test" else 60
        base = root / "unlabel_1" / "nobleed" if split == "no" else root / "label_2" / "images"
        base.mkdir(parents=True, exist_ok=True)
        nifti.write_volume(base / f"{id}.nii.gz", Volume(voxels, matrix, ""))
        if split != "no":
            masks = root / "label_2" / "ground truths"
            masks.mkdir(exist_ok=True)
            nifti.write_volume(masks / f"{id}.nii.gz", Volume(label, matrix, ""))
    lists = {"training": [names["train"] + ".nii.gz"], "test": [names["test"] + ".nii.gz"]}
    (root / "dataset.json").write_text(json.dumps(lists))
    preprocess.run(configure(root, "bhsd", spacing_mm=(5.0, 1.0, 1.0)), tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    assert found.plan.foreground == (60.0, 60.0, 0.0, 60.0)
    assert found.plan.spacing_mm == (5.0, 1.0, 1.0)
    assert found.plan.crop_hu == -200.0
    assert found.plan.license == BHSD(root).license
    assert [(e.id, e.split, e.bleeding) for e in found.entries] == [
        (names["train"], "train", True),
        (names["test"], "test", True),
        (names["no"], "unlabeled", False),
    ]
    image = found.load(names["no"]).image
    assert image.dtype == np.int16
    assert set(np.unique(image)) == {-1000, 40, 60}
    totals = json.loads((tmp_path / "run" / "integrity.json").read_text())
    assert totals["splits"]["test"]["classes"]["IPH"] == {
        "cases": 1, "voxels": 16, "ml": pytest.approx(0.08), "median_ml": pytest.approx(0.08),
    }  # fmt: skip
    assert totals["splits"]["unlabeled"]["classes"] == {}


def test_one_and_two_processes_write_the_same_bytes(data, tmp_path):
    for processes in (1, 2):
        preprocess.run(configure(data, processes=processes), tmp_path / str(processes))
    one, two = (contents(tmp_path / name / "shards") for name in ("1", "2"))
    assert len(one) == 3 + 3
    assert one == two


def test_a_shard_that_is_gone_is_written_again_alone_and_the_same(data, tmp_path):
    folder = tmp_path / "run" / "shards"
    preprocess.run(configure(data), tmp_path / "run")
    before, written = contents(folder), stamps(folder)
    (folder / shard(1)).unlink()
    preprocess.run(configure(data), tmp_path / "run")
    assert contents(folder) == before
    after = stamps(folder)
    assert {name for name in after if after[name] != written[name]} == {shard(1)}


def test_a_killed_run_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "shards"
    preprocess.run(configure(data), tmp_path / "whole")
    write, calls = store.write_shard, []

    def killed_at_the_second(path, prepared):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, prepared)

    monkeypatch.setattr(store, "write_shard", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        preprocess.run(configure(data), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="preprocess"):
        store.Shards(folder)
    preprocess.run(configure(data), tmp_path / "run")
    assert calls == [shard(0), shard(1), shard(1), shard(2)]
    assert contents(folder) == contents(tmp_path / "whole" / "shards")


def test_a_changed_file_rewrites_its_own_shard_only(data, tmp_path):
    folder = tmp_path / "run" / "shards"
    preprocess.run(configure(data, spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "run")
    written = stamps(folder)
    path = data / "imagesTr" / "h_3.nii.gz"
    volume = nifti.read(path)
    nifti.write_volume(path, Volume(volume.voxels[::-1].copy(), volume.affine, ""))
    preprocess.run(configure(data, spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "run")
    after = stamps(folder)
    assert {name for name in after if after[name] != written[name]} == {shard(1)}
    turned = store.Shards(folder).load("h_3").image
    assert not np.array_equal(turned, turned[::-1])


def test_another_plan_or_division_rewrites_all_and_clears_what_is_left_over(data, tmp_path):
    folder = tmp_path / "run" / "shards"
    preprocess.run(configure(data), tmp_path / "run")
    written = stamps(folder)
    preprocess.run(configure(data, spacing_mm=(2.0, 1.0, 1.0)), tmp_path / "run")
    after = stamps(folder)
    assert all(after[name] != written[name] for name in written)
    assert store.Shards(folder).entries[0].shape == (6, 17, 15)
    preprocess.run(configure(data, cases_per_shard=3), tmp_path / "run")
    assert sorted(stamps(folder)) == [shard(0, 2), shard(1, 2)]
    assert {entry.shard for entry in store.Shards(folder).entries} == {shard(0, 2), shard(1, 2)}


def test_a_broken_case_is_recorded_and_the_others_are_written(data, tmp_path):
    path = data / "imagesTr" / "h_2.nii.gz"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"1 of 5 cases skipped, see .*skipped\.csv; h_2: .*h_2"):
        preprocess.run(configure(data), tmp_path / "run")
    with (tmp_path / "run" / "skipped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["h_2"]
    assert "h_2.nii.gz" in rows[0]["reason"]
    found = store.Shards(tmp_path / "run" / "shards")
    assert [entry.id for entry in found.entries] == ["h_0", "h_1", "h_3", "h_4"]
    assert [entry.shard for entry in found.entries] == [shard(0), shard(0), shard(1), shard(2)]
    preprocess.run(configure(data, allow_skipped=True), tmp_path / "run")
    (data / "imagesTr" / "h_2.nii.gz").unlink()
    (data / "labelsTr" / "h_2.nii.gz").unlink()
    preprocess.run(configure(data), tmp_path / "run")
    assert not (tmp_path / "run" / "skipped.csv").exists()


def test_a_case_that_breaks_in_the_second_pass_is_tried_again(data, tmp_path, monkeypatch):
    real = preprocess.prepare_case

    def broken(case, plan, **known):
        if case.id == "h_1":
            raise OSError("disk gone")
        return real(case, plan, **known)

    monkeypatch.setattr(preprocess, "prepare_case", broken)
    with pytest.raises(ValueError, match="h_1: disk gone"):
        preprocess.run(configure(data), tmp_path / "run")
    written = stamps(tmp_path / "run" / "shards")
    monkeypatch.setattr(preprocess, "prepare_case", real)
    preprocess.run(configure(data), tmp_path / "run")
    after = stamps(tmp_path / "run" / "shards")
    assert {name for name in after if after[name] != written[name]} == {shard(0)}
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES


def test_a_defect_of_ours_is_not_taken_for_a_broken_case(data, tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        raise ValueError("shapes differ")

    monkeypatch.setattr(prepare, "foreground_positions", wrong)
    with pytest.raises(ValueError, match=r"^shapes differ$") as error:
        preprocess.run(configure(data, processes=1), tmp_path / "run")
    assert not isinstance(error.value, UserError)
    assert not (tmp_path / "run" / "skipped.csv").exists()


def test_verify_only_writes_the_integrity_table_and_no_shards(data, tmp_path):
    preprocess.run(configure(data, verify_only=True), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "integrity.csv",
        "integrity.json",
    ]
    with (tmp_path / "run" / "integrity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"h_{i}" for i in range(CASES)]
    assert rows[1]["voxels_right"] == "36"
    assert float(rows[1]["ml_right"]) == pytest.approx(0.036)
    assert rows[1]["voxels_left"] == "0"
    assert rows[4]["voxels_left"] == ""  # no mask is not an empty mask
    totals = json.loads((tmp_path / "run" / "integrity.json").read_text())
    assert totals["splits"]["train"]["classes"]["left"]["cases"] == 2
    assert totals["splits"]["test"]["labeled"] == 0
    assert totals["skipped"] == 0


def test_masks_that_are_all_empty_are_refused(data, tmp_path):
    for path in (data / "labelsTr").iterdir():
        volume = nifti.read(path)
        nifti.write_volume(path, Volume(np.zeros_like(volume.voxels), volume.affine, ""))
    with pytest.raises(ValueError, match="all 4 training cases are empty"):
        preprocess.run(configure(data), tmp_path / "run")


def test_without_a_training_case_that_is_left_the_first_reason_is_given(data, tmp_path):
    for path in (data / "labelsTr").iterdir():
        path.write_bytes(b"")
    for allowed in (False, True):
        with pytest.raises(ValueError, match=r"no training case .* 4 refused; h_0: .*h_0.* empty"):
            preprocess.run(configure(data, allow_skipped=allowed), tmp_path / "run")
    assert len((tmp_path / "run" / "skipped.csv").read_text().splitlines()) == 5


def test_a_second_look_leaves_nothing_of_the_first(data, tmp_path):
    path = data / "imagesTr" / "h_2.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-900])
    preprocess.run(configure(data, verify_only=True, allow_skipped=True), tmp_path / "run")
    assert "damaged gzip" in (tmp_path / "run" / "defects.csv").read_text()
    path.write_bytes(whole)
    preprocess.run(configure(data, verify_only=True), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "integrity.csv",
        "integrity.json",
    ]
    assert json.loads((tmp_path / "run" / "integrity.json").read_text())["defects"] == []


def test_an_empty_root_is_refused_unless_the_data_are_synthetic(tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.root is empty; say where msd\.MSD lies"):
        preprocess.run(configure(""), tmp_path / "run")


def test_shards_can_lie_elsewhere(data, tmp_path):
    preprocess.run(configure(data, shards=str(tmp_path / "else" / "where")), tmp_path / "run")
    assert len(store.Shards(tmp_path / "else" / "where").entries) == CASES
    assert not (tmp_path / "run" / "shards").exists()


def test_processes_are_started_where_there_is_enough_to_read(data, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 3)
    cases = list(MSD(data).cases())
    assert preprocess._processes(cases) == 1
    os.truncate(data / "imagesTr" / "h_0.nii.gz", 2**25 + 2**24)
    assert preprocess._processes(cases) == 2
    os.truncate(data / "imagesTr" / "h_0.nii.gz", 2**29)
    assert preprocess._processes(cases) == 3
    # The first file is enough: the others, of which there may be a million, are not looked at.
    stat, looked_at = Path.stat, []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda self: looked_at.append(self) or stat(self))
        assert preprocess._processes(cases) == 3
    assert looked_at == [data / "imagesTr" / "h_0.nii.gz"]
    looked_at[0].unlink()
    assert preprocess._processes(cases) == 1


def test_a_killed_worker_is_explained():
    message = r"worker process was killed.*preprocess\.processes"
    with workers.Workers(2) as pool, pytest.raises(ValueError, match=message):
        list(pool.each(os._exit, [3, 3]))


def test_progress_is_logged_while_a_job_takes_its_time(monkeypatch, caplog):
    monkeypatch.setattr(machine, "log_every_s", lambda: 0.01)
    with (
        caplog.at_level(logging.INFO, logger=workers.__name__),
        workers.Progress("check", 4) as progress,
    ):
        progress.advance(3)
        deadline = time.monotonic() + 300
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
        while_working = list(caplog.messages)
        progress.advance(1)
    assert while_working
    assert while_working[0].startswith("check: 3 of 4 cases")
    assert while_working[0].endswith("s left")
    assert caplog.messages[-1].startswith("check: 4 of 4 cases")
