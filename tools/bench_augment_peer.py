"""nnU-Net's side of `bench_augment.py`, which starts it; needs torch and nnunetv2."""

import functools
import os
import sys

import bench_pair
import numpy as np
import torch
from bench_augment import parse, patches
from bench_networks import PRESETS
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def main() -> None:
    """Serves as the peer."""
    args = parse(sys.argv[1:])
    torch.set_num_threads(args.threads)
    bench_pair.serve(functools.partial(setup, args), lambda: None)


def setup(args) -> tuple[dict, bench_pair.Jobs]:
    """Builds the trainer's pipeline for the preset."""
    preset = PRESETS[args.preset]
    flat = max(preset.patch) / preset.patch[0] > 3
    turn = np.pi if flat else np.pi / 6
    size = get_patch_size(preset.patch, turn, turn, turn, (0.85, 1.25))
    size[0] = preset.patch[0] if flat else size[0]
    transform = nnUNetTrainer.get_training_transforms(
        preset.patch, (-turn, turn), None, (0, 1, 2), flat, use_mask_for_norm=[False]
    )
    image, label = patches(args.batch or preset.batch, size, preset.classes)
    image = torch.from_numpy(image)[:, None]
    label = torch.from_numpy(label.astype(np.int16))[:, None]

    def run() -> None:
        for _ in range(args.draws):
            for patch, classes in zip(image, label, strict=True):
                transform(image=patch.clone(), segmentation=classes.clone())

    run()
    return {"device": f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores"}, {
        "augment": run
    }


if __name__ == "__main__":
    main()
