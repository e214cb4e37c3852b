"""The Python interface gives what the verb gives; the guide's snippets run as printed."""

import dataclasses
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jaxlib
import nibabel as nib
import numpy as np
import pytest
import tiny_run

from bhsd_jax.api import Predictor, read_scan, show
from bhsd_jax.assemble import calibrated, cascade, devices, ensemble, origins
from bhsd_jax.ct import probabilities
from bhsd_jax.infer.ensemble import mean_of_probabilities
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.platform import files
from bhsd_jax.report import niivue
from bhsd_jax.verbs import predict

GUIDE = Path(__file__).parents[1] / "tools" / "guide" / "python.md"


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compiling for eight devices takes longer; `tests/infer` does it."""
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs as folds leave them."""
    root = tmp_path_factory.mktemp("runs")
    return [tiny_run.make(root / f"fold{seed}", seed) for seed in range(3)]


@pytest.fixture
def scans(tmp_path):
    """Scans of several orientations, spacings and types."""
    images = tmp_path / "images"
    images.mkdir()
    turned = np.diag([-1.0, -1, 1, 1]) @ tiny_run.upright((2.0, 2.0, 5.0))
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), images / "a.nii.gz")
    nib.save(nib.Nifti1Image(tiny_run.head(1)[:, 3:], turned), images / "b.nii.gz")
    side = nib.Nifti1Image(
        tiny_run.head(2).transpose(2, 0, 1)[:, ::-1],
        tiny_run.upright((1.7, 1.9, 6.0))[:, [2, 0, 1, 3]],
    )
    side.header.set_data_dtype(np.float32)
    nib.save(side, images / "c.nii.gz")
    return images


def predict_all(run, images, out, **changes):
    """What the verb writes."""
    config = ensemble.run_of(run, images=str(images), out=str(out), **changes).config
    predict.run(config, run)
    return {path.name: np.asanyarray(nib.load(path).dataobj) for path in out.glob("*.nii.gz")}


def test_labels_are_those_of_the_verb_on_the_same_file(runs, scans, tmp_path):
    want = predict_all(runs[0], scans, tmp_path / "out")
    apply = Predictor.from_run(runs[0])
    assert apply.classes == tiny_run.CLASSES
    for name, label in want.items():
        assert len(np.unique(label)) > 1
        for voxels, affine in (nibabels(scans / name), read_scan(scans / name)):
            found = apply(voxels, affine)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, label)


def test_scans_in_the_other_formats_are_read_as_predict_reads_them(scans):
    itk = pytest.importorskip("SimpleITK")
    image = itk.ReadImage(str(scans / "b.nii.gz"))
    voxels, affine = read_scan(scans / "b.nii.gz")
    for name in ("b.nrrd", "b.mha"):
        itk.WriteImage(image, str(scans / name))
        same, place = read_scan(scans / name)
        np.testing.assert_array_equal(same, voxels)
        np.testing.assert_allclose(place, affine, atol=1e-5)


def test_one_network_may_be_named_without_a_tuple(runs):
    found = Predictor.from_run(runs[0], networks="student").members
    assert found == Predictor.from_run(runs[0], networks=("student",)).members


def test_whole_numbers_are_integers_whatever_type_they_come_in(tmp_path):
    """BLAST-CT's law takes the fraction of integers away, and nibabel's arrays are floats."""
    near = {"spacing_mm": (2.5, 1.7, 1.7), "crop_hu": None, "axes": "SPL", "law": "centers"}
    run = tiny_run.make(tmp_path / "run", plan=dataclasses.replace(tiny_run.PLAN, **near))
    images = tmp_path / "images"
    images.mkdir()
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), images / "a.nii.gz")
    floats = nib.Nifti1Image(tiny_run.head().astype(np.float32), tiny_run.upright())
    nib.save(floats, images / "b.nii.gz")
    apply = Predictor.from_run(run)
    want = apply.predict(tiny_run.head(), tiny_run.upright())
    for name, label in predict_all(run, images, tmp_path / "out").items():
        np.testing.assert_array_equal(label, want.labels)
        for scan in (nibabels(images / name), read_scan(images / name)):
            np.testing.assert_array_equal(apply.predict(*scan)._logits, want._logits)


def nibabels(path):
    image = nib.load(path)
    return image.get_fdata(), image.affine


