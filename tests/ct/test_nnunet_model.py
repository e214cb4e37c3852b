"""Plan and network of a trained nnU-Net, from its plans.json and dataset.json."""

import json

import pytest

from bhsd_jax.nnunet import trained
from bhsd_jax.nnunet.planner import from_nnunet_plans
from bhsd_jax.torch_weights import nnunet

FULL = "3d_fullres"
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "SDH": 2, "IPH": 1, "ignore": 3},
    "file_ending": ".nii.gz",
    "licence": "CC0",
}


@pytest.fixture
def plans(golden):
    return json.loads((golden / "plans" / "full_BHSDtrain96_nnUNetPlans.json").read_text())


def test_the_plan_is_what_nnunet_predicts_with(plans):
    plans["transpose_forward"] = [1, 0, 2]
    found = trained.plan_of(plans, DATASET, FULL, "abc")
    assert found.classes == ("background", "IPH", "SDH"), "by number; ignore is no class"
    assert (found.axes, found.normalize_first, found.crop_hu) == ("file", True, None)
    assert found.transpose == (1, 0, 2)
    assert found.foreground == (2.0, 56.0, 17.0, 98.0)
    assert found.network == from_nnunet_plans(plans)[0]
    assert found.spacing_mm[0] == 5.0
    assert found.median_shape == (34, 512, 512)
    assert (found.modality, found.license, found.source_sha256) == ("ct", "CC0", "abc")
    assert found.normalized_before
    name = "foreground_intensity_properties"
    plans[f"{name}_by_modality"] = plans.pop(f"{name}_per_channel")  # as the first v2 has it
    assert trained.plan_of(plans, DATASET, FULL, "abc") == found


def test_reoriented_files_have_axes_of_their_own(plans):
    plans["image_reader_writer"] = "NibabelIOWithReorient"
    assert trained.plan_of(plans, DATASET, FULL, "").axes == "SAR"


def test_z_scores_mean_mr(plans):
    settings = plans["configurations"][FULL]
    settings["normalization_schemes"] = ["ZScoreNormalization"]
    del plans["foreground_intensity_properties_per_channel"]
    assert trained.plan_of(plans, DATASET, FULL, "").modality == "mr"
    assert not trained.plan_of(plans, DATASET, FULL, "").use_mask_for_norm
    settings["use_mask_for_norm"] = [True]
    assert trained.plan_of(plans, DATASET, FULL, "").use_mask_for_norm


def test_the_network_has_the_arguments_of_its_class(plans):
    reference, constructor = trained.network_of(plans, DATASET, FULL)
    assert reference == "PlainConvUNet"
    assert (constructor["input_channels"], constructor["num_classes"]) == (1, 3)
    module = nnunet.from_torch(reference, constructor).module
    assert module.features == (32, 64, 128, 256, 320, 320, 320)
    assert module.deep_supervision, "all heads are imported"


@pytest.mark.parametrize("dropout", ["torch.nn.Dropout2d", "torch.nn.modules.dropout.Dropout2d"])
def test_a_planar_network_may_have_dropout(plans, dropout):
    """Nothing is dropped in prediction."""
    arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    plain = nnunet.from_torch(*trained.network_of(plans, DATASET, "2d")).module
    arguments |= {"dropout_op": dropout, "dropout_op_kwargs": {"p": 0.5}}
    assert nnunet.from_torch(*trained.network_of(plans, DATASET, "2d")).module == plain


def test_files_before_2_4_give_the_same_network(plans):
    _, want = trained.network_of(plans, DATASET, FULL)
    settings = plans["configurations"][FULL]
    given = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "conv_kernel_sizes": given["kernel_sizes"],
        "pool_op_kernel_sizes": given["strides"],
        "n_conv_per_stage_encoder": given["n_conv_per_stage"],
        "n_conv_per_stage_decoder": given["n_conv_per_stage_decoder"],
    }
    reference, found = trained.network_of(plans, DATASET, FULL)
    old, new = (nnunet.from_torch(reference, c).module for c in (found, want))
    assert old == new


def test_everything_without_a_counterpart_is_listed(plans):
    settings = plans["configurations"][FULL]
    settings |= {
        "normalization_schemes": ["Own", "CTNormalization", "CTNormalization"],
        "resampling_fn_probabilities": "resample_torch_fornnunet",
        "preprocessor_name": "Own",
    }
    plans |= {"image_reader_writer": "OwnIO", "label_manager": "OwnManager"}
    two = DATASET | {"channel_names": {"0": "CT", "1": "PET"}}
    with pytest.raises(ValueError, match="not supported") as caught:
        trained.plan_of(plans, two, FULL, "")
    for part in (
        "2 channels",
        "Own (known",
        "OwnIO (known",
        "preprocessor Own",
        "label manager OwnManager",
        "resample_torch_fornnunet",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"background": 0, "whole": [1, 2]}, "regions_class_order"),
        ({"background": 0, "a": 2}, "without gaps"),
        ({}, "without gaps"),
    ],
)
def test_labels_that_say_too_little_are_refused(plans, labels, said):
    with pytest.raises(ValueError, match=said):
        trained.plan_of(plans, DATASET | {"labels": labels}, FULL, "")
