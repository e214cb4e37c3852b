"""Run folders as the verbs leave them, without training anything."""

import math

import pytest

from bhsd_jax.configs import table2
from bhsd_jax.experiments import paper_tables, queue
from bhsd_jax.metrics import summary
from bhsd_jax.metrics.scores import ClassScore, write_csv
from bhsd_jax.platform import files
from bhsd_jax.settings import Settings
from bhsd_jax.train import checkpoint_files
from bhsd_jax.verbs import evaluate

PLAN = {
    "dataset": "made up",
    "classes": ["background", "any"],
    "modality": "ct",
    "spacing_mm": [5.0, 0.5, 0.5],
    "transpose": [0, 1, 2],
    "crop_hu": -200.0,
    "foreground": [0.0, 40.0, 10.0, 90.0],
    "median_shape": [32, 512, 512],
    "network": {
        "patch": [8, 32, 32],
        "batch": 2,
        "batch_dice": False,
        "features": [8, 16],
        "strides": [[1, 1, 1], [2, 2, 2]],
        "kernels": [[3, 3, 3], [3, 3, 3]],
        "convs_encoder": [2, 2],
        "convs_decoder": [2],
    },
    "source_sha256": "",
    "license": "CC0",
}


@pytest.fixture
def plan():
    """A plan as its file holds it."""
    return dict(PLAN)


@pytest.fixture
def make(tmp_path):
    """Makes the study of a table, nothing of it run."""

    def made(*more, table=table2):
        words = [table.TABLE.name, "--smoke", "--data=synthetic", f"--out={tmp_path}", *more]
        return paper_tables.make_study(table.TABLE, paper_tables._parser().parse_args(words))

    return made


@pytest.fixture
def finish():
    """Leaves a folder as training, prediction and evaluation would."""

    def finished(run, *counts, classes=("any",)):
        """A scan per entry of `counts`, which has (tp, fp, fn) for every class."""
        last = run.workdir / "checkpoints" / str(run.config.train.steps)
        last.mkdir(parents=True)
        (last / checkpoint_files.SUMS).touch()
        files.write_json(run.workdir / "config.json", queue.plain(run.config))
        plan = PLAN | {"classes": ["background", *classes]}
        files.write_json(run.workdir / "plan.json", plan)
        rows = [
            row(f"scan{i}", name, *each)
            for i, scan in enumerate(counts)
            for name, each in zip(classes, scan, strict=True)
        ]
        merged = [
            row(f"scan{i}", "any", *(sum(c) for c in zip(*scan, strict=True)))
            for i, scan in enumerate(counts)
        ]
        write_csv(run.workdir / "cases.csv", rows)
        write_csv(run.workdir / "cases_binary.csv", merged)
        found = evaluate._summary(Settings.of(run.config), rows, merged, classes)
        files.write_json(run.workdir / "summary.json", summary.without_nan(found))

    return finished


def row(case, name, tp, fp, fn):
    rest = dict.fromkeys(ClassScore.__dataclass_fields__, 0)
    voxels = {"voxels_ref": tp + fn, "voxels_pred": tp + fp, "tp": tp, "fp": fp, "fn": fn}
    total = 2 * tp + fp + fn
    numbers = {"dice": 2 * tp / total if total else math.nan, "hd95_mm": math.nan, "nsd": math.nan}
    return ClassScore(**rest | {"case": case, "patient": case, "name": name} | voxels | numbers)
