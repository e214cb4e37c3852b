"""Weights from files of PyTorch names, through the tool and `predict`, to label maps."""

import json
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import flax.linen as nn
import jax
import nibabel as nib
import numpy as np
import pytest
import safetensors.numpy

from bhsd_jax.assemble import deployed, devices, wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import from_run
from bhsd_jax.torch_weights import bundle, exporting, weights_file
from bhsd_jax.torch_weights.recipe import recipe_of, shapes_of
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.verbs import import_folders, import_weights, predict
from bhsd_jax.volume import Plan

TOOL = Path(__file__).parents[2] / "tools" / "import_torch.py"
TILE = (8, 12, 4)
CONSTRUCTOR = {
    "input_channels": 1,
    "num_classes": 3,
    "n_stages": 2,
    "features_per_stage": [4, 6],
    "kernel_sizes": [[3, 3, 1], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 1]],
    "n_conv_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
    "conv_bias": True,
    "norm_op": "torch.nn.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "torch.nn.LeakyReLU",
}
BATCH_NORM = {
    "in_channels": 1,
    "out_channels": 3,
    "feature_size": 6,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "norm_name": "batch",
    "downsample": "legacy",
}
# Axes as MONAI has them: x to the right, y anterior, z superior.
OPTIONS = [
    *("--classes", "background", "IPH", "SDH", "--spacing-mm", "2", "2", "5", "--axes", "RAS"),
    *("--window", "-100", "300", "--mirror-axes", "--license", "CC0"),
]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


def weights(reference, constructor):
    """Random variables as a state dict; variances are positive."""
    recipe = recipe_of(reference, constructor)
    random = np.random.default_rng(4)
    tree = {}
    for path, shape in shapes_of(recipe).items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        value = random.normal(0, 0.5, shape).astype(np.float32)
        node[last] = np.abs(value) + 0.5 if last == "var" else value
    return recipe.module, tree, exporting.dump(reference, constructor, tree)


@pytest.fixture(scope="module")
def plain():
    return weights("PlainConvUNet", CONSTRUCTOR)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_torch.py", *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def scan(folder, shape, codes="LAS"):
    """HU of a scan of one tile, along R, A, S; written in another order."""
    voxels = np.random.default_rng(1).integers(-90, 290, shape).astype(np.int16)
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 5.0, 1.0]))
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    folder.mkdir(exist_ok=True)
    nib.save(image.as_reoriented(change), folder / "a.nii.gz")
    return voxels


def predicted(run, images):
    """The label map of `predict`, along R, A, S."""
    config = from_run.get_config(str(run))
    config.predict.images = str(images)
    predict.run(config, run)
    label = nib.load(run / "predictions" / "a.nii.gz")
    return np.asanyarray(nib.as_closest_canonical(label).dataobj)


def expected(module, variables, voxels):
    image = ((voxels + 100) / 400).astype(np.float32)[None, ..., None]  # the window as 0..1
    apply = jax.jit(lambda v, x: module.apply(v, x, train=False)[0])
    return np.asarray(apply(variables, image))[0].argmax(-1)


def test_safetensors_become_a_run_that_predicts(tmp_path, monkeypatch, plain):
    module, variables, state = plain
    file, run = tmp_path / "w.safetensors", tmp_path / "run"
    safetensors.numpy.save_file({f"module.model.{k}": v for k, v in state.items()}, file)
    (tmp_path / "c.json").write_text(json.dumps(CONSTRUCTOR))
    given = ["--reference", "PlainConvUNet", "--constructor", tmp_path / "c.json"]
    run_tool(monkeypatch, file, run, *given, *OPTIONS, "--patch", *TILE)
    voxels = scan(tmp_path / "images", TILE)
    found = predicted(run, tmp_path / "images")
    want = expected(module, variables, voxels)
    assert len(np.unique(want)) == 3
    np.testing.assert_array_equal(found, want)
    facts = json.loads((run / "predictions" / "predictions.json").read_text())
    assert facts["mirror"] == []
    assert facts["license"] == "CC0"
    assert Plan.load(run).source_sha256 == import_weights.digest(file)


