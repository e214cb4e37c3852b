"""Regions and voxels to ignore: prepared, drawn, scored and assembled as by nnU-Net."""

import json

import numpy as np
import pytest
from nnunet_raw import Reference, config

from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import geometry, nifti
from bhsd_jax.ct.foreground import target_positions
from bhsd_jax.input.pipeline import Cut, Stream
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import nnunet_summary, overlap, scores
from bhsd_jax.nnunet import dataset_json, planner
from bhsd_jax.settings import Settings
from bhsd_jax.shards import store
from bhsd_jax.verbs import evaluate, preprocess
from bhsd_jax.volume import Plan, Volume

TUMOR = Labels(
    ("background", "value_1", "value_2", "active"),
    (("whole", (1, 2, 3)), ("core", (2, 3)), ("active", (3,))),
    (1, 2, 3),
    4,
)
PARTLY = Labels(("background", "lesion"), ignore=2)


@pytest.fixture(scope="module", params=["ignore", "regions"])
def prepared(request, tmp_path_factory):
    """A data set of either kind, and its shards by nnU-Net's plan."""
    reference = Reference.load(request.path.parents[1] / "golden", request.param)
    folder = tmp_path_factory.mktemp(request.param)
    root = reference.write(folder / "raw")
    (folder / "plans.json").write_text(json.dumps(reference.plans))
    preprocess.run(config(root, folder / "plans.json"), folder / "run")
    return request.param, reference, folder


def test_the_plan_is_nnunets(prepared):
    """The head counts what dataset.json names: regions and the label to ignore, too."""
    name, reference, folder = prepared
    preprocess.run(config(folder / "raw"), folder / "own")
    plan = Plan.load(folder / "own" / "shards")
    settings = reference.plans["configurations"]["3d_fullres"]
    assert (plan.network, plan.spacing_mm, plan.transpose) == planner.from_nnunet_plans(
        reference.plans
    )
    masks = [one.masked for one in plan.channels] or [plan.use_mask_for_norm]
    assert masks == settings["use_mask_for_norm"]
    assert plan.labels == dataset_json.labels(reference.dataset, name)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_prepared_voxels_and_labels_are_nnunets(prepared):
    _, reference, folder = prepared
    found = store.Shards(folder / "run" / "shards").load("c0")
    want = reference.trained_on("c0")
    assert np.abs(found.channels_last - want).max() < 1e-5
    label = np.maximum(reference.arrays["c0_3d_fullres_seg"][0], 0)
    assert (found.label == label).all()
    entry = store.Shards(folder / "run" / "shards").entries[0]
    assert entry.voxels == tuple(np.bincount(label.ravel(), minlength=4))
    assert np.count_nonzero(label == 3), "the last value is there"


def test_scores_are_nnunets(prepared, golden):
    """Every count of its summary.json, from its own predictions."""
    name, reference, folder = prepared
    with np.load(golden / f"model_{name}.npz") as stored:
        for case in reference.cases:
            predicted = Volume(stored[f"{case}_predicted"], reference.affine(case), case)
            nifti.write_volume(folder / "predicted" / f"{case}.nii.gz", predicted)
    made = config(folder / "raw")
    made.evaluate.update(
        predictions=str(folder / "predicted"),
        references=str(folder / "raw" / "labelsTr"),
        bootstrap=10,
    )
    evaluate.run(made, folder / "scored")
    written = json.loads((folder / "scored" / "summary_nnunet.json").read_text())
    theirs = json.loads((golden / f"model_{name}.json").read_text())["summary"]
    assert written["metric_per_case"][0]["reference_file"].endswith("/labelsTr/c0.nii.gz")
    for one in written["metric_per_case"]:
        for place in ("reference_file", "prediction_file"):
            one[place] = one[place].rpartition("/")[2]
    same_tree(written, theirs)
    rows = {(r.case, r.name): r for r in scores.read_csv(folder / "scored" / "cases.csv")}
    summary = json.loads((golden / f"model_{name}.json").read_text())["summary"]
    names = {str(v[0]) if len(v) == 1 else str(v): n for n, v in labels_of(name).targets}
    compared = 0
    for case in summary["metric_per_case"]:
        id = case["reference_file"].removesuffix(".nii.gz")
        for key, want in case["metrics"].items():
            row = rows[id, names[key]]
            got = (row.tp, row.fp, row.fn, row.voxels_pred, row.voxels_ref)
            assert got == tuple(want[k] for k in ("TP", "FP", "FN", "n_pred", "n_ref"))
            np.testing.assert_allclose((row.dice, row.iou), (want["Dice"], want["IoU"]), atol=1e-6)
            compared += 1
    assert compared == len(rows) == 3 * len(names)
    means = json.loads((folder / "scored" / "summary.json").read_text())["conventions"]["nnunet"]
    for key, want in summary["mean"].items():
        assert means[names[key]]["dice"] == pytest.approx(want["Dice"], abs=1e-6)
    assert means["mean"]["dice"] == pytest.approx(summary["foreground_mean"]["Dice"], abs=1e-6)


