"""The benchmarks run on any CPU, count what they should, and take turns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plain_code
import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def _tools_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


def _bench(script, tmp_path, *options):
    """One round of ours alone, at the smallest size: its figures and what it printed."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(TOOLS / script), "--preset", "tiny", "--peer-python", "none"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json", str(out), *options],
        env=os.environ | plain_code.environment(),  # how fast the programs are is not tested
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_the_step_benchmark_runs_with_one_command(tmp_path):
    found, text = _bench("bench_step.py", tmp_path, "--device", "cpu")
    assert "GFLOP/s" in text
    assert found["ours"]["wall"] > 0
    assert found["ours"]["peak_gb"] > 0
    # Six classes drawn at random: cross entropy near log 6, Dice near 1/6, its sign turned.
    assert 1.2 < found["facts"]["ours"]["loss"] < 3.0


@pytest.mark.parametrize("objective", ["cps", "mean_teacher"])
def test_the_step_benchmark_knows_unlabeled_patches(objective, tmp_path):
    found, _ = _bench("bench_step.py", tmp_path, "--objective", objective)
    networks = {"cps": 2, "mean_teacher": 1}[objective]
    assert 1.2 * networks < found["facts"]["ours"]["loss"] < 3.0 * networks


def test_the_augmentation_benchmark_gives_the_cost_of_a_batch(tmp_path):
    found, _ = _bench("bench_augment.py", tmp_path, "--draws", "1", "--no-step")
    assert found["ours"]["cpu"] > 0


def test_the_inference_benchmark_counts_its_tiles(tmp_path):
    found, _ = _bench("bench_infer.py", tmp_path, "--volume", "6,24,16", "--mirrors", "on")
    assert found["facts"]["ours"]["tiles"] == 2 * 2 * 1 * 8
    assert found["mirrors"]["ours"]["wall"] > 0


def test_the_benchmark_of_whole_predictions_goes_from_files_to_files(tmp_path):
    found, text = _bench("bench_predict.py", tmp_path, "--volume", "8,48,32", "--scans", "2")
    assert "tiny, 2 of 8,48,32, ours in float32" in text
    assert found["ours"]["wall"] > 0
    assert found["first"]["ours"]["cpu"] > 0
    assert found["ours"]["peak_gb"] > 0.1


@pytest.mark.parametrize(
    ("script", "options", "row"),
    [
        ("bench_preprocess.py", ("--alone", "--cases=2", "--size=64", "--rounds=1"), "both, cpu"),
        ("bench_input.py", ("--cases=1", "--seconds=1", "--threads=1"), "patches"),
        (
            "bench_evaluate.py",
            ("--cases=1", "--size=64", "--slices=8", "--rounds=1", "--peer-python=none"),
            "1 cases, overlap",
        ),
    ],
)
def test_the_benchmarks_of_the_host_side_run_with_one_command(script, options, row):
    done = subprocess.run(
        [sys.executable, str(TOOLS / script), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert row in done.stdout


def test_what_was_compiled_before_makes_no_figure_smaller(tmp_path, monkeypatch):
    import bench_growth
    import bench_train

    program = tmp_path / "program"
    told = "$JAX_COMPILATION_CACHE_DIR, $JAX_ENABLE_COMPILATION_CACHE."
    program.write_text(f"#!/bin/sh\necho compiled: {told} >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    with pytest.raises(SystemExit, match=rf"compiled: {tmp_path}/compiled, \."):
        bench_growth.measure("train", tmp_path, [])
    with pytest.raises(SystemExit, match=r"compiled: mine, false\."):
        bench_train.train("cps", tmp_path, tmp_path, bench_train.parse([]))


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_of_several_gpus_both_sides_predict_on_the_first(visible, first, tmp_path, monkeypatch):
    import bench_predict

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = bench_predict.environment(bench_predict.parse(["--device=gpu"]), tmp_path)
    assert (found["CUDA_VISIBLE_DEVICES"], "JAX_PLATFORMS" in found) == (first, False)
    found = bench_predict.environment(bench_predict.parse([]), tmp_path)
    assert found["JAX_PLATFORMS"] == "cpu"


def test_the_flops_of_the_plan_for_head_ct_are_those_counted_by_hand():
    from bench_networks import PRESETS, step_flops

    # 462.3 GMAC a patch forward (published for this plan), two patches, backward twice that.
    assert step_flops(PRESETS["bhsd"]) == pytest.approx(2 * 3 * 2 * 462.3e9, rel=0.01)


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_sides():
    from bench_pair import summarize

    def run(wall):
        return {"wall": wall, "cpu": 2 * wall, "peak": 10**9}

    table = summarize([(run(1.0), run(3.0)), (run(2.0), run(2.0)), (run(4.0), run(8.0))])
    assert table["ratio_wall"]["median"] == 2.0
    assert table["ratio_wall"]["low"] == 1.5
    assert table["ours"] == {"wall": 2.0, "cpu": 4.0, "peak_gb": 1.0}


def test_both_sides_take_turns_in_alternating_order():
    from bench_pair import take_turns

    said = []

    class Side:
        def __init__(self, name):
            self.name = name

        def run(self, job):
            said.append(self.name)
            return {"wall": 1.0, "cpu": 1.0, "peak": 0, "name": self.name}

    rounds = take_turns(Side("ours"), Side("peer"), "step", 2)
    assert said == ["ours", "peer", "peer", "ours"]
    assert [tuple(run["name"] for run in turn) for turn in rounds] == [("ours", "peer")] * 2
