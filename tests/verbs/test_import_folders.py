"""Whole folders of networks: nnU-Net's with all folds, BLAST-CT's with its config."""

import json
import shutil

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_import_torch import DATASET, PLAIN, TILE, plans, run_tool
from test_imported import weights

from bhsd_jax.assemble import cascade, deployed, devices
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import from_run
from bhsd_jax.torch_weights import importing
from bhsd_jax.torch_weights.recipe import recipe_of
from bhsd_jax.torch_weights.weights_file import WeightsFile
from bhsd_jax.verbs import import_folders, import_weights, predict
from bhsd_jax.volume import Case, Plan

torch = pytest.importorskip("torch", reason="needs the extra torch-import")

UNET = PLAIN | {"input_channels": 1, "num_classes": 3, "deep_supervision": True}
DEEPMEDIC = {
    "scale_factors": [[3, 3, 3], [1, 1, 1]],
    "feature_maps": [3, 4],
    "fully_connected": [5],
    "dropout": [0.0, 0.0],
}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


def noisy(state, seed):
    """Other weights, each under its first name alone; variances stay positive."""
    random = np.random.default_rng(seed)
    return {
        name: torch.tensor(value + _noise(random, name, value.shape))
        for name, value in state.items()
        if "all_modules" not in name and not name.startswith("decoder.encoder.")
    }


def _noise(random, name, shape):
    drawn = random.normal(0, 0.3, shape).astype(np.float32)
    return abs(drawn) if "var" in name else drawn


def networks_of(run):
    return deployed.load(Run.of(from_run.get_config(str(run)), run))[1]


@pytest.fixture
def model(tmp_path):
    """As TotalSegmentator releases them: plans of another name, a trainer without mirroring."""
    folder = tmp_path / "nnUNetTrainerNoMirroring__nnUNetResEncUNetLPlans__3d_fullres"
    _, _, state = weights("PlainConvUNet", UNET)
    for fold in ("0", "1", "all"):
        (folder / f"fold_{fold}").mkdir(parents=True)
        checkpoint = {
            "network_weights": noisy(state, len(fold) + int(fold == "1")),
            "init_args": {"configuration": "3d_fullres", "fold": fold},
            "trainer_name": "nnUNetTrainerNoMirroring",
            "inference_allowed_mirroring_axes": None,
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    named = plans() | {"plans_name": "nnUNetResEncUNetLPlans"}
    (folder / "plans.json").write_text(json.dumps(named))
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"licence": "CC BY 4.0"}))
    return folder


def test_a_fold_that_is_not_trained_to_its_end_is_left_out_unless_it_is_named(
    model, tmp_path, caplog
):
    """nnU-Net detects the folds that have a checkpoint_final.pth."""
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_best.pth")
    (model / "fold_2").mkdir()
    assert list(import_folders.from_nnunet(model).members) == ["fold_0"]
    assert "they have no checkpoint_final.pth: fold_1, fold_2" in caplog.text
    assert list(import_folders.from_nnunet(model, ["1"]).members) == ["fold_1"]
    with pytest.raises(FileNotFoundError, match="fold_2: none of"):
        import_folders.from_nnunet(model, ["0", "2"])


def test_all_folds_become_one_run_that_averages_logits(tmp_path, monkeypatch, capsys, model):
    run, images = tmp_path / "run", tmp_path / "images"
    run_tool(monkeypatch, model, run, "--folds", "0", "1", "all")
    said = capsys.readouterr().out
    assert "PlainConvUNet, 3 networks, mean of logits" in said
    assert "License of these weights: CC BY 4.0" in said
    config = from_run.get_config(str(run))
    assert config.predict.combine == "logits"
    assert not config.infer.mirror
    networks = networks_of(run)
    assert list(networks) == ["fold_0", "fold_1", "fold_all"]
    images.mkdir()
    voxels = np.random.default_rng(0).integers(1, 99, TILE).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), images / "a.nii.gz")
    config.predict.images = str(images)
    predict.run(config, run)
    found = np.asanyarray(nib.load(run / "predictions" / "a.nii.gz").dataobj).transpose(2, 1, 0)
    image = ((np.clip(voxels, 5, 90) - 45.5) / 20.25).astype(np.float32)[None, ..., None]
    image = jax.numpy.asarray(image)
    module = importing.load("PlainConvUNet", UNET, weights("PlainConvUNet", UNET)[2])[0]
    apply = jax.jit(lambda v: module.apply(v, image, train=False)[0])
    logits = np.mean([np.asarray(apply(v))[0] for v in networks.values()], axis=0)
    assert len(np.unique(logits.argmax(-1))) > 1
    assert (found != logits.argmax(-1)).mean() < 1e-3  # the two best may be equal to rounding


