"""What the system says no to is one line: which path, what happened, what to do."""

import errno
import os
from pathlib import Path

import pytest

from bhsd_jax.platform import faults, files


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refusal(path, size=10):
    """What is said where a file cannot be written."""
    with pytest.raises(faults.WriteError) as caught:
        files.write_bytes(path, bytes(size))
    said = faults.explain(caught.value)
    assert "\n" not in said
    return said


def test_a_full_disk_keeps_the_old_file_and_no_half_of_the_new(disk):
    folder = disk("size=64k")
    path = folder / "a.json"
    files.write_json(path, [1])
    said = refusal(path, 100_000)
    assert said.startswith(f"{path}: cannot be written: no space left on the device (")
    assert "of 0.1 MB are free); free some, or choose another folder." in said
    assert path.read_text() == "[\n 1\n]"
    assert names(folder) == ["a.json"]


def test_a_disk_without_inodes_says_so(disk):
    folder = disk("size=1m,nr_inodes=3")
    files.write_text(folder / "one", "")
    files.write_text(folder / "two", "")
    assert "no inode left on the device (3 files is all it holds)" in refusal(folder / "three")
    assert names(folder) == ["one", "two"]


def test_a_read_only_disk_says_so(disk):
    folder = disk("size=64k")
    files.write_text(folder / "a", "old")
    disk("ro,size=64k", again=True)
    for path in (folder / "a", folder / "new" / "b"):
        said = refusal(path)
        assert said.startswith(f"{folder}")
        assert "the file system is read-only; choose another folder" in said
    with pytest.raises(faults.WriteError, match="Read-only"):
        files.open_folder(folder)
    assert (folder / "a").read_text() == "old"
    files.sweep(folder)  # has nothing to say


def test_a_folder_is_tried_before_hours_go_into_what_it_is_to_hold(disk):
    folder = disk("size=16k")
    files.open_folder(folder / "new")
    assert names(folder) == ["new"]
    with pytest.raises(OSError, match="No space"):
        (folder / "fill").write_bytes(bytes(20_000))
    with pytest.raises(faults.WriteError, match="No space") as caught:
        files.open_folder(folder / "new")
    assert caught.value.filename == str(folder / "new")
    assert names(folder) == ["fill", "new"]


def test_a_line_is_appended_whole_or_not_at_all(disk):
    path = disk("size=8k") / "log.jsonl"
    files.append(path, "x" * 4000 + "\n")
    with pytest.raises(faults.WriteError) as caught:
        files.append(path, "y" * 8000 + "\n")
    assert caught.value.filename == str(path)
    assert path.read_text() == "x" * 4000 + "\n"
    files.append(path, "z\n")
    assert path.read_text().endswith("x\nz\n")


def test_paths_that_cannot_be_are_named(tmp_path):
    files.write_text(tmp_path / "file", "")
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    assert "/folder: cannot be written: a folder lies where a file" in refusal(tmp_path / "folder")
    below = refusal(tmp_path / "file" / "a" / "b")
    assert f"{tmp_path / 'file' / 'a'}: cannot be written: a part of the path is a file" in below
    assert "a file lies where a folder is needed" in refusal(tmp_path / "file" / "a")
    assert "the name is too long; choose a shorter one" in refusal(tmp_path / ("n" * 256))
    longest = tmp_path / ("n" * 255)
    files.write_text(longest, "fits")
    assert longest.read_text() == "fits"


def test_a_folder_of_someone_else_says_so(tmp_path):
    if os.geteuid():
        pytest.skip("only root can become another user")
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    for above in list(folder.parents)[:-1]:
        above.chmod(above.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        said = refusal(folder / "a")
    finally:
        os.seteuid(0)
    assert "no permission; change its rights, or choose another folder" in said


def test_errors_of_other_files_are_left_as_they_are(tmp_path):
    def copy():
        with files.replacing(tmp_path / "a") as temporary:
            temporary.write_bytes((tmp_path / "gone").read_bytes())

    with pytest.raises(FileNotFoundError) as caught:
        copy()
    assert caught.value.filename == str(tmp_path / "gone")
    assert names(tmp_path) == []


def test_what_has_no_words_is_not_explained():
    assert faults.explain(OSError("of a library")) is None
    assert faults.explain(ChildProcessError(errno.ECHILD, "no child")) is None
    assert "a file in /runs/x: this process has too many files open" in faults.explain(
        OSError(errno.EMFILE, "Too many open files"), Path("/runs/x")
    )


def test_the_words_of_a_library_are_the_systems_again(tmp_path):
    text = "open() failed: Read-only file system; opening /x; Failed to create the file header"
    found = faults.os_error_behind(RuntimeError(text), tmp_path)
    assert (found.errno, found.filename) == (errno.EROFS, str(tmp_path))
    assert faults.os_error_behind(RuntimeError("Invalid chunk header hash"), tmp_path) is None
