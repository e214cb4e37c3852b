"""The front door: words, flags, help and errors, as the installed program gives them anywhere."""

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bhsd_jax import command_line, fields
from bhsd_jax.assemble.trained import as_trained
from bhsd_jax.build import arguments, names
from bhsd_jax.command_line import UsageError, parse
from bhsd_jax.configs import common, cps, from_run, mean_teacher, supervised
from bhsd_jax.experiments import queue
from bhsd_jax.settings import Settings

ROOT = Path(__file__).parents[1]
OWN = "from bhsd_jax.configs import cps\ndef get_config(arg=''):\n    return cps.get_config(arg)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


@pytest.fixture
def bhsd(site, tmp_path):
    """Runs the wheel's program in a folder that has a package `configs` of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('not this one')\n")
    (tmp_path / "mine.py").write_text(OWN)

    def run(*words, code=0, **variables):
        done = subprocess.run(
            [sys.executable, "-m", "bhsd_jax.main", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout if code == 0 else done.stderr

    return run


def test_the_wheel_has_one_package_and_its_experiments(site):
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {"bhsd_jax"}
    experiments = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {path.name for path in (site / "bhsd_jax" / "configs").glob("*.py")} == experiments
    assert not (site / "bhsd_jax" / "configs.py").exists()


@pytest.mark.parametrize("config", ["cps:smoke", "configs/cps.py:smoke", "mine.py:smoke"])
def test_configs_are_found_from_any_folder(bhsd, config):
    lines = bhsd("config", f"--config={config}", "--train.steps=3").splitlines()
    assert any(line.startswith("train.steps = 3 ") for line in lines)
    assert any(line.startswith("data.name = 'synthetic.Synthetic'") for line in lines)


def test_scans_are_prepared_from_any_folder(bhsd, tmp_path):
    words = ("--config=mine.py:smoke", "--data.labeled=3", "--processes=1")
    bhsd("preprocess", "runs/first", *words)
    assert (tmp_path / "runs" / "first" / "shards" / "index.json").is_file()


def test_a_defect_of_ours_ends_with_its_traceback_and_skips_no_scan(bhsd, site, tmp_path):
    fault = tmp_path / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(
        "from bhsd_jax.ct import prepare\n"
        "def broken(*_, **__): raise ValueError('shapes differ')\n"
        "prepare.foreground_positions = broken\n"
    )
    words = ("--config=cps:smoke", "--data.labeled=3", "--processes=1")
    text = bhsd("preprocess", "runs/a", *words, code=1, PYTHONPATH=f"{fault}{os.pathsep}{site}")
    assert "Traceback" in text
    assert "ValueError: shapes differ" in text
    assert text.strip().splitlines()[-1].startswith("This is a defect of bhsd_jax")
    assert "cases skipped" not in text
    assert not (tmp_path / "runs" / "a" / "skipped.csv").exists()


def test_later_verbs_know_the_run_from_any_folder_and_refuse_another_config(bhsd, tmp_path):
    trained(tmp_path / "runs" / "a", cps.get_config("smoke"))
    assert "summary.json: not there; run the verb `evaluate`" in bhsd("report", "runs/a", code=1)
    for verb in ("predict", "evaluate", "report"):
        (text,) = bhsd(verb, "runs/a", "--config=supervised:smoke", code=1).splitlines()
        assert "config.split.binary is false, but runs/a was trained with true" in text or (
            'config.objective.name is "supervised.Supervised", but runs/a was trained with' in text
        )


@pytest.mark.parametrize(
    ("words", "code", "want"),
    [
        (["trian", "--config=cps"], 2, "no verb trian, did you mean train?"),
        (["train", "--config=cpss"], 2, "did you mean cps?"),
        (["train", "--config=none/cps.py"], 2, "no file none/cps.py"),
        (["train", "--config=cps:smok"], 2, "'smok' is not known; words are smoke"),
        (
            ["train", "--config=cps", "--weak.neg_sup=1"],
            2,
            "bhsd: --weak.neg_sup is called --slice_loss.neg_sup now",
        ),
        (
            ["train", "--config=cps", "--config.weak.mil=0.1"],
            2,
            "--config.weak.mil is called --slice_loss.mil now",
        ),
        (["train", "--config=cps", "--train.step=3"], 2, "did you mean train.steps?"),
        (["train", "--config=cps", "--config.train.step=3"], 2, "did you mean train.steps?"),
        (["train", "--config=cps", "--plan=a"], 2, "--plan, did you mean preprocess.plan?"),
        (["train", "--config=cps", "--objective.wieght=3"], 2, 'Did you mean "weight"'),
        (["train", "--config=cps", "--preset=ssl4mis"], 2, "--config=NAME:preset=VALUE"),
        (["train", "--config=cps", "--config.task=1"], 2, "--config=NAME:task=VALUE"),
        (["train", "--config=cps", "--train.steps=many"], 2, "train.steps=many"),
        (["train", "--config=cps", "--train.steps=0"], 1, "must be 1 or more; got 0"),
        (["train", "--config=cps", "--input.patch=32"], 1, "config.input.patch must be (a whole"),
        (["predict", "--config=cps", "--infer.mirror_axes=3,4"], 1, "got (3, 4)"),
        (["predict", "--config=cps", "--predict.networks=None"], 1, "got None"),
        (["predict", "nowhere"], 2, "nowhere holds no config.json; name the folder of a run that"),
        (["evaluate", "a", "b", "--config=cps"], 2, "one run folder; got a and b"),
        (["train", "--config=cps:data=BHSD"], 2, "bhsd: data=BHSD is not known; choose from"),
        (["train", "--config=cps", "--data=bhsd"], 2, "--config=NAME:data=bhsd"),
        (["train", "--config=cps", "--backbone", "unetr"], 2, "--config=NAME:backbone=unetr"),
        (["train", "--config=cps", "--smoke"], 2, "--config=NAME:smoke"),
        (["train", "--config=cps", "--model=unetr"], 2, "name a class by --model.name=..., or"),
        (["train", "--config=cps", "--train.steps=1e5"], 2, "=1e5: must be a whole number"),
        (["train", "--config=cps", "--infer.mirror=no"], 2, "=no: must be True or False"),
        (["train", "--config=cps", "--lr=0.1"], 2, "no field --lr, did you mean optimizer.lr?"),
        (["train", "--config=cps", "--root=/d"], 2, "did you mean data.root?"),
        (
            ["train", "--config=cps", "--optimizer.learning_rate=1"],
            2,
            "bhsd: no field optimizer.learning_rate in this config; sgd takes beta2, clip, ",
        ),
    ],
)
def test_what_is_misspelt_is_one_line_before_jax_is_imported(bhsd, words, code, want):
    lines = bhsd(*words, code=code, PYTHONPROFILEIMPORTTIME="1").strip().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if "import time:" in line}
    (text,) = [line for line in lines if "import time:" not in line]
    assert want in text
    assert "ml_collections" in imported or code == 2
    assert not {"jax", "flax", "numpy"} & imported


@pytest.mark.parametrize("verb", command_line.VERBS)
def test_the_help_of_a_verb_has_its_fields_words_and_examples(bhsd, verb):
    text = bhsd(verb, "--help")
    assert text.count(f"  bhsd {verb} ") == 2
    assert all(f"  {word}" in text for word in common.ABOUT)
    if verb != "config":
        for field in fields.describe(Settings):
            if field.path.startswith(f"{verb}."):
                assert f"--{field.path.removeprefix(f'{verb}.')}=" in text
                assert " ".join(field.about.split())[:20] in " ".join(text.split())


def test_the_program_tells_of_itself(bhsd):
    assert bhsd() == bhsd("--help") == bhsd("-h")
    text = bhsd("--help")
    assert all(f"  {verb} " in text for verb in command_line.VERBS)
    assert all(f"  {code:>3}  " in text for code in command_line.EXIT_CODES)
    assert bhsd("--version").startswith("bhsd_jax ")


def test_flags_are_fields_by_path_or_by_the_name_that_a_verb_gives_them():
    words = ["predict", "r", "--config=cps", "--images=x", "--infer.step", "1", "--data.root=/d"]
    words += ["--config.predict.split=val", "--model.features=(4,8)", "--probabilities"]
    file, *flags = parse(words, "").flags
    assert file == f"--config={ROOT / 'configs' / 'cps.py'}"
    assert set(flags) == {
        "--workdir=r",
        "--config.predict.images=x",
        "--config.infer.step=1",
        "--config.data.root=/d",
        "--config.predict.split=val",
        "--config.model.features=(4,8)",
        "--config.predict.probabilities=True",
    }
    assert parse(["--config=cps"], "").verb == "train"
    with pytest.raises(UsageError, match=r"no field --images, did you mean predict\.images"):
        parse(["train", "--config=cps", "--images=x"], "")


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("~/runs/x", "/home/me/runs/x"),
        ("~/a,/b,~/c", "/home/me/a,/b,/home/me/c"),
        ("('~/a',)", "('/home/me/a',)"),
        ("--root=~/BHSD", "--root=/home/me/BHSD"),
        ("configs/from_run.py:~/runs/x", "configs/from_run.py:/home/me/runs/x"),
        ("/data/scan~/x", "/data/scan~/x"),
        ("~other/runs", "~other/runs"),
    ],
)
def test_a_path_behind_an_equals_sign_may_begin_at_home(monkeypatch, word, want):
    monkeypatch.setenv("HOME", "/home/me")
    assert command_line.at_home(word) == want
    flags = parse(["predict", "--config=cps", f"--images={word}", f"--workdir={word}"], "").flags
    assert flags[1:] == (f"--config.predict.images={want}", f"--workdir={want}")


@pytest.mark.parametrize("name", ["runs", "predict.runs", "config.predict.runs"])
def test_no_folder_is_lost_where_a_list_is_given_in_two_flags(name):
    words = ["predict", "r", "--config=cps", f"--{name}=b", f"--{name}=c"]
    with pytest.raises(UsageError, match=rf"--{name} is given twice, b and c; .*--{name}=b,c"):
        parse(words, "")
    assert "--config.seed=2" in parse(["train", "--config=cps", "--seed=1", "--seed=2"], "").flags


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
def test_folders_with_commas_in_their_names_are_one_word_of_a_list(tmp_path, monkeypatch):
    """`launch/sweep` makes such; each was taken for two folders, neither of which is there."""
    for name in ("lr=0.1,weight=2/seed0", "plain"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given, want in (
        ("plain,lr=0.1,weight=2/seed0", ("plain", "lr=0.1,weight=2/seed0")),
        ("lr=0.1,weight=2/seed0", ("lr=0.1,weight=2/seed0",)),
        ("plain,b", ("plain", "b")),
    ):
        found = parse(["predict", "r", "--config=cps", f"--runs={given}"], "").flags
        assert queue.resolve(found[:2]).predict.runs == want


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
def test_a_pattern_in_a_list_of_folders_is_the_folders_that_it_fits(tmp_path, monkeypatch):
    """A shell leaves `--runs=runs/fold*` as it is: no file begins so."""
    for name in ("fold1", "fold0", "lr=1,w=2/seed0", "lr=1,w=3/seed0", "[x]"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "fold.txt").touch()
    monkeypatch.chdir(tmp_path)
    for given, want in (
        ("fold*", ("fold0", "fold1")),
        ("[x],fold?", ("[x]", "fold0", "fold1")),
        ("lr=1,w=*/seed0,fold1", ("lr=1,w=2/seed0", "lr=1,w=3/seed0", "fold1")),
        ("none*,fold0", ("none*", "fold0")),  # the verb says that it is not there
        ("('fold0', 'b')", ("fold0", "b")),
    ):
        found = parse(["predict", "r", "--config=cps", f"--runs={given}"], "").flags
        assert queue.resolve(found[:2]).predict.runs == want


def test_a_word_behind_a_flag_of_yes_or_no_is_no_value_of_it():
    """As with the flags of other programs: `--report runs/a` was to be True or False."""
    words = ["predict", "--report", "runs/a", "scans", "--infer.mirror", "False", "--config=cps"]
    assert set(parse(words, "").flags[1:]) == {
        "--config.predict.report=True",
        "--workdir=runs/a",
        "--config.predict.images=scans",
        "--config.infer.mirror=False",
    }
    assert parse(["info", "--json", "runs/a", "--config=cps"], "").flags[1:] == (
        "--json=True",
        "--workdir=runs/a",
    )


def trained(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("supervised", "objective.ema_decay=0.99", 0.99),  # of the class it is derived from
        ("mean_teacher", "objective.tested=student", "student"),
        ("cps_cutmix", "objective.deep=True", True),  # from another module
        ("w2s", "objective.covered=(0.1,0.2)", (0.1, 0.2)),
        ("supervised", "model.deep_supervision=False", False),
        ("supervised", "optimizer.nesterov=False", False),
        ("supervised", "optimizer.hold=250", 250),
        ("supervised", "data.seed=7", 7),
    ],
)
def test_an_argument_that_the_config_leaves_at_its_default_may_be_given(name, flag, value):
    path, _, _ = flag.partition("=")
    group, _, argument = path.partition(".")
    found = queue.resolve([f"--config=configs/{name}.py", f"--config.{flag}"])
    assert getattr(found, group)[argument] == value
    with pytest.raises(ValueError, match=f"{argument}x"):
        queue.resolve([f"--config=configs/{name}.py", f"--config.{path}x=1"])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
def test_the_class_that_is_named_says_what_may_be_given():
    named = ["--config=configs/supervised.py", "--config.objective.name=w2s.WeakToStrong"]
    found = queue.resolve([*named, "--config.objective.pairing=labeled"])
    assert found.objective["pairing"] == "labeled"


@pytest.mark.parametrize("package", ["datasets", "models", "objectives"])
def test_what_a_class_takes_is_read_off_its_source(package):
    place = f"bhsd_jax.{package}"
    for module in names(place):
        for name, one in vars(importlib.import_module(f"{place}.{module}")).items():
            own = dataclasses.is_dataclass(one) and one.__module__ == f"{place}.{module}"
            if own and name[0] != "_":
                takes = set(inspect.signature(one).parameters) - {"parent", "name"}
                assert takes <= arguments(place, f"{module}.{name}"), name


def test_a_trained_run_needs_no_config(tmp_path):
    run = trained(tmp_path / "run", cps.get_config("smoke"))
    command = parse(["report", str(run)], "")
    assert command.flags[0].endswith(f"from_run.py:{run}")
    assert command.flags[1:] == (f"--workdir={run}",)


def test_a_config_of_ones_own_need_not_know_the_fields_that_came_since():
    config = cps.get_config("smoke")
    whole = Settings.of(config)
    config.augment = {"spatial": whole.augment.spatial, "intensity": whole.augment.intensity}
    assert Settings.of(config) == whole
    del config.augment.spatial
    config.augment.spatail = ()
    with pytest.raises(ValueError, match=r"config\.augment has no field spatail"):
        Settings.of(config)


def test_what_lies_within_an_argument_is_set_by_its_path(tmp_path):
    own = "    config.model.norm = ConfigDict({'kind': 'group'})\n    return config"
    text = OWN.replace("    return ", "    config = ") + own
    (tmp_path / "mine.py").write_text(f"from ml_collections import ConfigDict\n{text}")
    words = ["config", f"--config={tmp_path}/mine.py", "--model.norm.kind=batch"]
    run = [sys.executable, "-m", "bhsd_jax.main", *words]
    done = subprocess.run(run, cwd=ROOT, check=False, capture_output=True, text=True)
    assert "model.norm.kind = 'batch'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("config = 3", "mine.py: no function get_config(arg), which returns a config"),
        ("def get_config(arg=''):\n    return STEPS", "mine.py, line 2: NameError: name 'STEPS'"),
        ("import nowhere", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config(arg='')\n    return 3", "mine.py, line 1: expected ':'"),
        (
            OWN.replace("return ", "config = ") + "    config.optimiser.lr = 1e-3",
            "mine.py, line 4: no field optimiser in this config, see `bhsd config`. Did you mean",
        ),
        (
            OWN.replace("return ", "config = ") + "    config.train.steps = 2.5",
            "mine.py, line 4: TypeError: Could not override field 'steps'",
        ),
    ],
)
def test_what_is_wrong_in_a_config_file_of_ones_own_is_one_line(tmp_path, monkeypatch, text, want):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    code = "import sys; from bhsd_jax import main; sys.argv[1:] = ['config', '--config=mine.py']\n"
    run = [sys.executable, "-c", f"{code}main.cli()"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert want in said


def test_the_folder_of_a_run_or_its_config_json_stands_for_its_config(tmp_path):
    run = trained(tmp_path / "run", cps.get_config("smoke"))
    for given in (run, run / "config.json"):
        command = parse(["train", "other", f"--config={given}"], "")
        assert command.flags[0].endswith(f"from_run.py:{run}")


def test_later_verbs_read_the_config_of_the_run(tmp_path):
    config = cps.get_config("smoke")
    config.train.steps, config.objective.weight = 7, 0.125
    run = trained(tmp_path / "run", config)
    given = cps.get_config("smoke,infer=fast")
    given.data.root, given.predict.split = "/elsewhere", "val"
    found = as_trained(Settings.of(given), run)
    assert found.train.steps == 7
    assert found.objective["weight"] == 0.125
    assert found.infer.step == 0.75
    assert found.data["root"] == "/elsewhere"
    assert found.predict.split == "val"
    assert as_trained(Settings.of(given), tmp_path) == Settings.of(given), "nothing was trained"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input.pad": "nnunet"}, r"input\.pad is \"nnunet\".* trained with \"air\""),
        ({"input.patch": (8, 32, 16)}, r"input\.patch is \[8, 32, 16\]"),
        ({"windows": ((40.0, 80.0),)}, r"windows is \[\[40\.0, 80\.0\]\].* \"plan\""),
        ({"split.fold": 3}, r"split\.fold is 3"),
        ({"split.binary": False}, r"split\.binary is false"),
        ({"model.features": (4, 8)}, r"model is .*\[4, 8\]"),
    ],
)
def test_what_a_run_was_trained_with_cannot_differ(tmp_path, changes, field):
    run = trained(tmp_path / "run", cps.get_config("smoke"))
    given = cps.get_config("smoke")
    given.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=field):
        as_trained(Settings.of(given), run)
    with pytest.raises(ValueError, match=r"objective\.name"):
        as_trained(Settings.of(supervised_binary()), run)


def test_the_network_that_was_to_be_tested_is_no_choice_of_later_verbs(tmp_path):
    """It was dropped without a word, and the other network predicted."""
    run = trained(tmp_path / "run", mean_teacher.get_config("smoke"))
    given = mean_teacher.get_config("smoke")
    assert as_trained(Settings.of(given), run).objective == given.objective.to_dict()
    given.objective.tested = "student"
    with pytest.raises(ValueError, match=r"--predict\.networks=student, says which"):
        as_trained(Settings.of(given), run)


def supervised_binary():
    config = supervised.get_config("smoke")
    config.split.binary = True
    return config


def test_runs_of_an_older_version_lack_fields_and_have_others(tmp_path):
    config = json.loads(json.dumps(cps.get_config("smoke").to_dict()))
    del config["train"]["accumulate"], config["mesh"]
    config["train"]["gone"], config["also_gone"] = 1, {"x": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = Settings.of(cps.get_config("smoke"))
    assert as_trained(given, tmp_path) == given
    assert Settings.of(from_run.get_config(str(tmp_path))) == given, "named by its folder alone"


def test_settings_take_what_files_and_command_lines_say():
    config = cps.get_config("smoke")
    config.predict.networks, config.infer.mirror_axes = "ema,model", 2
    config.input.patch, config.split.labeled = [8, 16, 16], 0.5
    found = Settings.of(config)
    assert found.predict.networks == ("ema", "model")
    assert found.infer.mirror_axes == (2,)
    assert found.input.patch == (8, 16, 16)
    assert found.split.labeled == 0.5
    assert Settings.of(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.steps", 1.5, "a whole number; got 1.5"),
        ("infer.mirror", 1, "True or False; got 1"),
        ("infer.mirror_axes", (0, 0), r"got \(0, 0\)"),
        ("input.foreground", 1.5, "1 or less; got 1.5"),
        ("input.patch", (8, 0, 8), "1 or more"),
        ("windows", ((40, 80, 2),), "plan or"),
        ("split.labeled", "some", "a number or None; got 'some'"),
        ("predict.dicom", 3, "a group of fields; got 3"),
        ("preprocess.spacing_mm", (0, 1, 1), r"above 0; got \(0, 1, 1\)"),
        ("preprocess.spacing_mm", (5.0, -1.0, 1.0), "above 0"),
        ("infer.step", float("nan"), "0.01 or more; got nan"),
        ("objective", {"weight": 3.0}, "fields with a name; got {'weight': 3.0}"),
    ],
)
def test_a_value_that_means_nothing_is_refused(path, value, message):
    plain = cps.get_config("smoke").to_dict()
    *groups, name = path.split(".")
    part = plain
    for group in groups:
        part = part[group]
    part[name] = value
    with pytest.raises(ValueError, match=rf"config\.{path} .*{message}"):
        Settings.of(plain)


def ended(error, tmp_path, module="bhsd_jax.platform.errors"):
    """How the program ends where a verb raises this, whose class is in that module."""
    run = trained(tmp_path / "run", cps.get_config("smoke"))
    code = f"""
import sys
from bhsd_jax import main
from {module} import *
from bhsd_jax.verbs import report
def run(*_): raise {error}
report.run = run
sys.argv = ["bhsd", "report", {str(run)!r}]
main.cli()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_what_a_user_can_mend_is_one_line_and_a_defect_of_ours_is_not(tmp_path):
    assert ended("UserError('mend this')", tmp_path).splitlines()[1:] == ["report: mend this"]
    full = "SaveError('no room; the last good checkpoint is step 3')"
    said = ended(full, tmp_path / "c", module="bhsd_jax.train.checkpoint")
    assert said.splitlines()[1:] == ["report: no room; the last good checkpoint is step 3"]
    full = "JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.')"
    (said,) = ended(full, tmp_path / "d", module="jax.errors").splitlines()[1:]
    assert said.startswith("report: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 b")
    assert "infer.tiles=1" in said
    text = ended("ValueError('shapes differ')", tmp_path / "b")
    assert "Traceback" in text
    assert "ValueError: shapes differ" in text
    assert text.strip().splitlines()[-1].startswith("This is a defect of bhsd_jax")