def test_fold_all_is_taken_if_it_is_named_or_the_only_one(model):
    # It was trained on the cases that validate the others, and nnU-Net leaves it out as well.
    assert list(import_folders.from_nnunet(model).members) == ["fold_0", "fold_1"]
    assert list(import_folders.from_nnunet(model, ["all"]).members) == ["fold_all"]
    for fold in ("fold_0", "fold_1"):
        shutil.rmtree(model / fold)
    assert list(import_folders.from_nnunet(model).members) == ["fold_all"]


def test_folds_are_chosen_and_must_be_of_one_model(tmp_path, monkeypatch, model):
    run_tool(monkeypatch, model, tmp_path / "one", "--folds", "1")
    assert list(networks_of(tmp_path / "one")) == ["student"]
    with pytest.raises(SystemExit, match=r"no fold_7; it has fold_0, fold_1, fold_all"):
        run_tool(monkeypatch, model, tmp_path / "none", "--folds", "7")
    with pytest.raises(SystemExit, match="--folds is for nnU-Net's folder of a model"):
        run_tool(monkeypatch, model / "fold_0", tmp_path / "none", "--folds", "0")
    file = model / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(file) | {"inference_allowed_mirroring_axes": (0, 1)}
    torch.save(checkpoint, file)
    with pytest.raises(SystemExit, match="fold_0 and fold_1 are not of one model: other mirror_ax"):
        run_tool(monkeypatch, model, tmp_path / "none")


def test_the_models_folder_stands_above_what_a_checkpoint_was_trained_with(model, tmp_path, caplog):
    """nnU-Net predicts by the folder's plans.json and dataset.json, which people edit."""
    file = model / "fold_0" / "checkpoint_final.pth"
    older = plans() | {"image_reader_writer": "NibabelIOWithReorient"}
    named = DATASET | {"labels": {"background": 0, "a": 1, "b": 2}}
    kept = {"configuration": "3d_fullres", "plans": older, "dataset_json": named}
    weights = WeightsFile({}, {"network_weights": 0, "init_args": kept})
    cached = tmp_path / "blobs" / "ab12"  # as in the cache of a hub
    cached.parent.mkdir()
    file.rename(cached)
    file.symlink_to(cached)
    plan = import_weights.from_nnunet(weights, file).plan
    assert (plan.axes, plan.classes) == ("file", ("background", "IPH", "SDH"))
    assert "plans.json: is not what" in caplog.text
    assert "dataset.json: is not what" in caplog.text
    alone = tmp_path / "downloads" / "checkpoint_final.pth"
    alone.parent.mkdir()
    shutil.copy(file, alone)
    shutil.copy(model / "dataset.json", tmp_path)
    plan = import_weights.from_nnunet(weights, alone).plan
    assert (plan.axes, plan.classes) == ("SAR", ("background", "a", "b"))


def test_axes_that_are_given_stand_above_those_of_nnunets_reader(tmp_path, monkeypatch, model):
    """TotalSegmentator turns every scan to RAS before its nnU-Net, which reads axes as they lie."""
    for name, path in (("all", model), ("one", model / "fold_0")):
        run_tool(monkeypatch, path, tmp_path / name, "--axes", "SAR")
        assert Plan.load(tmp_path / name).axes == "SAR"
    run_tool(monkeypatch, model / "fold_0", tmp_path / "plain")
    assert Plan.load(tmp_path / "plain").axes == "file"
    with pytest.raises(SystemExit, match="three letters, one each of R/L, A/P, S/I; got 'SAX'"):
        run_tool(monkeypatch, model, tmp_path / "none", "--axes", "SAX")


