"""Every experiment file builds, is what it was, and refuses words it does not know."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "backbones", "common", "from_run")
)
GOLDEN = Path(__file__).parents[1] / "golden" / "configs"


def resolved(name, arg=""):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_config_is_the_recorded_one(name):
    """A change of `common.py` must show as a change of every experiment that it touches."""
    path = GOLDEN / f"{name}.json"
    assert path.is_file(), f"record it: python tools/record_configs.py writes {path.name}"
    assert resolved(name) == json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_size(name):
    assert resolved(name, "smoke")["train"]["steps"] <= 10


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_word_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"smoke.*backbone=.*data=.*preset="):
        resolved(name, "smok")
    with pytest.raises(ValueError, match="synthetic, bhsd, msd"):
        resolved(name, "data=moon")


def test_words_reach_their_fields():
    assert resolved("supervised", "data=msd")["data"]["name"] == "msd.MSD"
    assert resolved("supervised", "labels=8")["split"]["labeled"] == 8
    assert resolved("supervised", "labels=0.1")["split"]["labeled"] == pytest.approx(0.1)
    assert resolved("supervised", "backbone=unet.X")["model"]["name"] == "unet.X"
    assert resolved("cps", "preset=ssl4mis")["objective"]["twin_init"] == "kaiming_xavier"
    with pytest.raises(ValueError, match="recommended, ssl4mis"):
        resolved("cps", "preset=other")


def test_a_finished_run_is_a_config(tmp_path):
    from configs import cps, from_run

    config = cps.get_config("smoke")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = from_run.get_config(str(tmp_path))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.input.patch, tuple)
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        from_run.get_config(str(tmp_path / "none"))
