import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.nnunet import dataset_json, planner
from bhsd_jax.nnunet.topology import PLANNERS, Pooling, activations, pool

TOOL = Path(__file__).parents[2] / "tools" / "plan.py"
NAMES = {planner.plans_name: name for name, planner in PLANNERS.items()}
FIXTURES = ["00_mri", "01_mri", "02_iso", "03_thin", "07_headct", "09_headct"]
XY = 0.4882810115814209
BHSD = (5.0, XY, XY)


def head_ct():
    """96 scans with the medians and 10th percentile of the BHSD training set."""
    rows = 20 * [(5.0, 34)] + 29 * [(5.0779547691345215, 32)] + 47 * [(5.3, 32)]
    return [(z, XY, XY) for z, _ in rows], [(n, 512, 512) for _, n in rows]


def as_json(value):
    return json.loads(json.dumps(value))


def load(golden, name):
    return json.loads((golden / "plans" / f"{name}.json").read_text())


def parts(whole, like):
    """`whole`, cut down to the keys of `like`."""
    if isinstance(like, dict) and isinstance(whole, dict):
        return {key: parts(whole[key], like[key]) for key in like if key in whole}
    return whole


@pytest.mark.parametrize("name", FIXTURES)
def test_plans_are_those_of_nnunet(golden, name):
    fixture = load(golden, f"plan_{name}")
    fingerprint = fixture["fingerprint"]
    assert fixture["plans"]
    for plans_name, theirs in fixture["plans"].items():
        ours = planner.make_plans(
            fingerprint["spacings"], fingerprint["shapes_after_crop"], planner=NAMES[plans_name]
        )
        assert list(ours["configurations"]) == list(theirs["configurations"])
        for settings in ours["configurations"].values():
            if "architecture" in settings:  # the fixtures hold the arguments alone
                settings["architecture"] = settings["architecture"]["arch_kwargs"]
        assert parts(as_json(ours), theirs) == theirs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BHSDtrain96_nnUNetPlans", "default"),
        ("BHSDtrain96_nnUNetResEncUNetMPlans", "resenc_m"),
    ],
)
def test_head_ct_plans_file_is_nnunets_to_the_last_key(golden, name, kind):
    theirs = load(golden, f"full_{name}")
    ours = planner.make_plans(
        *head_ct(),
        planner=kind,
        num_classes=6,
        dataset=theirs["dataset_name"],
        foreground=theirs["foreground_intensity_properties_per_channel"],
    )
    assert as_json(ours) == theirs


@pytest.mark.parametrize("name", ["hippocampus", "head_ct", "isotropic", "tiny"])
def test_every_key_of_the_residual_presets_is_nnunets(golden, name):
    found = load(golden, "resenc_presets")["fingerprints"][name]
    assert {"resenc_m", "resenc_l", "resenc_xl"} < found["plans"].keys()
    for preset, theirs in found["plans"].items():
        kind, _, memory_gb = preset.partition("@")
        ours = planner.make_plans(
            found["spacings"],
            found["shapes"],
            planner=kind,
            modality=found["modality"],
            num_classes=found["num_classes"],
            cases=found["cases"],
            relative_size=found["relative_size"],
            foreground=found["foreground"],
            dataset=theirs["dataset_name"],
            memory_gb=float(memory_gb) if memory_gb else None,
        )
        assert as_json(ours) == theirs, preset


def test_small_mr_plans_file_is_nnunets_to_the_last_key(golden):
    theirs = load(golden, "full_Hippocampus_nnUNetPlans")
    ours = planner.make_plans(
        [(1, 1, 1)] * 10,
        [(36, 50, 35)] * 10,
        modality="mr",
        num_classes=3,
        cases=260,
        dataset=theirs["dataset_name"],
        foreground=theirs["foreground_intensity_properties_per_channel"],
    )
    assert as_json(ours) == theirs