def same_tree(one, other):
    """Equal JSON, numbers to 1e-6."""
    assert type(one) is type(other) or {type(one), type(other)} == {int, float}
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_tree(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same_tree(a, b)
    elif isinstance(one, str):
        assert one == other
    else:
        np.testing.assert_allclose(one, other, atol=1e-6)


def labels_of(name):
    return {
        "ignore": Labels(("background", "lesion", "core"), ignore=3),
        "regions": Labels(TUMOR.classes, TUMOR.regions, TUMOR.region_order),
    }[name]


def test_a_labeled_patch_of_a_partly_annotated_scan_shows_what_is_annotated(prepared):
    """Every one is centered on an annotated voxel, and those that are forced on a class."""
    name, _, folder = prepared
    shards = store.Shards(folder / "run" / "shards")
    case = shards.open("c0")
    lists = len(labels_of(name).targets) + (name == "ignore")
    assert len(case.foreground) == lists
    label = shards.load("c0").label
    want = [set(map(tuple, np.argwhere(mask))) for mask in labels_of(name).masks(label)]
    for found, positions in zip(case.foreground, want, strict=False):
        assert set(map(tuple, found)) == positions
    if name == "regions":
        return
    assert set(map(tuple, case.foreground[-1])) == set(map(tuple, np.argwhere(label != 3)))
    one = (1, 1, 1)
    cut = Cut(patch=one, source=one, fill=0.0, foreground=0.5, annotated=True)
    stream = Stream(shards.open, ["c0"], cut, batch=2, length=400, seed=(0, 0), labeled=True)
    drawn = np.array([[stream[2 * i + row]["label"].item() for row in (0, 1)] for i in range(200)])
    assert 3 not in drawn
    assert set(drawn[:, 0]) == {0, 1, 2}
    assert (drawn[:, 0] == 0).mean() > 0.5, "anywhere that is annotated"
    assert set(drawn[:, 1]) == {1, 2}
    assert 0.35 < (drawn[:, 1] == 1).mean() < 0.65, "either class as often"


def test_a_scan_without_any_class_is_centered_on_what_is_annotated():
    label = np.full((2, 4, 4), 2, np.uint8)
    label[0, 0, 1] = 0
    none, annotated = target_positions(label, PARTLY)
    assert not len(none)
    assert annotated.tolist() == [[0, 0, 1]]
    assert [len(p) for p in target_positions(None, PARTLY)] == [0, 0]


def test_regions_are_written_in_their_order():
    logits = np.array([[1, 1, 1, -1], [-1, 2, 0.5, 3], [-1, -1, 0.1, -2]])[:, None, None]
    assert TUMOR.of_logits(logits).ravel().tolist() == [1, 2, 3, 2]
    backwards = Labels(TUMOR.classes, TUMOR.regions, (3, 2, 1))
    assert backwards.of_logits(logits).ravel().tolist() == [3, 2, 1, 2]
    assert PARTLY.of_logits(logits[:2]).ravel().tolist() == [0, 1, 0, 1]
    grid = geometry.locate(
        Volume(np.ones((1, 1, 4), np.uint8), np.eye(4), "a"), spacing_mm=(1.0, 1.0, 1.0),
        axes="file",
    )  # fmt: skip
    assert geometry.label_of_logits(logits, grid, TUMOR).ravel().tolist() == [1, 2, 3, 2]
    chances = geometry.probabilities_of_logits(logits, grid, TUMOR)
    np.testing.assert_allclose(chances, 1 / (1 + np.exp(-logits)), rtol=1e-6)


def test_a_region_of_one_value_is_called_in_the_summary_as_dataset_json_has_it():
    # nnunetv2 2.8.1 writes "(1,)" for [1] and "3" for 3.
    given = {"background": 0, "all": [2, 1, 3], "ring": [1], "dot": 3, "ignore": 4}
    facts = {"labels": given, "regions_class_order": [2, 1, 3]}
    labels = dataset_json.labels(facts, "dataset.json")
    summary = nnunet_summary.make([], labels)
    assert list(summary["mean"]) == ["(2, 1, 3)", "(1,)", "3"]
    plain = dataset_json.labels({"labels": {"background": [0], "a": [1], "b": 2}}, "dataset.json")
    assert list(nnunet_summary.make([], plain)["mean"]) == ["1", "2"]


def test_counts_leave_out_what_is_not_annotated():
    reference = np.array([[0, 1, 2, 3, 4, 4, 4]], np.uint8)
    predicted = np.array([[1, 1, 3, 0, 3, 1, 0]], np.uint8)
    whole, core, active = overlap.count_targets(reference, predicted, TUMOR)
    assert whole == overlap.Counts(2, 1, 1)
    assert core == overlap.Counts(1, 0, 1)
    assert active == overlap.Counts(0, 1, 1)
    with pytest.raises(ValueError, match="shape"):
        overlap.count_targets(reference, predicted[:, 1:], TUMOR)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("binary", True, "config.split.binary merges"), ("unlabeled", 2, "input.unlabeled is 2")],
)
@pytest.mark.parametrize("what", ["regions", "a label to ignore, 3"])
def test_what_is_not_defined_for_them_is_refused_by_name(
    golden, tmp_path, field, value, said, what
):
    name = "regions" if what == "regions" else "ignore"
    reference = Reference.load(golden, name)
    found = dataset_json.labels(reference.dataset, name)
    network, spacing, transpose = planner.from_nnunet_plans(reference.plans)
    plan = Plan(
        name, found.classes, "mr", spacing, transpose, None, (0.0, 0.0, 1.0, 0.0), network.patch,
        network, "", regions=found.regions, region_order=found.region_order, ignore=found.ignore,
    )  # fmt: skip
    made = config(tmp_path)
    (made.split if field == "binary" else made.input)[field] = value
    with pytest.raises(ValueError, match=said) as caught:
        Run.of(Settings.of(made), tmp_path, plan)
    assert what in str(caught.value)
