"""Many jobs that share nothing but a file system write what one would."""

import csv
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.assemble import data as of_config
from bhsd_jax.configs import common
from bhsd_jax.ct import nifti
from bhsd_jax.ct.integrity import facts_file
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.platform import faults
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.shards import jobs as shard_jobs
from bhsd_jax.shards import store
from bhsd_jax.verbs import preprocess
from bhsd_jax.volume import Volume

ROOT = Path(__file__).parents[2]
CASES, JOBS = 9, 4  # 5 shards of 2 cases: job 0 has two of them
UPRIGHT = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # canonical axes


@pytest.fixture
def data(tmp_path):
    """A Decathlon folder of small MR scans; the last two have no mask."""
    random = np.random.default_rng(0)
    for folder in ("imagesTr", "imagesTs", "labelsTr"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(CASES):
        labeled = index < CASES - 2
        shape = (9 + index, 13, 11)
        image = random.normal(100, 20, shape).astype(np.float32)
        mask = np.zeros(shape, np.uint8)
        mask[4:7, 5:9, 5:8] = 1 + (index % 2)
        path = tmp_path / "data" / ("imagesTr" if labeled else "imagesTs") / f"h_{index}.nii.gz"
        nifti.write_volume(path, Volume(image, UPRIGHT, ""))
        if labeled:
            path = tmp_path / "data" / "labelsTr" / path.name
            nifti.write_volume(path, Volume(mask, UPRIGHT, ""))
    about = {
        "name": "Small",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left", "2": "right"},
    }
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(about))
    return tmp_path / "data"


def configure(root, **settings):
    config = common.get_config("data=msd")
    config.data.root = str(root)
    config.preprocess.update(cases_per_shard=2, processes=1, spacing_mm=(2.0, 1.0, 0.8))
    config.preprocess.update(settings)
    return config


def flags(config, workdir):
    settings = config.preprocess
    return [
        "--config=configs/supervised.py:data=msd",
        f"--config.data.root={config.data.root}",
        f"--workdir={workdir}",
        f"--config.preprocess.spacing_mm={tuple(settings.spacing_mm)}",
        *(
            f"--config.preprocess.{name}={settings[name]}"
            for name in ("cases_per_shard", "processes", "shard_index", "num_shards")
        ),
    ]


def test_only_shards_whose_making_has_changed_have_another_key(data, tmp_path):
    """Of scans moved to HU, MR normalized inside its mask, and classes that a scan lacks."""
    config = configure(data)
    preprocess.run(config, tmp_path / "run")
    plan = store.Shards(tmp_path / "run" / "shards").plan
    case = next(iter(MSD(data).cases()))
    job = shard_jobs.ShardJob(Path("a"), Path("b"), (case,), ("digest",), plan)
    masked = dataclasses.replace(job, plan=dataclasses.replace(plan, use_mask_for_norm=True))
    shifted = dataclasses.replace(job, shifted=(case.id,))
    lacking = dataclasses.replace(job, cases=(dataclasses.replace(case, absent=(1,)),))
    assert len({job.key, masked.key, shifted.key, lacking.key}) == 4
    used = [plan.version, list(plan.classes), "mr", list(plan.spacing_mm), list(plan.transpose)]
    used += [plan.crop_hu, plan.axes, plan.normalize_first, store.SCHEMA]
    known = [(case.id, case.patient, case.split, case.bleeding, case.slice_labels)]
    text = json.dumps([used, known, ["digest"]])
    assert job.key == hashlib.sha256(text.encode()).hexdigest(), "as older versions wrote it"