@pytest.mark.parametrize(
    ("kind", "memory_gb", "patch", "batch"),
    [
        ("default", None, (20, 320, 256), 2),
        ("default", 11, (24, 320, 320), 2),
        ("default", 16, (24, 384, 384), 2),
        ("default", 24, (28, 448, 384), 2),
        ("default", 40, (32, 512, 512), 2),
        ("default", 80, (40, 512, 512), 3),
        ("resenc_m", None, (20, 256, 256), 2),
        ("resenc_l", None, (28, 384, 384), 2),
        ("resenc_xl", None, (32, 512, 448), 2),
    ],
)
def test_a_larger_gpu_gets_a_larger_patch(kind, memory_gb, patch, batch):
    plans = planner.make_plans(*head_ct(), planner=kind, num_classes=6, memory_gb=memory_gb)
    settings = plans["configurations"]["3d_fullres"]
    assert tuple(settings["patch_size"]) == patch
    assert settings["batch_size"] == batch


@pytest.mark.parametrize(
    ("planner", "patch", "expected"),
    [
        ("default", (40, 512, 512), 3_246_069_760),
        ("default", (28, 448, 448), 1_739_608_192),
        ("default", (24, 320, 320), 760_761_600),
        ("default", (20, 320, 256), 507_174_400),
        ("resenc_m", (20, 256, 256), 614_466_560),
        ("resenc_l", (28, 384, 384), 1_935_569_664),
        ("resenc_xl", (32, 512, 448), 3_440_080_896),
    ],
)
def test_memory_proxy_is_the_one_nnunet_counts(planner, patch, expected):
    assert activations(pool(BHSD, patch), PLANNERS[planner], 6) == expected


def test_memory_proxy_counts_every_convolution_once():
    pooling = Pooling((8, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)))
    # Two stages of 32 and 64 channels on 64 and 16 pixels, three classes.
    plain = 2 * 32 * 64 + 2 * 64 * 16 + (1 + 2) * 32 * 64 + 3 * 64
    residual = (1 + 2) * 32 * 64 + (3 * 2 + 1) * 64 * 16 + (1 + 1) * 32 * 64 + 3 * 64
    assert activations(pooling, PLANNERS["default"], 3) == plain
    assert activations(pooling, PLANNERS["resenc_m"], 3) == residual


def test_target_spacing_is_the_median_of_nearly_isotropic_scans():
    spacings = [(1.0, 0.9, 0.8), (1.2, 1.0, 0.7), (1.1, 1.4, 0.9)]
    assert planner.target_spacing(spacings, [(100, 100, 100)] * 3) == pytest.approx((1.1, 1.0, 0.8))


def test_target_spacing_takes_the_tenth_percentile_along_a_coarse_short_axis():
    spacings = [(z, 1.0, 1.0) for z in np.arange(5, 16)]  # 11 scans: the percentile is the second
    assert planner.target_spacing(spacings, [(20, 200, 200)] * 11) == pytest.approx((6, 1, 1))
    assert planner.target_spacing(spacings, [(80, 200, 200)] * 11) == pytest.approx((10, 1, 1))


def test_target_spacing_never_makes_the_coarse_axis_finer_than_the_others():
    spacings = [(z, 1.0, 1.0) for z in (0.4, 0.4, 0.4, 10, 10, 10, 10)]
    assert planner.target_spacing(spacings, [(20, 200, 200)] * 7) == pytest.approx((1.00001, 1, 1))


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((5, 1, 1), (0, 1, 2)),
        ((1, 5, 1), (1, 0, 2)),
        ((1, 1, 5), (2, 0, 1)),
        ((1, 1, 1), (0, 1, 2)),
    ],
)
def test_transpose_puts_the_coarsest_axis_first(spacing, expected):
    assert planner.transpose_for(spacing) == expected


def test_plan_of_permuted_axes_is_the_plan_of_the_transposed_scans():
    spacings, shapes = (np.array(rows) for rows in head_ct())
    order = [1, 2, 0]
    permuted = planner.make_plans(spacings[:, order], shapes[:, order])
    assert permuted["transpose_forward"] == [2, 0, 1]
    assert permuted["transpose_backward"] == [1, 2, 0]
    assert permuted["configurations"] == planner.make_plans(spacings, shapes)["configurations"]


def test_a_pinned_spacing_gives_the_plan_of_that_spacing():
    spacings, shapes = head_ct()
    thin = [(2.5, XY, XY)] * 20 + spacings[20:]
    assert planner.network_for(thin, shapes, num_classes=6).batch_dice is True
    assert planner.network_for(thin, shapes, num_classes=6, spacing_mm=BHSD) == planner.network_for(
        spacings, shapes, num_classes=6
    )


