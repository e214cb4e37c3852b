#!/usr/bin/env bash
# nnU-Net's networks see another background in prediction than in training, where scans are masked.
#
# Skull-stripped MR gets z-scores of its non-zero voxels; all others are set to 0. Resampling, by
# cubic splines, then spreads the edge of the brain over them. In training the augmentation ends with
# MaskImageTransform, which puts exactly 0 back wherever the segmentation is -1, into every patch.
# Prediction has no such step: of the same prepared scan not one voxel there is 0, and the values
# reach 1.8 standard deviations at the edge, so that the network is given what it has never seen. It
# happens only where scans are resampled, which the data sets that are usually shown (BraTS, at 1 mm
# all of them) are not.
#
# It matters to whoever compares a validation inside training, on masked patches, with nnU-Net's
# predictions, or trains elsewhere on its prepared files without that last step. Seen with nnunetv2
# 2.8.1, batchgeneratorsv2 0.3.6 and torch 2.15.0.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nnunetv2==2.8.1 batchgeneratorsv2==0.3.6 torch==2.15.0
cat > "$folder/program.py" <<'PROGRAM'
import sys
import warnings

import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

warnings.simplefilter("ignore")
data = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
settings = {
    "preprocessor_name": "DefaultPreprocessor",
    "architecture": {},
    "spacing": [0.8, 0.8, 0.8],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [True],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": data,
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {**data, "is_seg": True, "order": 1},
}
plans = PlansManager({
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {"3d_fullres": settings},
    "foreground_intensity_properties_per_channel": {"0": {}},
    "label_manager": "LabelManager",
})
about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "tumor": 1}}
planes = [np.linspace(-1, 1, size) for size in (24, 40, 40)]
distance = sum(axis**2 for axis in np.meshgrid(*planes, indexing="ij"))
random = np.random.default_rng(0)
scan = np.where(distance < 0.5, random.normal(500, 80, distance.shape), 0).astype(np.float32)
scan[0, 0, 0] = scan[-1, -1, -1] = 400  # nnU-Net's crop then takes the whole scan
tumor = (distance < 0.05).astype(np.int8)
image, segmentation, _ = DefaultPreprocessor(verbose=False).run_case_npy(
    scan[None], tumor[None], {"spacing": [1.0, 1.0, 1.0]}, plans,
    plans.get_configuration("3d_fullres"), about,
)
outside = segmentation[0] < 0
predicted = image[0][outside]
augment = nnUNetTrainer.get_training_transforms(
    image.shape[1:], (0, 0), None, None, False, use_mask_for_norm=[True], foreground_labels=[1]
)
torch.manual_seed(0)
np.random.seed(0)
zero = []
for _ in range(5):
    patch = augment(
        image=torch.from_numpy(image).float(),
        segmentation=torch.from_numpy(segmentation).to(torch.int16),
    )
    zero.append(float((patch["image"][0].numpy()[outside] == 0).mean()))
share, most = float((predicted == 0).mean()), float(np.abs(predicted).max())
print(f"{outside.mean():.0%} of the voxels lie outside the mask; exactly 0 among them are")
print(f"  in training, five patches: {', '.join(f'{one:.1%}' for one in zero)}")
print(f"  in prediction: {share:.1%}; they reach {most:.2f} standard deviations")
sys.exit(0 if zero == [1.0] * 5 and share == 0 and most > 1 else 1)
PROGRAM
status=0
"$folder/venv/bin/python" "$folder/program.py" || status=1
[ "$status" = 0 ] && echo "as before" || echo "the behavior has changed"
exit "$status"
