"""Weights trained with PyTorch to a run folder that `predict` accepts."""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.nnunet import trained
from bhsd_jax.objectives.ensemble import Ensemble
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Config, Infer, Settings
from bhsd_jax.torch_weights import bundle, importing, weights_file
from bhsd_jax.torch_weights.recipe import recipe_of
from bhsd_jax.torch_weights.weights_file import WeightsFile
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.volume import Millimeters, Network, Plan, Shape

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.json"  # what the network is in PyTorch; `tools/export.py` reads it
FOLD = re.compile(r"fold_(\d+|all)")  # nnU-Net's folders in that of a model
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
_FIXED_SIZE = ("img_size", "crop_size")  # constructor arguments that say the patch
_NOT_IN_A_CONFIG = ("parent", "name", "num_classes", "dtype", "remat")


@dataclass(frozen=True, eq=False)
class Source:
    """A network trained with PyTorch: constructor, plan, mirroring, padding, windows."""

    reference: str  # see `torch_weights.recipe`
    constructor: Mapping[str, Any]
    plan: Plan
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    pad: str = "nnunet"  # see `windows.Normalization.pad_value`
    windows: Any = "plan"  # see `config.windows`
    law: str = "nnunet"  # see `config.infer.law`
    combine: str = "probabilities"  # see `config.predict.combine`
    configuration: str = "3d_fullres"  # see `config.preprocess.configuration`


def find(path: Path) -> Path:
    """The file itself; of nnU-Net's folder of a fold the final, best or latest checkpoint.

    Of a bundle of MONAI's its weights.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not path.is_dir():
        return path
    names = (*CHECKPOINTS, bundle.WEIGHTS, bundle.WEIGHTS.name)
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        require_no_v1(path)
        models = sorted({fold.parent for fold in path.glob("**/fold_*") if fold.is_dir()} - {path})
        hint = f"; models are in {', '.join(map(str, models[:4]))}: name one" if models else ""
        raise FileNotFoundError(f"{path}: none of {', '.join(CHECKPOINTS)} in this folder{hint}")
    return found[0]


def require_no_v1(path: Path) -> None:
    """Refuses networks of the first nnU-Net by that name, wherever below a folder they lie.

    Raises:
        UserError: If one is there.
    """
    found = [path] if path.is_file() else sorted(path.glob("**/*.model"))
    first = next((one for one in found if one.with_name(f"{one.name}.pkl").is_file()), None)
    if first is not None:
        raise UserError(
            f"{first}: a network of nnU-Net v1, which is not imported; its data set is read as it "
            "is, with data=msd, to train one here"
        )


def is_nnunet(weights: WeightsFile) -> bool:
    """Whether nnU-Net v2's trainer wrote the file."""
    return "network_weights" in weights.beside and "init_args" in weights.beside


