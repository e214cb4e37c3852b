"""A row of a table as a user runs it, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plain_code

ROOT = Path(__file__).parents[2]


def test_a_row_from_nothing_to_the_report_and_nothing_twice(tmp_path):
    words = ["table2", "--smoke", "--rows=suponly", "--seeds=0", f"--out={tmp_path}"]

    def run():
        command = [sys.executable, "-m", "bhsd_jax.experiments.paper_tables", *words]
        # It compiles much and computes little.
        plain = {} if os.environ.get("BHSD_TEST_ALL") else plain_code.environment()
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | plain, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    assert "1 of 1 runs finished" in run()
    folder = tmp_path / "suponly" / "seed0"
    assert set(json.loads((folder / "wall.json").read_text())) == {
        "train",
        "predict",
        "evaluate",
        "report",
    }
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["flops_per_device"] > 1e6
    assert cost["parameters"] > 1000
    found = json.loads((folder / "summary.json").read_text())["binary"]
    figure = json.loads((tmp_path / "figures.json").read_text())["suponly"]["found"]
    assert figure["nnunet"]["any"]["mean"] == found["dice"]
    text = (tmp_path / "report.md").read_text()
    assert f"| SupOnly | 45.10 ± 0.21 | {100 * found['dice']:.2f} | — |" in text
    again = run()
    assert "suponly, seed 0 is finished" in again
    assert "train, run folder" not in again
