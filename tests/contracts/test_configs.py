"""Every experiment file builds, is what it was, and refuses words it does not know."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest
from bhsd_jax.configs.backbones import BACKBONES, RECIPES
from tiny_run import PLAN

from bhsd_jax.assemble import trained, wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.build import find
from bhsd_jax.configs import common
from bhsd_jax.platform import cluster
from bhsd_jax.settings import Settings
from bhsd_jax.verbs import parts

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "backbones", "common", "from_run", "tables")
)
GOLDEN = Path(__file__).parents[1] / "golden" / "configs"


def resolved(name, arg=""):
    config = importlib.import_module(f"bhsd_jax.configs.{name}").get_config(arg)
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_config_is_the_recorded_one(name):
    """A change of `common.py` must show as a change of every experiment that it touches."""
    path = GOLDEN / f"{name}.json"
    assert path.is_file(), f"record it: python tools/record_configs.py writes {path.name}"
    assert resolved(name) == json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_what_mirrors_its_predictions_was_trained_with_all_three_mirrors(name):
    """Recorded configs leave the axes to the training; results that are published have all."""
    config = importlib.import_module(f"bhsd_jax.configs.{name}").get_config("")
    run = Run.of(config, Path("run"), PLAN)
    assert wiring.mirror_axes(run) == ((0, 1, 2) if config.infer.mirror else ())


@pytest.mark.parametrize("word", sorted(set(common.DATA) - {"synthetic"}))
def test_every_field_of_a_data_set_can_be_set_on_the_command_line(word):
    """ml_collections takes a flag for a field that is there, and messages name such flags."""
    spec = common.DATA[word]
    fields = dataclasses.fields(find("bhsd_jax.datasets", spec["name"]))
    own = {field.name for field in fields if field.init}
    assert own <= set(spec)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_size(name):
    assert resolved(name, "smoke")["train"]["steps"] <= 10


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_word_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"smoke.*backbone=.*data=.*preset="):
        resolved(name, "smok")
    with pytest.raises(ValueError, match="synthetic, bhsd, msd"):
        resolved(name, "data=moon")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_takes_every_backbone_and_recipe(name, recipe, backbone):
    words = f"smoke,backbone={backbone},recipe={recipe}"
    if recipe == "fast" and name in ("demo", "hippocampus"):
        with pytest.raises(ValueError, match=f"{name}: .*; leave out recipe=fast"):
            resolved(name, words)
        return
    config = resolved(name, words)
    made, fields = find("bhsd_jax.models", config["model"]["name"]), dict(config["model"])
    del fields["name"]
    accepted = inspect.signature(made).parameters
    assert {key for key, value in fields.items() if value is not None} <= set(accepted)
    own = recipe == "published" and BACKBONES[backbone].optimizer is not None
    if name == "supervised":
        want = {"name": "adamw", "lr": 1e-4, "weight_decay": 1e-5, "clip": None, "warmup": 0.01}
        assert (want.items() <= config["optimizer"].items()) == own
        assert (config["optimizer"]["name"] == "muon") == (recipe == "fast")


@pytest.mark.parametrize("data", ["bhsd", "rsna", "mbhseg"])
def test_head_ct_pins_the_patch_unless_nnunet_plans_it(data):
    words = f"data={data},backbone="
    patches = {b: resolved("cps", words + b)["input"]["patch"] for b in BACKBONES}
    planned = {"nnunet", "nnunet_resenc"}
    assert {b for b, patch in patches.items() if patch is None} == planned
    assert all(patch == [20, 320, 256] for b, patch in patches.items() if b not in planned)


@pytest.mark.parametrize("data", ["msd", "instance", "dicom", "synthetic"])
def test_where_the_spacing_is_planned_so_is_the_patch(data):
    assert resolved("cps", f"data={data},backbone=unetr")["preprocess"]["spacing_mm"] is None
    assert resolved("cps", f"data={data},backbone=unetr")["input"]["patch"] is None


def test_unknown_backbones_and_recipes_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unetr, swin_unetr, cotr, nnformer, nnunet, nnunet_r"):
        resolved("supervised", "backbone=vnet")
    with pytest.raises(ValueError, match="published, nnunet, fast"):
        resolved("supervised", "recipe=mine")


def test_the_fast_recipe_is_half_as_long_and_leaves_what_it_does_not_name():
    plain, fast = (
        resolved("supervised", "data=bhsd"),
        resolved("supervised", "data=bhsd,recipe=fast"),
    )
    assert fast["train"].pop("steps") * 2 == plain["train"].pop("steps")
    assert fast["optimizer"].pop("clip") == plain["optimizer"].pop("clip") == 12.0
    del fast["optimizer"], plain["optimizer"]
    assert fast == plain
    own = resolved("supervised", "backbone=unet.X,recipe=fast")
    assert (own["optimizer"]["name"], own["train"]["steps"]) == ("muon", 125_000)


def test_a_recipe_of_one_config_does_not_reach_the_next():
    from bhsd_jax.configs import supervised

    first = supervised.get_config("backbone=unetr")
    first.optimizer.update(clip=1.0, lr=3.0)
    again = supervised.get_config("backbone=unetr")
    assert again.optimizer.clip is None
    assert again.optimizer.lr == pytest.approx(1e-4)


@pytest.mark.parametrize("labels", ["10%", "ten", "1.2.3"])
def test_a_number_of_masks_that_is_none_names_the_word_and_what_it_takes(labels):
    with pytest.raises(ValueError, match=f"labels={labels} is no number; give a count, .* a share"):
        resolved("supervised", f"labels={labels}")


@pytest.mark.parametrize("field", ["seed", "split.seed"])
def test_a_seed_below_0_is_refused_before_anything_is_drawn(field):
    config = common.get_config()
    config.update_from_flattened_dict({field: -1})
    with pytest.raises(ValueError, match=rf"config\.{field} must be 0 or more; got -1"):
        Settings.of(config)


def test_words_reach_their_fields():
    assert resolved("supervised", "data=msd")["data"]["name"] == "msd.MSD"
    assert resolved("supervised", "labels=8")["split"]["labeled"] == 8
    assert resolved("supervised", "labels=0.1")["split"]["labeled"] == pytest.approx(0.1)
    assert resolved("supervised", "backbone=unet.X")["model"]["name"] == "unet.X"
    assert resolved("cps", "preset=ssl4mis")["objective"]["twin_init"] == "kaiming_xavier"
    for experiment in ("cps", "suponly"):
        assert resolved(experiment, "preset=ssl4mis")["input"]["cases"] == "two_stream"
        assert resolved(experiment, "")["input"]["cases"] == "with_replacement"
    words = "planner=resenc_m,configuration=3d_cascade_fullres,previous=runs/low"
    found = resolved("supervised", words)["preprocess"]
    assert (found["planner"], found["configuration"]) == ("resenc_m", "3d_cascade_fullres")
    assert list(found["previous"]) == ["runs/low"]
    for wrong, choices in (
        ("planner=l", "resenc_m, resenc_l"),
        ("configuration=3d", "2d, 3d_full"),
    ):
        with pytest.raises(ValueError, match=choices):
            resolved("supervised", wrong)
    assert resolved("cps", "infer=fast")["infer"]["step"] == 0.75
    with pytest.raises(ValueError, match="full, fast"):
        resolved("cps", "infer=slow")
    with pytest.raises(ValueError, match="recommended, ssl4mis"):
        resolved("cps", "preset=other")


SSL4MIS = ("suponly", "entropy", "mean_teacher", "ict", "cps")


@pytest.mark.parametrize("name", SSL4MIS)
def test_the_preset_of_ssl4mis_is_its_whole_training(name):
    """The table in tools/guide/ssl4mis.md; the numbers are the scripts' arguments."""
    config = resolved(name, "preset=ssl4mis,backbone=swin_unetr")
    want = {
        "train": {"steps": 30_000, "validate_every": 200},
        "input": {
            "labeled": 2,
            "unlabeled": 0 if name == "suponly" else 2,
            "cases": "two_stream",
            "crop": "uniform",
            "rot_flip": True,
            "foreground": 0.0,
            "pad": "nnunet",
        },
        "augment": {"spatial": [], "intensity": []},
        "loss": {
            "ce_weight": 0.5,
            "dice_weight": 0.5,
            "batch_dice": True,
            "smooth": 1e-5,
            "background": True,
            "squared": True,
            "from_one": True,
        },
        "optimizer": {
            "name": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
            "nesterov": False,
            "clip": None,
            "weight_decay": 1e-4,
            "schedule": "poly_left",
            "power": 0.9,
            "warmup": 0.0,
            "lag": int(name != "cps"),
        },
        "infer": {"step": 64 / 96, "mirror": False},
        "predict": {"checkpoint": "best"},
    }
    if name != "suponly":
        want["objective"] = {"weight": 0.1, "ramp_steps": 30_000, "staircase": 150}
    for group, fields in want.items():
        assert fields.items() <= config[group].items(), group
    assert resolved(name, "preset=ssl4mis")["model"]["deep_supervision"] is False
    assert resolved(name, "preset=ssl4mis,smoke")["train"]["steps"] <= 10


