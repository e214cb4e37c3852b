"""Preprocessing by a plans.json of nnU-Net, and the network that is trained from it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.ct import nifti
from bhsd_jax.models.nnunet import blocks_of
from bhsd_jax.nnunet import planner, trained
from bhsd_jax.shards import store
from bhsd_jax.torch_weights.recipe import recipe_of
from bhsd_jax.verbs import preprocess
from bhsd_jax.volume import Plan, Volume

UPRIGHT = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])


@pytest.fixture
def data(tmp_path):
    """Three small MR scans with masks."""
    random = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(3):
        label = np.zeros((20, 24, 18), np.uint8)
        label[8:12, 8:14, 6:11] = 1 + index % 2
        image = random.normal(100, 20, label.shape).astype(np.float32)
        for folder, voxels in (("imagesTr", image), ("labelsTr", label)):
            path = tmp_path / "data" / folder / f"h_{index}.nii.gz"
            nifti.write_volume(path, Volume(voxels, UPRIGHT, ""))
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    about = {"name": "Small", "modality": {"0": "MRI"}, "labels": labels}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(about))
    return tmp_path / "data"


def test_shards_and_network_are_those_of_nnunets_plan(data, tmp_path, golden):
    theirs = json.loads((golden / "plans" / "full_Hippocampus_nnUNetPlans.json").read_text())
    settings = theirs["configurations"]["3d_fullres"]
    settings["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] = [3, 1, 2]
    theirs["configurations"]["3d_lowres"] = {
        **settings, "spacing": [2.0, 1.5, 1.5], "patch_size": [16, 16, 16], "batch_size": 3,
        "next_stage": "3d_cascade_fullres",
    }  # fmt: skip
    (tmp_path / "plans.json").write_text(json.dumps(theirs))
    config = common.get_config("data=msd")
    config.data.root = str(data)
    config.preprocess.update(plan=str(tmp_path / "plans.json"), configuration="3d_lowres")
    preprocess.run(config, tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    assert found.plan.spacing_mm == (2.0, 1.5, 1.5)
    assert {entry.shape for entry in found.entries} == {(10, 16, 12)}
    statistics = theirs["foreground_intensity_properties_per_channel"]["0"]
    assert found.plan.foreground[1] == statistics["mean"]
    assert (found.plan.network.patch, found.plan.network.batch) == ((16, 16, 16), 3)
    model = wiring.model(Run.of(config, Path("run"), found.plan))
    arguments = settings["architecture"]["arch_kwargs"]
    for ours, name in [
        (model.features, "features_per_stage"),
        (model.strides, "strides"),
        (model.kernels, "kernel_sizes"),
        (model.convs_encoder, "n_conv_per_stage"),
        (model.convs_decoder[::-1], "n_conv_per_stage_decoder"),  # from the lowest stage
    ]:
        assert json.loads(json.dumps(ours)) == arguments[name]


DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "IPH": 1}}
RESIDUAL = "full_BHSDtrain96_nnUNetResEncUNetMPlans"


def residual_plans(golden, blocks):
    """A plans.json for the residual encoder with other counts of blocks than the planners'."""
    plans = json.loads((golden / "plans" / f"{RESIDUAL}.json").read_text())
    settings = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    settings["n_blocks_per_stage"] = list(blocks)
    return plans


