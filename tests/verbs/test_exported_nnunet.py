"""Runs as the folder of a model of nnU-Net's, and back."""

import dataclasses
import json
import warnings

import jax
import nibabel as nib
import numpy as np
import pytest
import tiny_run
from test_exported import run_tool

from bhsd_jax.assemble import deployed, devices
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common, from_run
from bhsd_jax.nnunet import model_folder, trained
from bhsd_jax.torch_weights import nnunet
from bhsd_jax.torch_weights.recipe import recipe_of
from bhsd_jax.torch_weights.weights_file import WeightsFile
from bhsd_jax.verbs import export_nnunet, import_weights, predict

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
AS_NNUNET = dataclasses.replace(tiny_run.PLAN, crop_hu=None, normalize_first=True, repaired=True)


def make(folder, plan=AS_NNUNET, **changes):
    """A run with drawn weights that pads as nnU-Net, mirrors, and has other fields of a group."""
    tiny_run.make(folder, plan=plan, mirror=True)
    config = json.loads((folder / "config.json").read_text())
    config["input"]["pad"] = "nnunet"
    for group, fields in changes.items():
        config[group] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_of(folder):
    return Run.of(from_run.get_config(str(folder)), folder)


def as_checkpoint(model, state):
    given = {"plans": model.plans, "dataset_json": model.dataset}
    beside = {
        "network_weights": state,
        "init_args": given | {"configuration": model.configuration},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": model.mirror_axes,
    }
    return WeightsFile(state, beside)


@pytest.mark.parametrize("name", ["regions", "planar", "ignore"])
def test_what_nnunet_has_trained_goes_back_as_it_was(golden, tmp_path, name):
    known = json.loads((golden / f"model_{name}.json").read_text())
    with np.load(golden / f"model_{name}.npz") as stored:
        state = {k.removeprefix("trained/"): stored[k] for k in stored if k.startswith("trained/")}
    given = {"plans": known["plans"], "dataset_json": known["dataset"]}
    given["configuration"] = known["configuration"]
    beside = {"init_args": given, "inference_allowed_mirroring_axes": (0, 1)}
    (path := tmp_path / "checkpoint_final.pth").write_bytes(b"")
    source = import_weights.from_nnunet(WeightsFile(state, beside), path)
    import_weights.write_run(common.get_config(), source, {"network": state}, tmp_path / "run")
    model = export_nnunet.described(run_of(tmp_path / "run"))
    assert model.name == NAME.replace("3d_fullres", known["configuration"])
    assert model.mirror_axes == (0, 1)
    labels = {key: known["dataset"].get(key) for key in ("labels", "regions_class_order")}
    assert {key: model.dataset.get(key) for key in labels} == labels
    (found,) = model.folds.values()
    for weight, value in state.items():
        np.testing.assert_array_equal(found[weight], value, err_msg=weight)
    again = import_weights.from_nnunet(as_checkpoint(model, found), path)
    assert again.plan == source.plan
    assert again.mirror_axes == source.mirror_axes
    one, other = (recipe_of(each.reference, each.constructor) for each in (source, again))
    assert (one.module, one.image) == (other.module, other.image)


