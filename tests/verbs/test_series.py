"""What is finished stays, what stopped goes on, what fails is named: with verbs that do nothing."""

import argparse
import dataclasses
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from bhsd_jax.experiments import launch, places, queue
from bhsd_jax.experiments.queue import Trial
from bhsd_jax.platform import cluster, faults, files, locks
from bhsd_jax.train import checkpoint_files

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream


def change(run, **fields):
    path = run.workdir / "config.json"
    config = json.loads(path.read_text())
    for field, value in fields.items():
        part, _, name = field.partition("__")
        config[part][name] = value
    files.write_json(path, config)


def test_a_run_is_finished_when_its_own_results_are_there(make, finish):
    run = make("--rows=cps", "--seeds=0").runs[0]
    assert not queue.is_finished(run)
    finish(run, [(1, 0, 0)])
    assert queue.is_finished(run)
    # Evaluated before the training went on.
    os.utime(run.workdir / "summary.json", ns=(0, 0))
    assert not queue.is_finished(run)
    (run.workdir / "summary.json").touch()
    assert queue.is_finished(run)
    (run.workdir / "checkpoints" / "4" / checkpoint_files.SUMS).unlink()
    assert not queue.is_finished(run), "half-trained, and scored by hand"


def test_a_folder_of_another_config_is_refused_and_named(make, finish):
    run = make("--rows=cps", "--seeds=0").runs[0]
    finish(run, [(1, 0, 0)])
    change(run, optimizer__lr=0.5, objective__weight=9.0)
    with pytest.raises(ValueError, match=r"objective\.weight \(9\.0 -> 0\.5\), optimizer\.lr"):
        queue.is_finished(run)


def test_a_damaged_config_fails_its_run_alone(scripted):
    """A crash of the machine may leave a file of zeros; it ended the series with a traceback."""
    scripted[0].workdir.mkdir(parents=True)
    (scripted[0].workdir / "config.json").write_bytes(bytes(9))
    failures = queue.perform(scripted[:2])
    assert [failure.run.row for failure in failures] == ["suponly"]
    assert "config.json: damaged (holds 9 zero bytes); copy" in failures[0].reason
    assert launch._state(scripted[0]).startswith("refused: ")


def test_a_run_of_a_version_with_fewer_fields_is_still_finished(make, finish):
    run = make("--rows=cps", "--seeds=0").runs[0]
    finish(run, [(1, 0, 0)])
    saved = json.loads((run.workdir / "config.json").read_text())
    del saved["input"]["crop"], saved["train"]["init_leave"], saved["predict"]["dicom"]
    saved["weak"] = saved.pop("slice_loss")
    files.write_json(run.workdir / "config.json", saved)
    (run.workdir / "summary.json").touch()
    assert queue.is_finished(run)
    chosen = make("--rows=cps", "--seeds=0", "-o", "input.crop=uniform").runs[0]
    with pytest.raises(ValueError, match=r"input\.crop \(nnunet -> uniform\)"):
        queue.is_finished(chosen)


def test_where_things_lie_and_how_fast_they_go_does_not_matter(make, finish):
    run = make("--rows=cps", "--seeds=0").runs[0]
    finish(run, [(1, 0, 0)])
    change(run, data__root="/else", input__threads=7, report__title="x", preprocess__processes=9)
    (run.workdir / "summary.json").touch()
    assert queue.is_finished(run)
    change(run, evaluate__bootstrap=7)
    (run.workdir / "summary.json").touch()
    assert not queue.is_finished(run), "trained, but to be evaluated anew"


class Script(Trial):
    """A run whose verbs are the given lines of Python."""

    scripts: ClassVar[dict] = {}

    def command(self, verb, workdir=None):
        return [sys.executable, "-c", self.scripts.get((self.row, verb), "")]


@pytest.fixture
def scripted(make):
    Script.scripts = {}
    made = make("--rows=suponly,ict,cps", "--seeds=0").runs
    return [Script(r.row, r.seed, r.workdir, r.arguments, r.config) for r in made]


