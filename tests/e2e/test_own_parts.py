"""Each recipe of the README's "Adding to it", followed word for word in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BACKBONE = """
import flax.linen as nn


class Shallow(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, image, *, train):
        features = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(image))
        return (nn.Conv(self.num_classes, (1, 1, 1))(features),)
"""
OBJECTIVE = """
from dataclasses import dataclass

from bhsd_jax.objectives.common import SingleModel


@dataclass(frozen=True)
class Doubled(SingleModel):
    uses_unlabeled = False
    factor: float = 2.0

    def loss(self, learner, batch, key):
        logits = learner.forward(learner.params, batch.image, key)
        once = learner.segmentation(logits, batch.label)
        return self.factor * once, {"once": once, "darkest": batch.image.min()}
"""
AUGMENTATION = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Darker:
    by: float = 1000.0

    def __call__(self, key, image):
        return image - self.by
"""
DATA_SET = """
from pathlib import Path

from bhsd_jax.volume import Case


class Cohort:
    name = "cohort"
    classes = ("background", "bleed")
    modality = "ct"
    license = "none"

    def __init__(self, root):
        self.root = Path(root)

    def cases(self):
        for mask in sorted(self.root.glob("*_mask.nii")):
            id = mask.name.removesuffix("_mask.nii")
            yield Case(id, id, self.root / f"{id}_ct.nii", mask, "train")
"""
FILES = {
    "models/shallow.py": BACKBONE,
    "objectives/doubled.py": OBJECTIVE,
    "augment/darker.py": AUGMENTATION,
    "datasets/cohort.py": DATA_SET,
}
CONFIG = "--config=supervised:smoke,backbone=shallow.Shallow,data=cohort.Cohort"
WORDS = (
    CONFIG,
    "--objective.name=doubled.Doubled",
    "--augment.intensity=({'name': 'darker.Darker', 'by': 500.0},)",
    "--data.root=scans",
    "--preprocess.processes=1",
)


def bhsd(folder, *words):
    """The program of the copy, in a process of its own."""
    paths = {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "bhsd_jax.main", *words],
        cwd=folder,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with a file more in four of its folders, and five prepared scans."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("bhsd_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name, text in FILES.items():
        (folder / "bhsd_jax" / name).write_text(text)
    (folder / "scans").mkdir()
    place = np.mgrid[:40, :40, :16]
    affine = np.diag([-4.0, -4.0, 8.0, 1.0])
    noise = np.random.default_rng(0)
    for number in range(5):
        far = np.sqrt((((place.T - (20, 20, 8)) / (18, 18, 9)) ** 2).sum(-1)).T
        head = np.where(far < 0.9, 30, np.where(far < 1, 900, -1000))
        bleed = ((place.T - (15 + number, 20, 8)) ** 2 * (1, 1, 4)).sum(-1).T < 16
        hu = np.where(bleed, 70, head) + noise.integers(-5, 6, head.shape)
        for kind, values in (("ct", hu.astype(np.int16)), ("mask", bleed.astype(np.uint8))):
            image = nib.nifti1.Nifti1Image(values, affine)
            nib.save(image, folder / "scans" / f"case{number}_{kind}.nii")  # pyright: ignore
    done = bhsd(folder, "preprocess", "run", *WORDS)
    assert done.returncode == 0, done.stderr
    return folder


def recipes():
    """Rows of the README's table: what is added, the file to write, the words that name it."""
    text = (ROOT / "README.md").read_text().partition("## Adding to it")[2]
    return re.findall(r"^\| an? (.*?) \| (.*?) \| `(.*?)` \|$", text, re.MULTILINE)


def test_these_files_and_words_are_those_of_the_readme():
    rows = recipes()
    assert [what for what, _, _ in rows] == ["backbone", "objective", "augmentation", "data set"]
    for (_, where, words), name in zip(rows, FILES, strict=True):
        assert f"`bhsd_jax/{name.partition('/')[0]}/" in where
        asked = words.replace("<name>.<Class>", "")
        assert any(asked in word for word in WORDS), words


def test_a_network_an_objective_an_augmentation_and_a_data_set_of_ones_own_train(copy):
    done = bhsd(copy, "train", "run", *WORDS)
    assert done.returncode == 0, done.stderr
    assert "trained 4 steps" in done.stderr
    log = (copy / "run" / "metrics.jsonl").read_text()
    (first, *_) = [line for line in log.splitlines() if "train/once" in line]
    found = json.loads(first)
    assert found["train/loss"] == pytest.approx(2 * found["train/once"], rel=1e-4)
    assert found["train/darkest"] < -499


@pytest.mark.parametrize(
    ("name", "line", "verb", "words", "said"),
    [
        ("objectives/bare.py", "class Bare:\n    def loss(self): ...", "train",
         "--objective.name=bare.Bare", "bare.Bare: no twins, uses_unlabeled, ema_decay, ema_t0"),
        ("datasets/bare.py", "class Bare:\n    classes = ()\n    def __init__(self, root): ...",
         "preprocess", "--data.name=bare.Bare", "bare.Bare: no name, modality, license, cases; it"),
    ],
)  # fmt: skip
def test_what_lacks_a_part_is_told_which(copy, name, line, verb, words, said):
    (copy / "bhsd_jax" / name).write_text(line)
    done = bhsd(copy, verb, "run", *WORDS, words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "defect of bhsd_jax" not in done.stderr