def test_batch_norms_that_the_plans_do_not_name_are_taken_with_their_statistics(
    tmp_path, monkeypatch, model
):
    file, images = model / "fold_0" / "checkpoint_final.pth", tmp_path / "images"
    checkpoint = torch.load(file) | {"trainer_name": "nnUNetTrainerBN"}
    state = checkpoint["network_weights"]
    random = torch.Generator().manual_seed(0)
    for name in [n for n in state if n.endswith(".norm.weight")]:
        shape = state[name].shape
        state[name.replace("weight", "running_mean")] = torch.randn(shape, generator=random)
        state[name.replace("weight", "running_var")] = 1 + torch.rand(shape, generator=random)
        state[name.replace("weight", "num_batches_tracked")] = torch.tensor(7)
    torch.save(checkpoint, file)
    run_tool(monkeypatch, model / "fold_0", tmp_path / "run")
    config = from_run.get_config(str(tmp_path / "run"))
    assert config.model.norm == "batch"
    images.mkdir()
    voxels = np.random.default_rng(0).integers(1, 99, TILE).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), images / "a.nii.gz")
    config.predict.images = str(images)
    predict.run(config, tmp_path / "run")
    path = tmp_path / "run" / "predictions" / "a.nii.gz"
    found = np.asanyarray(nib.load(path).dataobj).transpose(2, 1, 0)
    image = ((np.clip(voxels, 5, 90) - 45.5) / 20.25).astype(np.float32)[None, ..., None]
    image = jax.numpy.asarray(image)
    arguments = UNET | {"norm_op": "BatchNorm3d"}
    arrays = {name: value.numpy() for name, value in state.items()}
    module, variables = importing.load("PlainConvUNet", arguments, arrays)
    logits = np.asarray(jax.jit(lambda v: module.apply(v, image, train=False)[0])(variables))[0]
    assert len(np.unique(found)) > 1
    assert (found != logits.argmax(-1)).mean() < 1e-3


def test_a_trainer_with_another_network_is_named_in_one_line(tmp_path, monkeypatch, model):
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file)
    primus = checkpoint | {"trainer_name": "nnUNet_PrimusV3M_Trainer"}
    primus["network_weights"] = {f"eva.blocks.{i}.w": torch.zeros(1) for i in range(70)}
    torch.save(primus, file)
    with pytest.raises(
        SystemExit, match=r"PrimusV3M_Trainer has built another one, with ev"
    ) as why:
        run_tool(monkeypatch, model, tmp_path / "none")
    assert "\n" not in str(why.value)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("trainer", "reference", "width"),
    [
        ("nnUNet_Primus_M_Trainer", "PrimusM", 864),
        ("nnUNet_Primus_M_Trainer_BS8_2e4", "PrimusM", 864),
        ("nnUNet_PrimusV2S_Trainer", "PrimusV2S", 396),
        ("_Primus_L_48_BS1", "PrimusL", 1056),
    ],
)
def test_the_trainers_of_primus_build_it_whatever_the_plans_name(model, trainer, reference, width):
    file = model / "fold_0" / "checkpoint_final.pth"
    beside = {"network_weights": 0, "init_args": {}, "trainer_name": trainer}
    source = import_weights.from_nnunet(WeightsFile({}, beside), file)
    recipe = recipe_of(source.reference, source.constructor)
    own = WeightsFile(dict.fromkeys(recipe.weights, np.zeros(1, np.float32)), beside)
    import_weights.require_named_network(source, own, file)
    assert source.reference == reference
    assert (recipe.module.width, recipe.module.patch) == (width, TILE)
    # Source: nnunetv2 2.8.1, the arguments that all of these trainers give.
    fixed = recipe.module.drop_path, recipe.module.norm_attention, recipe.module.layer_scale
    assert fixed == (0.2, True, 0.1)


@pytest.fixture
def blast(tmp_path):
    """BLAST-CT's folder of data, with a network that is smaller."""
    folder = tmp_path / "data"
    (folder / "saved_models").mkdir(parents=True)
    constructor = DEEPMEDIC | {"input_channels": 1, "num_classes": 3}
    _, _, state = weights("DeepMedic", constructor)
    for number in (2, 10, 1):
        file = folder / "saved_models" / f"model_{number}.torch_model"
        torch.save(noisy(state, number), file)
    window = {"IntensityWindowNormalization": {"lower_bound": -15.0, "upper_bound": 100.0}}
    data = {
        "class_names": ["foreground", "IPH", "EAH"],
        "channels": ["image"],
        "resolution": [1.0, 1.0, 1.0],
        "transformation": window,
        "input_channels": 1,
        "num_classes": 3,
    }
    config = {"model": {"DeepMedic": DEEPMEDIC}, "data": data}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_blast_ct_becomes_one_run_of_all_its_networks(tmp_path, monkeypatch, capsys, blast):
    run, images = tmp_path / "run", tmp_path / "images"
    run_tool(monkeypatch, blast, run, "--patch", "6", "6", "6")
    assert "DeepMedic, 3 networks, mean of probabilities" in capsys.readouterr().out
    plan = Plan.load(run)
    assert (plan.classes, plan.license) == (("background", "IPH", "EAH"), "Apache-2.0")
    networks = networks_of(run)
    assert list(networks) == ["model_1", "model_2", "model_10"]
    images.mkdir()
    # Upright, in ITK's terms: x to the left, y to the back, 1 mm.
    voxels = np.random.default_rng(0).integers(-40, 120, (8, 7, 9)).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), images / "a.nii.gz")
    config = from_run.get_config(str(run))
    config.predict.images = str(images)
    predict.run(config, run)
    found = np.asanyarray(nib.load(run / "predictions" / "a.nii.gz").dataobj).transpose(2, 1, 0)
    image = ((2 * np.clip(voxels, -15, 100) - 85) / 115).astype(np.float32)
    after = (-np.array(image.shape)) % 6
    padded = jnp.asarray(np.pad(image, [(6, 6 + n) for n in after], mode="edge")[None, ..., None])
    constructor = DEEPMEDIC | {"input_channels": 1, "num_classes": 3}
    module = importing.load("DeepMedic", constructor, weights("DeepMedic", constructor)[2])[0]
    apply = jax.jit(lambda v: jax.nn.softmax(module.apply(v, padded, train=False)[0]))
    chances = np.mean([np.asarray(apply(v))[0] for v in networks.values()], axis=0)
    want = chances.argmax(-1)[:8, :7, :9]
    assert len(np.unique(want)) > 1
    assert (found != want).mean() < 5e-3  # the two best may be equal to rounding