def test_probabilities_are_the_verbs_and_say_what_they_are(runs, scans, tmp_path):
    predict_all(runs[0], scans, tmp_path / "out", probabilities=True)
    prediction = Predictor.from_run(runs[0]).predict(*nibabels(scans / "c.nii.gz"))
    prediction.probabilities.save(tmp_path / "own.npz")
    written = tmp_path / "out" / "c_probabilities.npz"
    with np.load(written) as one, np.load(tmp_path / "own.npz") as other:
        assert sorted(one) == sorted(other) == ["affine", "axes", "classes", "probabilities"]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["axes"].tolist() == ["class", "k", "j", "i"]
        assert one["classes"].tolist() == list(tiny_run.CLASSES)
        np.testing.assert_allclose(one["affine"], nib.load(scans / "c.nii.gz").affine)
        assert one["probabilities"].shape == (3, *nib.load(scans / "c.nii.gz").shape[::-1])
    read = probabilities.load(written)
    assert read.values.shape == (3, *prediction.labels.shape)
    sure = np.sort(read.values.astype(np.float32), axis=0)
    clear = sure[-1] - sure[-2] > 0.01  # float16 has ties
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(read.values.argmax(0)[clear], prediction.labels[clear])


def test_findings_say_what_the_verb_says_of_the_same_scan(runs, scans, tmp_path, caplog):
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.35), -np.sin(0.35)], [np.sin(0.35), np.cos(0.35)]]
    apply = Predictor.from_run(runs[0])
    odd = nib.Nifti1Image(tiny_run.head(), turn @ tiny_run.upright())
    odd.header["pixdim"][3] = 6
    nib.save(odd, scans / "odd.nii.gz")
    caplog.clear()
    caplog.set_level("INFO")
    assert apply.predict(*read_scan(scans / "a.nii.gz")).findings == ()
    assert not caplog.text
    found = apply.predict(*read_scan(scans / "odd.nii.gz")).findings
    assert "turned by 20.1 degrees about x" in found[0]
    assert f"{scans / 'odd.nii.gz'}: sform has steps of 2 x 2 x 5 mm" in caplog.text
    predict_all(runs[0], scans / "odd.nii.gz", tmp_path / "out")
    logged = [(one.name, str(one.args[-1])) for one in caplog.records if one.args]
    by_verb = {text for name, text in logged if name == "bhsd_jax.assemble.predictor"}
    assert {*found, *(text for name, text in logged if name == "bhsd_jax.api")} == by_verb


def test_a_file_of_probabilities_that_lacks_its_words_is_made_again(runs, scans, tmp_path, caplog):
    out = tmp_path / "out"
    predict_all(runs[0], scans, out, probabilities=True)
    whole = (out / "a_probabilities.npz").read_bytes()
    with np.load(out / "a_probabilities.npz") as stored:
        np.savez_compressed(out / "a_probabilities.npz", probabilities=stored["probabilities"])
    other = probabilities.load(out / "b_probabilities.npz")
    probabilities.Probabilities(other.values, ("background", "x", "y"), other.affine).save(
        out / "b_probabilities.npz"
    )
    predict_all(runs[0], scans, out, probabilities=True, overwrite=False)
    assert (out / "a_probabilities.npz").read_bytes() == whole
    assert probabilities.load(out / "b_probabilities.npz").classes == tiny_run.CLASSES
    assert "a: predicted again, for" in caplog.text
    assert "holds no affine" in caplog.text
    (out / "a_probabilities.npz").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"a_probabilities\.npz: damaged"):
        probabilities.load(out / "a_probabilities.npz")


def test_three_runs_give_the_mean_of_their_probabilities(runs, scans, tmp_path):
    voxels, affine = nibabels(scans / "b.nii.gz")
    alone = [Predictor.from_run(run).predict(voxels, affine) for run in runs]
    together = Predictor.from_run(*runs)
    again = Predictor.from_run(*runs, runs[0], f"{runs[1]}/../{runs[1].name}/")
    assert again.members == together.members, "each counts once, however often it is named"
    assert [member.folder for member in together.members] == runs
    found = together.predict(voxels, affine)
    # On the prepared grid, before anything is brought back to the scan's voxels.
    softmax = [np.exp(one._logits) / np.exp(one._logits).sum(0) for one in alone]
    np.testing.assert_allclose(np.exp(found._logits), np.mean(softmax, axis=0), atol=2e-6)
    labels = [one.labels for one in alone]
    assert any((label != found.labels).any() for label in labels), "no run decides alone"
    written = predict_all(
        runs[0], scans, tmp_path / "out", runs=(str(runs[1]), str(runs[2])), probabilities=True
    )
    np.testing.assert_array_equal(written["b.nii.gz"], found.labels)
    facts = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["run"] for one in facts["averaged_with"]] == ["fold1", "fold2"]


