"""What is read from the log of a training that was stopped, damaged or resumed."""

import json

import pytest

from bhsd_jax.platform import step_log


@pytest.fixture
def log(tmp_path):
    """(lines, end of the file) -> path."""

    def write(*lines, end=""):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + end)
        return path

    return write


def steps(path):
    return [(record["step"], record.get("train/loss")) for record in step_log.read(path)]


def test_without_a_file_there_are_no_lines(tmp_path):
    assert step_log.read(tmp_path / "metrics.jsonl") == []


def test_a_line_cut_off_by_a_crash_and_one_without_a_step_are_left_out(log):
    path = log({"step": 1, "train/loss": 3.0}, {"note": 7}, end='{"step": 2, "tra')
    assert steps(path) == [(1, 3.0)]


def test_all_lines_of_one_step_are_kept_in_their_order(log):
    lines = [
        {"step": 3, "train/loss": 1.0, "time/elapsed_s": 1.0},
        {"step": 3, "val/dice/mean": 0.5, "time/elapsed_s": 2.0},
        {"step": 3, "checkpoint/step": 2, "time/elapsed_s": 3.0},
        {"step": 3, "checkpoint/step": 3, "time/elapsed_s": 4.0},
    ]
    assert step_log.read(log(*lines)) == lines


def test_later_lines_of_a_resumed_run_replace_the_steps_that_it_did_again(log):
    first = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3, 4)]
    again = [{"step": step, "train/loss": 2.0} for step in (3, 4, 5)]
    assert steps(log(*first, *again)) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_the_last_step_alone_may_have_been_done_again(log):
    validated = {"step": 2, "val/dice/mean": 0.5}
    path = log({"step": 2, "train/loss": 1.0}, validated, {"step": 2, "train/loss": 2.0})
    assert step_log.read(path) == [validated, {"step": 2, "train/loss": 2.0}]
