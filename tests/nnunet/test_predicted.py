"""Predictions of nnU-Net's own predictor, of small networks that its trainer has trained.

Its sums are float16, ours float32: labels may differ where two answers are almost equal.
"""

import json

import numpy as np
import pytest
from nnunet_raw import Reference, config

from bhsd_jax.assemble import deployed, devices
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import nifti
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.verbs import import_weights
from bhsd_jax.volume import Case

RAW = {name: name for name in ("two_channels", "regions", "ignore")} | {"planar": "two_channels"}


@pytest.mark.parametrize("name", RAW)
def test_labels_and_probabilities_are_nnunets(golden, tmp_path, name):
    reference = Reference.load(golden, RAW[name])
    root = reference.write(tmp_path / "raw")
    with np.load(golden / f"model_{name}.npz") as stored:
        arrays = dict(stored)
    known = json.loads((golden / f"model_{name}.json").read_text())
    state = {k.removeprefix("trained/"): v for k, v in arrays.items() if k.startswith("trained/")}
    given = {k: known[key] for k, key in (("plans", "plans"), ("dataset_json", "dataset"))}
    given["configuration"] = known["configuration"]
    axes = (0, 1) if known["configuration"] == "2d" else (0, 1, 2)
    beside = {"init_args": given, "inference_allowed_mirroring_axes": axes}
    weights = import_weights.WeightsFile(state, beside)
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(b"stands for the digest")
    source = import_weights.from_nnunet(weights, path)
    made = config(root)
    made.predict.probabilities = True
    import_weights.write_run(made, source, {"network": state}, tmp_path / "run")
    run = Run.of(made, tmp_path / "run", source.plan)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    run = Run.of(saved | {"predict": saved["predict"] | {"probabilities": True}}, run.folder)
    _, networks = deployed.load(run)
    predict = devices.make_predictor(run, list(networks.values()))
    everywhere = sum(np.count_nonzero(arrays[f"c{n}_predicted"]) for n in range(3))
    assert everywhere > 100, "the reference predicts something"
    for case in MSD(root).cases():
        target = tmp_path / "out" / f"{case.id}.nii.gz"
        row = predict(Case(case.id, case.id, case.image, None, "test"), target, case.id)
        found, want = nifti.read(target).voxels, arrays[f"{case.id}_predicted"]
        differ = found != want
        assert differ.sum() <= 5, f"{differ.sum()} of {differ.size}"
        assert row.total_ml == pytest.approx(
            np.count_nonzero(found) * np.prod(reference.arrays[f"{case.id}_spacing"]) / 1000
        )
        if case.id == "c0":
            with np.load(tmp_path / "out" / "c0_probabilities.npz") as stored:
                chances = stored["probabilities"].astype(np.float32)
            assert np.abs(chances - arrays["c0_probabilities"]).max() < 0.02
