"""Label maps that are there stay among those of the same networks, and of no others."""

import csv
import errno
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import tiny_run
from dicom_files import write_series

from bhsd_jax.assemble import origins
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.configs import common, from_run
from bhsd_jax.platform import faults
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.train import agreement, barrier
from bhsd_jax.verbs import chosen_scans, predict


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        image = nib.Nifti1Image(tiny_run.head(seed), tiny_run.upright())
        nib.save(image, folder / f"{name}.nii.gz")
    return folder


def run(folder, scans, out, *, step=0.5, **changes):
    config = from_run.get_config(str(folder))
    config.infer.step = step
    config.predict.update(images=str(scans), out=str(out), **changes)
    predict.run(config, folder)


def kept(out):
    """Which scans of the table have label maps that were there."""
    with (out / "volumes.csv").open(newline="") as file:
        return [row["case"] for row in csv.DictReader(file) if not row["seconds"]]


def test_label_maps_of_other_networks_and_other_tiles_are_not_taken_for_ours(tmp_path, scans):
    one, other = (tiny_run.make(tmp_path / f"run_{seed}", seed) for seed in (0, 1))
    out = tmp_path / "out"
    run(one, scans, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"2 of 2 label maps were made otherwise: weights_sha256"):
        run(other, scans, out, overwrite=False)
    with pytest.raises(ValueError, match=r"made otherwise: infer\.step \(0\.5 -> 0\.25\)"):
        run(one, scans, out, step=0.25, overwrite=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(one, scans, out, overwrite=False, present_ml=2.0)
    assert kept(out) == ["a", "b"]


def test_a_call_that_overwrites_and_is_stopped_goes_on_with_all_that_is_not_its_own(
    tmp_path, scans, monkeypatch
):
    one, other = (tiny_run.make(tmp_path / f"run_{seed}", seed) for seed in (0, 1))
    out, write = tmp_path / "out", Predictor.write
    run(one, scans, out)

    def full(self, answer, target):
        if target.name.startswith("b"):
            raise faults.WriteError(errno.ENOSPC, "No space left on device", str(target))
        return write(self, answer, target)

    monkeypatch.setattr(Predictor, "write", full)
    with pytest.raises(ValueError, match=r"1 of 2 label maps are in .*overwrite=False"):
        run(other, scans, out)
    monkeypatch.undo()
    run(other, scans, out, overwrite=False)
    assert kept(out) == ["a"]
    run(other, scans, tmp_path / "whole")
    for name in "ab":
        found, want = (folder / f"{name}.nii.gz" for folder in (out, tmp_path / "whole"))
        assert found.read_bytes() == want.read_bytes()


def test_label_maps_of_unknown_origin_stay_and_are_told_of(tmp_path, scans, caplog):
    folder, out = tiny_run.make(tmp_path / "run"), tmp_path / "out"
    run(folder, scans, out)
    (out / origins.NAME).unlink()
    run(folder, scans, out, overwrite=False)
    assert kept(out) == ["a", "b"]
    assert "2 label maps stay of which it is not known what made them" in caplog.text


def test_several_jobs_of_several_processes_do_not_mix_their_tables(tmp_path, scans, monkeypatch):
    """Each second process is done before the first ones, which is where they used to meet."""
    folder, out = tiny_run.make(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    for name in "abcd":
        image = nib.Nifti1Image(tiny_run.head(), tiny_run.upright())
        nib.save(image, scans / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.uint8(image.dataobj) * 0, image.affine), out / f"{name}.nii.gz")
    monkeypatch.setattr(barrier, "wait_for_all", lambda name: None)
    for index, job in ((1, 0), (1, 1), (0, 0), (0, 1)):
        monkeypatch.setattr(barrier, "place", lambda index=index: (index, 2))
        run(folder, scans, out, overwrite=False, num_parts=2, part_id=job)
    assert kept(out / "part_0_of_2") == ["a", "c"]
    assert kept(out / "part_1_of_2") == ["b", "d"]


def test_processes_of_one_run_that_were_given_other_scans_are_refused(tmp_path, scans, monkeypatch):
    """Such as by `mpiexec -n 2` with a part_id each: half of each part was left out, untold."""
    folder, out = tiny_run.make(tmp_path / "run"), tmp_path / "out"
    monkeypatch.setattr(barrier, "wait_for_all", lambda name: None)
    monkeypatch.setattr(barrier, "place", lambda: (1, 2))
    monkeypatch.setattr(agreement, "gather_words", lambda text: ["of other scans", text])
    with pytest.raises(UserError, match=r"^process 1 of 2 was given other scans .*PROCESSES=1$"):
        run(folder, scans, out, part_id=1, num_parts=2)
    assert not out.exists()


def test_of_more_jobs_than_scans_the_last_ones_do_nothing(tmp_path, scans, caplog):
    """They were refused, with an exit code of 1, so that an array of jobs counted as failed."""
    folder, out = tiny_run.make(tmp_path / "run"), tmp_path / "out"
    caplog.set_level("INFO")
    for job in (3, 0, 1, 2):
        run(folder, scans, out, part_id=job, num_parts=4)
    for job in (2, 3):
        table = json.loads((out / f"part_{job}_of_4" / "volumes.json").read_text())
        assert table["scans"] == []
        assert f"job {job} of 4: of 2 scans none is left for it" in caplog.text
    run(folder, scans, out, overwrite=False)  # the tables of all
    assert kept(out) == ["a", "b"]
    with pytest.raises(ValueError, match=r"part_id is 0\.\.3; got 4"):
        run(folder, scans, out, part_id=4, num_parts=4)


def refill(folder, seed, **options):
    """The inbox with another patient's series, in files of the same names."""
    shutil.rmtree(folder, ignore_errors=True)
    voxels = tiny_run.head(seed).transpose(2, 1, 0)[:, ::-1, ::-1]
    spacing_mm = (5.0, 2.0, 2.0)
    write_series(folder / "ct", voxels, series=f"1.2.3.{seed}", spacing_mm=spacing_mm, **options)


def test_a_folder_that_is_filled_again_has_other_hidden_names(tmp_path):
    """The same series in another folder is a scan of its own, as before."""
    config = from_run.get_config(str(tiny_run.make(tmp_path / "run")))
    config.predict.images = str(tmp_path / "in")
    settings, found = Settings.of(config), []
    for seed in (1, 2, 1):
        refill(tmp_path / "in", seed)
        cases = chosen_scans.find_scans(settings, tmp_path / "run")
        found += chosen_scans.output_names(cases, tmp_path / "run", settings.predict).values()
    assert found[0] == found[2] != found[1]
    refill(tmp_path / "in" / "again", 1)
    cases = chosen_scans.find_scans(settings, tmp_path / "run")
    names = chosen_scans.output_names(cases, tmp_path / "run", settings.predict)
    assert len({*names.values(), found[0]}) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_series_are_predicted_with_a_run_that_can_only_be_read(tmp_path):
    """Their hidden names need a salt, which a shared run without one cannot be given."""
    config, shared, out = common.get_config(), tmp_path / "run", tmp_path / "out"
    refill(tmp_path / "in", 1)
    config.predict.update(images=str(tmp_path / "in"), out=str(out))
    settings = Settings.of(config)
    shared.mkdir(mode=0o755)
    out.mkdir()
    out.chmod(0o777)
    for above in list(out.parents)[:-1]:
        above.chmod(above.stat().st_mode | 0o011)
    cases = chosen_scans.find_scans(settings, shared)
    os.seteuid(65534)
    try:
        first, again = (
            chosen_scans.output_names(cases, shared, settings.predict) for _ in range(2)
        )
        digests = chosen_scans.series_digests(cases, first, shared, out)
    finally:
        os.seteuid(0)
    assert first == again
    assert digests
    assert [path.name for path in out.iterdir()] == [".salt"]
    assert not list(shared.iterdir())


def test_nothing_of_another_patient_stays_under_an_open_name(tmp_path, caplog):
    """A tilted patient, a straight one, one more of the same geometry, and one who is refused."""
    folder = tiny_run.make(tmp_path / "run")
    inbox, out = tmp_path / "in", tmp_path / "out"
    refill(inbox, 1, tilt_deg=14.0)
    run(folder, inbox, out, show_ids=True, probabilities=True)
    pair = {out / "upright" / f"ct_{part}.nii.gz" for part in ("scan", "labels")}
    assert all(path.is_file() for path in (*pair, out / "ct_probabilities.npz"))
    refill(inbox, 2)
    run(folder, inbox, out, show_ids=True)
    assert not list(out.glob("**/ct_*"))
    before = (out / "ct.nii.gz").read_bytes()

    refill(inbox, 3)
    run(folder, inbox, out, show_ids=True, overwrite=False)
    assert "1 label maps are of other series" in caplog.text
    assert kept(out) == []
    assert (out / "ct.nii.gz").read_bytes() != before
    run(folder, inbox, out, show_ids=True, overwrite=False)
    assert kept(out) == ["ct"]
    assert "1.2.3" not in (out / origins.NAME).read_text()

    refill(inbox, 4, places=[0, 5, 10, 20, 25, 30, 35])
    with pytest.raises(ValueError, match="ct: series 1: 1 slice is missing"):
        run(folder, inbox, out, show_ids=True)
    assert not (out / "ct.nii.gz").exists(), "else it would pass for the one in skipped.csv"


def test_what_made_label_maps_is_noted_before_the_first_of_them(tmp_path, scans, monkeypatch):
    """Jobs of several note it beside all label maps, and a call that is stopped has noted it."""
    run_folder, out = tiny_run.make(tmp_path / "run"), tmp_path / "out"
    run(run_folder, scans, out, part_id=1, num_parts=2)
    noted = json.loads((out / "predictions.json").read_text())
    assert (noted["step"], noted["split"]) == (0, None)
    text = json.dumps(noted | {"step": 7})
    (out / "predictions.json").write_text(text)
    (out / "volumes.json").write_text("{}")

    def stopped(scans):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_all", stopped)
    for overwrite, step in ((False, 7), (True, 0)):
        with pytest.raises(KeyboardInterrupt):
            run(run_folder, scans, out, overwrite=overwrite)
        assert json.loads((out / "predictions.json").read_text())["step"] == step
        assert (out / "volumes.json").exists() != overwrite
