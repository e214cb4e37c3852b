"""Hostile files go through `preprocess` as a user runs it, with its memory watched."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from bhsd_jax.shards import store

REFUSED = {name: words for name, (_, words) in (hostile.IMAGES | hostile.MASKS).items()}
REFUSED |= hostile.ENTRIES
MOST_MIB = 150  # more than the imports take; the largest honest scan here has 3 KiB

RUN = """
import atexit, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
import bhsd_jax.verbs.preprocess
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
atexit.register(lambda: print("grown by KiB:", peak() - before, flush=True))
runpy.run_module("bhsd_jax.main", run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The verb twice: as it is, and with `allow_skipped`."""
    root, folder = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("run")
    listed = hostile.fill(root)
    (root / "dataset.json").write_text(json.dumps({"training": listed, "test": []}))
    config = Path(__file__).parents[2] / "configs" / "supervised.py"
    command = [
        *(sys.executable, "-c", RUN, "preprocess", f"--config={config}:data=bhsd"),
        *(f"--config.data.root={root}", f"--workdir={folder}"),
        *("--config.preprocess.processes=1", "--config.preprocess.spacing_mm=(20.0, 10.0, 10.0)"),
    ]
    allowed = [*command, "--config.preprocess.allow_skipped=True"]
    done = [
        subprocess.run(one, capture_output=True, text=True, check=False, cwd=config.parents[1])
        for one in (command, allowed)
    ]
    return folder, *done


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_refusal_has_its_kind(run):
    folder, *_ = run
    found = {}
    for row in rows(folder / "defects.csv"):
        if row["done"] == "refused":
            found.setdefault(row["defect"], set()).add(row["case"])
    assert found == {kind: set(names) for kind, names in hostile.KINDS.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_in_one_line_that_names_it(run, name):
    folder, *_ = run
    (row,) = (row for row in rows(folder / "skipped.csv") if row["case"] == name)
    assert any(words in row["reason"] for words in REFUSED[name].split("|")), row["reason"]
    assert name in row["reason"]
    assert row["reason"].isprintable()


def test_every_other_file_comes_through(run):
    folder, *_ = run
    expected = {*hostile.KEPT, "whole", "mask_nan_affine"}
    assert {entry.id for entry in store.Shards(folder / "shards").entries} == expected
    assert {row["case"] for row in rows(folder / "skipped.csv")} == set(REFUSED)
    said = {}
    for row in rows(folder / "defects.csv"):
        said.setdefault(row["case"], []).append(f"{row['defect']}: {row['text']}")
    for name, (_, words) in hostile.KEPT.items():
        assert words in "\n".join(said.get(name, [])), name
    assert "mask without usable geometry" in said["mask_nan_affine"][0]


def test_what_is_kept_of_odd_headers_is_the_scan(run):
    found = store.Shards(run[0] / "shards")
    good = found.load("good").image
    for name in ("nan_slope", "infinite_slope", "one_frame", "big_endian", "version_two"):
        assert (found.load(name).image == good).all(), name


def test_the_verb_fails_unless_that_is_allowed(run):
    _, first, second = run
    assert first.returncode == 1
    assert f"{len(REFUSED)} of " in first.stderr
    assert "allow_skipped=True" in first.stderr
    assert second.returncode == 0, second.stderr
    for done in (first, second):
        assert "Traceback" not in done.stderr


def test_memory_stays_bounded_whatever_headers_claim(run):
    for done in run[1:]:
        grown_kib = int(done.stdout.split("grown by KiB:")[1])
        assert grown_kib < MOST_MIB * 1024
