"""Jobs as the README submits them, on a real Slurm of two nodes: saved, queued again, finished.

`tests/slurm/cluster` starts the daemons on this machine; that needs root and Debian's slurm-wlm.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests" / "slurm" / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
LACKING = [
    name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"a real Slurm is needed; no {', '.join(LACKING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of a Slurm need root"),
]

CONFIG = (
    "--config=configs/suponly.py:smoke",
    "--config.train.log_every=5",
    "--config.train.validate_every=240",
    "--config.train.save_every=240",
    "--config.train.steps=240",
)
CPUS = ("--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running Slurm; the environment its commands need."""
    folder = Path("/tmp") / f"bhsd-slurm-{os.getpid()}"  # sockets need a short path
    environment = os.environ | {
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
    }
    environment.pop("XLA_FLAGS", None)
    try:
        subprocess.run(
            [CLUSTER, "start", folder], env=environment, check=True, timeout=120, text=True
        )
        yield environment
    finally:
        subprocess.run([CLUSTER, "stop", folder], env=environment, check=False, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "bhsd_jax.main", "preprocess", *CONFIG]
    subprocess.run([*command, f"--workdir={folder}"], cwd=ROOT, check=True)
    return f"--config.preprocess.shards={folder / 'shards'}"


def say(cluster, *command, cwd=ROOT):
    done = subprocess.run(
        command, env=cluster, cwd=cwd, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def submit(cluster, workdir, *words, options=(), script="launch/slurm.sh", cwd=ROOT):
    workdir.mkdir(parents=True, exist_ok=True)
    log = f"--output={workdir}/slurm.log"
    command = ("sbatch", "--parsable", log, *CPUS, *options, script)
    return say(cluster, *command, *words, f"--workdir={workdir}", cwd=cwd)


def state(cluster, job):
    """`PENDING`, `RUNNING`, ..., with `x0:15` what became of it."""
    told = say(cluster, "scontrol", "--oneliner", "show", "job", job)
    fields = dict(word.partition("=")[::2] for word in told.split() if "=" in word)
    return fields["JobState"], fields["ExitCode"], int(fields["Restarts"])


def wait_until(condition, seconds, workdir):
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            log = workdir / "slurm.log"
            pytest.fail(log.read_text() if log.is_file() else "no log")
        time.sleep(0.2)


def finished(cluster, job, workdir, seconds=600):
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait_until(lambda: state(cluster, job)[0] in ends, seconds, workdir)
    return state(cluster, job)


def parameters(workdir):
    """What was saved at the last step."""
    steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()]
    folder = max(steps, key=lambda p: int(p.name)) / "state"
    with ocp.StandardCheckpointer() as reader:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        known = reader.metadata(folder)
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            known.item_metadata.tree,
        )
        return reader.restore(folder, target)["params"]