@pytest.mark.parametrize("word", ["recipe=fast", "recipe=nnunet", "infer=fast"])
@pytest.mark.parametrize("name", SSL4MIS)
def test_the_preset_of_ssl4mis_refuses_words_that_it_would_drop(name, word):
    with pytest.raises(ValueError, match=f"{name}: preset=ssl4mis decides .* got {word}"):
        resolved(name, f"preset=ssl4mis,{word}")
    with pytest.raises(ValueError, match="supervised: preset=ssl4mis would change nothing"):
        resolved("supervised", "preset=ssl4mis")


@pytest.mark.parametrize("name", SSL4MIS)
def test_no_other_preset_takes_anything_from_ssl4mis(name):
    found, common = resolved(name), resolved("supervised")
    for group in ("augment", "loss", "optimizer", "infer"):
        assert found[group] == common[group]
    assert found["train"]["steps"] == 250_000
    assert found["input"]["crop"] == "nnunet"
    assert not found["input"]["rot_flip"]


def test_a_finished_run_is_a_config(tmp_path):
    from bhsd_jax.configs import cps, from_run

    config = cps.get_config("smoke")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = from_run.get_config(str(tmp_path))
    assert again.to_dict() == config.to_dict()
    fast = from_run.get_config(f"{tmp_path},infer=fast")
    assert fast.infer.step == 0.75
    assert not fast.infer.mirror
    assert fast.train.to_dict() == config.train.to_dict()
    assert isinstance(again.input.patch, tuple)
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        from_run.get_config(str(tmp_path / "none"))