@pytest.mark.parametrize(
    ("file", "configuration"),
    [
        ("plans/full_Hippocampus_nnUNetPlans", "3d_fullres"),
        ("plans/full_BHSDtrain96_nnUNetPlans", "2d"),
        ("plans/full_BHSDtrain96_nnUNetResEncUNetMPlans", "3d_fullres"),
        ("nnunet_cascade", "3d_cascade_fullres"),
        ("nnunet_cascade", "3d_lowres"),
    ],
)
def test_plans_of_nnunets_are_written_as_they_were_read(golden, file, configuration):
    plans = json.loads((golden / f"{file}.json").read_text())
    plans = plans.get("plans", plans)
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}}
    plan = trained.plan_of(plans, dataset, configuration, "")
    module = nnunet.from_torch(*trained.network_of(plans, dataset, configuration)).module
    twin = nnunet.constructor_of(module, 1 + 2 * bool(plan.previous_stage))
    patch = plan.network.patch
    written = {"patch": patch, "foreground": plan.foreground, "configuration": configuration}
    made = json.loads(json.dumps(model_folder.plans(plan, twin, **written)))
    described = model_folder.dataset(plan, plan.labels)
    assert trained.plan_of(made, described, configuration, "") == plan
    again = nnunet.from_torch(*trained.network_of(made, described, configuration))
    assert again.module == module
    ours, theirs = (p["configurations"][configuration] for p in (made, plans))
    theirs = plans["configurations"].get(theirs.get("inherits_from"), {}) | theirs
    for key in ("patch_size", "spacing", "normalization_schemes", "resampling_fn_data_kwargs"):
        assert ours[key] == theirs[key], key
    kept = ours["architecture"]["arch_kwargs"]
    for key in ("kernel_sizes", "strides", "n_conv_per_stage_decoder", "features_per_stage"):
        assert kept[key] == theirs["architecture"]["arch_kwargs"][key], key


@pytest.mark.parametrize(
    ("axes", "transpose", "want"),
    [
        ("file", (1, 0, 2), ("SimpleITKIO", (1, 0, 2), "")),
        ("SPL", (0, 1, 2), ("SimpleITKIO", (0, 1, 2), "LPS")),
        ("SPL", (2, 0, 1), ("SimpleITKIO", (2, 0, 1), "LPS")),
        ("SAR", (1, 0, 2), ("SimpleITKIOWithReorient", (1, 0, 2), "")),
        ("RAS", (0, 1, 2), ("SimpleITKIOWithReorient", (2, 1, 0), "")),
    ],
)
def test_axes_become_a_reader_an_order_and_how_files_are_stored(axes, transpose, want):
    plan = dataclasses.replace(tiny_run.PLAN, axes=axes, transpose=transpose)
    assert model_folder.reading(plan) == want


def test_settings_that_nnunet_does_not_have_are_named(tmp_path):
    run = run_of(tiny_run.make(tmp_path / "run"))
    with pytest.raises(ValueError, match="nnU-Net would label some voxels otherwise") as refused:
        export_nnunet.described(run)
    for setting in (
        "preprocess.crop_hu is -200, not None",
        "preprocess.first is resample, not normalize",
        "input.pad is air, not nnunet",
    ):
        assert setting in str(refused.value)
    assert export_nnunet.described(run, nearly=True).stored == "LPS"
    mr = dataclasses.replace(tiny_run.PLAN, crop_hu=None, modality="mr", normalize_first=False)
    model = export_nnunet.described(run_of(tiny_run.make(tmp_path / "mr", plan=mr)))
    (settings,) = model.plans["configurations"].values()
    assert settings["normalization_schemes"] == ["ZScoreNormalization"]
    assert model.mirror_axes is None
    windows = run_of(make(tmp_path / "two", plan=tiny_run.PLAN))
    windows = Run.of(dataclasses.replace(windows.config, windows=((40, 80), (60, 90))), run.folder)
    with pytest.raises(ValueError, match=r"config\.windows makes 2 channels of one scan"):
        export_nnunet.described(windows, nearly=True)


def test_one_window_becomes_the_clip_of_a_plan(tmp_path):
    run = run_of(make(tmp_path / "run", plan=tiny_run.PLAN))
    run = Run.of(dataclasses.replace(run.config, windows=((40.0, 160.0),)), run.folder)
    model = export_nnunet.described(run, nearly=True)
    measured = model.plans["foreground_intensity_properties_per_channel"]["0"]
    assert measured == {
        "percentile_00_5": -40,
        "mean": 40,
        "std": 80,
        "percentile_99_5": 120,
    }


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the extra torch-import")


