"""Cross-validation on folds made by hand: scores, the best, and what postprocessing is taken."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import PLAN

from bhsd_jax.configs import common
from bhsd_jax.ct import nifti
from bhsd_jax.ct.probabilities import Probabilities
from bhsd_jax.experiments import cross_validation, folds, queue
from bhsd_jax.experiments.queue import Failure, Trial
from bhsd_jax.experiments.study import Heading, Study
from bhsd_jax.platform import files
from bhsd_jax.settings import Settings
from bhsd_jax.shards.store import Entry, write_index
from bhsd_jax.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # upstream
AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
SHAPE, CLASSES = (4, 12, 12), 6


def masks():
    """Four scans, two a fold, with every class in each."""
    found = {}
    for index in range(4):
        label = np.zeros(SHAPE, np.uint8)
        for value in range(1, CLASSES):
            label[index % 2 : 3, 2 * value - 1 : 2 * value + 1, 2:8] = value
        found[f"case{index}"] = label
    return found


def first(label):
    """As the mask, but for stray voxels of class 2, far from the rest."""
    wrong = label.copy()
    wrong[3, 11, 10:12] = 2
    return wrong


def second(label):
    """The upper half of class 5 is missing, and half of class 1 is class 2."""
    wrong = label.copy()
    wrong[:2][label[:2] == 5] = 0
    wrong[:, 1][label[:, 1] == 1] = 2
    return wrong


def sure(label, share):
    """Probabilities in which the label has this share, the other classes the rest alike."""
    chances = np.full((CLASSES, *label.shape), (1 - share) / (CLASSES - 1), np.float16)
    np.put_along_axis(chances, label[None], np.float16(share), axis=0)
    return chances


@pytest.fixture
def made(tmp_path):
    """Two configs of two folds each, all finished."""
    runs = []
    for name, change, share in (("one", first, 0.9), ("two", second, 0.6)):
        for fold in range(2):
            config = common.get_config("data=bhsd")
            references = tmp_path / "masks" / str(fold)
            config.evaluate.update({"references": str(references), "bootstrap": 10})
            config.preprocess.processes = 1
            run = tmp_path / name / f"fold{fold}" / "seed0"
            settings = Settings.of(config)
            for case, label in list(masks().items())[2 * fold : 2 * fold + 2]:
                nifti.write_volume(references / f"{case}.nii.gz", Volume(label, AFFINE, ""))
                predicted = change(label)
                target = run / "predictions" / f"{case}.nii.gz"
                nifti.write_volume(target, Volume(predicted, AFFINE, ""))
                chances = sure(predicted, share).transpose(0, 3, 2, 1)
                beside = target.with_name(f"{case}_probabilities.npz")
                Probabilities(chances, ("background", *"abcde"), AFFINE).save(beside)
            trial = Trial(f"{name}/fold{fold}", 0, run, (), settings)
            files.write_json(run / "config.json", queue.plain(settings))
            saved = run / "checkpoints" / str(settings.train.steps) / "SHA256SUMS"
            files.write_text(saved, "made by hand")
            files.write_json(run / "summary.json", {})
            runs.append(trial)
    return Study("Cross-validation", tmp_path, {r.row: Heading(r.row) for r in runs}, runs)


def best(made):
    return json.loads((made.out / "best.json").read_text())


def dice(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn)


def test_the_best_config_is_found_and_its_stray_voxels_are_not_needed(made):
    assert folds.conclude(made, ensembles=False) == 4
    found = best(made)
    # Class 2 has 12 voxels in each slice of a mask: 36 in two of the scans, 24 in the others.
    with_strays = np.mean([dice(36, 2, 0), dice(24, 2, 0)])
    assert found["scores"]["one"]["IPH"] == pytest.approx(with_strays)
    assert found["scores"]["one"]["mean"] == pytest.approx((4 + with_strays) / 5)
    assert (found["best"], found["cases"]) == ("one", 4)
    # All classes touch, so that the first rule already takes the strays away.
    names = ["EDH", "IPH", "IVH", "SAH", "SDH"]
    assert found["postprocessing"] == {"keep_largest": [names]}
    assert found["after_postprocessing"]["mean"] == 1.0
    assert json.loads((made.out / "postprocessing.json").read_text()) == found["postprocessing"]
    page = (made.out / "report.md").read_text()
    assert "bhsd predict one/fold0/seed0 " in page
    assert "--predict.runs=one/fold1/seed0" in page
    assert "--predict.postprocessing=postprocessing.json" in page
    assert "previous" not in page
    assert str(made.out) not in page, "no place of this machine"
    assert "100.00" in page
    assert (found["checkpoint"], "the figures are too good" in page) == ("best", True)


def test_a_class_in_no_mask_does_not_choose_the_config(made, caplog):
    """One config draws a stray voxel of it: its Dice is 0, and that of the other not defined."""
    for run in made.runs:
        for fold in ("predictions", f"../../../masks/{run.row[-1]}"):
            for path in sorted((run.workdir / fold).glob("*.nii.gz")):
                label = nifti.read(path).voxels.astype(np.uint8)
                label[label == 3] = 0
                if run.row.startswith("two") and fold == "predictions":
                    label[3, 0, 11] = 3
                nifti.write_volume(path, Volume(label, AFFINE, ""))
    assert folds.conclude(made, ensembles=False) == 4

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    text = (made.out / "best.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    one, two = found["scores"]["one"], found["scores"]["two"]
    assert (one["IVH"], two["IVH"]) == (None, 0.0)
    drawn = ("EDH", "IPH", "SAH", "SDH")
    for scores in (one, two):
        assert scores["mean"] == pytest.approx(np.mean([scores[name] for name in drawn]))
    assert (found["best"], found["in_no_mask"]) == ("one", ["IVH"])
    assert found["postprocessing"] == {"keep_largest": [["IPH"]]}
    assert found["after_postprocessing"]["mean"] == 1.0
    assert found["tried"][0]["before"] is None, "nnU-Net's rule is left as it is"
    assert "no mask has IVH: left out of the mean Dice" in caplog.text
    page = (made.out / "report.md").read_text()
    assert "Left out of the mean, as no mask has them: IVH." in page
    assert f"{100 * one['mean']:.2f}** Dice in percent" in page


def test_masks_without_any_class_leave_no_mean(made):
    counts = np.zeros((2, 3, 3), int)
    assert cross_validation.in_no_mask(counts, ("background", "a", "b")) == {"a", "b"}
    dice = cross_validation.mean_dice(counts, ("background", "a", "b"), {"a", "b"})
    assert all(map(np.isnan, dice.values()))


def test_two_configs_may_be_better_together(made):
    assert folds.conclude(made) == 4
    scores = best(made)["scores"]
    assert list(scores) == ["one", "two", "one + two"]
    # Where the two differ the surer one decides: the mean of both is the first config's label.
    assert scores["one + two"] == pytest.approx(scores["one"])
    assert best(made)["best"] == "one", "of equals the simpler"


def test_the_runs_of_a_cascade_predict_first_and_are_given_its_first_stage(made):
    for run in made.runs[2:]:
        prepared = dataclasses.replace(run.config.preprocess, previous=("low",))
        config = dataclasses.replace(run.config, preprocess=prepared)
        made.runs[made.runs.index(run)] = dataclasses.replace(run, config=config)
    every = folds._by_config(made.runs)
    single = [cross_validation.candidate(name, runs) for name, runs in every.items()]
    found = folds._choose(cross_validation.pairs(single))
    assert found["best"] == "one + two"
    page = str(folds._usage(made.out, found))
    assert "predict two/fold0/seed0 --images" in page
    assert "--predict.runs=two/fold1/seed0,one/fold0/seed0,one/fold1/seed0" in page
    assert "--predict.previous=PREVIOUS" in page


def test_a_config_counts_once_all_its_folds_are_there(made):
    (made.runs[3].workdir / "summary.json").unlink()
    assert folds.conclude(made) == 3
    assert list(best(made)["scores"]) == ["one"]
    (made.runs[0].workdir / "summary.json").unlink()
    (made.out / "best.json").unlink()
    assert folds.conclude(made) == 2
    assert not (made.out / "best.json").exists()
    assert "2 of 4" in (made.out / "report.md").read_text()


def test_a_failure_is_told_without_the_words_of_the_verb(made):
    (made.runs[3].workdir / "summary.json").unlink()
    reason = "predict: /data/DOE^JOHN.nii.gz: damaged"
    folds.conclude(made, [Failure(made.runs[3], reason, "predict")])
    for name in ("report.md", "report.html"):
        text = (made.out / name).read_text()
        assert "predict failed; two/fold1/seed0/log.txt says why" in text
        assert "DOE" not in text


def test_probabilities_that_are_missing_are_named(made):
    gone = made.runs[1].workdir / "predictions" / "case3_probabilities.npz"
    gone.unlink()
    with pytest.raises(ValueError, match=r"case3_probabilities\.npz: not there; .*--no-ensembles"):
        folds.conclude(made)


def test_every_fold_is_a_run_of_its_own(tmp_path):
    words = ["--config=configs/supervised.py:smoke", "--config=wide=configs/supervised.py:smoke"]
    options = folds._parser().parse_args([*words, "--folds=0,3", f"--out={tmp_path}"])
    study = folds.make_study(options)
    told = [(r.row, r.config.split.fold, r.config.predict.split) for r in study.runs]
    assert told == [
        ("supervised/fold0", 0, "val"),
        ("wide/fold0", 0, "val"),
        ("supervised/fold3", 3, "val"),
        ("wide/fold3", 3, "val"),
    ]
    assert all(run.config.predict.probabilities for run in study.runs)
    assert {run.config.predict.checkpoint for run in study.runs} == {"last"}
    assert len({run.config.preprocess.shards for run in study.runs}) == 1
    words = ["--config=flat=configs/supervised.py:smoke,configuration=2d", *words[:1]]
    options = folds._parser().parse_args([*words, "--folds=0", f"--out={tmp_path}"])
    flat, full = folds.make_study(options).runs
    assert (flat.row, flat.config.preprocess.configuration) == ("flat/fold0", "2d")
    assert flat.config.preprocess.shards != full.config.preprocess.shards
    for wrong, said in (
        (["--config=configs/supervised.py:smoke"] * 2, "NAME="),
        ([*words, "--seeds=0,1"], "--seeds"),
    ):
        with pytest.raises(ValueError, match=said):
            folds.make_study(folds._parser().parse_args([*wrong, f"--out={tmp_path}"]))


def test_folds_of_a_data_set_that_says_who_validates_are_refused(tmp_path):
    """Every fold would be the same training; nothing is trained to find out."""
    words = ["--config=configs/supervised.py:smoke", f"--out={tmp_path}", f"--shards={tmp_path}"]
    files.write_json(tmp_path / "plan.json", PLAN.to_json())
    for marked in (False, True):
        splits = ["train"] * 5 + ["val"] * marked
        entries = [
            Entry(f"c{i}", f"p{i}", split, True, None, (8, 8, 8), (), (), "0", i)
            for i, split in enumerate(splits)
        ]
        write_index(tmp_path, entries)
        for given in ("0", "0,1,2"):
            study = folds.make_study(folds._parser().parse_args([*words, f"--folds={given}"]))
            if marked and given != "0":
                with pytest.raises(ValueError, match="which 1 cases validate, so that folds 0, 1"):
                    folds.require_folds(study)
            else:
                folds.require_folds(study)
    (tmp_path / "index.json").unlink()
    folds.require_folds(study)  # shards that nobody needs any more
    with pytest.raises(ValueError, match="--folds: needs whole numbers"):
        folds.make_study(folds._parser().parse_args([*words, "--folds=all"]))


def test_the_last_checkpoint_is_scored_unless_another_is_asked_for(tmp_path):
    """Validation scans have chosen the best one."""
    words = ["--config=configs/supervised.py:smoke", "--folds=0", f"--out={tmp_path}"]
    assert queue.resolve(words[:1]).predict.checkpoint == "best", "else nothing is shown here"
    for given, want, said in (
        ([], "last", "predicted by the last checkpoint of the fold not trained on it."),
        (["-o", "predict.checkpoint=best"], "best", "the best checkpoint of the fold"),
        (["--override=config.predict.checkpoint=4"], "4", "the checkpoint of step 4 of the fold"),
    ):
        study = folds.make_study(folds._parser().parse_args([*words, *given]))
        (run,) = study.runs
        assert run.config.predict.checkpoint == want
        assert folds.conclude(study) == 0
        page = (tmp_path / "report.md").read_text()
        assert "Of fold 0, every validation case" in page, "which is not every labeled one"
        assert said in page
        assert ("too good" in page) == (want == "best")