def test_single_slices_get_a_2d_plan_and_no_3d_network():
    spacings, shapes = [(3.0, 1.0, 1.0)] * 4, [(1, 256, 256)] * 4
    assert list(planner.make_plans(spacings, shapes)["configurations"]) == ["2d"]
    with pytest.raises(ValueError, match="single slice"):
        planner.network_for(spacings, shapes)


def test_z_scores_keep_to_the_mask_where_much_was_cropped():
    scans = ([(1, 1, 1)] * 4, [(64, 64, 64)] * 4)

    def masked(**arguments):
        return planner.make_plans(*scans, **arguments)["configurations"]["2d"]["use_mask_for_norm"]

    assert masked(modality="mr", relative_size=0.7, num_channels=2) == [True, True]
    assert masked(modality="mr", relative_size=0.75) == [False]
    assert masked(modality="ct", relative_size=0.7) == [False]


@pytest.mark.parametrize(
    ("thin", "warned"),
    [(0, False), (8, True), (9, True), (30, False)],
    ids=lambda value: str(value),
)
def test_margin_warns_where_a_few_thin_scans_decide(thin, warned):
    spacings = [(2.5, 0.5, 0.5)] * thin + [(5.0, 0.5, 0.5)] * (96 - thin)
    warnings = planner.spacing_warnings(spacings, [(32, 512, 512)] * 96)
    assert len(warnings) == warned
    assert all("axis 0" in warning and "2.5 to 5 mm" in warning for warning in warnings)


def test_margin_of_one_scan_is_silent():
    assert planner.spacing_warnings([BHSD], [(32, 512, 512)]) == []


def test_topology_of_the_planned_patch_is_the_planned_network():
    planned = planner.network_for(*head_ct(), num_classes=6)
    assert planner.topology(BHSD, (20, 320, 256)) == planned


def test_topology_of_a_pinned_patch_by_hand():
    network = planner.topology(BHSD, (8, 32, 64))
    # In the plane until 0.49 mm has become 3.9 mm; by then 4 rows are left, but 8 slices.
    assert network.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 1, 2))
    assert network.kernels == ((1, 3, 3), (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert network.features == (32, 64, 128, 256, 320)
    assert network.convs_encoder == (2, 2, 2, 2, 2)
    assert network.convs_decoder == (2, 2, 2, 2)


def test_a_patch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"nearest patch that does is \(20, 320, 256\)"):
        planner.topology(BHSD, (20, 320, 250))
    with pytest.raises(ValueError, match=r"nearest patch that does is \(64, 64, 64\)"):
        planner.topology((1, 1, 1), (65, 64, 64))
    assert planner.topology((1, 1, 1), (64, 64, 64)).patch == (64, 64, 64)


def test_padded_patches_are_accepted_and_axes_keep_four_voxels():
    generator = np.random.default_rng(0)
    for _ in range(300):
        spacing = generator.uniform(0.3, 6, 3).tolist()
        pooling = pool(spacing, generator.integers(4, 400, 3).tolist())
        assert pool(spacing, pooling.patch) == pooling
        bottleneck = np.array(pooling.patch) / pooling.total_stride
        assert bottleneck.min() >= 4
        assert (bottleneck % 1 == 0).all()


def test_nnunets_plans_are_read_back(golden):
    network, spacing, transpose = planner.from_nnunet_plans(
        load(golden, "full_BHSDtrain96_nnUNetPlans")
    )
    assert network == planner.topology(BHSD, (20, 320, 256))
    assert spacing == BHSD
    assert transpose == (0, 1, 2)
    residual = load(golden, "full_BHSDtrain96_nnUNetResEncUNetMPlans")
    assert planner.from_nnunet_plans(residual)[0].convs_encoder == (1, 3, 4, 6, 6, 6, 6)


def test_plans_in_the_older_spelling_are_read_alike(golden):
    plans = load(golden, "full_BHSDtrain96_nnUNetPlans")
    expected = planner.from_nnunet_plans(plans)
    settings = plans["configurations"]["3d_fullres"]
    arguments = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
        "pool_op_kernel_sizes": arguments["strides"],
    }
    assert planner.from_nnunet_plans(plans) == expected


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_one_number_may_stand_for_every_stage_and_axis(golden, configuration):
    """As the networks themselves take it, so that plans which people edit by hand have it."""
    plans = load(golden, "full_BHSDtrain96_nnUNetPlans")
    arguments = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    stages, axes = arguments["n_stages"], len(arguments["strides"][0])
    arguments |= {"kernel_sizes": [[3] * axes] * stages, "features_per_stage": [32] * stages}
    arguments["strides"] = [[1] * axes, *[[2] * axes] * (stages - 1)]
    expected = planner.from_nnunet_plans(plans, configuration)
    arguments |= {"kernel_sizes": 3, "features_per_stage": 32, "n_conv_per_stage": 2}
    arguments |= {"n_conv_per_stage_decoder": 2, "strides": [1] + [2] * (stages - 1)}
    assert planner.from_nnunet_plans(plans, configuration) == expected