def test_blocks_of_a_residual_plan_reach_the_network(golden):
    blocks = (2, 1, 1, 2, 2, 1, 3)
    plans = residual_plans(golden, blocks)
    settings = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    settings["n_conv_per_stage_decoder"] = [2, 1, 1, 3, 1, 2]  # from the lowest stage
    plan = trained.plan_of(plans, DATASET, "3d_fullres", "")
    assert plan.network.residual
    config = common.get_config("backbone=nnunet_resenc")
    config.precision = "float32"
    model = wiring.model(Run.of(config, Path("run"), plan))
    assert model.blocks_encoder == blocks
    recipe = recipe_of(*trained.network_of(plans, DATASET, "3d_fullres"))
    assert model == recipe.module

    config.input.patch = (20, 128, 128)  # two stages fewer
    smaller = wiring.model(Run.of(config, Path("run"), plan))
    assert smaller.blocks_encoder == blocks[: len(smaller.features)]
    assert len(smaller.features) < len(blocks)
    assert smaller.convs_decoder == (2, 1, 3, 1, 1, 2)[: len(smaller.features) - 1]
    config.model.convs_decoder = 2
    assert wiring.model(Run.of(config, Path("run"), plan)).convs_decoder == 2, "asked for"

    config.model.blocks_encoder = (1,) * len(smaller.features)
    assert (
        wiring.model(Run.of(config, Path("run"), plan)).blocks_encoder
        == config.model.blocks_encoder
    )


@pytest.mark.parametrize("preset", ["resenc_m", "resenc_xl"])
def test_a_residual_preset_is_planned_prepared_and_built(data, tmp_path, preset):
    config = common.get_config("data=msd,backbone=nnunet_resenc")
    config.data.root = str(data)
    config.preprocess.planner = preset
    preprocess.run(config, tmp_path / "run")
    plan = store.Shards(tmp_path / "run" / "shards").plan
    spacing, shape = ((1.0, 1.0, 1.0),) * 3, ((20, 24, 18),) * 3
    theirs = planner.make_plans(spacing, shape, planner=preset, modality="mr", num_classes=3)
    network, *_ = planner.from_nnunet_plans(theirs)
    assert plan.network == dataclasses.replace(network, batch_dice=plan.network.batch_dice)
    assert plan.network.residual
    model = wiring.model(Run.of(config, Path("run"), plan))
    assert blocks_of(model) == network.convs_encoder == (1, 3, 4)[: len(network.features)]


def test_a_plan_of_blocks_is_refused_by_the_plain_network(golden):
    plan = trained.plan_of(residual_plans(golden, (1, 3, 4, 6, 6, 6, 6)), DATASET, "3d_fullres", "")
    config = common.get_config()
    with pytest.raises(ValueError, match=r"residual encoder, \(1, 3, 4, .*backbone=nnunet_resenc"):
        wiring.model(Run.of(config, Path("run"), plan))
    config.model.convs_encoder = (2,) * 7
    assert wiring.model(Run.of(config, Path("run"), plan)).convs_encoder == (2,) * 7


def test_a_plan_that_does_not_say_of_what_it_counts_builds_the_networks_it_always_did(golden):
    written = trained.plan_of(residual_plans(golden, (2,) * 7), DATASET, "3d_fullres", "").to_json()
    del written["network"]["residual"]
    plan = Plan.from_json(written)
    config = common.get_config()
    assert wiring.model(Run.of(config, Path("run"), plan)).convs_encoder == (2,) * 7
    config.model.name = "nnunet.ResidualEncoderUNet"
    published = (1, 3, 4, 6, 6, 6, 6)
    assert blocks_of(wiring.model(Run.of(config, Path("run"), plan))) == published


def test_a_plan_for_the_plain_network_gives_a_residual_one_the_published_blocks(golden):
    plans = json.loads((golden / "plans" / "full_BHSDtrain96_nnUNetPlans.json").read_text())
    plan = trained.plan_of(plans, DATASET, "3d_fullres", "")
    config = common.get_config("backbone=nnunet_resenc")
    model = wiring.model(Run.of(config, Path("run"), plan))
    assert blocks_of(model) == (1, 3, 4, 6, 6, 6, 6)
    assert model.convs_decoder == 1


def test_a_configuration_that_is_not_there_is_refused(data, tmp_path, golden):
    config = common.get_config("data=msd")
    config.data.root = str(data)
    config.preprocess.plan = str(golden / "plans" / "full_Hippocampus_nnUNetPlans.json")
    config.preprocess.configuration = "3d_lowres"
    with pytest.raises(ValueError, match="no usable configuration 3d_lowres; there are 2d, 3d_f"):
        preprocess.run(config, tmp_path / "run")
