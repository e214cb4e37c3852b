"""Small generated data sets and what nnunetv2 2.8.1 made of them, run as a program.

`tests/golden/nnunet_<name>.npz` holds the scans ([C D H W], labels, spacings) and nnU-Net's
prepared arrays of one case, the JSON beside it dataset.json, plans.json and the fingerprint.
Prepared labels have -1 where all channels are 0.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bhsd_jax.configs import common
from bhsd_jax.ct import nifti
from bhsd_jax.volume import Volume


@dataclass(frozen=True)
class Reference:
    """One data set, raw and as nnU-Net has it."""

    arrays: dict = field(repr=False)
    dataset: dict
    plans: dict
    fingerprint: dict

    @classmethod
    def load(cls, golden: Path, name: str) -> "Reference":
        with np.load(golden / f"nnunet_{name}.npz") as stored:
            arrays = dict(stored)
        known = json.loads((golden / f"nnunet_{name}.json").read_text())
        return cls(arrays, known["dataset"], known["plans"], known["fingerprint"])

    @property
    def cases(self):
        return sorted(name.removesuffix("_label") for name in self.arrays if "_label" in name)

    def trained_on(self, case, configuration="3d_fullres"):
        """The prepared case [D H W C] as its patches show it: 0 outside the mask of the z-scores.

        nnU-Net's augmentation ends with that (`MaskImageTransform`), its files do not have it.
        """
        want = np.moveaxis(self.arrays[f"{case}_{configuration}"], 0, -1).copy()
        outside = self.arrays[f"{case}_{configuration}_seg"][0] < 0
        masked = self.plans["configurations"][configuration]["use_mask_for_norm"]
        for index in np.flatnonzero(masked):
            want[outside, index] = 0
        return want

    def affine(self, case):
        """As SimpleITK writes it: axes z, y, x run to S, P, L."""
        d, h, w = self.arrays[f"{case}_spacing"]
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = d, -h, -w, 1
        return affine

    def write(self, folder: Path, *, four_axes: bool = False) -> Path:
        """The raw data set as NIfTI files, as nnU-Net has read it."""
        for case in self.cases:
            for number, voxels in enumerate(self.arrays[f"{case}_image"]):
                name = f"{case}_{number:04d}.nii.gz"
                image = Volume(voxels, self.affine(case), case)
                nifti.write_volume(folder / "imagesTr" / name, image)
            label = Volume(self.arrays[f"{case}_label"], self.affine(case), case)
            nifti.write_volume(folder / "labelsTr" / f"{case}.nii.gz", label)
        (folder / "dataset.json").write_text(json.dumps(self.dataset))
        return folder


def config(root: Path, plans: Path | None = None, configuration: str = "3d_fullres"):
    """Settings that prepare such a data set, by nnU-Net's plan if one is given."""
    made = common.get_config("data=msd")
    made.data.root = str(root)
    made.preprocess.processes = 1
    if plans is not None:
        made.preprocess.update(plan=str(plans), configuration=configuration)
    return made