class Normalized(nn.Module):
    """Logits that hang on running statistics; as small as can be."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train):
        out = nn.Dense(self.num_classes)(nn.BatchNorm(use_running_average=not train)(image))
        return (out,)


def test_running_statistics_reach_the_prediction(tmp_path, monkeypatch, plain):
    np.savez(tmp_path / "w.npz", **plain[2])
    run, images = tmp_path / "run", tmp_path / "images"
    given = ["--reference", "PlainConvUNet", "--constructor", json.dumps(CONSTRUCTOR)]
    run_tool(monkeypatch, tmp_path / "w.npz", run, *given, *OPTIONS, "--patch", *TILE)
    voxels = scan(images, TILE, "PIL")
    variables = {
        "params": {
            "BatchNorm_0": {"scale": np.float32([1]), "bias": np.float32([0])},
            "Dense_0": {"kernel": np.float32([[-1, 0, 1]]), "bias": np.float32([0, 0.5, 0])},
        },
        "batch_stats": {"BatchNorm_0": {"mean": np.float32([0.4]), "var": np.float32([0.04])}},
    }
    statistics = {"batch_stats": variables["batch_stats"]}
    plan = json.loads((run / "plan.json").read_text())
    shutil.rmtree(run / "checkpoints")
    save_networks(
        run / "checkpoints", variables["params"], config={}, plan=plan, statistics=statistics
    )
    monkeypatch.setattr(wiring, "model", lambda run: Normalized())
    want = expected(Normalized(), variables, voxels)
    assert len(np.unique(want)) == 3
    np.testing.assert_array_equal(predicted(run, images), want)


def test_running_statistics_are_imported(tmp_path, monkeypatch):
    _, variables, state = weights("SwinUNETR", BATCH_NORM)
    np.savez(tmp_path / "w.npz", **state)
    given = ["--reference", "SwinUNETR", "--constructor", json.dumps(BATCH_NORM), *OPTIONS]
    run = tmp_path / "run"
    run_tool(monkeypatch, tmp_path / "w.npz", run, *given, "--patch", "32", "32", "32")
    _, networks = deployed.load(Run.of(from_run.get_config(str(run)), run))
    (found,) = networks.values()
    assert set(found) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_names_that_do_not_fit_are_listed(tmp_path, monkeypatch, plain):
    _, _, state = plain
    broken = state | {"decoder.surprise": np.zeros(2, np.float32)}
    del broken["decoder.seg_layers.0.bias"]
    np.savez(tmp_path / "w.npz", **broken)
    given = ["--reference", "PlainConvUNet", "--constructor", json.dumps(CONSTRUCTOR)]
    with pytest.raises(SystemExit) as caught:
        run_tool(
            monkeypatch, tmp_path / "w.npz", tmp_path / "run", *given, *OPTIONS, "--patch", *TILE
        )
    said = str(caught.value)
    assert "unknown decoder.surprise" in said
    assert "missing decoder.seg_layers.0.bias" in said
    assert not (tmp_path / "run").exists()


def test_what_the_file_does_not_say_is_asked_for(tmp_path, monkeypatch, plain):
    np.savez(tmp_path / "w.npz", **plain[2])
    with pytest.raises(SystemExit, match=r"--reference, --constructor, --classes, --spacing-mm"):
        run_tool(monkeypatch, tmp_path / "w.npz", tmp_path / "run")
    given = ["--reference", "PlainConvUNet", "--constructor", json.dumps(CONSTRUCTOR), *OPTIONS]
    with pytest.raises(SystemExit, match="give a patch"):
        run_tool(monkeypatch, tmp_path / "w.npz", tmp_path / "run", *given)
    open_order = {k: v for k, v in BATCH_NORM.items() if k != "downsample"}
    given = ["--reference", "SwinUNETR", "--constructor", json.dumps(open_order), *OPTIONS]
    with pytest.raises(SystemExit, match=r'"merging" if MONAI 1.5 or later'):
        run_tool(monkeypatch, tmp_path / "w.npz", tmp_path / "run", *given)


def test_options_that_a_network_says_itself_are_refused_by_name(tmp_path, monkeypatch):
    model, fold, blast = tmp_path / "model", tmp_path / "fold.pth", tmp_path / "blast"
    (model / "fold_0").mkdir(parents=True)
    blast.mkdir()
    (blast / "config.json").write_text(json.dumps({"model": {"DeepMedic": {}}}))
    of_nnunet = weights_file.WeightsFile({}, {"network_weights": 0, "init_args": {}})
    monkeypatch.setattr(weights_file, "read", lambda path: of_nnunet)
    options = ("--spacing-mm", 1, 1, 1, "--window", 0, 80, "--classes", "background", "a")
    names = "--classes, --spacing-mm, --window, --mirror-axes"
    for path, kind in (
        (model, "nnU-Net's folder of a model"),
        (fold, "a checkpoint of nnU-Net"),
        (blast, "BLAST-CT's networks"),
    ):
        with pytest.raises(SystemExit, match=f"{names} given, but {kind} says that itself") as why:
            run_tool(monkeypatch, path, tmp_path / "none", *options, "--mirror-axes")
        assert "bhsd predict has --infer.mirror_axes" in str(why.value)
    for path, *option in (
        (model, "--crop-hu", 0),
        (model, "--zscore"),
        (fold, "--reference", "PlainConvUNet"),
        (blast, "--axes", "SPL"),
    ):
        with pytest.raises(SystemExit, match=rf": {option[0]} given, but .* says that itself"):
            run_tool(monkeypatch, path, tmp_path / "none", *option)


def test_networks_of_monai_are_mirrored_only_if_that_is_asked_for(tmp_path):
    """Its inferers mirror nothing, and classes such as BTCV's tell left from right."""
    (tmp_path / "w.npz").touch()
    constructor = {"in_channels": 1, "out_channels": 2, "img_size": 32}
    said = {"reference": "UNETR", "constructor": json.dumps(constructor), "window": [[0, 80]]}
    said |= {"classes": ["background", "a"], "spacing_mm": [1, 1, 1]}
    tool = runpy.run_path(str(TOOL))
    options = Namespace(**dict.fromkeys(tool["_DESCRIPTION"]) | said)
    for given, axes in ((None, ()), ([0], (0,))):
        options.mirror_axes = given
        source = tool["described"](options, tmp_path / "w.npz", {})
        assert source.mirror_axes == axes


