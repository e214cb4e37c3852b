"""Processes that were not started for one and the same run."""

import dataclasses
import re

import pytest
import tiny_run

from bhsd_jax.assemble import together
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.platform import files


def run(folder, plan=tiny_run.PLAN, **changes):
    config = common.get_config()
    config.update_from_flattened_dict(changes)
    folder.mkdir(exist_ok=True)
    return Run.of(config, folder, plan)


def told(folder):
    """What process 0 tells the others."""
    (folder / "mark").touch()
    return together.facts(run(folder)) | {"folder": str(folder), "mark": "mark"}


def test_processes_with_scans_on_their_own_disks_are_one_run(tmp_path):
    first = told(tmp_path)
    assert together.difference(first, run(tmp_path)) == ""
    own = {"preprocess.shards": "/scratch/node1/shards", "input.threads": 2}
    assert together.difference(first, run(tmp_path, **own)) == ""


@pytest.mark.parametrize(("field", "value"), [("seed", 1), ("optimizer.lr", 0.5)])
def test_processes_with_configs_of_their_own_are_refused(tmp_path, field, value):
    """As by `srun --ntasks=2 bash -c 'bhsd train --seed=$SLURM_PROCID ...'`."""
    said = together.difference(told(tmp_path), run(tmp_path, **{field: value}))
    assert re.match(
        rf"was started with another config than process 0: config.{field} \(.* -> {value}\); give "
        "all processes of a run the same command",
        said,
    )


def test_a_run_folder_that_the_others_do_not_see_is_refused(tmp_path, monkeypatch):
    """As on the disks of two nodes, where the first checkpoint was waited for for ever."""
    monkeypatch.setattr(files, "_FILLED_S", 0.1)
    here, there = tmp_path / "node0", tmp_path / "node1"
    here.mkdir()
    said = together.difference(told(here), run(there))
    assert said.startswith(f"does not see in {there} what process 0 writes into {here}; ")


def test_other_scans_are_refused(tmp_path):
    plan = dataclasses.replace(tiny_run.PLAN, source_sha256="another")
    assert together.difference(told(tmp_path), run(tmp_path, plan)).startswith(
        "has shards of another plan"
    )


def test_a_run_of_one_process_leaves_nothing_behind(tmp_path):
    together.require_one_run(run(tmp_path))
    assert not list(tmp_path.iterdir())