def test_the_folds_of_a_user_go_with_the_shards(data, tmp_path):
    config, run = configure(data), tmp_path / "run"
    names = [f"h_{index}" for index in range(CASES - 2)]
    given = [{"train": names[k + 1 :], "val": names[k : k + 1]} for k in range(6)]
    (data / "splits_final.json").write_text(json.dumps(given))
    preprocess.run(config, run)
    assert json.loads((run / "splits_final.json").read_text()) == given
    config.split.fold = 5
    roles, notes = of_config.roles(Settings.of(config), run)
    assert (roles.train, roles.val, roles.test) == (("h_6",), ("h_5",), ("h_7", "h_8"))
    assert notes[0] == (
        "fold 5: 5 labeled cases it does not name are not used: h_0, h_1, h_2, h_3, h_4"
    )
    assert notes[1].startswith("none of the 1 masks that train has right:")
    assert len(notes) == 2
    config.split.fold = 6
    with pytest.raises(ValueError, match=r"fold is -1 .* to 5; got 6"):
        of_config.roles(Settings.of(config), run)
    (data / "splits_final.json").write_text(json.dumps([{"train": ["h_99"], "val": []}]))
    with pytest.raises(ValueError, match="fold 0 names h_99"):
        preprocess.run(config, run)
    (data / "splits_final.json").unlink()
    preprocess.run(config, run)
    config.split.fold = 4
    roles, _ = of_config.roles(Settings.of(config), run)
    assert len(roles.train) == 6, "nnU-Net's five again"
    offered = json.loads((run / "splits_final.json").read_text())
    assert len(offered) == 5
    assert offered[4] == {"train": list(roles.train), "val": list(roles.val)}


def contents(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "shards").iterdir()}


def stamps(workdir):
    return {path.name: path.stat().st_mtime_ns for path in (workdir / "shards").glob("shard-*")}


def names(*positions):
    return {f"shard-{position:05d}-of-00005.arrayrecord" for position in positions}


@pytest.fixture
def serial(data, tmp_path):
    preprocess.run(configure(data), tmp_path / "serial")
    found = contents(tmp_path / "serial")
    assert set(found) == names(*range(5)) | {"plan.json", "manifest.json", "index.json"}
    return found


def test_jobs_one_after_the_other_in_any_order_write_the_same_bytes(data, tmp_path, serial):
    written = {}
    for index in (2, 0, 3, 1):
        assert not (tmp_path / "run" / "shards" / "index.json").exists()
        config = configure(data, shard_index=index, num_shards=JOBS)
        preprocess.run(config, tmp_path / "run")
        new = stamps(tmp_path / "run").items() - written.items()
        assert {name for name, _ in new} == (names(0, 4) if index == 0 else names(index))
        written |= new
    assert contents(tmp_path / "run") == serial


def test_jobs_at_once_write_the_same_bytes(data, tmp_path, serial):
    """Four processes begin together; the last to end finds all shards and writes the index."""
    workdir, running = tmp_path / "run", []
    for index in range(JOBS):
        config = configure(data, shard_index=index, num_shards=JOBS)
        command = [sys.executable, "-m", "bhsd_jax.main", "preprocess", *flags(config, workdir)]
        running.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert contents(workdir) == serial
    assert (workdir / "integrity.json").is_file()


def test_a_pool_of_processes_writes_the_same_bytes(data, tmp_path, serial):
    preprocess.run(configure(data, processes=2), tmp_path / "run")
    assert contents(tmp_path / "run") == serial