def test_normalizations_that_exclude_one_another_are_refused(tmp_path, monkeypatch, plain):
    np.savez(tmp_path / "w.npz", **plain[2])
    given = ["--reference", "PlainConvUNet", "--constructor", json.dumps(CONSTRUCTOR)]
    given += ["--classes", "background", "a", "b", "--spacing-mm", "5", "2", "2", "--patch", *TILE]
    for options, said in (
        (("--zscore", "--window", "0", "80"), "exclude one another"),
        (("--zscore", "--range", "0", "1"), "--range is what a --window becomes"),
        (("--window", "0", "80", "--mean-std", "40", "20"), "--mean-std goes with --clip"),
    ):
        with pytest.raises(SystemExit, match=said):
            run_tool(monkeypatch, tmp_path / "w.npz", tmp_path / "run", *given, *options)


def test_a_network_that_does_not_fit_its_plan_is_refused(tmp_path, monkeypatch, plain):
    np.savez(tmp_path / "w.npz", **plain[2])
    given = ["--reference", "PlainConvUNet", "--constructor", json.dumps(CONSTRUCTOR), *OPTIONS]
    given += ["--classes", "background", "any", "--window", "0", "80", "--range", "-1", "1"]
    with pytest.raises(SystemExit) as caught:
        run_tool(
            monkeypatch, tmp_path / "w.npz", tmp_path / "run", *given, "--patch", "8", "13", "4"
        )
    said = str(caught.value)
    assert "3 classes, but 2 names" in said
    assert "takes 1 channels, but the normalization gives 2" in said
    assert "(8, 13, 4) is no multiple of its stride (2, 2, 1)" in said


def test_npz_becomes_a_run_once(tmp_path, monkeypatch, plain):
    _, variables, state = plain
    np.savez(tmp_path / "w.npz", **state)
    run = tmp_path / "run"
    given = [tmp_path / "w.npz", run, "--reference", "PlainConvUNet"]
    given += ["--constructor", json.dumps(CONSTRUCTOR), *OPTIONS, "--patch", *TILE]
    run_tool(monkeypatch, *given)
    _, networks = deployed.load(Run.of(from_run.get_config(str(run)), run))
    jax.tree.map(np.testing.assert_array_equal, networks, {"student": variables})
    with pytest.raises(SystemExit, match="there is a run in this folder"):
        run_tool(monkeypatch, *given)


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights_file.read(tmp_path / "none.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not an npz file of plain arrays"):
        weights_file.read(tmp_path / "objects.npz")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        weights_file.read(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="neither a JSON object nor a file"):
        weights_file.json_of("nowhere.json")


