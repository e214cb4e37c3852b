"""What cannot fit is refused before it begins; what may not fit is warned of."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from bhsd_jax import main
from bhsd_jax.platform import budget, machine
from bhsd_jax.platform.errors import UserError

GB = 10**9


def test_work_that_needs_more_memory_than_there_is_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 8 * GB)
    budget.require_memory(8 * GB, "the step", "use less")
    with pytest.raises(UserError, match=r"the step needs at least 8\.5 GB .* are 8 GB; use less"):
        budget.require_memory(8.5 * GB, "the step", "use less")
    with pytest.raises(UserError, match=r"needs at least 20 GB .* are 16 GB"):
        budget.require_memory(20 * GB, "the step", "use less", available=16 * GB)


def test_a_device_without_memory_is_explained_below_what_jax_says():
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.3GiB.\n  largest: conv"
    told = budget.explain_exhausted(JaxRuntimeError(said))
    assert told.startswith(f"{said}; if another program holds memory of the device (`nvidia-smi`")
    for word in ("input.patch", "input.labeled", "train.accumulate=2", "mesh.space"):
        assert word in told
    assert told.endswith("to predict and to validate, infer.tiles=1")
    graph = "INTERNAL: Failed to instantiate graph: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    assert budget.explain_exhausted(JaxRuntimeError(graph)).startswith(graph)
    for other in (JaxRuntimeError("INTERNAL: no such kernel"), ValueError("out of memory")):
        assert budget.explain_exhausted(other) is None


def test_a_machine_without_memory_is_no_defect_of_the_program(tmp_path):
    with pytest.raises(MemoryError, match="Unable to allocate") as caught:
        np.zeros(2**60, np.uint8)
    for error in (caught.value, MemoryError()):
        told = main._reason(error, tmp_path)
        assert "has no more. Ask for more, or use less: preprocess.processes=1" in told
    assert main._reason(caught.value, tmp_path).startswith("Unable to allocate 1.00 EiB")


def test_where_the_system_does_not_tell_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 0)
    budget.require_memory(1e18, "the step", "use less")


def test_disk_is_refused_below_the_least_and_warned_of_below_the_most(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    asked = []
    usage = SimpleNamespace(free=3 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    folder = tmp_path / "not" / "there"
    budget.require_disk(folder, 2 * GB, "shards")
    budget.require_disk(folder, 4 * GB, "shards", least=GB)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "shards take 2 GB; 3 GB are free"),
        ("WARNING", "shards take up to 4 GB; 3 GB are free"),
    ]
    with pytest.raises(UserError, match=r"there: shards take 4 GB, and 3 GB are free; make room"):
        budget.require_disk(folder, 4 * GB, "shards")
    assert set(asked) == {tmp_path}, "the nearest folder that is there"


@pytest.mark.parametrize(
    ("group", "file", "limits"),
    [
        ("0::/slurm/job_1/step_0\n", "memory.max", {"slurm/job_1": "2000\n", "slurm": "max\n"}),
        (
            "9:cpu:/x\n4:memory,hugetlb:/slurm/job_1/step_0\n",
            "memory.limit_in_bytes",
            {"memory/slurm": "3000", "memory/slurm/job_1": "2000"},
        ),
    ],
)
def test_the_limit_of_a_container_or_a_job_counts(tmp_path, group, file, limits):
    groups = tmp_path / "groups"
    groups.write_text(group)
    (tmp_path / file).write_text("5")  # above the tree of version 1, the root of version 2
    for folder, text in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text(text)
    found = list(machine._limits(groups, tmp_path))
    assert 2000 in found
    assert (5 in found) == (file == "memory.max")
    assert list(machine._limits(tmp_path / "no such file", tmp_path)) == []


@pytest.mark.parametrize(
    ("group", "files", "want"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # `podman run --cpus=1.5`
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000"}, 3),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),  # more than the cores it may run on
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        (
            "3:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("3:cpuset:/\n", {}, 8),
    ],
)
def test_a_quota_of_processor_time_counts_as_so_many_cores(
    tmp_path, monkeypatch, group, files, want
):
    (tmp_path / "groups").write_text(group)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    assert machine.cores() == want
