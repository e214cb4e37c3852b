"""Files of `torch.save`: networks of nnU-Net and MONAI, and what must not be read."""

import json
import pydoc
import runpy
import sys
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.assemble import devices
from bhsd_jax.configs import from_run
from bhsd_jax.torch_weights import weights_file
from bhsd_jax.verbs import import_weights, predict
from bhsd_jax.volume import Plan

torch = pytest.importorskip("torch", reason="needs the extra torch-import")

TOOL = Path(__file__).parents[2] / "tools" / "import_torch.py"
TILE = (4, 16, 12)
SPACING = (5.0, 1.0, 1.0)
PLAIN = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [1, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
SIZES = {"input_channels": 1, "num_classes": 3, "deep_supervision": False}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["import_torch.py", *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def scan(folder, shape, air=0):
    """A NIfTI file whose array is [D H W] = (z, y, x), x to the left, y to the back.

    So many slices of it are air, without which a scan of some size is refused.
    """
    voxels = np.random.default_rng(0).integers(1, 99, shape).astype(np.int16)
    voxels[:air] = -1000
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    folder.mkdir()
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), folder / "a.nii.gz")
    return voxels


def predicted(run, images):
    config = from_run.get_config(str(run))
    config.predict.images = str(images)
    predict.run(config, run)
    return np.asanyarray(nib.load(run / "predictions" / "a.nii.gz").dataobj).transpose(2, 1, 0)


def randomized(network, shape):
    """Every weight moved at random, so that all of them matter, and the classes equally likely."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        logits = network.eval()(torch.randn(1, 1, *shape, generator=generator))
        *_, bias = (p for p in network.parameters() if p.shape == (3,))  # of the last head
        bias -= logits.mean((0, 2, 3, 4))
    return network


def torch_logits(network, image):
    with torch.no_grad():
        found = network(torch.from_numpy(image.astype(np.float32))[None, None])
    return found[0].numpy()


def require_same(found, logits):
    """Every voxel has PyTorch's class, but where its two best are equal to rounding."""
    want = logits.argmax(0)
    assert len(np.unique(want)) == len(logits), "every class is there"
    second, best = np.sort(logits, axis=0)[-2:]
    tied = best - second < 1e-4 * np.abs(logits).max()
    assert tied.mean() < 1e-3
    np.testing.assert_array_equal(found[~tied], want[~tied])


@pytest.fixture
def plain():
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="needs the package dynamic-network-architectures",
    )
    layers = {k: pydoc.locate(PLAIN[k]) for k in ("conv_op", "norm_op", "nonlin")}
    return randomized(unet.PlainConvUNet(**PLAIN | layers | SIZES), TILE)


