"""2D configurations: slices on their own, planned, prepared and trained on as by nnU-Net."""

import json

import numpy as np
import pytest
from nnunet_raw import Reference, config

from bhsd_jax.infer import tiles
from bhsd_jax.metrics import scores
from bhsd_jax.nnunet import planner
from bhsd_jax.platform import step_log
from bhsd_jax.shards import store
from bhsd_jax.verbs import evaluate, predict, preprocess, train
from bhsd_jax.volume import Plan


@pytest.fixture(scope="module")
def reference(request):
    return Reference.load(request.path.parents[1] / "golden", "two_channels")


def test_the_plan_and_the_voxels_are_nnunets(reference, tmp_path):
    root = reference.write(tmp_path / "raw")
    (tmp_path / "plans.json").write_text(json.dumps(reference.plans))
    preprocess.run(config(root, tmp_path / "plans.json", "2d"), tmp_path / "run")
    found = store.Shards(tmp_path / "run" / "shards")
    network, spacing, transpose = planner.from_nnunet_plans(reference.plans, "2d")
    assert network.patch == (1, *reference.plans["configurations"]["2d"]["patch_size"])
    assert {stride[0] for stride in network.strides} == {1}
    assert {kernel[0] for kernel in network.kernels} == {1}
    assert (found.plan.network, found.plan.spacing_mm) == (network, spacing)
    assert found.plan.planar
    case = found.load("c0")
    want = reference.trained_on("c0", "2d")
    assert np.abs(case.image - want).max() < 1e-5
    assert (case.label == np.maximum(reference.arrays["c0_2d_seg"][0], 0)).all()
    own_mm = reference.arrays["c0_spacing"][0]
    assert case.grid.spacing_mm[0] == pytest.approx(own_mm, rel=1e-6), "the scan's own"

    own = config(root)
    own.preprocess.configuration = "2d"
    preprocess.run(own, tmp_path / "own")
    plan = Plan.load(tmp_path / "own" / "shards")
    assert (plan.network, plan.spacing_mm, plan.transpose) == (network, spacing, transpose)
    assert plan.median_shape[1:] == (22, 24)
    own.preprocess.configuration = "3d_cascade_fullres"
    with pytest.raises(ValueError, match="second stage of a 3D cascade; name folders or runs"):
        preprocess.run(own, tmp_path / "cascade")


def test_slices_are_tiles_of_their_own():
    assert tiles.starts((5, 20, 20), (1, 16, 16), 0.5)[0] == (0, 1, 2, 3, 4)
    weights = tiles.gaussian((1, 16, 16))
    flat = tiles.gaussian((16, 16))
    np.testing.assert_allclose(weights[0], flat)


def test_another_patch_has_the_planners_topology():
    given = planner.topology((5.0, 1.0, 1.0), (1, 64, 32), batch=4, planar=True)
    assert given.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    assert planner.for_patch(given, (1, 32, 32), (5.0, 1.0, 1.0)).kernels == ((1, 3, 3),) * 4
    with pytest.raises(ValueError, match="patches of one slice"):
        planner.for_patch(given, (2, 32, 32), (5.0, 1.0, 1.0))


def test_regions_of_two_channels_go_through_all_verbs(golden, tmp_path, plain_compilation):
    """Slices of a small network; what it has learned in three steps is scored, not judged."""
    reference = Reference.load(golden, "regions")
    made = config(reference.write(tmp_path / "raw"))
    made.preprocess.configuration = "2d"
    made.split.fold = -1
    made.model.features = (4, 6, 8)
    made.input.update(labeled=2, threads=1)
    made.train.update(steps=3, log_every=1, validate_every=3, save_every=3)
    made.infer.update(step=1.0, mirror=False)
    made.evaluate.update(bootstrap=10)
    run = tmp_path / "run"
    (tmp_path / "raw" / "splits_final.json").write_text(
        json.dumps([{"train": ["c0", "c1"], "val": ["c2"]}])
    )
    made.split.fold = 0
    for verb in (preprocess, train):
        verb.run(made, run)
    lines = step_log.read(run / "metrics.jsonl")
    known = {key for line in lines for key in line}
    assert {f"val/dice/{name}" for name in ("whole", "core", "active")} <= known
    made.predict.update(split="val", checkpoint="last")
    for verb in (predict, evaluate):
        verb.run(made, run)
    rows = scores.read_csv(run / "cases.csv")
    assert [(row.case, row.name) for row in rows] == [
        ("c2", "whole"),
        ("c2", "core"),
        ("c2", "active"),
    ]
    label = reference.arrays["c2_label"]
    assert [row.voxels_ref for row in rows] == [np.count_nonzero(label >= v) for v in (1, 2, 3)]
    facts = json.loads((run / "predictions" / "predictions.json").read_text())
    assert facts["classes"] == ["background", "whole", "core", "active"]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