def test_every_run_is_mirrored_as_it_was_trained_whichever_is_named_first(scans, tmp_path):
    voxels, affine = nibabels(scans / "a.nii.gz")
    made = []
    for seed, axes in enumerate([(), (2,), (1, 2)]):
        made.append(tiny_run.make(tmp_path / f"run{seed}", seed, mirror=bool(axes)))
        config = json.loads((made[-1] / "config.json").read_text())
        config["infer"]["mirror_axes"] = axes or (0, 1, 2)
        (made[-1] / "config.json").write_text(json.dumps(config))
    alone = [Predictor.from_run(run).predict(voxels, affine)._logits for run in made]
    want = np.mean([np.exp(one) / np.exp(one).sum(0) for one in alone], axis=0)
    together = Predictor.from_run(*made[::-1])
    assert [member.mirror for member in together.members] == [(1, 2), (2,), ()]
    found = together.predict(voxels, affine)
    np.testing.assert_allclose(np.exp(found._logits), want, atol=2e-6)
    out, more = tmp_path / "out", (str(made[1]), str(made[2]))
    written = predict_all(made[0], scans / "a.nii.gz", out, runs=more)
    np.testing.assert_array_equal(written["a.nii.gz"], found.labels)
    facts = json.loads((out / "predictions.json").read_text())
    assert [one["mirror"] for one in facts["averaged_with"]] == [[2], [1, 2]]
    for asked, want in ((False, [(), (), ()]), (True, [(0, 1, 2), (2,), (1, 2)])):
        members = Predictor.from_run(*made, mirror=asked).members
        assert [member.mirror for member in members] == want, "what is asked for holds for all"


def test_a_run_that_was_trained_with_one_mirror_is_predicted_with_it_and_says_so(
    scans, tmp_path, caplog
):
    run = tiny_run.make(tmp_path / "run", mirror=True)
    config = json.loads((run / "config.json").read_text())
    config["augment"]["spatial"] = [{"name": "spatial.Mirror", "axes": [2]}]
    (run / "config.json").write_text(json.dumps(config))
    predictor = Predictor.from_run(run)
    assert predictor._networks.window.mirror_axes == (2,)
    assert predictor.members[0].mirror == (2,)
    with caplog.at_level(logging.INFO):
        predict_all(run, scans / "a.nii.gz", tmp_path / "out")
    assert "mirrored along W, infer.mirror=False needs one in 2" in caplog.text
    facts = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert facts["mirror"] == [2]
    lines = (tmp_path / "out" / origins.NAME).read_text().splitlines()
    (made_with,) = [line["facts"] for line in map(json.loads, lines) if "facts" in line]
    assert made_with["infer"]["mirror_axes"] == [2]


def test_what_is_averaged_and_the_precision_hold_for_all_runs_if_asked_for(runs, tmp_path):
    """Also for those whose scans are prepared in another way; else each run has its own."""
    plan = dataclasses.replace(tiny_run.PLAN, spacing_mm=(5.0, 3.0, 3.0))
    coarse = tiny_run.make(tmp_path / "coarse", 3, plan)
    config = json.loads((coarse / "config.json").read_text())
    config["predict"]["combine"] = "logits"
    (coarse / "config.json").write_text(json.dumps(config))

    def asked(combine, precision):
        first = ensemble.run_of(runs[0], combine=combine)
        config = dataclasses.replace(first.config, precision=precision)
        return dataclasses.replace(first, config=config)

    def found(first):
        one, _ = ensemble.open_runs(first, (coarse,), apart=True)
        image = np.zeros((1, *tiny_run.TILE, 1), np.float32)
        for each in (one, *one.apart):
            computed = str(jax.make_jaxpr(each.window.forward)(each.networks[0], image))
            yield each.window.combine, "bf16" in computed

    own = list(found(asked("probabilities", "auto")))
    assert own == [("probabilities", False), ("logits", False)]
    changed = asked("logits", "bfloat16")
    assert list(found(changed)) == [("logits", True)] * 2
    facts = cascade.open_first(changed, coarse, tmp_path / "out").origins.facts
    assert facts["precision"] == "bfloat16", "of the first network of a cascade, too"