def test_beam_writes_the_same_bytes(data, tmp_path, serial):
    python = os.environ.get("BHSD_BEAM_PYTHON")
    if not python:
        pytest.skip("BHSD_BEAM_PYTHON names no Python that has apache-beam")
    command = [python, "tools/preprocess_beam.py", *flags(configure(data), tmp_path / "run")]
    done = subprocess.run(
        [*command, "--", "--runner=DirectRunner"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == serial


def test_a_job_run_again_writes_nothing_and_a_lost_shard_comes_back_alone(data, tmp_path, serial):
    workdir = tmp_path / "run"
    for index in range(2):
        preprocess.run(configure(data, shard_index=index, num_shards=2), workdir)
    before = stamps(workdir)
    for name in names(3):
        (workdir / "shards" / name).unlink()
    preprocess.run(configure(data, shard_index=0, num_shards=2), workdir)
    assert stamps(workdir).items() == {k: v for k, v in before.items() if k not in names(3)}.items()
    preprocess.run(configure(data, shard_index=1, num_shards=2), workdir)
    assert {k for k, v in stamps(workdir).items() if before[k] != v} == names(3)
    assert contents(workdir) == serial


def test_the_manifest_alone_is_enough_to_know_what_is_written(data, tmp_path):
    folder = str(tmp_path / "shared")
    preprocess.run(configure(data, shards=folder), tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("shard-*")}
    preprocess.run(configure(data, shards=folder), tmp_path / "two")
    assert {path: path.stat().st_mtime_ns for path in Path(folder).glob("shard-*")} == before


def test_what_a_killed_job_left_is_swept_once_it_is_old(data, tmp_path):
    folder = tmp_path / "run" / "shards"
    folder.mkdir(parents=True)
    old, fresh = folder / ".shard-00000.gone-1.tmp", folder / ".shard-00001.here-2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * 3600))
    preprocess.run(configure(data), tmp_path / "run")
    assert not old.exists()
    assert fresh.exists()


def test_the_last_job_knows_what_another_could_not_prepare(data, tmp_path, monkeypatch):
    real = preprocess.prepare_case

    def broken(case, plan, **known):
        if case.id == "h_0":
            raise OSError("disk gone")
        return real(case, plan, **known)

    monkeypatch.setattr(preprocess, "prepare_case", broken)
    for index in range(2):
        with pytest.raises(ValueError, match=r"1 of 9 cases skipped.*h_0: disk gone"):
            preprocess.run(configure(data, shard_index=index, num_shards=2), tmp_path / "run")
    assert "h_0,disk gone" in (tmp_path / "run" / "skipped.csv").read_text()
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES - 1
    monkeypatch.setattr(preprocess, "prepare_case", real)
    preprocess.run(configure(data, shard_index=0, num_shards=2), tmp_path / "run")
    assert not (tmp_path / "run" / "skipped.csv").exists()
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES


def test_a_shard_that_lost_all_its_cases_is_gone(data, tmp_path, monkeypatch):
    preprocess.run(configure(data), tmp_path / "run")
    real = preprocess.prepare_case

    def broken(case, plan, **known):
        if case.id in ("h_2", "h_3"):
            raise UserError("no good")
        return real(case, plan, **known)

    monkeypatch.setattr(preprocess, "prepare_case", broken)
    config = configure(data, spacing_mm=(1.0, 1.0, 1.0), allow_skipped=True)
    preprocess.run(config, tmp_path / "run")
    assert set(stamps(tmp_path / "run")) == names(0, 2, 3, 4)
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES - 2


@pytest.fixture
def slurm_task(tmp_path):
    """Runs a task of an array of Slurm: what it calls, or what it says if it refuses."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "env").write_text('PATH="$PWD:$PATH"')
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    (tmp_path / "python").chmod(0o755)

    def called(**variables):
        done = subprocess.run(
            ["bash", ROOT / "launch" / "slurm_prepare.sbatch", "--config=a b.py", "--workdir=w"],
            env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (2 if done.stderr else 0), done
        return done.stderr or done.stdout.splitlines()

    return called


@pytest.mark.parametrize(
    ("array", "index", "number"),
    [
        ("3 0 7 1 8", 3, 8),  # --array=0-7
        ("3 1 8 1 8", 2, 8),  # --array=1-8
        ("6 0 14 2 8", 3, 8),  # --array=0-15:2
        ("3 3 3 1 1", 0, 1),  # --array=3
    ],
)
def test_a_slurm_task_is_the_job_of_its_place_in_the_array(slurm_task, array, index, number):
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    told = {f"SLURM_ARRAY_TASK_{n}": v for n, v in zip(names, array.split(), strict=True)}
    assert slurm_task(**told) == [
        *("-m", "bhsd_jax.main", "preprocess", "--config=a b.py", "--workdir=w"),
        f"--config.preprocess.shard_index={index}",
        f"--config.preprocess.num_shards={number}",
    ]


def test_some_slurm_tasks_of_an_earlier_array_are_the_jobs_of_their_numbers(slurm_task):
    names = ("ID", "MIN", "MAX", "COUNT")
    told = {f"SLURM_ARRAY_TASK_{n}": v for n, v in zip(names, "3372", strict=True)}
    assert slurm_task(**told, BHSD_NUM_SHARDS="64")[-2:] == [
        "--config.preprocess.shard_index=3",
        "--config.preprocess.num_shards=64",
    ]
    assert "the array has 2 jobs and gaps; say of how many jobs" in slurm_task(**told)


@pytest.mark.parametrize(("index", "number"), [(4, 4), (-1, 4), (0, 0)])
def test_a_job_that_is_none_of_them_is_refused(data, tmp_path, index, number):
    with pytest.raises(ValueError, match=r"shard_index is 0\.\.3.*got 4|shard.* or more; got"):
        preprocess.run(configure(data, shard_index=index, num_shards=number), tmp_path / "run")


def test_a_job_begins_with_its_own_cases_and_helps_with_all_others(data):
    cases = list(MSD(data).cases())
    orders = [shard_jobs.Share(i, JOBS).order(cases, 2) for i in range(JOBS)]
    assert [[c.id for c in order[:2]] for order in orders] == [
        [f"h_{2 * i}", f"h_{2 * i + 1}"] for i in range(JOBS)
    ]
    assert all(sorted(c.id for c in order) == [c.id for c in cases] for order in orders)
    assert len({tuple(c.id for c in order) for order in orders}) == JOBS


@pytest.fixture
def looks(monkeypatch):
    """Ids of the cases whose files were read in the first pass."""
    real, seen = preprocess.fingerprint_case, []

    def counted(case, **settings):
        seen.append(case.id)
        return real(case, **settings)

    monkeypatch.setattr(preprocess, "fingerprint_case", counted)
    return seen


def taken(looks):
    found, looks[:] = sorted(looks), []
    return found


def test_cases_are_looked_at_again_only_if_a_file_changed(data, tmp_path, looks):
    every = [f"h_{i}" for i in range(CASES)]
    preprocess.run(configure(data), tmp_path / "run")
    assert taken(looks) == every
    preprocess.run(configure(data, spacing_mm=(1.0, 1.0, 1.0)), tmp_path / "run")
    assert taken(looks) == []
    os.utime(data / "labelsTr" / "h_3.nii.gz", (0, 0))
    preprocess.run(configure(data), tmp_path / "run")
    assert taken(looks) == ["h_3"]
    preprocess.run(configure(data, crop_hu=None), tmp_path / "run")  # as before: MR has no HU
    assert taken(looks) == []
    preprocess.run(configure(data, verify_only=True), tmp_path / "run")  # means it
    assert taken(looks) == every


def test_a_refusal_is_remembered_until_the_file_is_another(data, tmp_path, looks):
    path = data / "imagesTr" / "h_1.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-900])
    for expected in ([f"h_{i}" for i in range(CASES)], []):
        with pytest.raises(ValueError, match=r"1 of 9 cases skipped.*h_1: .*h_1\.nii\.gz"):
            preprocess.run(configure(data), tmp_path / "run")
        assert taken(looks) == expected
        with (tmp_path / "run" / "skipped.csv").open() as file:
            assert [row["case"] for row in csv.DictReader(file)] == ["h_1"]
    path.write_bytes(whole)
    preprocess.run(configure(data), tmp_path / "run")
    assert taken(looks) == ["h_1"]
    assert not (tmp_path / "run" / "skipped.csv").exists()
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES


def test_a_failure_of_the_machine_is_not_remembered(data, tmp_path, monkeypatch):
    real = preprocess.fingerprint_case

    def flaky(case, **settings):
        if case.id == "h_2":
            raise OSError("stale file handle")
        return real(case, **settings)

    monkeypatch.setattr(preprocess, "fingerprint_case", flaky)
    with pytest.raises(ValueError, match="h_2: stale file handle"):
        preprocess.run(configure(data), tmp_path / "run")
    monkeypatch.setattr(preprocess, "fingerprint_case", real)
    preprocess.run(configure(data), tmp_path / "run")
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES


def test_a_refusal_is_remembered_until_the_code_is_another(data, tmp_path, monkeypatch):
    real = preprocess.fingerprint_case

    def strict(case, **settings):
        if case.id == "h_2":
            raise Refusal(Kind.AXES, f"{case.image}: not a 3D scan")
        return real(case, **settings)

    def run():
        preprocess.run(configure(data), tmp_path / "run")

    monkeypatch.setattr(preprocess, "fingerprint_case", strict)
    with pytest.raises(ValueError, match="not a 3D scan"):
        run()
    monkeypatch.setattr(preprocess, "fingerprint_case", real)  # as if the fix were elsewhere
    with pytest.raises(ValueError, match="not a 3D scan"):
        run()
    assert "not three axes,refused,h_2," in (tmp_path / "run" / "defects.csv").read_text()
    monkeypatch.setattr(facts_file, "_code", lambda: "with the fix")
    run()
    assert len(store.Shards(tmp_path / "run" / "shards").entries) == CASES


def test_facts_come_back_as_they_were_and_half_a_file_is_none(data, tmp_path):
    case = next(iter(MSD(data).cases()))
    settings = {"num_classes": 3, "modality": "mr", "crop_hu": None}
    facts = preprocess.fingerprint_case(case, **settings)
    key = facts_file.key(case, settings)
    facts_file.save(tmp_path / "looked", case, key, facts)
    found = facts_file.load(tmp_path / "looked", case, key)
    assert found.foreground.dtype == facts.foreground.dtype
    assert found.foreground.tobytes() == facts.foreground.tobytes()
    without = [{k: v for k, v in vars(f).items() if k != "foreground"} for f in (found, facts)]
    assert without[0] == without[1]
    assert facts_file.load(tmp_path / "looked", case, "another") is None
    assert facts_file.key(case, settings | {"num_classes": 4}) != key
    (path,) = (tmp_path / "looked").rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-40])
    assert facts_file.load(tmp_path / "looked", case, key) is None


# What was damaged on disk.


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def damaged(data, tmp_path, caplog):
    """Runs, damages by a function, runs again: rewritten shards, and what was said."""

    def run(damage, processes=1):
        workdir = tmp_path / "run"
        preprocess.run(configure(data, processes=processes), workdir)
        whole, before = contents(workdir), stamps(workdir)
        damage(workdir)
        caplog.clear()
        caplog.set_level("WARNING", "bhsd_jax")
        preprocess.run(configure(data, processes=processes), workdir)
        assert contents(workdir) == whole
        said = [text for text in caplog.messages if "damaged" in text]
        again = {name for name, stamp in stamps(workdir).items() if stamp != before[name]}
        caplog.clear()
        preprocess.run(configure(data, processes=processes), workdir)
        assert not [text for text in caplog.messages if "damaged" in text]
        return again, said

    return run


@pytest.mark.parametrize(("share", "processes"), [(0.0, 1), (0.5, 1), (0.999, 1)])
def test_a_flipped_byte_in_a_finished_shard_rewrites_that_shard_alone(damaged, share, processes):
    def flip_one(workdir):
        path = workdir / "shards" / min(names(3))
        flip(path, int(share * path.stat().st_size))

    again, said = damaged(flip_one, processes)
    assert again == names(3)
    (line,) = said
    assert f"{min(names(3))}: damaged (its SHA-256 is not what was written); it is made" in line


RECORDS = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "zeros": lambda text: "\0" * len(text),
    "list": lambda text: "[]",
    "no key": lambda text: text.replace('"key"', '"kex"'),
    "no entries": lambda text: text.replace('"entries"', '"entriez"'),
    "no field": lambda text: text.replace('"patient"', '"patienz"'),
    "a digit": lambda text: text.replace('"record": 1', '"record": 0'),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_made_anew_and_costs_nothing_else(damaged, name):
    """The manifest still tells what the shard is."""

    def damage(workdir):
        path = workdir / "written" / f"{min(names(2)).removesuffix('.arrayrecord')}.json"
        path.write_text(RECORDS[name](path.read_text()))

    again, said = damaged(damage)
    assert again == set()
    (line,) = said
    assert f"{min(names(2)).removesuffix('.arrayrecord')}.json: damaged (" in line


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_manifest_is_made_anew_and_costs_nothing_else(damaged, name):
    def damage(workdir):
        path = workdir / "shards" / "manifest.json"
        path.write_text(RECORDS[name](path.read_text()))

    again, said = damaged(damage)
    assert again == set()
    assert said
    assert all("shards/manifest.json: damaged (" in line for line in said)


def test_with_record_and_manifest_damaged_the_shard_is_written_anew(damaged):
    def damage(workdir):
        (workdir / "shards" / "manifest.json").write_text("{")
        for path in (workdir / "written").glob("*-00001-*"):
            path.write_text("{")

    again, said = damaged(damage)
    assert again == names(1)
    assert len(said) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"entries": [{}]}'])
@pytest.mark.parametrize("name", ["index.json", "plan.json"])
def test_a_damaged_index_or_plan_is_named_and_made_anew(data, tmp_path, name, content):
    folder = tmp_path / "run" / "shards"
    preprocess.run(configure(data), tmp_path / "run")
    whole = contents(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        store.Shards(folder)
    assert str(caught.value).startswith(f"{folder / name}: damaged (")
    assert "`preprocess`" in str(caught.value)
    preprocess.run(configure(data), tmp_path / "run")
    assert contents(tmp_path / "run") == whole


def test_records_without_a_digest_are_checked_against_the_shard_itself(damaged):
    """As versions before this one have written them; one of the shards has a flipped byte."""

    def age(workdir):
        for path in (workdir / "shards" / "manifest.json", *(workdir / "written").iterdir()):
            found = json.loads(path.read_text())
            for row in found.values() if path.name == "manifest.json" else [found]:
                del row["sha256"], row["seal"]
            path.write_text(json.dumps(found))
        path = workdir / "shards" / min(names(4))
        flip(path, path.stat().st_size // 2)

    again, said = damaged(age)
    assert again == names(4)
    (line,) = said
    assert f"{min(names(4))}: damaged (" in line


def test_facts_with_any_byte_flipped_are_as_they_were_or_none(data, tmp_path, caplog):
    case = next(iter(MSD(data).cases()))
    settings = {"num_classes": 3, "modality": "mr", "crop_hu": None}
    facts, key = preprocess.fingerprint_case(case, **settings), facts_file.key(case, settings)
    facts_file.save(tmp_path / "looked", case, key, facts)
    (path,) = (tmp_path / "looked").rglob("*.npz")
    whole, lost = path.read_bytes(), 0
    for at in [*range(0, len(whole), 31), *range(len(whole) - 90, len(whole))]:
        path.write_bytes(whole)
        flip(path, at)
        caplog.clear()
        found = facts_file.load(tmp_path / "looked", case, key)
        if found is None:
            lost += 1
            assert not path.exists()
            assert f"{path}: damaged (" in caplog.text
        else:
            assert found.foreground.tobytes() == facts.foreground.tobytes()
            assert found.source_sha256 == facts.source_sha256
    assert lost > 50


# What the disk said no to.


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(
    data, tmp_path, serial, disk, processes
):
    small = 3 * max(len(content) for content in serial.values())
    folder = disk(f"size={small}")
    config = configure(data, shards=str(folder / "shards"), processes=processes)
    with pytest.raises(faults.WriteError, match="No space left") as caught:
        preprocess.run(config, tmp_path / "run")
    said = faults.explain(caught.value)
    assert f"{folder}/shards/" in said
    assert "no space left on the device (" in said
    assert ".tmp" not in said
    assert not list(folder.rglob(".*"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/shard-*")}
    disk("size=20m", again=True)
    preprocess.run(config, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == serial
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/shard-*")}
    assert before.items() <= after.items()


def test_a_disk_full_of_facts_ends_in_one_line(data, tmp_path, disk):
    folder = disk("size=1m,nr_inodes=8")
    with pytest.raises(faults.WriteError) as caught:
        preprocess.run(configure(data), folder / "run")
    assert "no inode left on the device (8 files is all it holds)" in faults.explain(caught.value)
    assert not list(folder.rglob(".*"))


def test_the_verb_says_one_line_and_exits_with_1(data, disk):
    folder = disk("ro,size=1m")
    command = [*(sys.executable, "-m", "bhsd_jax.main", "preprocess")]
    command += flags(configure(data), folder / "run")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"preprocess: {folder / 'run'}: cannot be written: the file system is read-only; choose "
        "another folder, or mount it for writing. What was there before is as it was"
    )