def test_a_configuration_inherits_and_its_own_settings_win(golden):
    plans = load(golden, "full_BHSDtrain96_nnUNetPlans")
    plans["configurations"]["large"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    assert planner.from_nnunet_plans(plans, "large")[0].batch == 7
    plans["configurations"]["next"] = {"inherits_from": "3d_fullres", "previous_stage": "low"}
    assert planner.from_nnunet_plans(plans, "next") == planner.from_nnunet_plans(plans)


@pytest.mark.parametrize(
    ("configuration", "settings", "message"),
    [
        ("nothing", {}, "no usable configuration nothing; there are 2d, 3d_fullres"),
        ("long", {"inherits_from": "2d", "patch_size": [1, 2, 3, 4]}, "need a 2D or 3D"),
        ("loop", {"inherits_from": "loop"}, "loop -> loop"),
        ("empty", {"spacing": [1, 1, 1]}, "says nothing of"),
    ],
)
def test_plans_that_cannot_be_used_are_refused(golden, configuration, settings, message):
    plans = load(golden, "full_BHSDtrain96_nnUNetPlans")
    if settings:
        plans["configurations"][configuration] = settings
    with pytest.raises(ValueError, match=message):
        planner.from_nnunet_plans(plans, configuration)


@pytest.mark.parametrize(
    ("spacings", "shapes", "message"),
    [
        ([], [], "three numbers per scan"),
        ([(1, 1)], [(10, 10)], "three numbers per scan"),
        ([(1, 1, 1)], [(10, 10, 10)] * 2, "got 1 and 2"),
        ([(1, 1, 1), (1, 0, 1)], [(10, 10, 10)] * 2, "scan 1 has"),
        ([(1, 1, float("nan"))], [(10, 10, 10)], "must be positive"),
        ([("a", 1, 1)], [(10, 10, 10)], "must be numbers"),
    ],
)
def test_a_fingerprint_that_cannot_be_is_refused(spacings, shapes, message):
    with pytest.raises(ValueError, match=message):
        planner.make_plans(spacings, shapes)


def test_unknown_planners_and_impossible_memory_are_refused():
    with pytest.raises(ValueError, match=r"resenc_m.*got 'resenc'"):
        planner.make_plans(*head_ct(), planner="resenc")
    with pytest.raises(ValueError, match="modality is ct or mr"):
        planner.make_plans(*head_ct(), modality="pet")
    with pytest.raises(ValueError, match="fits the memory"):
        planner.make_plans(*head_ct(), memory_gb=1e-6)
    with pytest.raises(ValueError, match="median scan has"):
        planner.make_plans([(1, 1, 1)], [(10, 10, 10)], spacing_mm=(30, 1, 1))


def run(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_prints_the_plan_of_a_file(golden):
    path = golden / "plans" / "plan_01_mri.json"
    done = run(path, "--planner", "resenc_l")
    fingerprint = json.loads(path.read_text())["fingerprint"]
    expected = as_json(planner.make_plans(*fingerprint.values(), planner="resenc_l"))
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    theirs = load(golden, "plan_01_mri")["plans"]["nnUNetResEncUNetLPlans"]
    assert parts(printed, theirs) == theirs  # the fixtures have no arch_kwargs
    for settings in printed["configurations"].values():
        if architecture := settings.get("architecture"):
            for name in architecture["arch_kwargs"]:
                del architecture[name]
    assert printed == expected


def test_the_tool_warns_where_a_few_scans_decide_unless_the_spacing_is_pinned(golden):
    path = golden / "plans" / "plan_07_headct.json"
    assert "2.5 to 5 mm over random halves" in run(path).stderr
    assert run(path, "--spacing-mm", "5", "0.5", "0.5").stderr == ""


def test_the_tool_reads_classes_channels_and_modality_from_a_dataset_json(golden, tmp_path):
    theirs = load(golden, "full_Hippocampus_nnUNetPlans")
    fingerprint = tmp_path / "fingerprint.json"
    fingerprint.write_text(
        json.dumps(
            {
                "spacings": [[1, 1, 1]] * 10,
                "shapes_after_crop": [[36, 50, 35]] * 10,
                "foreground_intensity_properties_per_channel": theirs[
                    "foreground_intensity_properties_per_channel"
                ],
            }
        )
    )
    about = {"name": theirs["dataset_name"], "numTraining": 260, "modality": {"0": "MRI"}}
    about["labels"] = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    done = run(fingerprint, "--dataset", tmp_path / "dataset.json")
    assert done.returncode == 0, done.stderr
    assert parts(json.loads(done.stdout), theirs) == theirs
    assert run(fingerprint).stdout == done.stdout  # the one beside the fingerprint
    (tmp_path / "dataset.json").write_text("{}")
    done = run(fingerprint)
    assert (done.returncode, done.stdout) == (2, "")
    assert "dataset.json: no labels" in done.stderr


def test_the_tool_plans_as_nnunet_for_channels_readers_and_its_name_of_the_data_set(tmp_path):
    """PET/CT beside a mask that is not normalized, in .nii, where nnU-Net keeps its fingerprint."""
    folder = tmp_path / "Dataset221_AutoPET"
    folder.mkdir()
    fingerprint, about = folder / "dataset_fingerprint.json", folder / "dataset.json"
    measured = {"spacings": [[3, 2, 2]] * 10, "shapes_after_crop": [[90, 100, 100]] * 10}
    measured["median_relative_size_after_cropping"] = 0.5
    fingerprint.write_text(json.dumps(measured))
    named = {"channel_names": {"0": "CT", "1": "PET", "2": "noNorm"}, "name": "PET"}
    named |= {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii"}
    about.write_text(json.dumps(named))
    plans = json.loads(run(fingerprint).stdout)
    assert (plans["dataset_name"], plans["image_reader_writer"]) == (folder.name, "NibabelIO")
    # Source: nnU-Net v2.8.1, `determine_normalization_scheme_and_whether_mask_is_used_for_norm`.
    settings = plans["configurations"]["3d_fullres"]
    schemes = ["CTNormalization", "ZScoreNormalization", "NoNormalization"]
    assert settings["normalization_schemes"] == schemes
    assert settings["use_mask_for_norm"] == [False, True, False]
    assert "several ways, so that --channels=2" in run(fingerprint, "--channels", "2").stderr


@pytest.mark.parametrize(
    ("facts", "slices", "reader"),
    [
        ({"file_ending": ".nii.gz"}, False, "SimpleITKIO"),
        ({"file_ending": ".mha", "overwrite_image_reader_writer": "None"}, False, "SimpleITKIO"),
        ({"file_ending": ".png"}, True, "NaturalImage2DIO"),
        ({"file_ending": ".tif"}, True, "NaturalImage2DIO"),
        ({"file_ending": ".tif"}, False, "Tiff3DIO"),
        (
            {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "NibabelIOWithReorient"},
            False,
            "NibabelIOWithReorient",
        ),
    ],
)
def test_the_reader_is_nnunets(facts, slices, reader):
    assert dataset_json.reader(facts, slices=slices) == reader


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "no spacings"),
        ('{"spacings": [[1, 1, 1]]}', "no shapes_after_crop"),
        ('{"spacings": [[1, 1, 1]], "shapes_after_crop": [[1, 2]]}', "three numbers"),
    ],
)
def test_the_tool_names_what_is_wrong_and_exits_two(tmp_path, text, message):
    path = tmp_path / "fingerprint.json"
    path.write_text(text)
    done = run(path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