def test_a_failed_run_is_named_and_the_others_go_on(scripted):
    Script.scripts = {
        ("ict", "predict"): "import sys; sys.exit('predict: no checkpoint')",
        ("suponly", "train"): "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        ("cps", "report"): "print('written')",
    }
    seen = []
    failures = queue.perform(scripted, lambda so_far: seen.append(len(so_far)))
    assert {f.run.row: f.reason for f in failures} == {
        "suponly": "train: ended by SIGKILL",
        "ict": "predict: no checkpoint",
    }
    assert seen == [1, 2, 2], "a report after every run"
    cps = scripted[2].workdir
    assert "written" in (cps / "log.txt").read_text()
    assert set(json.loads((cps / "wall.json").read_text())) == set(queue.VERBS)
    ict = scripted[1].workdir
    assert set(json.loads((ict / "wall.json").read_text())) == {"train", "predict"}


def test_a_failure_is_known_until_the_run_begins_again(scripted, finish):
    Script.scripts = {
        ("ict", "predict"): "import sys; sys.exit('predict: no checkpoint')",
        ("cps", "train"): "import sys; sys.exit('train: broken')",
    }
    failures = queue.perform(scripted)
    assert [(f.run.row, f.verb) for f in failures] == [("ict", "predict"), ("cps", "train")]
    noted = queue.known_failures(scripted)  # as a later process finds them
    assert [(f.run.row, f.verb, f.log) for f in noted] == [
        ("ict", "predict", "log.txt"),
        ("cps", "train", "log.txt"),
    ]
    assert queue.known_failures(scripted, failures) == failures, "none twice"
    Script.scripts = {}
    assert queue.perform(scripted[1:2]) == []
    finish(scripted[2], [(1, 0, 0)])  # by hand
    assert queue.known_failures(scripted) == []
    files.write_json(scripted[0].workdir / "failed.json", {"verb": "train", "log": "../../x"})
    (job,) = queue.known_failures(scripted)
    assert job.on_page(scripted[0].workdir) == "train failed; x says why"
    files.write_json(scripted[0].workdir / "failed.json", {"verb": "train", "log": ""})
    (job,) = queue.known_failures(scripted)
    assert job.on_page(scripted[0].workdir) == "train failed; the job's log says why"


def test_what_is_finished_or_trained_is_not_done_again(scripted, finish):
    done, trained, _ = scripted
    finish(done, [(1, 0, 0)])
    finish(trained, [(1, 0, 0)])
    (trained.workdir / "summary.json").unlink()
    assert queue.perform(scripted[:2]) == []
    assert not (done.workdir / "log.txt").exists()
    assert set(json.loads((trained.workdir / "wall.json").read_text())) == set(queue.VERBS[1:])


def test_a_training_that_was_asked_to_stop_ends_the_series(scripted):
    Script.scripts = {("suponly", "train"): "import sys; sys.exit(75)"}
    with pytest.raises(queue.Stopped, match="suponly, seed 0 was asked"):
        queue.perform(scripted)
    assert not scripted[1].workdir.exists()