def test_folds_join_in_a_folder_that_is_imported_as_it_was(tmp_path, monkeypatch, capsys, torch):
    folders = [make(tmp_path / f"run_{f}", split={"fold": f}) for f in (0, 1)]
    out, place = tmp_path / "out", tmp_path / "out" / NAME
    for folder in folders:
        run_tool(monkeypatch, "export.py", folder, out, "--to", "nnunet")
    assert f"-m {place} -f 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="fold_1: is there already"):
        run_tool(monkeypatch, "export.py", folders[1], out, "--to", "nnunet")
    other = dataclasses.replace(AS_NNUNET, spacing_mm=(4.0, 2.0, 2.0))
    with pytest.raises(SystemExit, match=r"plans\.json: is of another model"):
        run_tool(monkeypatch, "export.py", make(tmp_path / "b", other), out, "--to", "nnunet")
    file = place / "fold_1" / "checkpoint_final.pth"
    state = torch.load(file, weights_only=True)["network_weights"]
    stem = "encoder.stages.0.0.convs.0"
    names = f"{stem}.conv.weight", f"decoder.{stem}.all_modules.0.weight"
    first, second = (state[name] for name in names)
    assert first.data_ptr() == second.data_ptr(), "shared tensors take their place once"
    run_tool(monkeypatch, "import_torch.py", place, tmp_path / "again", "--folds", "1")
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "again"), weights(folders[1]))


def weights(folder):
    (found,) = deployed.load(run_of(folder))[1].values()
    return found


def scan(folder, spacing_mm=(1.5, 1.5, 4.0)):
    """HU of a head, stored as L, P, S; its array as SimpleITK reads it."""
    voxels = tiny_run.head(shape=(26, 32, 9))[::-1, ::-1]
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    folder.mkdir()
    nib.save(nib.Nifti1Image(voxels, affine), folder / "a.nii.gz")
    return voxels.transpose(2, 1, 0)


def predicted(folder, images, out):
    config = from_run.get_config(str(folder))
    config.predict.update(images=str(images), out=str(out))
    predict.run(config, folder)
    return np.asanyarray(nib.load(out / "a.nii.gz").dataobj).transpose(2, 1, 0)


@pytest.mark.parametrize("network", ["nnunet.PlainConvUNet", "nnunet.ResidualEncoderUNet"])
def test_nnunet_predicts_the_same_labels(tmp_path, monkeypatch, torch, network):
    """Its own predictor, with sums in float32: in float16 almost equal classes change places."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of what else is installed
        module = pytest.importorskip(
            "nnunetv2.inference.predict_from_raw_data", reason="needs the package nnunetv2"
        )
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(tiny_run.common, "get_config", lambda: with_model(network))
    folder = make(tmp_path / "run")
    place, told = export_nnunet.folder(from_run.get_config(str(folder)), folder, tmp_path / "out")
    assert 'SimpleITK.DICOMOrient(scan, "LPS")' in told
    voxels = scan(tmp_path / "images")
    found = predicted(folder, tmp_path / "images", tmp_path / "labels")
    given = voxels[None].astype(np.float32), {"spacing": [4.0, 1.5, 1.5]}
    monkeypatch.setattr(torch, "half", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        predictor = module.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(place), None)
        want = predictor.predict_single_npy_array(*given)
    assert sorted(np.bincount(want.ravel()))[-2] > 100, "two classes are predicted"
    np.testing.assert_array_equal(found, want)
    run_tool(monkeypatch, "import_torch.py", place, tmp_path / "again")
    again = predicted(tmp_path / "again", tmp_path / "images", tmp_path / "labels_again")
    np.testing.assert_array_equal(again, found)


def with_model(name, get_config=common.get_config):
    config = get_config()
    config.model = {"name": name}
    return config


def test_options_of_another_format_are_refused(tmp_path, monkeypatch, capsys):
    for option, kind in (("--nearly", "safetensors"), ("--weights-apart", "nnunet")):
        with pytest.raises(SystemExit):
            run_tool(monkeypatch, "export.py", tmp_path, tmp_path / "x", "--to", kind, option)
        assert f"{option} changes nothing of --to {kind}" in capsys.readouterr().err
