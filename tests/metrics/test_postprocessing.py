"""Keeping the largest component, against what nnU-Net decides and writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.labels import Labels
from bhsd_jax.metrics import overlap, postprocessing

# Six pairs of label maps for each of four sets, and what `determine_postprocessing` of nnunetv2
# 2.8.1 chose and wrote for them.
GOLDEN = Path(__file__).parents[1] / "golden" / "nnunet_postprocessing.npz"


def tally_of(references, predictions):
    def tally(rules):
        rows = []
        for reference, predicted in zip(references, predictions, strict=True):
            counts = overlap.count(reference, postprocessing.apply(predicted, rules), 4)
            rows.append([(each.tp, each.fp, each.fn) for each in counts])
        return np.array(rows)

    return tally


@pytest.mark.parametrize("name", ["per_class", "all", "none", "two"])
def test_the_rules_and_the_label_maps_are_nnunets(name):
    golden = np.load(GOLDEN)
    references, predictions = golden[f"{name}_ref"], golden[f"{name}_pred"]
    trials = postprocessing.decide(tally_of(references, predictions), 4)
    rules = [trial.rule for trial in trials if trial.taken]
    assert [list(rule) for rule in rules] == json.loads(str(golden[f"{name}_rules"]))
    before, _ = golden[f"{name}_dice"]
    assert trials[0].before == pytest.approx(before, abs=1e-12)
    for predicted, want in zip(predictions, golden[f"{name}_post"], strict=True):
        np.testing.assert_array_equal(postprocessing.apply(predicted, rules), want)


def test_components_of_one_size_all_stay_and_corners_connect():
    label = np.zeros((3, 3, 8), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1  # connected by a corner
    label[0, 0, 4] = label[0, 0, 5] = 2
    label[2, 2, 7] = 1
    kept = postprocessing.keep_largest(label, (1, 2))
    assert kept[2, 2, 7] == 0
    np.testing.assert_array_equal(np.flatnonzero(kept), np.flatnonzero(label)[:4])
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(postprocessing.keep_largest(label, (3,)), label)


def test_nothing_is_removed_that_some_class_needs():
    reference = np.zeros((1, 4, 9), np.uint8)
    reference[0, :, :4], reference[0, 0, 8] = 1, 2  # the second class lies apart
    predicted = reference.copy()
    predicted[0, 3, 6] = 1
    trials = postprocessing.decide(tally_of([reference] * 2, [predicted] * 2), 4)
    assert [trial.rule for trial in trials] == [(1, 2, 3), (1,), (2,), (3,)]
    assert [trial.taken for trial in trials] == [False, True, False, False]


def test_rules_come_from_a_file_by_the_names_of_classes(tmp_path):
    classes = ("background", "EDH", "SAH")
    path = tmp_path / "postprocessing.json"
    rules = ((1, 2), (2,))
    path.write_text(json.dumps(postprocessing.to_json(rules, classes)))
    assert postprocessing.load(path, classes) == rules
    for wrong in ({"keep_largest": [["SDH"]]}, {"keep_largest": [["background"]]}, {}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r'wants \{"keep_largest".* classes EDH, SAH; got'):
            postprocessing.load(path, classes)
    with pytest.raises(FileNotFoundError):
        postprocessing.load(tmp_path / "none.json", classes)


def test_the_file_of_nnunet_names_values(tmp_path):
    path = tmp_path / "postprocessing.json"
    name = "remove_all_but_largest_component_from_segmentation"
    given = [[1, 2, 3], [2, 3], 3]
    stored = {
        "postprocessing_fns": [name] * 3,
        "postprocessing_kwargs": [{"labels_or_regions": one} for one in given],
        "input_folder": {"foreground_mean": {"Dice": 0.5}},
    }
    path.write_text(json.dumps(stored))
    classes = ("background", "a", "b", "c")
    assert postprocessing.load(path, classes) == ((1, 2, 3), (2, 3), (3,))
    # What nnUNetv2_apply_postprocessing is given; the same rules lie beside it.
    path.with_suffix(".pkl").write_bytes(b"\x80\x04N.")
    assert postprocessing.load(path.with_suffix(".pkl"), classes) == ((1, 2, 3), (2, 3), (3,))
    regions = ((0,), (1, 2, 3), (3,), (2, 3))
    labels = Labels(
        ("background", "a", "b", "c"),
        regions=(("whole", (1, 2, 3)), ("active", (3,)), ("core", (2, 3))),
        region_order=(1, 3, 2),
    )
    rules = postprocessing.load(path, labels.names, regions)
    assert [labels.values_of(rule) for rule in rules] == [(1, 2, 3), (2, 3), (3,)]
    for wrong in ([[1, 2]], [4], ["a"]):
        stored["postprocessing_kwargs"] = [{"labels_or_regions": one} for one in wrong]
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="of the classes whole, active, core; got"):
            postprocessing.load(path, labels.names, regions)
    stored["postprocessing_fns"] = ["fill_holes"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="of the classes a, b, c; got"):
        postprocessing.load(path, classes)
