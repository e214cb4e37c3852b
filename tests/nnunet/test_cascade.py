"""The 3D cascade: planned, prepared, trained on and predicted as by nnU-Net.

`nnunet_cascade.npz` has of every case the first stage's label map on the second's grid: `previous`
as nnU-Net's prediction has it (-1 where the scan is 0), `previous_trained` as its training does.
`model_cascade.npz` has both networks, a batch, and what was predicted.
"""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run
from dicom_files import write_series
from nnunet_raw import Reference, config
from test_step_losses import after_two_steps, weights
from tiny_run import PLAN

from bhsd_jax.api import Predictor, read_scan
from bhsd_jax.assemble import cascade
from bhsd_jax.assemble.recipe import Cascade, make_augment
from bhsd_jax.assemble.run import Run
from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.ct import nifti, prepare
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.metrics import scores
from bhsd_jax.nnunet import dataset_json, dataset_plan, planner, trained
from bhsd_jax.platform import step_log
from bhsd_jax.settings import DicomSeries, Settings
from bhsd_jax.shards import store
from bhsd_jax.torch_weights import importing
from bhsd_jax.types import Batch
from bhsd_jax.verbs import evaluate, import_weights, predict, preprocess, train
from bhsd_jax.volume import Case, Series, Volume
from bhsd_jax.windows import CascadeInput, Normalization

CASCADE = "3d_cascade_fullres"
CASES = ("c0", "c1", "c2")


@pytest.fixture(scope="module")
def golden(request):
    return request.path.parents[1] / "golden"


@pytest.fixture(scope="module")
def reference(golden):
    return Reference.load(golden, "cascade")


@pytest.fixture(scope="module")
def model(golden):
    """Arrays by name, and plans, dataset.json, learning rate."""
    with np.load(golden / "model_cascade.npz") as stored:
        return dict(stored), json.loads((golden / "model_cascade.json").read_text())


@pytest.fixture(scope="module")
def raw(reference, model, tmp_path_factory):
    """The data set, nnU-Net's plans, and the label maps that its first stage has predicted."""
    folder = tmp_path_factory.mktemp("cascade")
    root = reference.write(folder / "raw")
    (folder / "plans.json").write_text(json.dumps(reference.plans))
    for case in CASES:
        label = Volume(model[0][f"{case}_low"], reference.affine(case), case)
        nifti.write_volume(folder / "low" / f"{case}.nii.gz", label)
    return root


def cascade_config(raw):
    made = config(raw, raw.parent / "plans.json", CASCADE)
    made.preprocess.previous = (str(raw.parent / "low"),)
    return made


def test_the_plans_are_nnunets(reference, raw):
    """Every key of all configurations, planned for a very small GPU; and ours of the same facts."""
    cases = MSD(raw).cases()
    facts = [
        prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None) for case in cases
    ]
    made = planner.make_plans(
        [fact.spacing_mm for fact in facts],
        [fact.shape for fact in facts],
        modality="mr",
        num_classes=3,
        memory_gb=0.02,
        relative_size=float(np.median([fact.relative_size for fact in facts])),
    )
    assert made["configurations"] == reference.plans["configurations"]
    assert list(made["configurations"]) == ["2d", "3d_lowres", "3d_fullres", CASCADE]
    for configuration, before in ((CASCADE, "3d_lowres"), ("3d_lowres", "")):
        plan = dataset_plan.make_plan(
            facts,
            dataset="a",
            classes=("background", "lesion", "core"),
            modality="mr",
            license="",
            source_sha256="",
            memory_gb=0.02,
            configuration=configuration,
        )
        want = planner.from_nnunet_plans(reference.plans, configuration)
        assert (plan.network, plan.spacing_mm, plan.transpose) == want
        assert plan.previous_stage == before
        assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_image_and_label_map_are_prepared_as_nnunets(reference, raw, tmp_path):
    preprocess.run(cascade_config(raw), tmp_path / "run")
    shards = store.Shards(tmp_path / "run" / "shards")
    assert shards.plan.previous_stage == "3d_lowres"
    apart = []
    for name in CASES:
        found = shards.load(name)
        assert found.image.dtype == np.float32
        want = np.maximum(reference.arrays[f"{name}_previous"], 0)
        assert (found.image[..., 1] == want).all()
        # A mask is resampled as that label map: the rim of the empty region outvotes no label.
        low = raw.parent / "low" / f"{name}.nii.gz"
        case = Case(
            name, name, raw / "imagesTr" / f"{name}_0000.nii.gz", low, "train", previous=low
        )
        assert (prepare.prepare_case(case, shards.plan).label == want).all()
        apart.append(np.count_nonzero(want != reference.arrays[f"{name}_previous_trained"]))
        if name == "c0":
            image = found.image[::2, ::2, ::2, 0]
            assert np.abs(image - reference.arrays["c0_image_prepared"]).max() < 1e-5
            assert (found.label == np.maximum(reference.arrays["c0_seg_prepared"], 0)).all()
    # nnU-Net's trainer resamples the logits of its first stage once, its predictor the label map
    # twice. At the spacing of the second stage the two are one.
    assert apart == [866, 0, 670]


