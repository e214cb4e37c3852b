"""The programs of `launch/`: what they make of their options, and what Slurm is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bhsd_jax.experiments import launch, paper_tables, queue, sweep

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
printf '%s|' "$BHSD_AFTER" "$@" >> {0}/jobs; echo >> {0}/jobs
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
    assert "--job-name=table2-shards" in shards
    for job in (shards, report):
        assert {"--partition=gpu", "--gpus-per-node=1", "--nodes=1", "--ntasks=1"} <= set(job)
    assert any("bhsd_jax.main preprocess" in word for word in shards)
    for job, row in ((first, "suponly"), (second, "cps")):
        assert job[0] == "predict evaluate report"
        assert {
            "--dependency=afterok:101",
            "--kill-on-invalid-dep=yes",
            "--partition=gpu",
            "--gpus-per-node=1",
        } <= set(job)
        assert f"--job-name=table2-{row}-s1" in job
        at = job.index("launch/slurm.sh")
        assert job[at + 1].startswith(f"--config=configs/table2.py:{row},seed=1")
        assert job[-1] == f"--workdir={cluster / 'table2' / row / 'seed1'}"
    assert "--dependency=afterany:102:103" in report
    assert report[-1].endswith("--report-only")
    # What that job does: it submits nothing.
    assert paper_tables.cli([*words, "--slurm=--partition=gpu", "--report-only"]) == 0
    assert len((cluster / "jobs").read_text().splitlines()) == 4
    assert (cluster / "table2" / "report.html").is_file()


def test_what_is_queued_or_finished_is_not_submitted_again(cluster, make, finish):
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\necho table2-cps-s1\n")
    words = ["table2", "--smoke", "--rows=suponly,cps", "--seeds=1", f"--out={cluster / 'table2'}"]
    made = paper_tables.make_study(
        paper_tables.importlib.import_module("bhsd_jax.configs.table2").TABLE, parsed(words)
    )
    finish(made.runs[0], [(1, 0, 0)])
    assert paper_tables.cli([*words, "--slurm"]) == 0
    assert not (cluster / "jobs").exists()


def parsed(words):
    options = paper_tables._parser().parse_args(words)
    paper_tables._make_out(options)
    return options


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no `sbatch` on the PATH"):
        paper_tables.cli(["table2", "--smoke", f"--out={tmp_path}", "--slurm"])


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
def test_the_job_runs_verb_after_verb(tmp_path, codes, code, verbs, requeued):
    (tmp_path / "tools").mkdir()
    # A shell option that it leaves behind must not end the job before it is queued again.
    (tmp_path / "tools" / "env").write_text("set -e\n")
    cases = "".join(f"{verb}) exit {number};; " for verb, number in codes.items())
    programs = {
        "srun": '#!/bin/sh\nwhile [ "$1" != python ]; do shift; done\n"$@"\n',
        "squeue": "#!/bin/sh\necho RUNNING\n",
        "python": f'#!/bin/sh\necho "$3" >> verbs\ncase "$3" in {cases} *) exit 0;; esac\n',
        "scontrol": "#!/bin/sh\ntouch requeued\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "BHSD_AFTER": "predict evaluate report",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh"), "--config=x", f"--workdir={tmp_path}"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "verbs").read_text().split() == verbs
    assert (tmp_path / "requeued").exists() == requeued


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


def test_paths_are_those_of_the_folder_it_is_called_in(tmp_path):
    for words in (
        ["paper_tables", "table2", "--root=BHSD", "--shards=made/shards", "--out=out"],
        ["sweep", "--config=configs/cps.py:data=bhsd", "train.steps=1,2", "--shards=made/shards"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"bhsd_jax.experiments.{words[0]}", *words[1:], "--dry-run"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        )
        first = done.stdout.splitlines()[1]
        assert f"--config.preprocess.shards={tmp_path}/made/shards" in first
        if words[0] == "tables":
            assert f"--config.data.root={tmp_path}/BHSD" in first
            assert f"--workdir={tmp_path}/out/" in first