def test_bfloat16_of_safetensors_is_read(tmp_path):
    wide = np.float32([[1.0, -0.5, 3.140625], [2.0**-130, np.inf, 0.0]])
    data = {"a": np.float32([7.0]).tobytes(), "b": (wide.view(np.uint32) >> 16).astype("<u2")}
    kinds = {"a": ("F32", [1]), "b": ("BF16", [2, 3])}
    header, content = {"__metadata__": {"reference": "UNETR"}}, b""
    for name, (kind, shape) in kinds.items():
        part = bytes(data[name])
        offsets = [len(content), len(content) + len(part)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        content += part
    text = json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    found = weights_file.read(file)
    assert found.beside == {"reference": "UNETR"}
    assert found.state["b"].dtype == np.float32
    np.testing.assert_array_equal(found.state["b"], wide)
    np.testing.assert_array_equal(found.state["a"], [7])


def test_a_missing_library_is_named_with_its_extra(tmp_path):
    with pytest.raises(ValueError, match=r"needs no_such_library; .* BHSD_EXTRAS=export tools/env"):
        weights_file.library("no_such_library.part", tmp_path, extra="export")


def test_a_folder_of_a_fold_gives_its_final_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of checkpoint_final\.pth"):
        import_weights.find(tmp_path)
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"):
        (tmp_path / name).write_bytes(b"")
        assert import_weights.find(tmp_path).name == name


def test_batch_norms_that_plans_name_keep_their_epsilon(tmp_path, golden):
    """Of a trainer that puts its own in the place of instance norms PyTorch's counts."""
    plans = json.loads((golden / "plans" / "full_Hippocampus_nnUNetPlans.json").read_text())
    dataset = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}}
    given = {"plans": plans, "dataset_json": dataset, "configuration": "3d_fullres"}
    state = {"encoder.stages.0.0.convs.0.norm.running_var": np.ones(32, np.float32)}
    (path := tmp_path / "checkpoint_final.pth").touch()

    def epsilon(trainer):
        beside = {"network_weights": state, "init_args": given, "trainer_name": trainer}
        source = import_weights.from_nnunet(weights_file.WeightsFile(state, beside), path)
        module = recipe_of(source.reference, source.constructor).module
        return module.norm, module.epsilon

    assert epsilon("nnUNetTrainerBN") == ("batch", 1e-5)
    layers = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    layers |= {"norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-3, "affine": True}}
    assert epsilon("nnUNetTrainer") == ("batch", 1e-3)
    assert epsilon("nnUNetTrainerBN") == ("batch", 1e-5)


def test_a_bundle_may_have_its_config_in_yaml(tmp_path):
    for name in ("models", "configs"):
        (tmp_path / name).mkdir()
    text = "imports: [$import glob]\nclasses: 3\nnetwork_def:\n  _target_: SwinUNETR\n"
    text += '  in_channels: 1\n  out_channels: "@classes"\n  use_flash_attention: true\n'
    (tmp_path / "configs" / "inference.yaml").write_text(text)
    config = bundle.config_of(tmp_path / "models" / "model.pt")
    reference, constructor = bundle.network_of(weights_file.json_of(str(config)))
    assert (reference, constructor["out_channels"]) == ("SwinUNETR", 3)
    with pytest.raises(ValueError, match=r"of a bundle say --reference SwinUNETR/merging"):
        recipe_of(reference, constructor)
    assert recipe_of("SwinUNETR/merging", constructor).module.merging == "fixed"
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml: neither a JSON object nor a file"):
        weights_file.json_of(str(tmp_path / "broken.yaml"))


def test_a_bundle_of_nnunets_networks_is_imported_as_its_folder(tmp_path, golden, monkeypatch):
    """As `monai.apps.nnunet` writes them: weights in a folder of a fold, all else one folder up."""
    known = json.loads((golden / "model_regions.json").read_text())
    models = tmp_path / "models"
    state = {}
    for fold in ("fold_0", "fold_1"):
        (models / fold).mkdir(parents=True)
        (models / fold / "model.pt").touch()
        state[fold] = {"encoder.stages.0.0.convs.0.conv.weight": np.ones(1, np.float32)}
    for name in ("plans", "dataset"):
        (models / f"{name}.json").write_text(json.dumps(known[name]))
    (models / "nnunet_checkpoint.pth").touch()
    given = {"plans": known["plans"], "dataset_json": known["dataset"]}
    rest = {
        "inference_allowed_mirroring_axes": (0, 2),
        "init_args": given | {"configuration": known["configuration"]},
        "trainer_name": "nnUNetTrainer",
    }

    def read(path):
        weights = state[path.parent.name]
        return weights_file.WeightsFile(weights, {"network_weights": weights})

    monkeypatch.setattr(weights_file, "read", read)
    monkeypatch.setattr(weights_file, "beside", lambda path: rest)
    for path in (tmp_path, models):
        model = import_folders.from_nnunet(path)
        assert model.members == state
        assert model.source.mirror_axes == (0, 2)
        regions = [name for name, _ in model.source.plan.regions]
        assert regions == list(known["dataset"]["labels"])[1:]
    one = import_folders.one_of_nnunet(import_weights.find(models / "fold_1"))
    assert one.members == {"network": state["fold_1"]}
    assert one.source.plan.regions == model.source.plan.regions
