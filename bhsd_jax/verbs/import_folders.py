"""Folders of networks trained with PyTorch, as nnU-Net v2 and BLAST-CT leave them."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bhsd_jax.ct.geometry import CENTERS
from bhsd_jax.platform.errors import UserError
from bhsd_jax.torch_weights import bundle, weights_file
from bhsd_jax.verbs import import_weights
from bhsd_jax.verbs.import_weights import Source
from bhsd_jax.volume import Shape

logger = logging.getLogger(__name__)

BLAST_CT = "BLAST-CT (Monteiro et al. 2020), trained on head CT of traumatic brain injury"
_BLAST_WEIGHTS = re.compile(r"model_(\d+)\.(pt|torch_model)")
_BLAST_TILE: Shape = (60, 60, 60)  # of theirs 30: fewer voxels are computed twice, none differs
_ALL = "fold_all"  # no case was kept back from it


@dataclass(frozen=True, eq=False)
class Model:
    """A network, and the weights of its members by name."""

    source: Source
    members: Mapping[str, Mapping[str, np.ndarray]]


def folds(path: Path) -> dict[str, Path]:
    """Folders of folds by name, `fold_0` first, in nnU-Net's folder of a model; {}: it is none.

    So are they in `models` of a bundle of MONAI's that holds its networks.
    """
    found = [
        one
        for one in bundle.nnunet_models(path).glob("fold_*")
        if one.is_dir() and import_weights.FOLD.fullmatch(one.name)
    ]
    return {one.name: one for one in sorted(found, key=lambda one: (len(one.name), one.name))}


def from_nnunet(path: Path, wanted: Sequence[str] = ()) -> Model:
    """The numbered folds of nnU-Net's folder of a model, or those named; their logits are averaged.

    `fold_all` was trained on what validates the others: it is taken if named, or if there is no
    other. Of several folds that are not named those count that have been trained to their end.

    Source: nnU-Net v2.8.1, `nnUNetPredictor.auto_detect_available_folds`.

    Raises:
        FileNotFoundError: If a fold is not there, or has no checkpoint.
        ValueError: If the folds are of different networks, plans or mirrored axes, or one cannot
            be read.
    """
    found = folds(path)
    numbered = [name for name in found if name != _ALL] or list(found)
    names = [f"fold_{fold}" for fold in wanted] or _finished(path, found, numbered)
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"{path}: no {', '.join(missing)}; it has {', '.join(found)}")
    models = {name: one_of_nnunet(import_weights.find(found[name])) for name in names}
    (first, of_first), *others = models.items()
    for name, model in others:
        for what in ("reference", "constructor", "mirror_axes", "plan"):
            here, there = (_comparable(getattr(m.source, what)) for m in (of_first, model))
            if here != there:
                raise UserError(f"{path}: {first} and {name} are not of one model: other {what}")
    source = replace(of_first.source, combine="logits")
    return Model(source, {name: model.members["network"] for name, model in models.items()})


def _finished(path: Path, found: Mapping[str, Path], names: list[str]) -> list[str]:
    """Those of the folds that have a final checkpoint; all, where none has."""
    final = import_weights.CHECKPOINTS[0]
    done = [name for name in names if (found[name] / final).is_file()] or names
    left = [name for name in names if name not in done]
    if left:
        logger.warning("%s: left out, for they have no %s: %s", path, final, ", ".join(left))
    return done


def first_stage(path: Path, source: Source, wanted: Sequence[str] = ()) -> Model | None:
    """The first network of a cascade, from the folder beside that of the second; None: not there.

    Args:
        path: The second network's folder of a model, or a fold or checkpoint in it.
        source: Of the second network.
        wanted: As in `from_nnunet`.

    Raises:
        FileNotFoundError: As `from_nnunet`.
        ValueError: As `from_nnunet`.
    """
    for folder in (path, *path.resolve().parents[:2]):
        trainer, _, configuration = folder.resolve().name.rpartition("__")
        beside = folder.resolve().with_name(f"{trainer}__{source.plan.previous_stage}")
        if trainer and configuration and folds(beside):
            return from_nnunet(beside, wanted)
    return None


def one_of_nnunet(path: Path) -> Model:
    """A checkpoint of nnU-Net v2.

    Raises:
        ValueError: If it is none, or its trainer has built a network that its plans do not name.
    """
    weights = bundle.read(path)
    if not import_weights.is_nnunet(weights):
        raise UserError(f"{path}: is no checkpoint of nnU-Net v2")
    source = import_weights.from_nnunet(weights, path)
    import_weights.require_named_network(source, weights, path)
    return Model(source, {"network": weights.state})


def blast_config(path: Path) -> dict[str, Any] | None:
    """BLAST-CT's config.json in a folder or beside a file, or one folder up; None: none is."""
    folder = path if path.is_dir() else path.parent
    for place in (folder / "config.json", folder.parent / "config.json"):
        try:
            config = json.loads(place.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "DeepMedic" in (config.get("model") or {}):
            return config
    return None


def from_blast_ct(path: Path, config: Mapping[str, Any], tile: Shape | None = None) -> Model:
    """BLAST-CT's networks in a folder or its `saved_models`, or one file; probabilities averaged.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the config has what there is no counterpart for here.
    """
    data = config["data"]
    window = dict(data["transformation"])
    low, high = _bounds(window.pop("IntensityWindowNormalization", {}))
    channels = list(data.get("channels", ["image"]))
    if window or len(channels) != 1:
        raise UserError(
            f"{path}: BLAST-CT's config has what is not supported: {', '.join(window) or channels}"
        )
    files = _blast_files(path)
    arguments = dict(config["model"]["DeepMedic"])
    arguments |= {"input_channels": data["input_channels"], "num_classes": data["num_classes"]}
    x, y, z = (float(mm) for mm in data.get("resolution") or (1, 1, 1))
    plan = import_weights.plan_for(
        arguments,
        classes=("background", *data["class_names"][1:]),
        spacing_mm=(z, y, x),
        axes="SPL",
        foreground=(low, (low + high) / 2, (high - low) / 2, high),
        source_sha256=import_weights.digest(files[0]),
        patch=tile or _BLAST_TILE,
        dataset=BLAST_CT,
        license="Apache-2.0",
    )
    source = Source("DeepMedic", arguments, replace(plan, law=CENTERS), (), "air", law="adjacent")
    return Model(source, {file.stem: weights_file.read(file).state for file in files})


def _bounds(window: Mapping[str, Any]) -> tuple[float, float]:
    if set(window) - {"lower_bound", "upper_bound"} or len(window) < 2:
        raise UserError(
            f"BLAST-CT's config: IntensityWindowNormalization needs lower_bound and upper_bound, "
            f"and nothing else is supported; got {dict(window)}"
        )
    return float(window["lower_bound"]), float(window["upper_bound"])


def _blast_files(path: Path) -> list[Path]:
    """By their numbers."""
    if path.is_file():
        return [path]
    for folder in (path, path / "saved_models"):
        found = {
            int(match[1]): file
            for file in (folder.iterdir() if folder.is_dir() else ())
            if (match := _BLAST_WEIGHTS.fullmatch(file.name))
        }
        if found:
            return [found[number] for number in sorted(found)]
    raise FileNotFoundError(
        f"{path}: no weights of BLAST-CT (model_1.pt or model_1.torch_model, ...) in it or in its "
        "saved_models"
    )


def _comparable(value: Any) -> Any:
    """Plans of folds are equal but for the file that they were read from."""
    plain = value.to_json() if hasattr(value, "to_json") else value
    return (
        {**plain, "source_sha256": ""} if isinstance(plain, dict) and "network" in plain else plain
    )