def from_nnunet(weights: WeightsFile, path: Path) -> Source:
    """Network, plan and mirrored axes of a checkpoint of nnU-Net v2.

    Of a fold in the folder of a model, plans.json and dataset.json of that folder count, as in
    nnU-Net, whatever the checkpoint was trained with. What a file alone does not say is looked for
    beside it, or one folder up.

    Source: nnU-Net v2.8.1, `nnUNetPredictor.initialize_from_trained_model_folder`.

    Raises:
        ValueError: If something is missing or not supported.
    """
    given = weights.beside["init_args"]
    plans, dataset = (
        _described(path, file, given.get(key))
        for key, file in (("plans", "plans.json"), ("dataset_json", "dataset.json"))
    )
    configuration = given.get("configuration", "3d_fullres")
    plan = trained.plan_of(plans, dataset, configuration, digest(path))
    trainer = str(weights.beside.get("trainer_name", ""))
    reference, constructor = trained.network_of(plans, dataset, configuration, trainer)
    named = "BatchNorm" in str(constructor.get("norm_op")) and "TrainerBN" not in trainer
    if not named and any(name.endswith(".norm.running_var") for name in weights.state):
        # nnUNetTrainerBN puts batch norms in the place of those that its plans name.
        constructor |= {"norm_op": "BatchNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    axes = weights.beside.get("inference_allowed_mirroring_axes")
    first = 1 if plan.planar else 0  # of a 2D network's axes among ours
    return Source(
        reference,
        constructor,
        plan,
        tuple(first + int(axis) for axis in axes or ()),
        configuration=configuration,
    )


def require_named_network(source: Source, weights: WeightsFile, path: Path) -> None:
    """Refuses weights of a network that a trainer has built of its own, whatever the plans say.

    Raises:
        ValueError: In one line, with the trainer's name.
    """
    recipe = recipe_of(source.reference, source.constructor)
    canonical = [recipe.canonical(name) for name in importing.unwrapped(weights.state)]
    unknown = [n for n in canonical if n not in recipe.weights and not recipe.unused(n)]
    if not unknown:
        return
    trainer = weights.beside.get("trainer_name", "its trainer")
    kind = f"another one, with {unknown[0]}"
    raise UserError(
        f"{path}: {trainer} has built {kind} instead of the {source.reference} that the plans "
        "name; such networks are not supported"
    )


def plan_for(
    constructor: Mapping[str, Any],
    *,
    classes: Sequence[str],
    spacing_mm: Millimeters,
    axes: str,
    foreground: tuple[float, float, float, float] | None,
    source_sha256: str,
    patch: Shape | None = None,
    crop_hu: float | None = None,
    dataset: str = "imported",
    license: str = "",
) -> Plan:
    """A plan for weights that come without one, from what the user states.

    `foreground` is clip from, subtract, divide by, clip to; None: z-scores of every scan.

    Raises:
        ValueError: If neither `patch` nor the constructor says the size of the input.
    """
    fixed = next((constructor[name] for name in _FIXED_SIZE if name in constructor), None)
    size = patch or fixed
    if size is None:
        raise UserError("the constructor says nothing of the size of its input: give a patch")
    d, h, w = (size,) * 3 if isinstance(size, int) else (int(n) for n in size)
    return Plan(
        dataset=dataset,
        classes=tuple(classes),
        modality="mr" if foreground is None else "ct",
        spacing_mm=spacing_mm,
        transpose=(0, 1, 2),
        crop_hu=crop_hu,
        foreground=foreground or (0.0, 0.0, 1.0, 0.0),
        median_shape=(d, h, w),
        # The network brings its own topology; only the patch is read.
        network=Network(
            patch=(d, h, w),
            batch=1,
            features=(),
            strides=(),
            kernels=(),
            convs_encoder=(),
            convs_decoder=(),
            batch_dice=False,
        ),
        source_sha256=source_sha256,
        license=license,
        axes=axes,
    )


def write_run(
    config: Config, source: Source, members: Mapping[str, Mapping[str, np.ndarray]], out: Path
) -> None:
    """Fills in the config and writes it with plan, weights and digests as a run of step 0.

    `members` are state dicts by name: one, or several that are averaged.

    Raises:
        ValueError: If the weights do not fit the constructor (lists all names that do not), or the
            network does not fit the plan; or if there is a run in `out`.
    """
    if (out / "checkpoints").exists():
        raise UserError(f"{out}: there is a run in this folder; choose another")
    loaded = {
        name: importing.load(source.reference, source.constructor, state)
        for name, state in members.items()
    }
    (module, variables), *others = loaded.values()
    if others:
        each = {name: found for name, (_, found) in loaded.items()}
        variables = {kind: {name: each[name][kind] for name in each} for kind in variables}
    recipe = recipe_of(source.reference, source.constructor)
    config = Settings.of(config)
    config = replace(
        config,
        name=out.name,
        model=_spec(module),
        windows=source.windows,
        preprocess=replace(config.preprocess, configuration=source.configuration),
        input=replace(config.input, patch=source.plan.network.patch, pad=source.pad),
        infer=replace(_mirrored(config.infer, source.mirror_axes), law=source.law),
    )
    if others:
        config = replace(
            config,
            objective={"name": "ensemble.Ensemble", "members": Ensemble(tuple(members)).twins},
            predict=replace(config.predict, networks=("ensemble",), combine=source.combine),
        )
    _require_fit(Run.of(config, out, source.plan), source, module, channels=recipe.image[-1])
    plain, plan = json.loads(json.dumps(config.to_dict())), source.plan.to_json()
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    save_networks(
        out / "checkpoints", variables["params"], config=plain, plan=plan, statistics=statistics
    )
    reference = {"reference": source.reference, "constructor": dict(source.constructor)}
    files.write_json(out / REFERENCE_FILE, reference)
    files.write_json(out / "plan.json", plan)
    files.write_json(out / "config.json", plain)  # last: with it the folder is a run


def _mirrored(infer: Infer, axes: tuple[int, ...]) -> Infer:
    return replace(infer, mirror=True, mirror_axes=axes) if axes else replace(infer, mirror=False)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(path: Path, name: str, trained_with: Any) -> dict[str, Any]:
    """A JSON file of the model that a checkpoint belongs to, or what the checkpoint has kept."""
    fold = path.absolute().parent  # files may be links into a cache
    current = fold.with_name(name)
    if not trained_with or not (FOLD.fullmatch(fold.name) and current.is_file()):
        return trained_with or _beside(path, name)
    found = weights_file.json_of(str(current))
    if found != trained_with:
        logger.warning("%s: is not what %s was trained with; taken, as by nnU-Net", current, path)
    return found


def _beside(path: Path, name: str) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        if (folder / name).is_file():
            return weights_file.json_of(str(folder / name))
    raise UserError(f"{path}: says nothing of {name}, and there is none beside it or one folder up")


def _spec(module: Any) -> dict[str, Any]:
    """A module as `config.model` names it."""
    name = f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
    fields = [f.name for f in dataclasses.fields(module) if f.name not in _NOT_IN_A_CONFIG]
    return {"name": name, **{field: getattr(module, field) for field in fields}}


def _require_fit(run: Run, source: Source, module: Any, *, channels: int) -> None:
    plan, patch = source.plan, source.plan.network.patch
    given = run.network_input.channels
    odd = [n for n, step in zip(patch, module.stride, strict=True) if n % step]
    wrong = []
    if plan.labels.outputs != module.num_classes:
        wrong.append(
            f"it has {module.num_classes} classes, but {plan.labels.outputs} names are given"
        )
    if given != channels:
        wrong.append(f"it takes {channels} channels, but the normalization gives {given}")
    if odd:
        wrong.append(f"the patch {patch} is no multiple of its stride {module.stride}")
    if wrong:
        raise UserError(f"{source.reference}: {'; '.join(wrong)}")
    built = wiring.model(run).clone(dtype=module.dtype, remat=module.remat)
    assert built == module, f"{built} != {module}"
