"""A run as the folder of a model that nnU-Net v2 predicts with.

Source: nnU-Net v2.8.1, `nnUNetTrainer.save_checkpoint`,
`nnUNetPredictor.initialize_from_trained_model_folder`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.assemble import deployed, wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.nnunet import model_folder
from bhsd_jax.nnunet.model_folder import PLANS_NAME, TRAINER
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.page import notice
from bhsd_jax.settings import Config
from bhsd_jax.torch_weights import exporting, nnunet, weights_file
from bhsd_jax.verbs import import_weights
from bhsd_jax.volume import Plan

_FINAL = import_weights.CHECKPOINTS[0]


@dataclass(frozen=True, eq=False)
class Model:
    """All that nnU-Net reads of a model, by the names it has there."""

    name: str  # of the folder
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    folds: Mapping[str, Mapping[str, np.ndarray]]  # weights by PyTorch name
    mirror_axes: tuple[int, ...] | None  # among those of a patch
    stored: str  # how scans must be stored, as "LPS"; "": as they are

    @property
    def configuration(self) -> str:
        return next(iter(self.plans["configurations"]))


def folder(config: Config, workdir: Path, out: Path, *, nearly: bool = False) -> tuple[Path, str]:
    """Writes plans.json, dataset.json and a fold, or several that are averaged, into `out`.

    A further fold joins a model of the same plans and labels. What is there is never replaced.

    Args:
        config: Of the run.
        workdir: Of the run.
        out: Folder of a data set among nnU-Net's results, such as `nnUNet_results/Dataset004_Head`.
        nearly: Also where nnU-Net prepares scans otherwise, and so labels some voxels otherwise.

    Returns:
        The folder of the model, and what its user must know: the command, and how to store scans.

    Raises:
        FileNotFoundError: If there is no plan or checkpoint.
        ValueError: If nnU-Net has no such network, prepares scans otherwise (unless `nearly`), or
            another model or the fold is there; or if PyTorch is not installed.
    """
    torch: Any = weights_file.library("torch", out)
    run = Run.of(config, workdir)
    model = described(run, nearly=nearly)
    place = out / model.name
    _require_free(place, model)
    for name, value in (("plans", model.plans), ("dataset", model.dataset)):
        files.write_json(place / f"{name}.json", value)
    for name, state in model.folds.items():
        data = io.BytesIO()
        torch.save(_checkpoint(model, name, _tensors(torch, state)), data)
        files.write_bytes(place / name / _FINAL, data.getvalue())
    return place, _told(model, place, run.config.infer.step)


def described(run: Run, *, nearly: bool = False) -> Model:
    """What the folder of a run's model holds.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If nnU-Net has no such network, or prepares scans otherwise (unless `nearly`).
    """
    plan, network = run.plan, wiring.model(run)
    reference, constructor = nnunet.constructor_of(network, run.network_input.channels)
    _require_possible(run)
    odd = [] if nearly else _differences(run)
    if odd:
        raise UserError(
            f"{run.folder}: nnU-Net would label some voxels otherwise, for it prepares scans in "
            f"another way: {'; '.join(odd)}; train with those settings for the same labels, or add "
            "--nearly to export this run as it is"
        )
    _, networks = deployed.load(run)
    folds = {
        name: _as_planned(plan, exporting.dump(reference, constructor, variables))
        for name, variables in zip(_names(run, networks), networks.values(), strict=True)
    }
    configuration = model_folder.configuration_of(plan, run.config.preprocess.configuration)
    plans = model_folder.plans(
        plan,
        (reference, constructor),
        patch=run.patch,
        foreground=_foreground(run),
        configuration=configuration,
    )
    first = 1 if plan.planar else 0  # of a 2D network's axes among ours
    axes = tuple(axis - first for axis in wiring.mirror_axes(run) if axis >= first)
    return Model(
        name=f"{TRAINER}__{PLANS_NAME}__{configuration}",
        plans=_plain(plans),
        dataset=_plain(model_folder.dataset(plan, run.labels, notice(run.labels.names))),
        folds=folds,
        mirror_axes=axes or None,  # nnU-Net asks an empty list for its largest entry
        stored=model_folder.reading(plan)[2],
    )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it, so that file and checkpoint say the same."""
    return json.loads(json.dumps(value))


