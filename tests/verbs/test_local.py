"""Several processes of one machine: started, stopped and ended together."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bhsd_jax.experiments import local

ROOT = Path(__file__).parents[2]
LONG = 300  # seconds after which something hangs, however slow the machine

SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(0.3); print('saved', flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, save)
UP
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
UP
time.sleep(600)
"""


def group(*scripts, before=""):
    """A program that runs the scripts as one group, in a process of its own; a line comes before.

    Who is asked to save may take longer than any test waits.
    """
    lines = (
        f"import sys\nfrom bhsd_jax.experiments import local\n{before}\n"
        "local._LAST_WORDS_S, local._KILL_S = 3600.0, 1.0\n"
        f"scripts = {scripts!r}\n"
        "commands = [[sys.executable, '-c', script] for script in scripts]\n"
        "sys.exit(local.Group(commands, [{} for _ in scripts]).run())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", lines],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def up(path):
    return f"import os, pathlib; pathlib.Path({str(path)!r}).write_text(str(os.getpid()))\n"


def after(path):
    """Lines that wait until another script is up."""
    there = f"pathlib.Path({str(path)!r})"
    wait = f"while not ({there}.is_file() and {there}.read_text()): time.sleep(0.02)\n"
    return f"import pathlib, time\n{wait}"


def wait_for(paths, seconds=LONG):
    begun = time.monotonic()
    while not all(path.is_file() and path.read_text() for path in paths):
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_all_well_is_0_and_others_are_prefixed():
    whole = group("print('first')", "print('second')", "")
    out, err = whole.communicate(timeout=LONG)
    assert whole.returncode == 0
    assert out == "first\n"
    assert "[1] second\n" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_all_and_they_save(tmp_path, number):
    marks = [tmp_path / "0", tmp_path / "1"]
    whole = group(*(SAVES.replace("UP", up(mark)) for mark in marks))
    pids = wait_for(marks)
    whole.send_signal(number)
    out, err = whole.communicate(timeout=LONG)
    assert whole.returncode == 75
    assert "saved" in out
    assert "[1] saved" in err
    assert not any(map(is_alive, pids))


def test_all_save_where_nobody_reads_the_log_any_more(tmp_path):
    marks, saved = [tmp_path / "0", tmp_path / "1"], tmp_path / "saved"
    saves = SAVES.replace("print('saved', flush=True)", f"open({str(saved)!r}, 'a').write('x')")
    whole = group(*(saves.replace("UP", "print('up', flush=True)\n" + up(m)) for m in marks))
    wait_for(marks)
    whole.stdout.close()
    whole.stderr.close()  # as where Ctrl-C has ended `| tee log`
    whole.send_signal(signal.SIGINT)
    assert whole.wait(timeout=LONG) == 75
    assert saved.read_text() == "xx"


def test_a_closed_terminal_ends_nothing_that_nohup_started(tmp_path):
    marks = [tmp_path / "0", tmp_path / "1"]
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    whole = group(*(SAVES.replace("UP", up(mark)) for mark in marks), before=nohup)
    pids = wait_for(marks)
    whole.send_signal(signal.SIGHUP)
    time.sleep(0.2)  # as long as it takes to be passed on, and more
    assert all(map(is_alive, pids))
    assert whole.poll() is None
    whole.terminate()
    out, _ = whole.communicate(timeout=LONG)
    assert (whole.returncode, out) == (75, "saved\n")


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_one_that_dies_ends_the_others_and_its_code_counts(tmp_path, end, code):
    mark = tmp_path / "mark"
    script = after(mark) + f"import sys; {end}"
    whole = group(STUBBORN.replace("UP", up(mark)), script)
    _, err = whole.communicate(timeout=LONG)
    assert whole.returncode == code
    assert f"a process ended with {code}; ending 1" in err
    assert not is_alive(int(mark.read_text()))


def test_nobody_is_left_when_the_launcher_is_killed(tmp_path):
    marks = [tmp_path / "0", tmp_path / "1"]
    whole = group(*(up(mark) + "import time; time.sleep(600)" for mark in marks))
    pids = wait_for(marks)
    whole.kill()
    whole.communicate(timeout=LONG)
    begun = time.monotonic()
    while any(map(is_alive, pids)):
        assert time.monotonic() - begun < LONG
        time.sleep(0.05)


def test_each_process_knows_its_number_and_its_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    made = {}

    class Recorded(local.Group):
        def run(self):
            made["commands"], made["environments"] = self.commands, self.environments
            return 0

    monkeypatch.setattr(local, "Group", Recorded)
    assert local.cli(["3", "train", "--config=x", "--workdir=a b"]) == 0
    assert made["commands"][2][1:] == [
        "-m",
        "bhsd_jax.main",
        "train",
        "--config=x",
        "--workdir=a b",
    ]
    addresses = {each["JAX_COORDINATOR_ADDRESS"] for each in made["environments"]}
    assert len(addresses) == 1
    for index, each in enumerate(made["environments"]):
        assert each["JAX_COORDINATOR_BIND_ADDRESS"].startswith("127.0.0.1:"), "not from outside"
        assert each["JAX_PROCESS_ID"] == str(index)
        assert each["JAX_NUM_PROCESSES"] == "3"
        assert each["CUDA_VISIBLE_DEVICES"] == "356"[index]
    assert local.cli(["1", "report", "--config=x"]) == 0
    assert made["environments"] == [{}], "one process needs to meet nobody"


def test_processes_started_here_are_none_of_those_of_a_launcher(monkeypatch):
    """In a shell that inherits its variables they were refused: they are 2, and not 4."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    told = "import os, sys; sys.exit('RANK' in os.environ)"
    running = group(told)
    assert (running.wait(LONG), running.communicate()[1]) == (0, "")


def test_wrong_words_are_one_line():
    for words in ([], ["2"], ["two", "train"], ["2", "--config=x"]):
        with pytest.raises(ValueError, match=r"launch/local.sh N VERB --config="):
            local.cli(words)
    with pytest.raises(ValueError, match="local: N: needs at least 1; got 0"):
        local.cli(["0", "train"])