def test_what_blast_ct_could_ask_for_beyond_this_is_refused(tmp_path, blast):
    config = import_folders.blast_config(blast)
    one = import_folders.from_blast_ct(blast / "saved_models" / "model_2.torch_model", config)
    assert list(one.members) == ["model_2"]
    assert import_folders.blast_config(tmp_path) is None
    config["data"]["transformation"] |= {"MaskImageUsingSamplingMask": {"outside_value": 0}}
    with pytest.raises(ValueError, match="not supported: MaskImageUsingSamplingMask"):
        import_folders.from_blast_ct(blast, config)
    window = {"lower_bound": 0, "upper_bound": 9, "map_upper_bound_to_lower_bound": True}
    config["data"]["transformation"] = {"IntensityWindowNormalization": window}
    with pytest.raises(ValueError, match="needs lower_bound and upper_bound"):
        import_folders.from_blast_ct(blast, config)


def cascaded(golden, folder, configuration, which):
    """nnU-Net's folder of one stage of the cascade in `model_cascade.npz`."""
    known = json.loads((golden / "model_cascade.json").read_text())
    with np.load(golden / "model_cascade.npz") as stored:
        names = [name for name in stored.files if name.startswith(f"{which}/")]
        state = {name.removeprefix(f"{which}/"): torch.tensor(stored[name]) for name in names}
    model = folder / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (model / "fold_0").mkdir(parents=True)
    checkpoint = {
        "network_weights": state,
        "init_args": {"configuration": configuration, "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    (model / "plans.json").write_text(json.dumps(known["plans"]))
    (model / "dataset.json").write_text(json.dumps(known["dataset"]))
    return model


def test_the_second_stage_of_a_cascade_brings_the_first(golden, tmp_path, monkeypatch, capsys):
    model = cascaded(golden, tmp_path, "3d_cascade_fullres", "trained")
    run_tool(monkeypatch, model, tmp_path / "alone")
    assert "There is no 3d_lowres beside it" in capsys.readouterr().out
    cascaded(golden, tmp_path, "3d_lowres", "low")
    run_tool(monkeypatch, model, tmp_path / "turned", "--axes", "SAR")
    assert "its first stage" in capsys.readouterr().out
    turned = tmp_path / "turned", tmp_path / "turned" / cascade.PREVIOUS_STAGE
    assert [Plan.load(run).axes for run in turned] == ["SAR", "SAR"]
    for number, path in enumerate((model, model / "fold_0")):
        folder = tmp_path / f"run{number}"
        run_tool(monkeypatch, path, folder)
        assert "previous_stage: 3d_lowres, its first stage" in capsys.readouterr().out
        config = from_run.get_config(str(folder))
        config.predict.images = "scans"
        run = Run.of(config, folder)
        assert run.plan.previous_stage == "3d_lowres"
        case = Case("a", "a", tmp_path / "a.nii.gz", None, "test")
        cases, first = cascade.first_of(run, [case])
        assert cases == [case]
        assert first == folder / "previous_stage"
        stage = cascade.open_first(run, first, tmp_path / "out")
        assert stage.predict.plan.spacing_mm[0] > run.plan.spacing_mm[0]
        assert stage.folder == tmp_path / "out" / "previous_stage"