def test_who_was_which_process_is_not_the_runs(tmp_path):
    from bhsd_jax.configs import cps, from_run

    config = cps.get_config("smoke")
    saved = json.loads(json.dumps(config.to_dict()))
    here = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 1, "detect": "mpi4py"}
    saved["mesh"] |= here | {"space": 2}  # as versions before wrote it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = from_run.get_config(str(tmp_path))
    assert parts.place(Settings.of(found)) == cluster.Place()
    assert found.mesh.to_dict() == config.mesh.to_dict() | {"space": 2}
    found.mesh.update(here)  # what this call says is heard
    assert Settings.of(found).mesh.process_id == 1


def test_a_run_of_an_older_version_gets_todays_defaults_for_what_it_lacks(tmp_path):
    from bhsd_jax.configs import common, cps, from_run

    config = cps.get_config("smoke").to_dict()
    config["train"]["steps"] = 77
    want = json.loads(json.dumps(config))
    saved = json.loads(json.dumps(config))
    del saved["slice_loss"], saved["task"], saved["infer"]["mirror_axes"]
    del saved["preprocess"]["plan"], saved["input"]["outside"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = from_run.get_config(str(tmp_path))
    assert json.loads(json.dumps(found.to_dict())) == want
    assert found.infer.mirror_axes == common.get_config().infer.mirror_axes
    assert not found.slice_loss.gate_pseudo
    assert "features" in found.model
    assert set(found.objective) == set(config["objective"]), "its fields are its own"


def test_a_group_that_an_older_version_called_otherwise_is_found(tmp_path):
    from bhsd_jax.configs import cps, from_run

    config = cps.get_config("smoke")
    config.slice_loss.update(neg_sup=1.0, gate_pseudo=True)
    saved = json.loads(json.dumps(config.to_dict()))
    saved["weak"] = saved.pop("slice_loss")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert from_run.get_config(str(tmp_path)).to_dict() == config.to_dict()
    assert trained.as_trained(Settings.of(cps.get_config("smoke")), tmp_path) == Settings.of(config)


@pytest.mark.parametrize("masks", [1, 1.0])
def test_a_count_may_come_as_a_float_and_a_share_stays_one(masks):
    """Of masks 1 is one of them and 1.0 all."""
    config = common.get_config()
    config.update_from_flattened_dict({"input.labeled": 2.0, "split.labeled": masks})
    found = Settings.of(config)
    assert (found.input.labeled, type(found.input.labeled)) == (2, int)
    assert type(found.split.labeled) is type(masks)