def test_a_plain_unet_predicts_as_in_pytorch(tmp_path, monkeypatch, plain):
    torch.save({"epoch": 7, "state_dict": plain.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "c.json").write_text(json.dumps(PLAIN | SIZES))
    run, images = tmp_path / "run", tmp_path / "images"
    run_tool(
        monkeypatch,
        *(tmp_path / "w.pth", run, "--reference", "PlainConvUNet"),
        *("--constructor", tmp_path / "c.json", "--classes", "background", "a", "b"),
        *("--patch", *TILE, "--spacing-mm", *SPACING, "--window", 0, 80, "--mirror-axes"),
    )
    voxels = scan(images, TILE)
    image = np.clip(voxels, 0, 80) / 80
    require_same(predicted(run, images), torch_logits(plain, image))


def test_a_bundle_of_a_swin_unetr_predicts_as_in_monai(tmp_path, monkeypatch):
    """Not mirrored, as by MONAI's inferer: left and right may be classes of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own, of what else is installed
        nets = pytest.importorskip("monai.networks.nets", reason="needs the package monai")
    constructor = {"in_channels": 1, "out_channels": 3, "feature_size": 12}
    constructor |= {"downsample": "merging"}
    constructor |= {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "window_size": 3}
    network = randomized(nets.SwinUNETR(**constructor), (64, 32, 32))
    bundle = tmp_path / "bundle"
    for name in ("models", "configs"):
        (bundle / name).mkdir(parents=True)
    torch.save({"model": network.state_dict()}, bundle / "models" / "model.pt")
    described = {"_target_": "SwinUNETR", **constructor, "out_channels": "@classes"}
    config = {"classes": 3, "network_def": described, "network": "$@network_def.to(@device)"}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    run, images = tmp_path / "run", tmp_path / "images"
    run_tool(
        monkeypatch,
        *(bundle, run, "--classes", "background", "a", "b"),
        *("--patch", 64, 32, 32, "--spacing-mm", *SPACING, "--axes", "SPL"),
        *("--clip", 0, 90, "--mean-std", 40, 25),
    )
    voxels = scan(images, (64, 32, 32), air=16)
    image = (np.clip(voxels, 0, 90) - 40) / 25
    require_same(predicted(run, images), torch_logits(network, image))


def plans():
    settings = {
        "patch_size": list(TILE),
        "batch_size": 2,
        "spacing": list(SPACING),
        "median_image_size_in_voxels": [8.0, 40.0, 40.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {"network_class_name": "a.b.PlainConvUNet", "arch_kwargs": PLAIN},
    }
    measured = {"percentile_00_5": 5.0, "mean": 45.5, "std": 20.25, "percentile_99_5": 90.0}
    return {
        "dataset_name": "Dataset001_Head",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "configurations": {"3d_fullres": settings},
        "foreground_intensity_properties_per_channel": {"0": measured},
    }


DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "IPH": 1, "SDH": 2}}


def test_a_checkpoint_of_nnunet_needs_no_more(tmp_path, monkeypatch, plain):
    """Numbers of NumPy in the log, plans beside the fold, two of three axes mirrored."""
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    fold = model / "fold_0"
    fold.mkdir(parents=True)
    log = {"mean_fg_dice": [np.float64(0.5)], "dice": [[np.float32(0.25), np.float64("nan")]]}
    checkpoint = {
        "network_weights": plain.state_dict(),
        "logging": log,
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    with pytest.raises(SystemExit, match=r"says nothing of plans\.json"):
        run_tool(monkeypatch, fold, tmp_path / "run")
    (model / "plans.json").write_text(json.dumps(plans()))
    (model / "dataset.json").write_text(json.dumps(DATASET))
    run, images = tmp_path / "run", tmp_path / "images"
    run_tool(monkeypatch, fold, run)
    assert Plan.load(run).classes == ("background", "IPH", "SDH")
    voxels = scan(images, TILE)
    image = (np.clip(voxels, 5, 90).astype(np.float32) - 45.5) / 20.25
    flips = [(), (0,), (1,), (0, 1)]
    found = [
        np.flip(torch_logits(plain, np.flip(image, f).copy()), [a + 1 for a in f]) for f in flips
    ]
    require_same(predicted(run, images), np.mean(found, axis=0))


class Payload:
    """What a malicious file would hold."""

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_no_code_in_a_file_is_run(tmp_path):
    payload = Payload()
    payload.path = str(tmp_path / "was_run")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": payload}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"without running code.*save the weights alone"):
        weights_file.read(tmp_path / "w.pth")
    assert not (tmp_path / "was_run").exists()
    (tmp_path / "cut.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"cut\.pth"):
        weights_file.read(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page in place of the file"),
        ({"model/constants.pkl": "", "model/data.pkl": ""}, "a TorchScript archive, whose network"),
        ({"Dataset004/plans.json": "{}"}, "an archive of files; unpack it"),
    ],
)
def test_what_stands_in_the_place_of_weights_is_told(content, said, tmp_path):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    with pytest.raises(ValueError, match=said):
        weights_file.read(path)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"epoch": 1, "net": {"model_state_dict": state}},
        lambda state: {"network_weights": state, "model": "a name"},
        lambda state: {"net_state": state, "optimizer": {"state": {0: {}}}, "epoch": 3},
    ],
)
def test_weights_are_found_where_scripts_put_them(nest, tmp_path):
    state = {"a": torch.arange(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(nest(state), tmp_path / "w.model")
    found = weights_file.read(tmp_path / "w.model").state
    assert list(found) == ["a", "b"]
    assert found["b"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], [0, 1, 2])


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"no weights under .*it holds epoch, lr"):
        weights_file.read(tmp_path / "w.pth")
    assert not import_weights.is_nnunet(weights_file.WeightsFile({}, {"init_args": {}}))


def test_the_models_of_a_data_sets_folder_are_named(tmp_path):
    model = tmp_path / "Dataset004" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"models are in {model}: name one"):
        import_weights.find(tmp_path / "Dataset004")
    with pytest.raises(FileNotFoundError, match=r"in this folder$"):
        import_weights.find(model / "fold_0")


def test_networks_of_nnunets_first_version_are_called_so(tmp_path, monkeypatch):
    fold = tmp_path / "nnUNetTrainerV2__nnUNetPlansv2.1" / "fold_0"
    fold.mkdir(parents=True)
    weights = fold / "model_final_checkpoint.model"
    torch.save({"state_dict": {"conv_blocks_context.0.weight": torch.zeros(1)}}, weights)
    (fold / f"{weights.name}.pkl").write_bytes(b"")
    for given in (fold.parent, fold, weights):
        with pytest.raises(SystemExit, match=r"checkpoint\.model: a network of nnU-Net v1, which"):
            run_tool(monkeypatch, given, tmp_path / "run")
