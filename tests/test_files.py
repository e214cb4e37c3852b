"""Files are there whole or not at all."""

import json

import pytest

from bhsd_jax import files


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
