"""Files are there whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bhsd_jax.platform import faults, files

ROOT = Path(__file__).parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"old": 1})
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(".a.json.")
        temporary.write_text("[2]")
        assert json.loads(path.read_text()) == {"old": 1}
    assert json.loads(path.read_text()) == [2]
    assert names(path.parent) == ["a.json"]


def test_after_an_error_or_without_a_file_nothing_has_changed(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "ganz\n")
    with pytest.raises(RuntimeError, match="halfway"), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ha")
        raise RuntimeError("halfway")
    with files.replacing(path):
        pass
    assert path.read_bytes() == b"ganz\n"
    assert names(tmp_path) == ["a.txt"]
    with files.replacing(tmp_path / "none"):
        pass
    assert names(tmp_path) == ["a.txt"]


DAMAGED = {
    "empty": (b"", "the file is empty"),
    "zeros": (bytes(40), "holds 40 zero bytes"),
    "cut": (b'{\n "a": [1,', "line 2, column 10: Expecting value"),
    "text": (b"<html>", "line 1, column 1: Expecting value"),
    "latin": (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
    "a list": (b"[1]", "expected an object, got a list"),
    "no key": (b'{"b": 1}', "has no 'a'"),
    "deep": (b"[" * 200_000, "recursion"),
    "no number": (b'{"a": "x"}', "invalid literal for int"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_json_file_is_named_with_the_place_and_what_to_do(tmp_path, name):
    content, words = DAMAGED[name]
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as caught:
        files.read_json(path, lambda value: int(value["a"]), keys=("a",), remedy="make it again")
    assert str(caught.value).startswith(f"{path}: damaged (")
    assert words in str(caught.value)
    assert str(caught.value).endswith("); make it again")


def test_a_damaged_file_that_can_be_made_anew_is_gone_after_one_line(tmp_path, caplog):
    path = tmp_path / "index.json"
    assert files.recall_json(path) is None
    assert caplog.text == ""
    path.write_text('{"a"')
    assert files.recall_json(path) is None
    assert len(caplog.messages) == 1
    assert f"{path}: damaged (line 1, column 5: Expecting ':' delimiter)" in caplog.text
    assert names(tmp_path) == []


def test_a_log_is_read_without_its_damaged_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert files.read_json_lines(path) == []
    path.write_bytes(b'{"step": 1}\n{"st\xff": 2}\n\n7\n{"step": 3}\n{"step": 4, "lo')
    assert files.read_json_lines(path) == [{"step": 1}, {"step": 3}]
    assert [text.split(": ")[1] for text in caplog.messages] == [
        "line 2 is damaged (byte 4 is not UTF-8); left out",
        "line 4 is damaged (expected an object, got a int); left out",
    ]


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, here = os.getpid(), files._host()
    left = {
        f".a.json.{here}-{dead.pid}.tmp": False,
        f"below/.b.nii.gz.{here}-{dead.pid}.tmp": False,
        f".line\nfeed.{here}-{dead.pid}.tmp": False,
        f".c.json.{here}-{alive}.tmp": True,
        f".d.json.elsewhere-{dead.pid}.tmp": True,
        ".theirs.tmp": True,
        "a.json": True,
    }
    (tmp_path / "below").mkdir()
    for name in left:
        (tmp_path / name).write_text("half")
    old = tmp_path / ".e.json.elsewhere-1.tmp"
    old.write_text("half")
    os.utime(old, (0, time.time() - 2 * 3600))
    files.sweep(tmp_path)
    assert {name: (tmp_path / name).exists() for name in left} == left
    assert not old.exists()


def test_a_killed_writer_leaves_what_the_next_sweep_finds(tmp_path):
    """A real process, killed inside a write."""
    code = (
        "import os, signal, sys; from bhsd_jax.platform import files\n"
        "with files.replacing(sys.argv[1]) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "a.json"
    path.write_text("whole")
    command = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert len(names(tmp_path)) == 2
    files.sweep(tmp_path)
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "whole"


def test_of_many_who_write_first_at_once_all_read_the_same(tmp_path):
    code = (
        "import sys, time; from bhsd_jax.platform import files\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(files.write_first(sys.argv[1], sys.argv[3]))"
    )
    start = str(time.time() + 1.5)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / ".salt"), start, str(number) * 500],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    found = {process.communicate(timeout=300)[0].strip() for process in running}
    assert found == {(tmp_path / ".salt").read_text()}
    assert names(tmp_path) == [".salt"]


@pytest.fixture
def no_links(monkeypatch):
    """As on gcsfuse, where what is asked of a file may also be answered from before it was made."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: False)


def test_without_links_too_the_first_text_stays(tmp_path, no_links):
    path = tmp_path / ".salt"
    assert [files.write_first(path, text) for text in ("ours", "theirs")] == ["ours", "ours"]
    assert names(tmp_path) == [".salt"]


def test_a_text_that_another_process_has_not_written_yet_is_waited_for(
    tmp_path, no_links, monkeypatch
):
    path = tmp_path / ".salt"
    path.touch()
    monkeypatch.setattr(files.time, "sleep", lambda _: path.write_text("theirs"))
    assert files.write_first(path, "ours") == "theirs"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOSPC])
def test_where_another_machine_was_first_its_text_is_taken_and_a_full_disk_is_said(
    tmp_path, no_links, monkeypatch, code
):
    path, create = tmp_path / ".salt", Path.open

    class Closing:
        """gcsfuse says at the end that it could not keep the file, and shows the other one."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self.file

        def __exit__(self, *_):
            self.file.close()
            if code == errno.ESTALE:
                path.write_text("theirs")
            raise OSError(code, os.strerror(code))

    def opened(self, mode="r", *rest, **more):
        file = create(self, mode, *rest, **more)
        return Closing(file) if mode == "x" else file

    monkeypatch.setattr(Path, "open", opened)
    if code == errno.ESTALE:
        assert files.write_first(path, "ours") == "theirs"
    else:
        with pytest.raises(faults.WriteError, match="No space left"):
            files.write_first(path, "ours")
        assert names(tmp_path) == []
