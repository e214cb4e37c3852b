import dataclasses
import json

import numpy as np
import pytest

from bhsd_jax.ct.prepared import Facts
from bhsd_jax.nnunet import adoption, planner
from bhsd_jax.volume import Network, Plan

PROPERTIES = {"0": {"percentile_00_5": 3, "mean": 50.5, "std": 16, "percentile_99_5": 97}}


def head_ct(golden):
    """NnU-Net's plan for BHSD."""
    return json.loads((golden / "plans" / "full_BHSDtrain96_nnUNetPlans.json").read_text())


def facts(shape=(34, 512, 512), spacing=(5.0, 0.5, 0.5), order=(0, 1, 2)):
    return Facts(
        case="a",
        patient="a",
        split="train",
        bleeding=True,
        shape=shape,
        spacing_mm=spacing,
        tilt_deg=0.0,
        intensity=(0.0, 0.0, 0.0),
        voxels=(1, 1),
        volume_ml=(1.0, 1.0),
        foreground=np.zeros(1, np.float32),
        source_sha256="",
        findings=(),
        order=order,
    )


def ours(modality="ct"):
    return Plan(
        dataset="made up",
        classes=("background", "blood"),
        modality=modality,
        spacing_mm=(1.0, 1.0, 1.0),
        transpose=(0, 1, 2),
        crop_hu=-200.0,
        foreground=(0.0, 1.0, 2.0, 3.0),
        median_shape=(8, 16, 16),
        network=Network((8, 16, 16), 2, (8,), ((1, 1, 1),), ((3, 3, 3),), (2,), (), True),
        source_sha256="abc",
        license="free",
        notes=("the target spacing rests on a few scans",),
    )


def test_what_nnunet_decided_is_taken_and_the_rest_is_ours(golden):
    theirs = head_ct(golden) | {"foreground_intensity_properties_per_channel": PROPERTIES}
    made = adoption.adopt(ours(), [facts(), facts((30, 400, 512))], theirs, "3d_fullres")
    settings = theirs["configurations"]["3d_fullres"]
    assert made.network == planner.from_nnunet_plans(theirs)[0]
    assert list(made.network.patch) == settings["patch_size"]
    assert made.network.batch == settings["batch_size"]
    assert list(made.spacing_mm) == settings["spacing"]
    assert made.foreground == (3.0, 50.5, 16.0, 97.0)
    # 512 and 400 rows of 0.5 mm are 524 and 410 of 0.48828 mm.
    assert made.median_shape == (32, 467, 524)
    assert (made.transpose, made.crop_hu, made.license) == ((0, 1, 2), -200.0, "free")
    assert made.notes == ("plan of nnU-Net: nnUNetPlans, 3d_fullres, of Dataset501_BHSDtrain96",)
    # The first v2 called channels modalities.
    theirs["foreground_intensity_properties_by_modality"] = PROPERTIES
    del theirs["foreground_intensity_properties_per_channel"]
    scans = [facts(), facts((30, 400, 512))]
    assert adoption.adopt(ours(), scans, theirs, "3d_fullres") == made


def test_a_coarser_configuration_is_taken_by_name(golden):
    theirs = head_ct(golden)
    coarse = {
        "inherits_from": "3d_fullres",
        "spacing": [5.0, 0.7, 0.7],
        "patch_size": [20, 256, 256],
    }
    theirs["configurations"]["3d_lowres"] = coarse
    made = adoption.adopt(ours(), [facts()], theirs, "3d_lowres")
    assert made.spacing_mm == (5.0, 0.7, 0.7)
    assert made.network.patch == (20, 256, 256)
    assert made.median_shape == (34, 366, 366)
    assert "3d_lowres" in made.notes[0]


def test_axes_of_the_files_become_axes_of_the_patient(golden):
    """Coronal files: planes to the back, rows up, columns to the left."""
    theirs = head_ct(golden)
    theirs["transpose_forward"] = [1, 0, 2]  # rows first: superior
    scan = facts((34, 300, 512), order=(1, 0, 2))
    made = adoption.adopt(ours(), [scan], theirs, "3d_fullres")
    assert made.transpose == (0, 1, 2)
    assert made.median_shape == (34, 307, 524)
    theirs["transpose_forward"] = [0, 1, 2]  # posterior first
    made = adoption.adopt(ours(), [scan], theirs, "3d_fullres")
    assert made.transpose == (1, 0, 2)
    # Posterior 300 x 0.5 mm at 5 mm, superior 34 x 5 mm at 0.48828 mm.
    assert made.median_shape == (30, 348, 524)
    with pytest.raises(ValueError, match=r"\(0, 1, 2\), \(1, 0, 2\).*store all scans alike"):
        adoption.adopt(ours(), [scan, facts()], theirs, "3d_fullres")


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_axes_of_a_reader_that_turns_scans_are_the_patients(golden, reader):
    """To superior, anterior, right: the lines of ours, however the files lie."""
    theirs = head_ct(golden) | {"image_reader_writer": reader}
    scans = [facts((34, 300, 512), order=(1, 2, 0)), facts((34, 300, 512))]
    made = adoption.adopt(ours(), scans, theirs, "3d_fullres")
    assert made.transpose == (0, 1, 2)
    assert made.median_shape == (34, 307, 524)
    theirs["transpose_forward"] = [1, 0, 2]
    assert adoption.adopt(ours(), scans, theirs, "3d_fullres").transpose == (1, 0, 2)