def test_the_losses_of_two_steps_are_nnunets(model):
    arrays, known = model
    labels = dataset_json.labels(known["dataset"], "cascade")
    network = trained.network_of(known["plans"], known["dataset"], CASCADE)
    assert network[1]["input_channels"] == 3
    module, variables = importing.load(*network, weights(arrays, "before"))
    scan, label, previous = arrays["x16"][:, 0] / 16, arrays["y"][:, 0], arrays["y"][:, 1]
    assert previous.min() == -1, "some of it lies outside"
    raw_batch = Batch(np.stack([scan, previous], axis=-1).astype(np.float32), label)
    inputs = CascadeInput(Normalization.from_plan("mr", (0, 0, 1, 0)), 2, 2)
    augment = make_augment(
        inputs.normalization,
        SpatialChain((), label.shape[1:]),
        IntensityChain(()),
        cascade=Cascade(inputs.maps, IntensityChain(())),
    )
    found, _ = after_two_steps(module, variables, labels, known, raw_batch, augment)
    np.testing.assert_allclose(found, arrays["losses"], atol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3, "the step has changed something"


@pytest.fixture(scope="module")
def runs(raw, model, tmp_path_factory):
    """Both imported networks: the second's run, and the first's beside it."""
    arrays, known = model
    folder = tmp_path_factory.mktemp("imported")
    path = folder / "checkpoint_final.pth"
    path.write_bytes(b"stands for the digest")
    for name, configuration, which in (
        ("full", CASCADE, "trained"),
        ("low", "3d_lowres", "low"),
    ):
        given = {"plans": known["plans"], "dataset_json": known["dataset"]}
        given["configuration"] = configuration
        beside = {"init_args": given, "inference_allowed_mirroring_axes": (0, 1, 2)}
        state = weights(arrays, which)
        source = import_weights.from_nnunet(import_weights.WeightsFile(state, beside), path)
        made = config(raw)
        made.infer.tiles = 16
        import_weights.write_run(made, source, {"network": state}, folder / name)
    return folder


def settings(run, **changes):
    made = Settings.of(json.loads((run / "config.json").read_text()))
    return dataclasses.replace(made, predict=dataclasses.replace(made.predict, **changes))


def test_both_stages_predict_as_nnunets(runs, raw, reference, model, tmp_path):
    """Theirs with float32 sums. The first stage has been predicted, or is by its run."""
    arrays, _ = model
    asked = {"images": str(raw / "imagesTr"), "out": str(tmp_path / "first"), "logits": True}
    predict.run(settings(runs / "low", **asked), runs / "low")
    for case in CASES:
        first = nifti.read(tmp_path / "first" / f"{case}.nii.gz").voxels
        assert np.count_nonzero(first) > 1000
        assert (first == arrays[f"{case}_low"]).all()
    made = cascade_config(raw)
    made.preprocess.previous = (str(tmp_path / "first"),)
    preprocess.run(made, tmp_path / "run")
    for case in CASES:  # the logits are taken, as nnU-Net's trainer does it
        previous = store.Shards(tmp_path / "run" / "shards").load(case).image[..., 1]
        assert (previous == reference.arrays[f"{case}_previous_trained"]).all()

    full, out = runs / "full", tmp_path / "out"
    asked |= {"out": str(out), "previous": str(tmp_path / "first")}
    asked |= {"logits": False, "probabilities": True}
    predict.run(settings(full, **asked), full)
    for case in CASES:
        found = nifti.read(out / f"{case}.nii.gz").voxels
        assert set(np.unique(found)) == {0, 1, 2}
        assert (found == arrays[f"{case}_predicted"]).all()
        assert np.count_nonzero(found != arrays[f"{case}_low"]) > 100
    with np.load(out / "c0_probabilities.npz") as stored:
        chances = stored["probabilities"][1:].astype(np.float32)
    assert np.abs(chances - arrays["c0_probabilities"] / 255).max() < 0.004
    again = tmp_path / "again"
    asked |= {"images": str(raw / "imagesTr" / "c1_0000.nii.gz"), "out": str(again)}
    predict.run(settings(full, **asked | {"previous": str(runs / "low")}), full)
    first = nifti.read(again / "previous_stage" / "c1.nii.gz").voxels
    assert (first == arrays["c1_low"]).all()
    assert (nifti.read(again / "c1.nii.gz").voxels == arrays["c1_predicted"]).all()


@pytest.fixture(scope="module")
def ct(reference, raw, tmp_path_factory):
    """The same scans as CT, whose plan normalizes as nnU-Net's for CT: config and run folder."""
    folder = tmp_path_factory.mktemp("ct")
    root = folder / "ct"
    changed = {"channel_names": {"0": "CT"}}
    for case in CASES:
        values = reference.arrays[f"{case}_image"][0]
        hu = np.where(values == 0, -1000, 4 * values - 30).astype(np.int16)
        image = Volume(hu, reference.affine(case), case)
        nifti.write_volume(root / "imagesTr" / f"{case}_0000.nii.gz", image)
    (root / "labelsTr").symlink_to(raw / "labelsTr")
    (root / "dataset.json").write_text(json.dumps(reference.dataset | changed))
    split = [{"train": ["c0", "c1"], "val": ["c2"]}]
    (root / "splits_final.json").write_text(json.dumps(split))
    plans = json.dumps(reference.plans).replace("ZScoreNormalization", "CTNormalization")
    (folder / "plans.json").write_text(plans)
    made = config(root, folder / "plans.json", CASCADE)
    made.preprocess.previous = (str(raw.parent / "low"),)
    made.model.features = (4, 6, 8)
    made.input.update(labeled=2, threads=1)
    made.train.update(steps=3, log_every=1, validate_every=3, save_every=3)
    made.infer.update(step=1.0, mirror=False, tiles=16)
    made.evaluate.update(bootstrap=10)
    made.predict.update(split="val", checkpoint="last")
    return made, folder / "run"


def test_a_cascade_on_ct_goes_through_all_verbs(ct, model, tmp_path, plain_compilation):
    """What it has learned in three steps is scored, not judged."""
    made, run = ct
    for verb in (preprocess, train, predict, evaluate):
        verb.run(made, run)
    found = store.Shards(run / "shards").load("c1")
    assert found.image.dtype == np.int16
    assert (np.unique(found.image[..., 1]) == (0, 1, 2)).all()
    lines = step_log.read(run / "metrics.jsonl")
    assert {"val/dice/lesion", "val/dice/core"} <= {key for line in lines for key in line}
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    rows = scores.read_csv(run / "cases.csv")
    assert [(row.case, row.name) for row in rows] == [("c2", "lesion"), ("c2", "core")]

    label = nifti.read(run / "predictions" / "c2.nii.gz").voxels.transpose(2, 1, 0)
    server = Predictor.from_run(run, checkpoint="last")
    voxels, affine = read_scan(run.parent / "ct" / "imagesTr" / "c2_0000.nii.gz")
    first = model[0]["c2_low"].transpose(2, 1, 0)
    assert (server(voxels, affine, first) == label).all()
    assert (server(voxels, affine, 0 * first) != label).any()
    with pytest.raises(ValueError, match="give the label map of 3d_lowres"):
        server(voxels, affine)

    asked = {"images": str(run.parent / "ct" / "imagesTr"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"second stage of a 3D cascade: name a folder"):
        predict.run(settings(run, **asked), run)


def test_what_a_cascade_lacks_is_said(ct, raw, tmp_path):
    made, run = ct
    made = made.copy_and_resolve_references()
    few = tmp_path / "few"
    few.mkdir()
    (few / "c1.nii.gz").symlink_to(raw / "labelsTr" / "c1.nii.gz")
    made.preprocess.previous = (str(few),)
    with pytest.raises(ValueError, match="no label map of 2 of 3 cases with masks: c0, c2"):
        preprocess.run(made, tmp_path / "other")
    plan = dataclasses.replace(PLAN, previous_stage="3d_lowres")
    asked = {"previous": str(few), "images": "scans"}
    predicting = dataclasses.replace(Settings.of(made).predict, **asked)
    opened = Run.of(dataclasses.replace(Settings.of(made), predict=predicting), run, plan)
    case = Case("c0", "c0", run.parent / "ct" / "imagesTr" / "c0_0000.nii.gz", None, "test")
    with pytest.raises(ValueError, match="no label map of 1 of 1 scans: c0"):
        cascade.first_of(opened, [case])
    series = dataclasses.replace(case, image=Series((case.image,), "series 1"))
    with pytest.raises(ValueError, match=r"are hidden unless .*predict\.show_ids=True"):
        cascade.first_of(opened, [case, series])
    with pytest.raises(ValueError, match="no label map of 3d_lowres, the first stage"):
        prepare.prepare_case(case, plan)
    made.input.unlabeled = 2
    with pytest.raises(ValueError, match="unlabeled is 2, but only supervised training"):
        Run.of(made, run, plan)
    made.input.unlabeled = 0
    made.split.binary = True
    with pytest.raises(ValueError, match=r"config.split.binary merges classes"):
        Run.of(made, run, plan)


@pytest.mark.parametrize("unshear", [False, True])
def test_a_tilted_series_goes_through_both_stages(tmp_path, unshear):
    """Drawn networks; the label map of the first lies on the voxels of the series."""
    low = tiny_run.make(tmp_path / "low")
    plan = dataclasses.replace(PLAN, previous_stage="3d_lowres")
    full = tiny_run.make(tmp_path / "full", seed=1, plan=plan)
    voxels = tiny_run.head().transpose(2, 1, 0)[:, ::-1]
    write_series(tmp_path / "ct", voxels, spacing_mm=(5.0, 2.0, 2.0), tilt_deg=14.0)
    asked = {"images": str(tmp_path / "ct"), "dicom": DicomSeries(unshear=unshear)}
    predict.run(settings(low, out=str(tmp_path / "first"), **asked), low)
    out = tmp_path / "out"
    predict.run(settings(full, out=str(out), previous=str(low), **asked), full)
    found = [
        nifti.read(next(folder.glob("*.nii.gz")))
        for folder in (tmp_path / "first", out / "previous_stage", out)
    ]
    assert (found[0].voxels == found[1].voxels).all()
    assert found[2].voxels.shape == voxels.shape
    np.testing.assert_allclose(found[2].affine, found[1].affine)
    assert len(np.unique(found[1].voxels)) > 1
    assert (found[2].voxels != found[1].voxels).any()


def test_folders_that_are_no_first_stage_are_refused(raw, runs, tmp_path):
    made = cascade_config(raw)
    made.preprocess.previous = ()
    with pytest.raises(ValueError, match="second stage of a 3D cascade; name folders or runs"):
        preprocess.run(made, tmp_path / "run")
    made.preprocess.update(previous=(str(raw.parent / "low"),), configuration="3d_fullres")
    with pytest.raises(ValueError, match="previous is for a second stage, such as 3d_cascade"):
        preprocess.run(made, tmp_path / "run")
    made = cascade_config(raw)
    made.preprocess.previous = (str(raw / "labelsTr"), str(raw.parent / "low"))
    with pytest.raises(ValueError, match="both have a label map of c0; each case"):
        preprocess.run(made, tmp_path / "run")
    made.preprocess.previous = (str(runs / "low"),)
    with pytest.raises(FileNotFoundError, match=r"predictions: no label maps in it"):
        preprocess.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    images, out = str(raw / "imagesTr"), str(tmp_path / "out")
    for run, previous, words in (
        ("low", str(raw.parent / "low"), "is for the second network of a cascade"),
        ("full", str(runs / "full"), "is itself the second stage of a cascade"),
    ):
        asked = {"images": images, "out": out, "previous": previous}
        with pytest.raises(ValueError, match=words):
            predict.run(settings(runs / run, **asked), runs / run)
