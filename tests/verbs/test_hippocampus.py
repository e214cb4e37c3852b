"""The study of few masks: its trials, what begins with pretrained weights, its table, its end."""

import json
import signal
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from bhsd_jax.configs.hippocampus import TABLE

from bhsd_jax.experiments import hippocampus, queue, turned
from bhsd_jax.experiments.children import running
from bhsd_jax.experiments.queue import Stopped
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream


def options(tmp_path, *words):
    return hippocampus._parser().parse_args(["/data/Task04", f"--out={tmp_path}", *words])


def study(tmp_path, masks, *words):
    return hippocampus.make_study(TABLE, options(tmp_path, *words), masks)


def test_every_row_has_its_masks_its_seed_and_one_set_of_shards(tmp_path):
    made = study(tmp_path, 4, "--seeds=0,1")
    assert {run.config.split.labeled for run in made.runs} == {4}
    assert [run.seed for run in made.runs] == [0] * len(made.rows) + [1] * len(made.rows)
    assert {run.config.preprocess.shards for run in made.runs} == {str(tmp_path / "shards")}
    assert len({run.config.train.steps for run in made.runs}) == 1
    assert TABLE.pretraining not in made.rows
    begun = {run.row: run.config.train.init_from for run in made.runs if run.seed == 1}
    there = str(tmp_path / "pretraining" / "seed1")
    assert begun == {row: there if row in TABLE.pretrained else "" for row in made.rows}
    with pytest.raises(ValueError, match=r"--rows: no pretrain; there are masks, "):
        study(tmp_path, 4, "--rows=masks,pretrain")


def test_masks_alone_are_a_moving_average_too(tmp_path):
    """Else what the average of a teacher brings would count for the unlabeled scans."""
    made = study(tmp_path, 8, "--seeds=0")
    decays = {run.row: run.config.objective.get("ema_decay") for run in made.runs}
    assert {row for row, decay in decays.items() if decay is None} == {"cps", "cps_cutmix"}  # twins
    assert len(set(decays.values()) - {None}) == 1


@pytest.fixture
def finished(tmp_path, finish):
    """Two rows with two seeds each: Dice 0.4 and 0.6, then 0.5 and 0.9."""
    made = study(tmp_path, 8, "--rows=masks,cps", "--seeds=0,1", "-o", "evaluate.bootstrap=50")
    names = ("Anterior", "Posterior")
    scans = {
        ("masks", 0): (4, 6, 6),
        ("masks", 1): (6, 4, 4),
        ("cps", 0): (5, 5, 5),
        ("cps", 1): (9, 1, 1),
    }
    for run in made.runs:
        counts = scans[run.row, run.seed]
        finish(run, [counts, counts], [counts, counts], classes=names)
        files.write_json(run.workdir / "cpu.json", {"train": 240.0, "predict": 60.0})
        lines = [{"step": s, "val/dice/mean": d} for s, d in ((2, 0.25), (4, 0.5 + run.seed / 4))]
        (run.workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return made


def test_the_table_says_means_differences_and_how_many_seeds_are_above(finished, tmp_path):
    few = study(tmp_path, 4, "--rows=masks,ict", "--seeds=0")
    files.write_json(few.runs[1].workdir / "failed.json", {"verb": "train", "log": "log.txt"})
    hippocampus.write({8: finished, 4: few}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = {
        tuple(cells[:2]): cells[2:]
        for line in text.splitlines()
        if len(cells := [part.strip() for part in line.strip("|").split(" | ")]) == 8
    }
    assert rows["Masks alone", "8"] == ["50.00 ± 14.14", "—", "—", "2", "—", "5 min"]
    assert rows["CPS", "8"] == ["70.00 ± 28.28", "+20.00", "+20.0 to +20.0", "2", "2 of 2", "5 min"]
    assert rows["Masks alone", "4"][0] == "not run"
    assert rows["Interpolation consistency", "4"][0] == "failed"


def test_a_report_has_the_learning_curves_and_the_cpu_time(finished):
    from bhsd_jax.experiments import study as studies

    studies.write(finished)
    text = (finished.out / "report.md").read_text()
    assert "| CPS | 25.0 | 62.5 |" in text.split("## Learning curves")[1]
    assert text.split("## Cost")[1].split("| CPS |")[1].splitlines()[0].endswith("| 5 min |")


def test_the_cpu_time_of_a_command_is_that_of_its_process(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    with running() as children:
        call = children.call()
        assert call([sys.executable, "-c", busy], tmp_path / "log.txt")[0] == 0
    assert call.cpu_s is not None
    assert 0.5 < call.cpu_s < 10


def test_the_time_limit_stops_as_a_signal_does_and_is_gone_afterwards():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Stopped, match=r"0\.001 minutes are over"), hippocampus._time_limit(0.001):
        time.sleep(300)
    for minutes in (None, 10):
        with hippocampus._time_limit(minutes):
            assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(
                60 * (minutes or 0), 0.5
            )
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_the_time_limit_ends_what_is_prepared_or_trained_for_others_too(tmp_path):
    """There the series itself reads what the command says, and no other thread would end it."""
    command = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
        "os.kill(os.getppid(), signal.SIGALRM)\n"
        "time.sleep(20)\n"
    )
    log = tmp_path / "log.txt"
    with running() as children:
        call = children.call()
        with pytest.raises(Stopped, match="10 minutes are over"), hippocampus._time_limit(10):
            call([sys.executable, "-c", command], log)
        assert call.child.poll() == 1, "it has ended before the series goes on"
    assert log.read_text().splitlines()[-1] == "saved"


def test_what_others_begin_with_is_trained_once(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(queue, "prepare", lambda run, folder: done.append("shards"))
    monkeypatch.setattr(queue, "train", lambda run: done.append((run.workdir, run.config.seed)))
    hippocampus._pretrain(TABLE, options(tmp_path, "--rows=masks,cps", "--seeds=0"))
    assert not done
    hippocampus._pretrain(TABLE, options(tmp_path, "--rows=masks,pretrained", "--seeds=3"))
    assert done == ["shards", (tmp_path / "pretraining" / "seed3", 3)]


def test_coronal_slices_are_the_same_voxels_turned(tmp_path):
    rng, affine = np.random.default_rng(0), np.diag([-1.0, 2, 3, 1])
    source, target = tmp_path / "axial", tmp_path / "coronal"
    for part in ("imagesTr", "labelsTr"):
        (source / part).mkdir(parents=True)
        voxels = rng.integers(0, 90, (4, 5, 6)).astype(np.int16)
        image = nib.Nifti1Image(voxels, affine)
        image.header.set_slope_inter(0.5, 3)
        nib.save(image, source / part / "scan_1.nii.gz")
    (source / "dataset.json").write_text("{}")
    assert turned.write_coronal(source, target) == target
    for part in ("imagesTr", "labelsTr"):
        before, after = (
            nib.Nifti1Image.load(place / part / "scan_1.nii.gz") for place in (source, target)
        )
        np.testing.assert_array_equal(before.get_fdata(), after.get_fdata())
        assert nib.aff2axcodes(before.affine) == ("L", "A", "S")
        assert nib.aff2axcodes(after.affine) == ("L", "S", "P")
        np.testing.assert_allclose(after.get_sform(), after.get_qform(), atol=1e-6)
    made = study(tmp_path, 4, "--plane=coronal", "--rows=w2s", "--seeds=0")
    assert [run.config.input.patch for run in made.runs] == [(16, 12, 12)]


def test_a_folder_of_another_layout_is_not_turned(tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json, or no \*\.nii\.gz in imagesTr"):
        turned.write_coronal(tmp_path, tmp_path / "coronal")
