"""Checkpoints outlive kills, full disks and several processes: real ones."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from checkpoint_process import EXTRA, make_state
from test_checkpoint import abstract, bits, names

from bhsd_jax.experiments.local import free_port
from bhsd_jax.train.checkpoint import Checkpoints, load_networks

HERE = Path(__file__).parent

# What Orbax leaves behind when a save fails.
QUIET = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def on_device(state):
    return jax.device_put(state, jax.devices()[5])


def start(*arguments):
    path = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, HERE / "checkpoint_process.py", *arguments]
    return subprocess.Popen(
        command, env=os.environ | path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("sign", ["state/d", "state/commit_success.txt"])
def test_a_save_that_is_killed_leaves_the_step_before_and_can_be_made_again(tmp_path, sign):
    folder = tmp_path / "c"
    process = start("large", folder)
    try:
        while not (folder / "2.unfinished" / sign).exists():
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.0005)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert names(folder) == ["1", "2.unfinished"]
    state = on_device(make_state())
    checkpoints = Checkpoints(folder, **EXTRA, recorded=[1])
    assert checkpoints.latest() == 1
    assert bits(checkpoints.restore(abstract(state))[0]) == bits(state)
    checkpoints.save(2, state, {"batches": 2}, 0.5)
    checkpoints.close()
    assert names(folder) == ["1", "2"]
    assert Checkpoints(folder, **EXTRA).latest() == 2


def failed_save(folder):
    """Waits for the error of a background save as the training does: by asking now and then."""
    checkpoints = Checkpoints(folder, **EXTRA)

    def train():
        checkpoints.save(2, make_state(2**18), {"batches": 2}, 0.5)  # 2 MB
        for _ in range(600):
            checkpoints.finished()
            time.sleep(0.1)

    with pytest.raises(OSError, match=f"{folder}/2: this checkpoint could not") as caught:
        train()
    checkpoints.close()  # says it no second time
    assert "\n" not in str(caught.value)
    assert "Make room" in str(caught.value)
    return str(caught.value)


def small_save(folder):
    checkpoints = Checkpoints(folder, **EXTRA)
    checkpoints.save(1, make_state(), {"batches": 1}, 0.5)
    checkpoints.close()


@QUIET
def test_a_file_that_cannot_grow_is_said_and_the_step_before_stays(tmp_path):
    folder = tmp_path / "c"
    small_save(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        said = failed_save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; the last good checkpoint is step 1" in said
    assert Checkpoints(folder, **EXTRA).latest() == 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOTSUP])
def test_a_file_system_that_renames_no_folder_is_named(tmp_path, monkeypatch, code):
    """Stands for a flat bucket by gcsfuse, which no test has: empty folders and files only."""
    rename = os.rename

    def refuse(source, target):
        if os.path.isdir(source) and os.listdir(source):
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=f"{os.strerror(code)}.* no older one") as caught:
        small_save(tmp_path / "c")
    assert "does not rename a folder with files in it" in str(caught.value)
    assert "Make room" not in str(caught.value)


@QUIET
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("size=512k", "No space left on device"),
        ("nr_inodes=40", "No space left on device"),
        ("ro", "Read-only file system"),
    ],
)
def test_a_full_or_read_only_disk_is_said_and_the_step_before_stays(tmp_path, options, cause):
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    limits = "size=50m" if options == "ro" else options
    command = [mount or "mount", "-t", "tmpfs", "-o", limits, "tmpfs", disk]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        small_save(disk / "c")
        if options == "ro":
            subprocess.run([mount, "-o", "remount,ro", disk], check=True)
        said = failed_save(disk / "c")
        assert f"{cause}; the last good checkpoint is step 1" in said
        assert Checkpoints(disk / "c", **EXTRA).latest() == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_processes_save_and_decide_together_and_one_reads_what_they_saved(tmp_path):
    folder = tmp_path / "c"
    port = str(free_port())
    both = [start("shared", folder, str(index), "2", port) for index in range(2)]
    try:
        told = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (out, error) in zip(both, told, strict=True):
        assert process.returncode == 0, error[-3000:]
        assert "restored 1\n" in out
        assert re.search(r"refused .*step 2: its folder is gone", out)
    assert "2: input.json has 2 bytes of" in told[0][1], "process 0 says what is wrong"
    assert names(folder) == ["1-backup", "2-backup", "2.damaged"]
    for step in "12":
        (folder / f"{step}-backup").rename(folder / step)
    state = on_device(make_state())
    restored, position = Checkpoints(folder, **EXTRA).restore(abstract(state))
    assert position == {"batches": 2}
    assert bits(restored) == bits(state)
    step, params, _ = load_networks(folder, "last")
    assert step == 2
    assert bits(params) == bits(state.params)
