"""nnU-Net's side of `bench_time_to_dice.py`, which starts it; needs torch and nnunetv2.

    PYTHON tools/bench_trainer_peer.py prepare STUDY
    PYTHON tools/bench_trainer_peer.py train STUDY RUN SEED [INITIAL]

The trainer is nnU-Net's own. What differs is said in `ShortTrainer`: its length, what it draws and
saves between epochs, and that it predicts the validation cases at some steps.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

STUDY = Path(sys.argv[2]).absolute()
SETUP = json.loads((STUDY / "setup.json").read_text())
SETUP |= SETUP["peer"]
NAME, CONFIGURATION = SETUP["dataset"], "3d_fullres"
os.environ |= {
    "nnUNet_raw": str(STUDY / "raw"),
    "nnUNet_preprocessed": str(STUDY / "preprocessed"),
    "nnUNet_results": str(STUDY / "results"),
    # In training, augmentation in this process, whose clock then counts all; planning refuses 0.
    "nnUNet_n_proc_DA": "0" if sys.argv[1] == "train" else "1",
    "nnUNet_def_n_proc": "1",
    "OMP_NUM_THREADS": "1",
}

import torch  # noqa: E402  (nnU-Net reads the variables when it is imported)
from nnunetv2.experiment_planning import plan_and_preprocess_api as api  # noqa: E402
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402


def main() -> None:
    """Prepares the data, or trains one network."""
    torch.set_num_threads(1)
    if sys.argv[1] == "prepare":
        prepare()
    else:
        train(Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]) if sys.argv[5:] else None)


def prepare() -> None:
    """Plans, puts the study's small network in place of the planned one, and preprocesses."""
    number = int(NAME[7:10])
    api.extract_fingerprint_dataset(number, num_processes=1, show_progress_bar=False)
    spacing = tuple(SETUP["spacing_mm"])
    api.plan_experiment_dataset(number, overwrite_target_spacing=spacing)
    path = STUDY / "preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    settings = plans["configurations"][CONFIGURATION]
    settings["patch_size"], settings["batch_size"] = SETUP["patch"], SETUP["batch"]
    features, depth = SETUP["features"], len(SETUP["features"])
    settings["architecture"]["arch_kwargs"] |= {
        "n_stages": depth,
        "features_per_stage": features,
        "kernel_sizes": [[3, 3, 3]] * depth,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (depth - 1),
        "n_conv_per_stage": [2] * depth,
        "n_conv_per_stage_decoder": [2] * (depth - 1),
    }
    path.write_text(json.dumps(plans))
    api.preprocess_dataset(number, configurations=(CONFIGURATION,), num_processes=[1])
    splits = STUDY / "raw" / NAME / "splits_final.json"
    (path.parent / splits.name).write_text(splits.read_text())


class ShortTrainer(nnUNetTrainer):
    """nnU-Net's trainer for so many steps; its figures and progress pictures are left out.

    Epochs are short, so that the learning rate falls as smoothly as over 1000 of them.
    """

    def begin(self, run: Path, initial: Path | None) -> None:
        """Sets the length, and the weights to start with if they are not to be drawn."""
        self.run, self.points = run, []
        self.num_iterations_per_epoch = SETUP["epoch"]
        self.num_val_iterations_per_epoch = 1
        self.num_epochs = SETUP["steps"] // SETUP["epoch"]
        self.save_every = 10**9
        self.initialize()
        if initial is not None:
            given = {name: torch.from_numpy(value) for name, value in np.load(initial).items()}
            self.network.load_state_dict(given, strict=True)
        weights = {name: value.numpy() for name, value in self.network.state_dict().items()}
        np.savez(run / "initial.npz", **weights)
        self.logger.local_logger.plot_progress_png = lambda *_: None
        self.spent = 0.0

    def on_train_epoch_start(self) -> None:
        """Starts the clock."""
        super().on_train_epoch_start()
        self.begun = time.process_time()

    def on_train_epoch_end(self, train_outputs: list) -> None:
        """Stops it, and keeps the mean loss."""
        self.spent += time.process_time() - self.begun
        super().on_train_epoch_end(train_outputs)
        step = (self.current_epoch + 1) * self.num_iterations_per_epoch
        loss = float(np.mean([output["loss"] for output in train_outputs]))
        self.points.append({"step": step, "loss": loss, "cpu_s": self.spent})

    def on_epoch_end(self) -> None:
        """Predicts at the steps of the curve."""
        super().on_epoch_end()
        if self.points[-1]["step"] in SETUP["curve"]:
            begun = time.process_time()
            last = self.points[-1]["step"] == SETUP["steps"]
            out = self.run / f"at_{self.points[-1]['step']}"
            predict(self, STUDY / "raw" / ("all" if last else "early"), out)
            self.points[-1]["predict_cpu_s"] = time.process_time() - begun
            (self.run / "curve.json").write_text(json.dumps(self.points))


def train(run: Path, seed: int, initial: Path | None) -> None:
    """Trains as `nnUNetv2_train` does, and predicts on the way."""
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (nnU-Net's loader draws from it)
    random.seed(seed)
    folder = STUDY / "preprocessed" / NAME
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset = json.loads((folder / "dataset.json").read_text())
    os.environ |= {"nnUNet_results": str(run)}
    trainer = ShortTrainer(plans, CONFIGURATION, 0, dataset, torch.device("cpu"))
    trainer.disable_checkpointing = True
    trainer.begin(run, initial)
    trainer.run_training()
    np.savez(run / "final.npz", **{k: v.numpy() for k, v in trainer.network.state_dict().items()})


def predict(trainer: nnUNetTrainer, folder: Path, out: Path) -> None:
    """Label maps of the validation cases from their files, nnU-Net's default way."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    out.mkdir(exist_ok=True)
    scans = sorted(folder.glob("*.nii.gz"))
    # One network, whose weights are still to be trained: the list holds a copy.
    predictor.list_of_parameters = [
        {name: value.clone() for name, value in trainer.network.state_dict().items()}
    ]
    predictor.predict_from_files_sequential(
        [[str(scan)] for scan in scans],
        [str(out / scan.name.removesuffix(".nii.gz")) for scan in scans],
    )
    trainer.set_deep_supervision_enabled(True)


if __name__ == "__main__":
    main()