def test_parts_count_as_often_as_they_have_networks():
    random = np.random.default_rng(0)
    one, two, three = (random.normal(0, 3, (3, 2, 2, 2)).astype(np.float32) for _ in range(3))
    assert mean_of_probabilities([(one, 4)]) is one
    chances = [np.exp(x) / np.exp(x).sum(0) for x in (one, two, three)]
    want = (chances[0] + 2 * chances[1] + 3 * chances[2]) / 6
    found = mean_of_probabilities([(one, 1), (two, 2), (three, 3)])
    np.testing.assert_allclose(np.exp(found), want, rtol=1e-5)
    with pytest.raises(ValueError, match="no networks"):
        mean_of_probabilities([])


def test_runs_that_see_other_scans_are_not_averaged(runs, tmp_path):
    import dataclasses

    plan = dataclasses.replace(tiny_run.PLAN, spacing_mm=(5.0, 1.0, 1.0))
    other = tiny_run.make(tmp_path / "fine", plan=plan)
    with pytest.raises(ValueError, match=r"fine: spacing_mm of its plan is \(5.0, 1.0, 1.0\)"):
        Predictor.from_run(runs[0], other)
    with pytest.raises(FileNotFoundError, match="give the folder of a run that was trained"):
        Predictor.from_run(tmp_path / "nothing")


def test_what_the_config_says_of_predicting_counts_as_on_the_command_line(runs, scans, tmp_path):
    """Its postprocessing, its temperature and its further runs were passed over."""
    image = scans / "a.nii.gz"
    plain = Predictor.from_run(runs[0]).predict(*nibabels(image))
    files.write_json(tmp_path / "rules.json", {"keep_largest": [list(tiny_run.CLASSES[1:])]})
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    saved = json.loads((run / "config.json").read_text())
    saved["predict"] |= {"postprocessing": str(tmp_path / "rules.json"), "calibrated": True}
    files.write_json(run / "config.json", saved)
    with pytest.raises(ValueError, match="run the verb `calibrate` first"):
        Predictor.from_run(run)
    made_with = {"networks": calibrated.key(Predictor.from_run(runs[0]).members)}
    rest = {"before": {}, "after": {}, "scans": 1, "voxels": 1}
    files.write_json(run / calibrated.NAME, {"temperature": 4.0} | made_with | rest)
    found = Predictor.from_run(run).predict(*nibabels(image))
    want = predict_all(run, image, tmp_path / "out", probabilities=True)["a.nii.gz"]
    np.testing.assert_array_equal(found.labels, want)
    assert (found.labels != plain.labels).any(), "it has several components"
    written = probabilities.load(tmp_path / "out" / "a_probabilities.npz")
    np.testing.assert_array_equal(found.probabilities.values.astype(np.float16), written.values)
    assert (found.probabilities.values < plain.probabilities.values.max()).all()
    saved["predict"] |= {"postprocessing": "", "calibrated": False, "runs": [str(runs[1])]}
    files.write_json(run / "config.json", saved)
    assert [one.folder for one in Predictor.from_run(run).members] == [run, runs[1]]
    (of_given,) = Predictor.from_run(run, runs[2]).members[1:]
    assert of_given.folder == runs[2]


def test_threads_give_what_one_gives(runs, scans):
    apply = Predictor.from_run(runs[0])
    apply.warm_up()
    inputs = [nibabels(path) for path in sorted(scans.iterdir())] * 4
    want = [apply(*each) for each in inputs[:3]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: apply(*each), inputs))
    for index, label in enumerate(found):
        np.testing.assert_array_equal(label, want[index % 3])