def test_what_the_plan_lacks_or_wants_otherwise_is_said(golden):
    theirs = head_ct(golden) | {"foreground_intensity_properties_per_channel": {}}
    settings = theirs["configurations"]["3d_fullres"]
    settings["resampling_fn_data"] = "resample_torch_fornnunet"
    made = adoption.adopt(ours(), [facts()], theirs, "3d_fullres")
    assert made.foreground == ours().foreground
    assert made.notes[1] == "it has no intensity statistics; ours are used"
    said = "it has resampling of data by resample_torch_fornnunet"
    assert made.notes[2].startswith(said)
    assert made.notes[2].endswith("here scans and masks are resampled as nnU-Net plans it")
    settings["resampling_fn_seg_kwargs"] = {"order": 0}
    made = adoption.adopt(ours(), [facts()], theirs, "3d_fullres")
    assert "resampling of seg by resample_data_or_seg_to_shape {'order': 0" in made.notes[3]
    residual = (golden / "plans" / "full_BHSDtrain96_nnUNetResEncUNetMPlans.json").read_text()
    made = adoption.adopt(ours(), [facts()], json.loads(residual), "3d_fullres")
    assert made.notes[1] == "made for --config.model.name=nnunet.ResidualEncoderUNet"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "norm_op=BatchNorm"),
        ({"norm_op_kwargs": {"eps": 1e-5}}, "norm_op_kwargs.affine=False"),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "norm_op_kwargs.eps=0.001"),
        ({"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.2}}, "dropout_op=Drop"),
        ({"conv_bias": False}, "conv_bias=False"),
        ({"nonlin": "torch.nn.ReLU"}, "nonlin=ReLU"),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "nonlin_kwargs.negative_slope=0.2"),
        ({"nonlin_first": True}, "nonlin_first=True"),
        ({"preprocessor_name": "Own"}, "preprocessor_name=Own"),
        ({"image_reader_writer": "OwnIO"}, "image_reader_writer=OwnIO"),
        ({"label_manager": "OwnManager"}, "label_manager=OwnManager"),
    ],
)
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_layers_and_readers_of_ones_own_are_refused_by_name(golden, configuration, changed, said):
    theirs = head_ct(golden)
    adoption.require_usable(theirs, configuration)
    settings = theirs["configurations"][configuration]
    arguments = settings["architecture"]["arch_kwargs"]
    arguments |= {"dropout_op": "torch.nn.Dropout2d", "dropout_op_kwargs": {"p": 0}}
    adoption.require_usable(theirs, configuration)
    places = {"preprocessor_name": settings}
    places |= dict.fromkeys(("image_reader_writer", "label_manager"), theirs)
    for name, value in changed.items():
        places.get(name, arguments)[name] = value
    with pytest.raises(
        ValueError, match=f"{configuration} has {said}.*leave config.preprocess.plan"
    ):
        adoption.adopt(ours(), [facts()], theirs, configuration)


def test_another_normalization_is_refused(golden):
    theirs = head_ct(golden)
    with pytest.raises(ValueError, match=r"normalization \['CTNormalization'\].*mr.*ZScore"):
        adoption.adopt(ours("mr"), [facts()], theirs, "3d_fullres")


@pytest.mark.parametrize("scheme", ["NoNormalization", "RescaleTo01Normalization", "Own"])
def test_a_normalization_that_is_not_supported_is_refused_by_name(golden, scheme):
    theirs = head_ct(golden)
    theirs["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
    for modality in ("ct", "mr"):
        with pytest.raises(ValueError, match=scheme):
            adoption.adopt(ours(modality), [facts()], theirs, "3d_fullres")


def test_the_mask_of_the_normalization_is_taken_from_the_plan(golden):
    """Asked for or not, whatever our own plan has decided; nnU-Net's CT never has one."""
    theirs = head_ct(golden)
    settings = theirs["configurations"]["3d_fullres"]
    settings["use_mask_for_norm"] = [True]
    assert not adoption.adopt(ours(), [facts()], theirs, "3d_fullres").use_mask_for_norm
    settings["normalization_schemes"] = ["ZScoreNormalization"]
    masked = dataclasses.replace(ours("mr"), use_mask_for_norm=True)
    for asked, kept in (([True], True), ([False], False)):
        settings["use_mask_for_norm"] = asked
        for own in (ours("mr"), masked):
            made = adoption.adopt(own, [facts()], theirs, "3d_fullres")
            assert made.use_mask_for_norm is kept
    del settings["use_mask_for_norm"]
    assert adoption.adopt(masked, [facts()], theirs, "3d_fullres").use_mask_for_norm


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("[1]", "no `configurations`"), ("{}", "nnU-Net v2")]
)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "plans.json"
    with pytest.raises(FileNotFoundError, match=r"plans\.json.*preprocess\.plan"):
        adoption.read(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"plans\.json: .*{message}"):
        adoption.read(path)


def test_a_folder_and_plans_of_nnunets_first_version_are_told(tmp_path):
    (tmp_path / "nnUNetResEncUNetLPlans.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a folder; .*\(nnUNetResEncUNetLPlans\.json\)"):
        adoption.read(tmp_path)
    (tmp_path / "nnUNetPlansv2.1_plans_3D.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="plans of nnU-Net v1 are not read; leave"):
        adoption.read(tmp_path / "nnUNetPlansv2.1_plans_3D.pkl")
