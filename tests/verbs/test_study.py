"""What the report of many runs says, against numbers made by hand."""

import dataclasses
import json

import numpy as np
import pytest

from bhsd_jax.configs import table1, table3
from bhsd_jax.experiments import study
from bhsd_jax.experiments.queue import Failure, Trial
from bhsd_jax.platform import files
from bhsd_jax.report.page import NOTICE
from bhsd_jax.volume import HEMORRHAGE

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
FIVE = HEMORRHAGE[1:]


def section(text, title):
    """A heading's part of the Markdown."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(text, title, row):
    """What a table of the section has in a row."""
    for line in section(text, title).splitlines():
        parts = [part.strip() for part in line.strip("|").split(" | ")]
        if parts[0] == row:
            return parts[1:]
    raise AssertionError(f"no row {row}")


@pytest.fixture
def binary(make, finish):
    """SupOnly with Dice 0.4 and 0.6, CPS with 0.7 and 0.8, entropy with one seed of two."""
    made = make("--rows=suponly,entropy,cps", "--seeds=0,1", "--override=evaluate.bootstrap=100")
    runs = {(run.row, run.seed): run for run in made.runs}
    # Two scans with Dice 0.2 and 0.6; then both 0.6; ...
    finish(runs["suponly", 0], [(1, 4, 4)], [(3, 2, 2)])
    finish(runs["suponly", 1], [(3, 2, 2)], [(3, 2, 2)])
    finish(runs["cps", 0], [(3, 2, 2)], [(4, 1, 1)])
    finish(runs["cps", 1], [(4, 1, 1)], [(4, 1, 1)])
    finish(runs["entropy", 1], [(0, 5, 5)], [(0, 5, 5)])
    return made, runs


def test_means_standard_deviations_and_differences(binary):
    made, runs = binary
    failure = Failure(runs["entropy", 0], "train: /data/DOE^JOHN.nii.gz: damaged", "train")
    study.write(made, [failure])
    text = (made.out / "report.md").read_text()
    sd = 100 * 0.2 / np.sqrt(2)
    assert cells(text, "Results", "SupOnly")[:3] == ["45.10 ± 0.21", "50.00", f"{sd:.2f}"]
    sd = 100 * 0.1 / np.sqrt(2)
    assert cells(text, "Results", "CPS")[:3] == ["49.50 ± 0.19", "75.00", f"{sd:.2f}"]
    assert cells(text, "Results", "CPS")[-1] == "2"
    # Per scan, CPS is (0.7, 0.8) and SupOnly (0.4, 0.6) over the seeds: all draws lie between.
    assert cells(text, "Results", "CPS")[3] == "70.0 to 80.0"
    against = cells(text, "Against SupOnly", "CPS")
    assert against[:2] == ["+4.40", "+25.00"]
    assert against[2] == f"{100 * 0.1 / np.sqrt(2):.2f}", "0.3 with one seed, 0.2 with the other"
    assert against[3] == "+20.0 to +30.0"
    one = cells(text, "Results", "Entropy minimization")
    assert one[1:] == ["0.00", "—", "0.0 to 0.0", "1"]
    failed = "entropy, seed 0: train failed; entropy/seed0/log.txt says why"
    assert failed in section(text, "Runs that failed")
    for name in ("report.md", "report.html", "figures.json"):
        assert "DOE" not in (made.out / name).read_text(), "a verb's words may name a patient"
    assert "5 of 6" in text.split("## ")[0]
    assert "any" not in section(text, "Results"), "said in words"


def test_synthetic_data_is_not_held_against_the_paper(binary):
    made, _ = binary
    study.write(made)
    for name in ("report.md", "report.html"):
        text = (made.out / name).read_text()
        assert "computer-generated" in text
        assert "Smoke size" in text
        assert NOTICE in text
        assert "ours - paper" not in text
        assert "configs/table2.py:cps,seed=0" in text
        assert str(made.out) not in text, "no place of this machine"
    assert "CC0" in text


def not_generated(made, data):
    """The study as if its runs were on this data set, and no smoke runs."""
    for run in made.runs:
        run.config.data["name"] = data
        if (run.workdir / "summary.json").is_file():
            config = json.loads((run.workdir / "config.json").read_text())
            config["data"]["name"] = data
            files.write_json(run.workdir / "config.json", config)
            (run.workdir / "summary.json").touch()
    return study.Study(made.title, made.out, made.rows, made.runs, made.baseline, made.notes)


def test_the_test_part_of_bhsd_is_held_against_the_paper(binary):
    made, _ = binary
    real = not_generated(made, "bhsd.BHSD")
    study.write(real)
    text = (made.out / "report.md").read_text()
    assert "Not all of these scans" not in text
    assert "2** test scans in every figure" in text
    assert "computer-generated" not in text
    assert cells(text, "Results", "CPS")[4] == "+25.50"
    assert cells(text, "Results", "SupOnly")[4] == "+4.90"
    assert "192" in section(text, "Notes")
    assert "1418, not 1500" in section(text, "Notes")


def test_validation_scans_are_called_so_and_not_held_against_the_paper(binary):
    made, runs = binary
    for run in runs.values():
        path = run.workdir / "summary.json"
        if path.is_file():
            found = json.loads(path.read_text())
            files.write_json(path, found | {"scored": {"split": "val"}})
    study.write(not_generated(made, "bhsd.BHSD"))
    text = (made.out / "report.md").read_text()
    assert "ours - paper" not in text
    assert "Not all of these scans are the test part of BHSD" in text
    assert "2** validation scans in every figure" in text
    assert "test scans" not in text.split("## ")[0]
    assert cells(text, "How it was made", "scans tested") == ["validation scans"]


def test_another_data_set_with_its_own_classes_is_not_held_against_the_paper(make, finish):
    made = make("--rows=nnunet", "--seeds=0", "-o", "predict.split=val", table=table1)
    finish(made.runs[0], [(4, 1, 1), (1, 0, 0)], classes=("liver", "cyst"))
    study.write(not_generated(made, "msd.MSD"))
    text = (made.out / "report.md").read_text()
    assert "Not all of these scans are the test part of BHSD" in text
    assert "ours - paper" not in text
    assert "difference" not in section(text, "By class")
    assert "n counts the validation scans" in section(text, "By class")
    assert cells(text, "Results", "nnU-Net 3D")[:2] == ["29.44", "90.00"]


def test_a_row_whose_dice_is_not_defined_is_not_the_best(make, finish):
    """Of two rows the first was named, since NaN is not less than anything."""
    made = make("--rows=suponly,cps", "--seeds=0")
    finish(made.runs[0], [(0, 0, 0)])  # rightly empty
    finish(made.runs[1], [(3, 2, 2)])
    study.write(made)
    head = (made.out / "report.md").read_text().split("## ")[0]
    assert "**60.00** Dice in percent of the best row, CPS" in head


def test_what_differs_between_rows_is_not_said_of_all(make, finish):
    """A sweep over the number of masks was said to have used those of its first row."""
    made = make("--rows=suponly,cps", "--seeds=0", "-o", "evaluate.bootstrap=50")
    first, second = made.runs
    split = dataclasses.replace(second.config.split, labeled=4)
    second = dataclasses.replace(second, config=dataclasses.replace(second.config, split=split))
    for run in (first, second):
        finish(run, [(3, 2, 2)])
    study.write(dataclasses.replace(made, runs=[first, second]))
    text = (made.out / "report.md").read_text()
    facts = {
        "masks used of the training part": "not the same in all rows",
        "validation fold": "none",
        "intervals": "50 bootstrap resamples of patients",
    }
    assert {name: cells(text, "How it was made", name) for name in facts} == {
        name: [value] for name, value in facts.items()
    }


def test_nothing_run_yet_is_a_report_too(make):
    made = make("--rows=500-0,0-0", table=table3)
    study.write(made)
    text = (made.out / "report.md").read_text()
    assert cells(text, "Results", "CPS, 500 / 0")[1] == "not run"
    assert "0 of 6" in text


def test_classes_conventions_and_false_alarms(make, finish):
    made = make("--rows=nnformer,nnunet", "--seeds=0", table=table1)
    absent, found, spurious = (0, 0, 0), (4, 1, 1), (0, 2, 0)
    for run, first in zip(made.runs, (absent, spurious), strict=True):
        finish(
            run,
            [first, found, absent, absent, absent],
            [absent, found, absent, absent, found],
            classes=FIVE,
        )
    study.write(made)
    text = (made.out / "report.md").read_text()
    # nnU-Net's rule: EDH is in no scan; with a false alarm it counts 0, without it is left out.
    assert cells(text, "Results", "nnFormer [1]")[:2] == ["29.19", "80.00"]
    assert cells(text, "Results", "nnU-Net 3D")[:2] == ["29.44", "53.33"]
    part = section(text, "By class")
    assert "EDH (n = 0) | IPH (n = 2)" in part
    assert "|  | ours | — | 80.00 | — | — | 80.00 | 80.00 |" in part
    assert "|  | ours | 0.00 | 80.00 | — | — | 80.00 | 53.33 |" in part
    assert cells(text, "False alarms", "nnU-Net 3D") == ["1.0", "0.0", "0.0", "0.0", "0.0"]
    assert cells(text, "False alarms", "nnFormer [1]")[0] == "0.0"
    # Merged: (4, 3, 1) is 8 / 12, (8, 2, 2) is 0.8.
    other = cells(text, "Under other conventions", "nnU-Net 3D")
    assert other[0] == "53.33"
    assert other[1] == "80.00", "where present"
    assert other[-1] == f"{100 * (8 / 12 + 0.8) / 2:.2f}"
    assert "26.36" in section(text, "Notes")


def test_costs_are_those_the_runs_wrote_down(binary):
    made, runs = binary
    for run in (runs["cps", 0], runs["cps", 1]):
        flops = {"devices": 2, "device": "H100", "parameters": 31_000_000, "flops_per_device": 4e12}
        files.write_json(run.workdir / "cost.json", flops)
        files.write_json(
            run.workdir / "wall.json", {"train": 200.0 + run.seed * 100, "predict": 50.0}
        )
        lines = [
            {"step": 2, "train/loss": 1.0, "time/step_s": 10.0},
            {"step": 2, "val/dice/mean": 0.5, "time/validation_s": 99.0},
            {"step": 4, "train/loss": 1.0, "time/step_s": 20.0},
        ]
        (run.workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    study.write(made)
    text = (made.out / "report.md").read_text()
    want = ["31", "8,000", "4", "8x32x32", "2 + 2", "60 s", "5 min"]
    assert cells(text, "Cost", "CPS") == want
    assert "H100" in section(text, "Cost")
    assert cells(text, "Cost", "SupOnly")[-2:] == ["—", "—"]
    figures = json.loads((made.out / "figures.json").read_text())
    assert figures["cps"]["found"]["nnunet"]["any"]["mean"] == pytest.approx(0.75)


def test_runs_on_different_scans_do_not_share_a_table(make, finish):
    made = make("--rows=suponly,cps", "--seeds=0")
    finish(made.runs[0], [(1, 0, 0)])
    finish(made.runs[1], [(1, 0, 0)], [(1, 0, 0)])
    with pytest.raises(ValueError, match="different scans"):
        study.write(made)


def test_arguments_have_no_folder_of_this_machine(make):
    config = make("--rows=cps", "--seeds=0").runs[0].config
    words = ["--config=/home/jane/x.py:smoke", "--config.predict.runs=('/data/J D/a','/b/c')"]
    words += ["--config.data.root=/data/DOE", "--config.input.patch=(8,32,32)"]
    plain = "--config=configs/cps.py:data=bhsd"
    shown = study._words(Trial("a", 0, make().out, (*words, plain), config))
    assert shown.split(" ")[0] == "--config=x.py:smoke"
    assert not [name for name in ("jane", "/data", "J D", "DOE", "/b/") if name in shown]
    assert "(8,32,32)" in shown
    assert plain in shown


def test_a_refused_trial_says_so_without_its_folder(binary):
    made, runs = binary
    study.write(made, [Failure(runs["entropy", 0], f"{made.out} holds a run of another config")])
    text = (made.out / "report.md").read_text()
    assert "entropy, seed 0: refused before it began" in section(text, "Runs that failed")
    assert str(made.out) not in text