def test_a_series_in_a_shell_of_several_processes_runs_its_verbs_alone(scripted, monkeypatch):
    """Each would wait for others that nobody starts."""
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "1"), ("PMI_SIZE", "4"), ("PMI_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert cluster.find().several
    told = "import os, sys; sys.exit({*os.environ} & {'RANK', 'PMI_RANK'} or 0)"
    Script.scripts = {("suponly", "train"): told}
    assert queue.perform(scripted[:1]) == []


GATHER = """
import os, pathlib, sys, time
folder = pathlib.Path({folder!r})
(folder / {row!r}).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))
begun = time.monotonic()
while len(list(folder.iterdir())) < {count}:  # all run at the same time, or none ends well
    time.sleep(0.02)
    if time.monotonic() - begun > 300:
        sys.exit('train: alone')
"""


def gather(tmp_path, count, rows=("suponly", "ict", "cps")):
    folder = tmp_path / "met"
    folder.mkdir()
    for row in rows:
        script = GATHER.format(folder=str(folder), row=row, count=count)
        Script.scripts[row, "train"] = script
    return folder


def test_runs_go_on_side_by_side_each_on_its_own_gpu(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a,6")
    folder = gather(tmp_path, 3)
    Script.scripts["ict", "predict"] = "import sys; sys.exit('predict: no checkpoint')"
    seen = []
    failures = queue.perform(
        scripted, lambda so_far: seen.append(len(so_far)), places.share(3, option="--jobs")
    )
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "suponly": "4",
        "ict": "GPU-5a",
        "cps": "6",
    }
    assert [f.run.row for f in failures] == ["ict"], "the others went on"
    assert len(seen) == 3
    for run in scripted:
        assert "train" in json.loads((run.workdir / "wall.json").read_text())
        assert (run.workdir / "log.txt").is_file()


def test_a_place_serves_one_run_after_the_other(scripted, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = "import os; print('here', os.environ['CUDA_VISIBLE_DEVICES'])"
    Script.scripts = {(run.row, "train"): lines for run in scripted}
    assert queue.perform(scripted, places=places.share(2, option="--jobs")) == []
    used = {run.row: (run.workdir / "log.txt").read_text() for run in scripted}
    assert "here 0" in used["suponly"]
    assert "here 1" in used["ict"]
    assert "here" in used["cps"]


def test_stopping_stops_all_runs_and_waits_for_them(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    wait = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    Script.scripts = {("suponly", "train"): wait, ("ict", "train"): wait}
    logs = [run.workdir / "log.txt" for run in scripted[:2]]

    def terminate():
        while not all(log.is_file() and "\nup" in log.read_text() for log in logs):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(queue.Stopped):
        queue.perform(scripted, places=places.share(2, option="--jobs"))
    thread.join()
    assert all("saved" in log.read_text() for log in logs)
    assert not scripted[2].workdir.exists()


def test_a_run_that_another_call_or_job_runs_is_left_to_it(scripted, caplog):
    """It failed at the lock of the training that ran, and counted as failed."""
    called, trained, _ = scripted
    for run in (called, trained):
        run.workdir.mkdir(parents=True)
    with (
        locks.held(called.workdir / locks.SERIES),
        locks.held(trained.workdir / locks.TRAINING),
    ):
        assert queue.perform(scripted) == []
        assert [queue.is_running(run) for run in scripted] == [True, True, False]
    assert caplog.text.count("is running in another call or job, which is left to it") == 2
    logs = [run.workdir / "log.txt" for run in scripted]
    assert [log.exists() for log in logs] == [False, False, True]
    assert queue.perform(scripted[:2]) == []
    assert all(log.exists() for log in logs)
    assert not any(map(queue.is_running, scripted))


def test_a_series_that_is_called_twice_says_what_is_running(make, scripted, caplog, monkeypatch):
    monkeypatch.setattr(queue, "share_programs", lambda folder: None)
    what = dataclasses.replace(make("--rows=suponly,ict,cps", "--seeds=0"), runs=scripted)
    options = argparse.Namespace(dry_run=False, report_only=False, slurm=None, jobs=1)
    shards = Path(scripted[0].config.preprocess.shards)
    shards.mkdir(parents=True)
    (shards / "index.json").touch()
    scripted[1].workdir.mkdir(parents=True)
    Script.scripts["ict", "train"] = "import sys; sys.exit('train: another process trains')"
    with locks.held(scripted[1].workdir / locks.SERIES):
        assert launch.launch(what, options, []) == cluster.TRY_AGAIN
        assert launch._state(scripted[1]) == "running"
        text = (what.out / "report.md").read_text()
    assert "running in another call or job: ict, seed 0" in caplog.text
    assert "Runs that failed" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Interpolation"))
    assert "| running |" in row
    options.report_only = True
    assert launch.launch(what, options, []) == 0
    assert "| running |" not in (what.out / "report.md").read_text()


def test_shards_that_another_call_makes_are_waited_for(scripted, caplog):
    run = scripted[0]
    shards = Path(run.config.preprocess.shards)
    shards.mkdir(parents=True)
    Script.scripts = {("suponly", "preprocess"): "import sys; sys.exit('preprocess: twice')"}
    begun = threading.Event()

    def other():
        with locks.held(shards.parent / locks.SERIES):
            begun.set()
            until = time.monotonic() + 300
            while "another call makes the shards" not in caplog.text:
                assert time.monotonic() < until
                time.sleep(0.02)
            (shards / "index.json").touch()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    queue.prepare(run, shards.parent)
    thread.join()


def test_what_a_report_lacks_or_a_full_disk_is_one_line_and_stops_no_series(
    make, caplog, monkeypatch
):
    """A traceback from between two runs ended the series."""
    made = make("--rows=cps", "--seeds=0")
    full = faults.WriteError(errno.ENOSPC, "No space left on device", "/out/report.md")
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", "/out/cases.csv")
    for error, words in ((full, "report.md: cannot be written: no space"), (gone, "cases.csv: no")):

        def write(*_, error=error):
            raise error

        launch._so_far(made, write, ())
        assert f"no report yet: /out/{words}" in caplog.text
        with pytest.raises(SystemExit, match=f": /out/{words}"):
            launch.main(write)


def test_places_share_what_there_is(monkeypatch):
    for listed, count, want, idle in (
        ("0,1,2", 3, ["0", "1", "2"], []),
        ("0,1,2", 2, ["0", "1"], ["2"]),
        ("7,5,3,1", 2, ["7,5", "3,1"], []),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        shared = places.share(count, option="--jobs")
        assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in shared] == want
        assert places.idle(count) == idle
    assert places.share(1, option="--jobs")[0].environment == {}, "one has all"
    with pytest.raises(ValueError, match=r"--jobs: 5 processes do not fit 4 GPUs \(7, 5, 3, 1\)"):
        places.share(5, option="--jobs")
    with pytest.raises(ValueError, match="at least 1"):
        places.share(0, option="--jobs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert places.gpus() == []
    shared = places.share(2, option="--jobs")
    assert [dict(place.environment) for place in shared] == [{}, {}]
    cores = [place.prefix[-1] for place in shared if place.prefix]
    assert len(set(cores)) == len(cores), "no core has two"


def test_the_driver_is_asked_where_nobody_chose(tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'; echo 'GPU 1: A (UUID: y)'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert places.gpus() == ["0", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert places.gpus() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_end_reaches_the_training(scripted, number, monkeypatch):
    Script.scripts = {
        ("suponly", "train"): "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    }

    def terminate():
        log = scripted[0].workdir / "log.txt"
        while not (log.is_file() and "\nup" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    reads, writes = os.pipe()
    os.close(reads)  # nobody reads what the series says, as where its terminal was closed
    thread = threading.Thread(target=terminate)
    thread.start()
    begun = time.monotonic()
    with io.TextIOWrapper(os.fdopen(writes, "wb", 0), write_through=True) as unread:
        monkeypatch.setattr(sys, "stderr", unread)
        with pytest.raises(queue.Stopped):
            queue.perform(scripted)
    thread.join()
    assert time.monotonic() - begun < 500, "it was not waited for"


def test_shards_are_made_once_and_their_failure_is_the_end(scripted, tmp_path):
    run = scripted[0]
    shards = Path(run.config.preprocess.shards)
    script = f"import pathlib; p = pathlib.Path({str(shards)!r}); p.mkdir(parents=True); "
    Script.scripts = {("suponly", "preprocess"): script + "(p / 'index.json').touch()"}
    folder = shards.parent
    queue.prepare(run, folder)
    assert (shards / "index.json").is_file()
    Script.scripts = {("suponly", "preprocess"): "import sys; sys.exit('preprocess: broken')"}
    queue.prepare(run, folder)  # they are there: nothing is called
    (folder / "skipped.csv").touch()  # but not all of them
    with pytest.raises(ValueError, match="no run was started: preprocess: broken"):
        queue.prepare(run, folder)