def logged(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_asked_to_stop_it_is_queued_again_and_ends_as_the_uninterrupted_run(
    cluster, shards, tmp_path
):
    whole, parted = tmp_path / "whole run", tmp_path / "parted run"  # with a space
    first = submit(cluster, whole, *CONFIG, shards, options=["--nodes=2"])
    assert finished(cluster, first, whole)[:2] == ("COMPLETED", "0:0")

    job = submit(cluster, parted, *CONFIG, shards, options=["--nodes=2"])
    for times, how in enumerate((["--signal=TERM"], ["--batch", "--signal=TERM"]), start=1):
        before = logged(parted)
        wait_until(lambda n=before: logged(parted) > n + 2, 300, parted)
        say(cluster, "scancel", *how, job)
        wait_until(lambda n=times: state(cluster, job)[2] == n, 120, parted)
    assert finished(cluster, job, parted)[:2] == ("COMPLETED", "0:0")
    log = (parted / "slurm.log").read_text()
    assert "process 0 of 2" in log
    assert log.count("start the same command again to go on") >= 2
    assert log.count("resuming after step") >= 2
    jax.tree.map(np.testing.assert_array_equal, parameters(whole), parameters(parted))


def test_at_its_time_limit_it_saves_and_goes_on(cluster, shards, tmp_path):
    workdir = tmp_path / "run"
    long = [*CONFIG, "--config.train.steps=1000000", "--config.train.validate_every=1000000"]
    # Slurm looks at the clock every 30 s, and its limits are whole minutes.
    options = ["--time=3", "--signal=TERM@60"]
    job = submit(cluster, workdir, *long, shards, options=options)
    wait_until(lambda: state(cluster, job)[2] == 1, 300, workdir)
    assert "saved step" in (workdir / "slurm.log").read_text()
    wait_until(lambda: "resuming after step" in (workdir / "slurm.log").read_text(), 300, workdir)
    say(cluster, "scancel", job)  # a person's word is the last: it is not queued again
    assert finished(cluster, job, workdir)[0] == "CANCELLED"
    time.sleep(3)
    assert state(cluster, job)[0] == "CANCELLED"


SCRIPTED = """#!/usr/bin/env bash
[ "$3" = train ] || { echo "$3" >>"$WORK/verbs"; exit 0; }
cd / && PYTHONPATH=ROOT REAL -c "from bhsd_jax.platform import cluster; p = cluster.find(); \
print(p.index, p.count, p.coordinator)" >"$WORK/told$SLURM_PROCID" && cd - >/dev/null
echo "$(cat "$WORK/told$SLURM_PROCID") $SLURM_CPUS_PER_TASK $(pwd) [$BHSD_EXTRAS]" >>"$WORK/tasks"
"""


@pytest.fixture
def scripted(tmp_path, cluster):
    """A repository of this very `launch/`, whose verbs are lines of shell."""

    def made(lines):
        home = tmp_path / "some where"
        (home / "tools").mkdir(parents=True)
        shutil.copytree(ROOT / "launch", home / "launch")
        (home / "bin").mkdir()
        python = home / "bin" / "python"
        text = SCRIPTED.replace("$WORK", str(tmp_path)).replace("ROOT", str(ROOT))
        python.write_text(text.replace("REAL", sys.executable) + lines)
        python.chmod(0o755)
        env = home / "tools" / "env"
        env.write_text(f'set -e\nexport PATH="{home}/bin:$PATH"\n')  # leaves an option behind
        return home

    return made


def test_each_process_knows_its_number_and_where_to_meet(cluster, scripted, tmp_path):
    home, workdir = scripted("exit 0"), tmp_path / "run"
    # Told on the command line what to hand on: nothing else of our environment arrives.
    options = ["--nodes=2", "--cpus-per-task=2", "--export=BHSD_AFTER=predict evaluate report"]
    job = submit(cluster, workdir, "--config=x", options=options, cwd=home)
    assert finished(cluster, job, workdir)[:2] == ("COMPLETED", "0:0")
    meeting = f"127.0.0.1:{61440 + int(job) % 4096}"
    tasks = sorted((tmp_path / "tasks").read_text().splitlines())
    assert tasks == [f"{index} 2 {meeting} 2 {home} []" for index in range(2)]
    # Processes share the scans; the report is written by one.
    verbs = (tmp_path / "verbs").read_text().split()
    assert verbs == ["predict", "predict", "evaluate", "evaluate", "report"]


@pytest.mark.parametrize(
    ("lines", "code", "restarts", "word"),
    [
        ("exit 3", 3, 0, ""),
        ("[ $SLURM_PROCID = 0 ] || exit 9\nsleep 200", None, 0, "Killed"),
        ("exit 75", 2, 4, "started again 4 times without a newer checkpoint"),
        ("kill -TERM $$; sleep 9", 2, 4, "started again 4 times without a newer checkpoint"),
    ],
)
def test_what_ends_badly_is_not_queued_for_ever(
    cluster, scripted, tmp_path, lines, code, restarts, word
):
    home, workdir = scripted(lines), tmp_path / "run"
    begun = time.monotonic()
    job = submit(cluster, workdir, "--config=x", options=["--nodes=2"], cwd=home)
    ended, exit_code, restarted = finished(cluster, job, workdir)
    assert ended == "FAILED"
    assert (code is None) or exit_code == f"{code}:0"
    assert restarted == restarts
    assert word in (workdir / "slurm.log").read_text()
    assert time.monotonic() - begun < 120


def test_a_newer_checkpoint_is_progress(cluster, scripted, tmp_path):
    workdir = tmp_path / "run"
    step = f"{workdir}/checkpoints/$SLURM_RESTART_COUNT"
    lines = (
        f"n=${{SLURM_RESTART_COUNT:-0}}; [ $n -lt 6 ] || exit 0; mkdir -p {step}x; "
        f"mkdir -p '{workdir}/checkpoints/'$n; touch '{workdir}/checkpoints/'$n/SHA256SUMS; exit 75"
    )
    job = submit(cluster, workdir, "--config=x", cwd=scripted(lines))
    ended, code, restarts = finished(cluster, job, workdir)
    assert (ended, code, restarts) == ("COMPLETED", "0:0", 6)


SAVES = """
folder='{0}/checkpoints/'
[ ! -d "$folder/7" ] || exit 0
save() {{
  sleep 2; mkdir -p "$folder/7"; touch "$folder/7/SHA256SUMS"
  echo "saved step 7"; exit 75
}}
trap save TERM
echo up
sleep 100 & wait
"""


def test_pushed_out_by_another_job_it_saves_and_comes_back(cluster, scripted, tmp_path):
    workdir = tmp_path / "run"
    home = scripted(SAVES.format(workdir))
    job = submit(cluster, workdir, "--config=x", options=["--nodes=2", "--exclusive"], cwd=home)
    log = workdir / "slurm.log"
    wait_until(lambda: log.is_file() and log.read_text().count("up") == 2, 60, workdir)
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    say(cluster, "sbatch", *options, "--wrap=sleep 1")
    assert finished(cluster, job, workdir, 120) == ("COMPLETED", "0:0", 1)
    assert log.read_text().count("saved step 7") == 2


def test_an_array_prepares_the_shards(cluster, tmp_path):
    log = f"--output={tmp_path}/slurm-%a.log"
    command = ("sbatch", "--parsable", "--array=0-1", "--mem=0", "--cpus-per-task=1", log)
    say(cluster, *command, "launch/slurm_prepare.sbatch", CONFIG[0], f"--workdir={tmp_path}")
    wait_until(lambda: not say(cluster, "squeue", "--noheader"), 300, tmp_path)
    logs = [path.read_text() for path in sorted(tmp_path.glob("slurm-*.log"))]
    assert len(logs) == 2
    assert (tmp_path / "shards" / "index.json").is_file(), logs


def test_wrong_places_are_one_line(cluster, tmp_path):
    for cwd, words, want in (
        (tmp_path, ["--workdir=x"], f"{tmp_path} is not the repository; submit there, or set"),
        (ROOT, [], "give --workdir=FOLDER"),
    ):
        log = tmp_path / "log"
        command = ("sbatch", "--wait", f"--output={log}", *CPUS, ROOT / "launch" / "slurm.sh")
        done = subprocess.run(
            [*command, "--config=x", *words], env=cluster, cwd=cwd, check=False, timeout=60
        )
        assert done.returncode == 2
        assert log.read_text().startswith(f"launch/slurm.sh: {want}")
        log.unlink()


def test_a_table_goes_through_it(cluster, tmp_path):
    words = ["--smoke", "--rows=suponly", "--seeds=0", f"--out={tmp_path}", "-o", "train.steps=2"]
    done = subprocess.run(
        [ROOT / "launch" / "table2", *words, f"--slurm={' '.join(CPUS)} --partition=main"],
        env=cluster,
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not say(cluster, "squeue", "--noheader"), 900, tmp_path)
    logs = "\n".join(path.read_text() for path in tmp_path.rglob("slurm*.log"))
    assert (tmp_path / "report.html").is_file(), logs
    assert "1 of 1 runs finished" in logs, logs
