"""The programs of `launch/`: what they make of their options, and what Slurm is told."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bhsd_jax.experiments import folds, launch, paper_tables, queue, sweep

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream


def swept(tmp_path, *words):
    given = ["--config=configs/cps.py:smoke", f"--out={tmp_path}", *words]
    return sweep.make_study(sweep._parser().parse_args(given))


def test_a_grid_has_every_combination():
    assert sweep.grid(["optimizer.lr=0.1,0.01", "input.patch=(8,32,32),(8,64,64)"]) == {
        "lr=0.1,patch=_8,32,32": ("optimizer.lr=0.1", "input.patch=(8,32,32)"),
        "lr=0.1,patch=_8,64,64": ("optimizer.lr=0.1", "input.patch=(8,64,64)"),
        "lr=0.01,patch=_8,32,32": ("optimizer.lr=0.01", "input.patch=(8,32,32)"),
        "lr=0.01,patch=_8,64,64": ("optimizer.lr=0.01", "input.patch=(8,64,64)"),
    }
    for wrong in ([], ["lr"], ["lr="]):
        with pytest.raises(ValueError, match="FIELD=A,B,C"):
            sweep.grid(wrong)
    with pytest.raises(ValueError, match=r"two settings are called lr=1"):
        sweep.grid(["optimizer.lr=1,1"])


def test_a_list_has_a_setting_per_line(tmp_path):
    path = tmp_path / "list"
    path.write_text(
        "# weights\nplain\nw02 --config.objective.weight=0.2 train.steps=5\n"
        "\nobjective.weight=1.0\n"
    )
    assert sweep.read_list(path) == {
        "plain": (),
        "w02": ("objective.weight=0.2", "train.steps=5"),
        "weight=1.0": ("objective.weight=1.0",),
    }
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no setting in it"):
        sweep.read_list(path)


def test_a_sweep_sets_fields_and_seeds_and_shares_what_it_can(tmp_path):
    made = swept(tmp_path, "objective.weight=0.2,1.0", "--seeds=3,5", "-o", "train.steps=2")
    settings = [
        (r.config.objective["weight"], r.config.seed, r.config.train.steps) for r in made.runs
    ]
    assert settings == [(0.2, 3, 2), (1.0, 3, 2), (0.2, 5, 2), (1.0, 5, 2)]
    assert len({run.config.preprocess.shards for run in made.runs}) == 1
    assert len({run.workdir for run in made.runs}) == 4
    assert made.baseline == "weight=0.2"
    assert made.rows["weight=1.0"].title == "objective.weight=1.0"
    assert made.smoke
    other = swept(tmp_path, "preprocess.spacing_mm=(16.0,4.0,4.0),(8.0,4.0,4.0)", "--seeds=0")
    assert len({run.config.preprocess.shards for run in other.runs}) == 2
    own = swept(tmp_path, "train.steps=1,2", "--seeds=0", "--shards=/made/before")
    assert {run.config.preprocess.shards for run in own.runs} == {"/made/before"}


def test_validation_scans_are_not_tested_with_the_checkpoint_they_chose(tmp_path):
    words = ["--config=configs/supervised.py:smoke", f"--out={tmp_path}", "train.steps=2"]
    for given, want in (
        (["-o", "predict.split=val"], "last"),
        (["-o", "predict.split=val", "-o", "predict.checkpoint=best"], "best"),
        ([], "best"),  # of the test scans
    ):
        options = sweep._parser().parse_args([*words, "--seeds=0", *given])
        (run,) = sweep.make_study(options).runs
        assert run.config.predict.checkpoint == want
        assert queue.resolve(run.arguments) == run.config


def test_a_sweep_that_no_table_compares_is_refused_before_it_is_trained(tmp_path):
    """It was trained whole, and then no report could be written."""
    words = ["split.fold=0,1", "--seeds=0"]
    assert len(swept(tmp_path, *words).runs) == 2  # all tested on the same scans
    with pytest.raises(ValueError, match=r"folds 0, 1 are each scored .* launch/folds"):
        swept(tmp_path, *words, "--override=predict.split=val")
    for field, values in (
        ("split.binary", "True,False"),
        ("evaluate.split", "test,val"),
        (":data", "synthetic,folder"),
    ):
        with pytest.raises(ValueError, match="scored on other scans or classes"):
            swept(tmp_path, f"{field}={values}", "--seeds=0")


def test_a_sweep_varies_words_of_the_config_too(tmp_path):
    made = swept(tmp_path, ":recipe=nnunet,fast", "optimizer.lr=0.1,0.2", "--seeds=0")
    told = [(run.config.optimizer["name"], run.config.optimizer["lr"]) for run in made.runs]
    assert told == [("sgd", 0.1), ("sgd", 0.2), ("muon", 0.1), ("muon", 0.2)]
    assert list(made.rows)[2] == "recipe=fast,lr=0.1"
    assert made.runs[2].arguments[0] == "--config=configs/cps.py:smoke,recipe=fast"
    path = tmp_path / "list"
    path.write_text("whole :recipe=nnunet train.steps=8\nhalf :recipe=fast train.steps=4\n")
    listed = swept(tmp_path, f"--list={path}", "--seeds=0").runs
    told = [(run.row, run.config.optimizer["name"], run.config.train.steps) for run in listed]
    assert told == [("whole", "sgd", 8), ("half", "muon", 4)]
    with pytest.raises(ValueError, match="recipe=slow is not known; choose from published, nnunet"):
        swept(tmp_path, ":recipe=slow", "--seeds=0")


def test_wrong_options_are_one_line(tmp_path):
    for words, message in (
        (["train.step=1"], 'Did you mean "steps"'),
        (["train.steps=1", "--seeds=a"], "whole numbers like 0,1,2; got 'a'"),
        (["train.steps=1", "-o", "steps"], "FIELD=VALUE"),
        (["train.steps=1", "--list=x"], "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            swept(tmp_path, *words)
    with pytest.raises(ValueError, match="no nothing; table1 has unetr, swin_unetr"):
        paper_tables.cli(["table1", "--rows=nothing", "--dry-run"])


def test_a_field_that_a_program_sets_for_each_run_is_refused(tmp_path):
    """One of the two values would be dropped: rows `seed=5` and `seed=6` were the same runs."""
    smoke = "--config=configs/supervised.py:smoke"
    for program, words, option in (
        (sweep.cli, [smoke, "seed=5,6"], "--seeds"),
        (sweep.cli, [smoke, "train.steps=2,3", "-o", "config.seed=7"], "--seeds"),
        (paper_tables.cli, ["table2", "--smoke", "-o", "seed=7"], "--seeds"),
        (folds.cli, [smoke, "-o", "split.fold=1"], "--folds"),
        (folds.cli, [smoke, "-o", "predict.split=test"], "launch/folds, to the validation cases"),
    ):
        with pytest.raises(ValueError, match=f"is set for each run by {option}"):
            program([*words, "--dry-run", f"--out={tmp_path}"])
    listed = tmp_path / "list"
    listed.write_text("a seed=5\n")
    with pytest.raises(ValueError, match="seed=5: seed is set for each run by --seeds"):
        swept(tmp_path, f"--list={listed}")


def test_a_dry_run_lists_commands_and_states(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    assert (
        paper_tables.cli(
            ["table3", "--root=/data", "--preset=ssl4mis", f"--out={out}", "--dry-run"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 10
    assert lines[0] == "# 0-0, seed 0: new"
    assert lines[1].startswith(
        "bhsd train --config=configs/table3.py:0-0,seed=0,data=bhsd,preset=ssl4mis "
        "--config.data.root=/data --config.preprocess.shards="
    )
    assert not out.exists()


def test_each_table_has_its_folder():
    for words, want in (
        (["table1"], "runs/table1"),
        (["table2", "--preset=ssl4mis"], "runs/table2-ssl4mis"),
        (["table2", "--smoke"], "runs/table2-smoke"),
        (["table3", "--data=synthetic"], "runs/table3-synthetic"),
    ):
        options = paper_tables._parser().parse_args(words)
        paper_tables._make_out(options)
        assert str(options.out) == want


SBATCH = """#!/bin/sh
n=$(cat {0}/count 2>/dev/null || echo 100); n=$((n + 1)); echo $n > {0}/count
printf '%s|' "$@" >> {0}/jobs; echo >> {0}/jobs
echo "$n;cluster"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm that writes down what it is asked."""
    scripts = {"sbatch": SBATCH.format(tmp_path), "squeue": "#!/bin/sh\necho table2-s0\n"}
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return tmp_path


def test_slurm_gets_shards_then_runs_then_the_report(cluster):
    words = ["table2", "--smoke", "--rows=suponly,cps", "--seeds=1", f"--out={cluster / 'table2'}"]
    assert paper_tables.cli([*words, "--slurm=--partition=gpu --gpus-per-node=1"]) == 0
    shards, first, second, report = (
        line.split("|")[:-1] for line in (cluster / "jobs").read_text().splitlines()
    )
    (series,) = re.findall(r"^--job-name=(table2-[0-9a-f]{6})-shards$", "\n".join(shards), re.M)
    for job in (shards, report):
        assert {"--partition=gpu", "--gpus-per-node=1", "--nodes=1", "--ntasks=1"} <= set(job)
    assert any("bhsd_jax.main preprocess" in word for word in shards)
    for job, row in ((first, "suponly"), (second, "cps")):
        assert {
            "--dependency=afterok:101",
            "--kill-on-invalid-dep=yes",
            "--partition=gpu",
            "--gpus-per-node=1",
        } <= set(job)
        assert f"--job-name={series}-{row}-s1" in job
        at = job.index("launch/slurm.sh")
        assert job[at + 1] == "--after=predict evaluate report"
        assert job[at + 2].startswith(f"--config=configs/table2.py:{row},seed=1")
        assert job[-1] == f"--workdir={cluster / 'table2' / row / 'seed1'}"
    assert "--dependency=afterany:102:103" in report
    assert report[-1].endswith("--report-only")
    # What that job does: it submits nothing.
    assert paper_tables.cli([*words, "--slurm=--partition=gpu", "--report-only"]) == 0
    assert len((cluster / "jobs").read_text().splitlines()) == 4
    assert (cluster / "table2" / "report.html").is_file()


def test_what_is_queued_or_finished_is_not_submitted_again(cluster, make, finish):
    words = ["table2", "--smoke", "--rows=suponly,cps", "--seeds=1"]
    here, there = (f"--out={cluster / name / 'table2'}" for name in ("a", "b"))
    made = paper_tables.make_study(
        paper_tables.importlib.import_module("bhsd_jax.configs.table2").TABLE,
        parsed([*words, here]),
    )
    finish(made.runs[0], [(1, 0, 0)])
    assert paper_tables.cli([*words, here, "--slurm"]) == 0
    titles = submitted(cluster)
    assert [title.partition("-")[2][7:] for title in titles] == ["shards", "cps-s1", "report"]
    lines = "".join(f"echo '{title}  '\n" for title in titles)
    (cluster / "bin" / "squeue").write_text(f"#!/bin/sh\n{lines}")
    assert paper_tables.cli([*words, here, "--slurm"]) == 0
    assert submitted(cluster) == titles, "it is queued"
    # Another series, whose folder has the same name.
    assert paper_tables.cli([*words, there, "--slurm"]) == 0
    others = submitted(cluster)[len(titles) :]
    assert len(others) == 4
    assert not set(others) & set(titles)


def test_shards_without_refused_scans_are_made_again_on_slurm_too(cluster):
    words = ["table2", "--smoke", "--rows=cps", "--seeds=1", f"--out={cluster / 'table2'}"]
    table = paper_tables.importlib.import_module("bhsd_jax.configs.table2").TABLE
    (run,) = paper_tables.make_study(table, parsed(words)).runs
    shards = Path(run.config.preprocess.shards)
    shards.mkdir(parents=True)
    (shards / "index.json").touch()
    (shards.parent / "skipped.csv").touch()
    assert paper_tables.cli([*words, "--slurm"]) == 0
    kinds = [title.partition("-")[2][7:] for title in submitted(cluster)]
    assert kinds == ["shards", "cps-s1", "report"]
    assert paper_tables.cli([*words, "--slurm", "-o", "preprocess.allow_skipped=True"]) == 0
    kinds = [title.partition("-")[2][7:] for title in submitted(cluster)[3:]]
    assert kinds == ["cps-s1", "report"]


def test_a_folder_of_another_config_is_a_failure_on_slurm_too(cluster, capsys):
    words = ["table2", "--smoke", "--rows=suponly,cps", "--seeds=1", f"--out={cluster / 'table2'}"]
    folder = cluster / "table2" / "cps" / "seed1"
    folder.mkdir(parents=True)
    table = paper_tables.importlib.import_module("bhsd_jax.configs.table2").TABLE
    other = paper_tables.make_study(table, parsed([*words, "-o", "train.steps=7"])).runs[1]
    (folder / "config.json").write_text(json.dumps(queue.plain(other.config)))
    assert paper_tables.cli([*words, "--slurm"]) == 1
    kinds = [title.partition("-")[2][7:] for title in submitted(cluster)]
    assert kinds == ["shards", "suponly-s1", "report"], "the others are submitted"
    assert "failed: cps, seed 1: " in (said := capsys.readouterr().err)
    assert "train.steps (7 -> " in said


def submitted(cluster):
    """Titles of the jobs so far."""
    return re.findall(r"\|--job-name=([^|]*)\|", (cluster / "jobs").read_text())


def test_the_report_of_a_series_knows_what_failed_in_a_job(cluster):
    words = ["table2", "--smoke", "--rows=suponly,cps", "--seeds=1", f"--out={cluster / 'table2'}"]
    folder = cluster / "table2" / "cps" / "seed1"
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text('{"verb": "predict", "log": "slurm-7.log"}\n')
    assert paper_tables.cli([*words, "--report-only"]) == 0
    text = (cluster / "table2" / "report.md").read_text()
    assert "cps, seed 1: predict failed; cps/seed1/slurm-7.log says why" in text
    assert re.search(r"^\| CPS \|.*\| failed \|", text, re.M)
    assert re.search(r"^\| SupOnly \|.*\| not run \|", text, re.M)


def parsed(words):
    options = paper_tables._parser().parse_args(words)
    paper_tables._make_out(options)
    return options


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no `sbatch` on the PATH"):
        paper_tables.cli(["table2", "--smoke", f"--out={tmp_path}", "--slurm"])


@pytest.fixture
def job(tmp_path):
    """Runs `launch/slurm.sh` as job 7 with verbs that only note what they were given."""
    home = tmp_path / "home"
    (home / "tools").mkdir(parents=True)
    # A shell option that it leaves behind must not end the job before it is queued again.
    (home / "tools" / "env").write_text("set -e\n")

    def run(lines, *words, after=(), workdir="", **more):
        programs = {
            "srun": '#!/bin/sh\nwhile [ "$1" != python ]; do shift; done\n"$@"\n',
            "squeue": "#!/bin/sh\necho RUNNING\n",
            "python": f'#!/bin/sh\nshift 2; echo "$*" >> calls\n{lines}\n',
            "scontrol": "#!/bin/sh\ntouch requeued\n",
        }
        for name, text in programs.items():
            (home / name).write_text(text)
            (home / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{home}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(home),
            "SLURM_JOB_ID": "7",
            "BHSD_AFTER": "predict evaluate report",
            **more,
        }
        for name in ("calls", "requeued"):
            (home / name).unlink(missing_ok=True)
        done = subprocess.run(
            [
                "bash",
                ROOT / "launch" / "slurm.sh",
                *after,
                "--config=x",
                f"--workdir={workdir or tmp_path}",
                *words,
            ],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        calls = (home / "calls").read_text().splitlines() if (home / "calls").exists() else []
        return done, [call.split() for call in calls], (home / "requeued").exists()

    return run


def test_the_job_keeps_its_notes_in_a_run_folder_at_home(job, tmp_path):
    """As `sbatch launch/slurm.sh --workdir=~/runs/x` has it: no shell expands that."""
    done, _, _ = job("exit 1", workdir="~/runs/x", HOME=str(tmp_path))
    assert done.returncode == 1
    noted = {path.name for path in (tmp_path / "runs" / "x").iterdir()}
    assert noted == {".slurm-starts", "failed.json"}


@pytest.mark.parametrize(
    ("codes", "code", "verbs", "requeued"),
    [  # tests/slurm runs it on a real Slurm
        ({}, 0, ["train", "predict", "evaluate", "report"], False),
        ({"train": 75}, 75, ["train"], True),
        ({"train": 1}, 1, ["train"], False),
        ({"predict": 143}, 75, ["train", "predict"], True),
        ({"evaluate": 1}, 1, ["train", "predict", "evaluate"], False),
    ],
)
def test_the_job_runs_verb_after_verb(job, tmp_path, codes, code, verbs, requeued):
    (tmp_path / "slurm-7.log").touch()
    cases = "".join(f"{verb}) exit {number};; " for verb, number in codes.items())
    done, calls, again = job(f'case "$1" in {cases} *) exit 0;; esac')
    assert done.returncode == code, done.stderr
    assert [words[0] for words in calls] == verbs
    assert again == requeued
    if code == 1:  # the report of a series is told
        noted = json.loads((tmp_path / "failed.json").read_text())
        assert noted == {"verb": verbs[-1], "log": "slurm-7.log"}
        job("exit 0")
    assert not (tmp_path / "failed.json").exists()


def test_what_is_told_to_the_job_itself_needs_no_variable(job):
    """As with `sbatch --export=NONE`, which hands none on."""
    done, calls, _ = job("exit 0", after=["--after=predict report"], BHSD_AFTER="")
    assert done.returncode == 0, done.stderr
    assert [words[0] for words in calls] == ["train", "predict", "report"]
    assert not any("--after" in word for words in calls for word in words)
    _, calls, _ = job("exit 0", after=["--after="])  # comes before the variable
    assert [words[0] for words in calls] == ["train"]


MAP = (
    'mkdir -p "$MAPS"; [ "$1" != predict ] || {{ sleep 0.05; touch "$MAPS/{}.nii.gz"; exit 143; }}'
)


@pytest.mark.parametrize("out", ["", "elsewhere"])
def test_a_job_that_comes_back_goes_on_with_its_predictions(job, tmp_path, out):
    folder = tmp_path / (out or "predictions")
    given = [f"--config.predict.out={folder}"] if out else []
    maps, kept = {"MAPS": str(folder)}, "--config.predict.overwrite=False"
    folder.mkdir()
    (folder / "old.nii.gz").touch()  # of another network, perhaps
    os.utime(folder / "old.nii.gz", (1, 1))

    def predicts(lines, *words, count, **more):
        done, calls, _ = job(lines, *given, *words, SLURM_RESTART_COUNT=count, **maps, **more)
        assert all(kept not in call for call in calls if call[0] != "predict")
        return done, next((call for call in calls if call[0] == "predict"), [])

    assert kept not in predicts(MAP.format("a"), count="0")[1]
    assert kept in predicts(MAP.format("b"), count="1")[1]
    user = "--config.predict.overwrite=True"
    call = predicts(MAP.format("c"), user, count="2")[1]
    assert (user in call, kept in call) == (True, False)
    # Another job begins anew, also one that came back while it trained.
    assert kept not in predicts("exit 0", count="0", SLURM_JOB_ID="8")[1]
    job("exit 75", *given, SLURM_JOB_ID="9", SLURM_RESTART_COUNT="0", **maps)
    assert kept not in predicts("exit 0", count="1", SLURM_JOB_ID="9")[1]


def test_label_maps_that_are_written_again_are_no_progress_twice(job, tmp_path):
    maps = {"MAPS": str(tmp_path / "predictions")}
    for name in ("a", "b"):  # left by an earlier job
        (tmp_path / "predictions").mkdir(exist_ok=True)
        (tmp_path / "predictions" / f"{name}.nii.gz").touch()
        os.utime(tmp_path / "predictions" / f"{name}.nii.gz", (1, 1))
    for count, name in enumerate(("a", "b", "b", "b", "b", "b", "b")):
        done, _, _ = job(MAP.format(name), SLURM_RESTART_COUNT=str(count), **maps)
        if done.returncode != 75:
            break
    # `a` and `b` in place of others are progress; then three starts without any, and the end.
    assert (done.returncode, count) == (2, 6), done.stderr
    assert "started again 4 times without a newer checkpoint" in done.stderr
    assert json.loads((tmp_path / "failed.json").read_text())["verb"] == "predict"


def test_shards_that_cannot_be_made_are_one_line(tmp_path):
    words = ["table2", "--rows=cps", "--seeds=0", f"--root={tmp_path / 'none'}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bhsd_jax.experiments.paper_tables",
            *words,
            f"--out={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("paper_tables: preprocess failed, no run was started: preprocess: ")
    assert "none" in last
    assert "Traceback" not in done.stderr


def test_shards_depend_on_what_they_hold_alone(tmp_path):
    words = ["--config=configs/cps.py:data=bhsd"]
    config = queue.resolve(words)
    same = queue.resolve([*words, "--config.preprocess.processes=3", "--config.train.steps=1"])
    moved = queue.resolve([*words, "--config.data.root=/other"])
    finer = queue.resolve([*words, "--config.preprocess.spacing_mm=(2.5, 0.5, 0.5)"])
    folder = launch.data_folder(config, tmp_path)
    assert folder == launch.data_folder(same, tmp_path)
    assert folder != launch.data_folder(moved, tmp_path)
    assert folder != launch.data_folder(finer, tmp_path)


def test_a_machine_with_several_gpus_gets_as_many_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    runs = swept(tmp_path, "objective.weight=0.2,1.0", "--seeds=0,1").runs

    def chosen(runs, jobs=None):
        return [p.environment.get("CUDA_VISIBLE_DEVICES") for p in launch._places(runs, jobs)]

    assert chosen(runs) == ["0", "1", "2"]
    assert chosen(runs[:2]) == ["0", "1"], "no more places than runs"
    assert chosen(runs, 1) == [None], "one run has them all"
    assert chosen(runs, 2) == ["0", "1"]
    with pytest.raises(ValueError, match="--jobs: 9 processes do not fit 3 GPUs"):
        launch._places(runs, 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert chosen(runs) == [None], "on CPUs one after the other, unless asked"
    assert len(launch._places(runs, 2)) == 2
    with pytest.raises(ValueError, match="--jobs: Slurm decides"):
        paper_tables.cli(["table2", "--smoke", f"--out={tmp_path}", "--slurm", "--jobs=2"])


def test_paths_are_those_of_the_folder_it_is_called_in(tmp_path, capsys, monkeypatch):
    for program, words in (
        (paper_tables, ["table2", "--root=BHSD", "--out=out"]),
        (sweep, ["--config=configs/cps.py:data=bhsd", "train.steps=1,2"]),
    ):
        monkeypatch.chdir(tmp_path)  # the program leaves it
        assert program.cli([*words, "--shards=made/shards", "--dry-run"]) == 0
        first = capsys.readouterr().out.splitlines()[1]
        assert f"--config.preprocess.shards={tmp_path}/made/shards" in first
        if program is paper_tables:
            assert f"--config.data.root={tmp_path}/BHSD" in first
            assert f"--workdir={tmp_path}/out/" in first


def test_a_config_is_named_as_a_verb_takes_it_from_any_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("from bhsd_jax.configs.cps import get_config\n")
    dry = ["--dry-run", "--seeds=0", f"--out={tmp_path / 'out'}"]
    for program, given, named in (
        (sweep, ["--config=cps:smoke"], "configs/cps.py:smoke"),
        (sweep, ["--config", "configs/cps.py:smoke"], "configs/cps.py:smoke"),
        (sweep, ["--config=mine.py:smoke"], f"{tmp_path}/mine.py:smoke"),
        (folds, ["--config=own=mine.py:smoke"], f"{tmp_path}/mine.py:smoke"),
        (folds, ["--config", "supervised:smoke"], "configs/supervised.py:smoke"),
    ):
        monkeypatch.chdir(tmp_path)  # the program leaves it
        fields = ["train.steps=1"] if program is sweep else ["--folds=0"]
        assert program.cli([*given, *fields, *dry]) == 0
        title, command = capsys.readouterr().out.splitlines()
        assert f"bhsd train --config={named} " in command
        if "own" in given[0]:
            assert title.startswith("# own/fold0, ")
    monkeypatch.chdir(tmp_path)
    (words,) = launch.find_configs(["--config=from_run:runs/cps,infer=fast"])
    assert words == f"--config=configs/from_run.py:{tmp_path}/runs/cps,infer=fast"
    with pytest.raises(ValueError, match="no experiment of this name, did you mean cps"):
        sweep.cli(["--config=cpss:smoke", "train.steps=1"])


def test_the_report_of_a_series_on_slurm_finds_the_same_configs(cluster, monkeypatch):
    (cluster / "mine.py").write_text("from bhsd_jax.configs.cps import get_config\n")
    monkeypatch.chdir(cluster)
    words = ["--config=own=mine.py:smoke", "--config=cps:smoke", "--folds=0", "--out=series"]
    assert folds.cli([*words, "--slurm"]) == 0
    *_, report = (cluster / "jobs").read_text().splitlines()
    (line,) = re.findall(r"--wrap=(.*)\|", report)
    assert line.startswith(f"cd {ROOT} && ")
    assert re.findall(r"--config=(\S*)", line) == [
        f"own={cluster}/mine.py:smoke",
        "configs/cps.py:smoke",
    ]