def _require_possible(run: Run) -> None:
    """Refuses what no plan of nnU-Net says.

    Raises:
        UserError: Names the setting.
    """
    config, plan = run.config, run.plan
    wrong = ""
    if run.normalization.channels != plan.scan_channels:
        channels = run.normalization.channels
        wrong = f"config.windows makes {channels} channels of one scan, and nnU-Net one of each"
    elif config.infer.law != "nnunet" or plan.law != Plan.law:
        wrong = f"its tiles or voxels lie by another law (infer.law={config.infer.law})"
    if wrong:
        raise UserError(f"{run.folder}: cannot become a model of nnU-Net: {wrong}")


def _differences(run: Run) -> list[str]:
    """Settings by which scans are prepared otherwise than by nnU-Net, and which it has instead."""
    plan, pad = run.plan, run.config.input.pad
    found = []
    if plan.crop_hu is not None:
        found.append(f"preprocess.crop_hu is {plan.crop_hu:g}, not None (to non-zero voxels)")
    if not plan.normalized_before:
        found.append("preprocess.first is resample, not normalize")
    if any(abs(value) > 1e-6 for value in run.network_input.fill(pad)):
        found.append(f"input.pad is {pad}, not nnunet")
    return found


def _foreground(run: Run) -> Sequence[float]:
    """Clip from, subtract, divide by, clip to: of the plan, or of one window."""
    if run.config.windows == "plan":
        return run.plan.foreground
    window = run.normalization
    return window.low[0], window.shift[0], window.scale[0], window.high[0]


def _names(run: Run, networks: Mapping[str, Any]) -> list[str]:
    """Of the folds: those that were imported keep theirs.

    Raises:
        UserError: If several are averaged by their probabilities.
    """
    known = all(import_weights.FOLD.fullmatch(name) for name in networks)
    if len(networks) == 1:
        fold = run.config.split.fold
        return list(networks) if known else [f"fold_{'all' if fold < 0 else fold}"]
    if run.config.predict.combine != "logits":
        raise UserError(
            f"{run.folder}: predicts with the mean probabilities of {', '.join(networks)}, and "
            "nnU-Net with mean logits; name one with --network"
        )
    return list(networks) if known else [f"fold_{number}" for number in range(len(networks))]


def _as_planned(plan: Plan, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kernels without the axis across slices where the network is 2D; shared tensors stay so."""
    if not plan.planar:
        return dict(state)
    flat = {id(value): value[:, :, 0] for value in state.values() if value.ndim == 5}
    return {name: flat.get(id(value), value) for name, value in state.items()}


def _tensors(torch: Any, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """As tensors: what lies there under several names is one, and takes its place once."""
    made: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in made:
            made[id(value)] = torch.tensor(np.ascontiguousarray(value))
    return {name: made[id(value)] for name, value in state.items()}


def _checkpoint(model: Model, fold: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    number = fold.removeprefix("fold_")
    return {
        "network_weights": dict(tensors),
        "init_args": {
            "plans": model.plans,
            "configuration": model.configuration,
            "fold": int(number) if number.isdecimal() else number,
            "dataset_json": model.dataset,
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": model.mirror_axes,
    }


def _require_free(place: Path, model: Model) -> None:
    """Refuses a place that holds another model, or a fold that would be replaced.

    Raises:
        UserError: Says what is there.
    """
    for name, value in (("plans", model.plans), ("dataset", model.dataset)):
        file = place / f"{name}.json"
        if file.is_file() and weights_file.json_of(str(file)) != value:
            raise UserError(f"{file}: is of another model; choose another folder")
    there = [name for name in model.folds if (place / name).exists()]
    if there:
        raise UserError(
            f"{place / there[0]}: is there already; remove it, or choose another folder"
        )


def _told(model: Model, place: Path, step: float) -> str:
    numbers = " ".join(name.removeprefix("fold_") for name in model.folds)
    command = f"nnUNetv2_predict_from_modelfolder -i SCANS -o LABELS -m {place} -f {numbers}"
    command += f" -step_size {step:g}" if step != 0.5 else ""
    lines = [command, "Scans are called CASE_0000.nii.gz; further channels CASE_0001.nii.gz, ..."]
    if model.stored:
        lines.append(
            f"nnU-Net takes axes as they lie: store scans as {model.stored}, for example with "
            f'SimpleITK.DICOMOrient(scan, "{model.stored}")'
        )
    return "\n".join(lines)