def test_one_scan_at_a_time_is_in_the_networks_of_all_threads(runs):
    """Memory is counted for one: of several at once a service was killed."""
    inside, most = [], []

    class Watched(SlidingWindow):
        """Notes how many scans are in it, or in another."""

        def logits(self, *args, **more):
            inside.append(1)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()
            return super().logits(*args, **more)

    services = []
    for run in runs[:2]:
        apply = Predictor.from_run(run)
        old = apply._networks.window
        window = Watched(**{f.name: getattr(old, f.name) for f in dataclasses.fields(old)})
        networks = dataclasses.replace(apply._networks, window=window)
        services.append(Predictor(networks, apply.members))
    scan = tiny_run.head(), tiny_run.upright()
    with ThreadPoolExecutor(4) as pool:
        called = [pool.submit(services[k % 2], *scan) for k in range(6)]
        called += [pool.submit(service.warm_up) for service in services]
    assert all(one.exception() is None for one in called)
    assert most == [1] * 8


def test_further_axes_of_size_one_are_dropped_as_in_files(runs):
    apply, voxels, affine = Predictor.from_run(runs[0]), tiny_run.head(), tiny_run.upright()
    want = apply(voxels, affine)
    image = nib.Nifti1Image(voxels[..., None], affine)
    for given in (voxels[..., None], voxels[..., None, None], image, image.get_fdata()):
        np.testing.assert_array_equal(apply(given, image.affine), want)


@pytest.mark.parametrize(
    ("voxels", "affine", "words"),
    [
        (np.zeros((4, 4)), np.eye(4), r"an array of numbers \[i, j, k\]"),
        (np.zeros((4, 4, 4), bool), np.eye(4), "got bool"),
        (np.zeros((4, 0, 4)), np.eye(4), r"got float64\(4, 0, 4\)"),
        (np.zeros((4, 4, 4)), np.eye(3), r"\(3, 3\)"),
        (np.full((4, 4, 4), np.nan), np.eye(4), "not finite numbers"),
        (np.zeros((4, 4, 4)), np.diag([1.0, 1, 0, 1]), "zero axis"),
        (np.full((40, 40, 40), 1e6), np.eye(4), "the scan: no HU"),
    ],
)
def test_what_is_no_scan_is_refused_in_one_line(runs, voxels, affine, words):
    with pytest.raises(ValueError, match=words):
        Predictor.from_run(runs[0])(voxels, affine)


@pytest.mark.skipif(not niivue.available(), reason="the extra `viewer` is missing")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ipywidgets
def test_a_scan_in_memory_is_shown_in_a_notebook():
    voxels, affine = tiny_run.head(), tiny_run.upright()
    labels = (voxels > 60).astype(np.uint8)
    found = show(voxels, affine, labels, tiny_run.CLASSES)
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(bytes(found.volumes[1].data)))
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), labels)
    with pytest.raises(ValueError, match=r"labels have shape \(20, 26, 6\)"):
        show(voxels, affine, labels[..., 1:], tiny_run.CLASSES)
    mr = np.where(voxels > -500, 400 + 10 * voxels.astype(float), 0)
    shown = [show(each, affine, labels, tiny_run.CLASSES) for each in (voxels + 1024, mr)]
    windows = [(one.volumes[0].cal_min, one.volumes[0].cal_max) for one in shown]
    assert windows == [(0, 80), pytest.approx(tuple(np.percentile(mr, (2, 99.5))))]


def test_the_package_alone_does_not_import_jax():
    code = "import sys, bhsd_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ipywidgets
def test_the_guides_snippets_run_as_printed(runs, scans, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    if not niivue.available():
        blocks = [block for block in blocks if "show(" not in block]
    assert len(blocks) >= 4
    (tmp_path / "runs").mkdir()
    for run in runs:
        (tmp_path / "runs" / run.name).symlink_to(run)
    (tmp_path / "runs" / "first").symlink_to(runs[0])
    (scans / "a.nii.gz").rename(tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    names = {}
    found = []
    for block in blocks:
        exec(block, names)
        found.append(names["labels"])
    want = predict_all(runs[0], tmp_path / "scan.nii.gz", tmp_path / "out")["scan.nii.gz"]
    for label in found[:3]:
        np.testing.assert_array_equal(label, want)
    assert (found[3] != want).any()
    assert (tmp_path / "scan_probabilities.npz").is_file()


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="of this version alone")
def test_a_jax_that_was_started_too_early_to_add_up_rightly_is_refused():
    program = """
import jax
jax.devices()
import bhsd_jax.api
from bhsd_jax.assemble import devices
devices.require_right_sums()
"""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "UserError: jaxlib 0.10.2 adds up wrongly" in done.stderr
    assert "import bhsd_jax.api before the first computation" in done.stderr
