"""Runs by their folders, and several of them as one predictor: folds, or other trainings alike."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import predictor
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Infer, Settings

_PREPARATION = (  # fields of a plan that decide what a network is given of a scan
    *("classes", "modality", "spacing_mm", "transpose", "axes", "crop_hu"),
    *("normalize_first", "use_mask_for_norm", "repaired", "law"),
    *("channels", "regions", "region_order", "ignore", "planar", "previous_stage"),
)


def run_of(folder: str | Path, *, infer: Infer | None = None, **predict: Any) -> Run:
    """The run in a folder, with the config it was trained with.

    Args:
        folder: Of the run.
        infer: How volumes are predicted; None: as its config says.
        predict: Fields of `settings.Predict` to change.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If its config or plan is damaged.
    """
    from_run: Any = importlib.import_module("bhsd_jax.configs.from_run")
    config = Settings.of(from_run.get_config(str(folder)))
    changed = dataclasses.replace(config.predict, **predict)
    config = dataclasses.replace(config, predict=changed, infer=infer or config.infer)
    return Run.of(config, Path(folder))


def open_runs(run: Run, more: Sequence[str | Path] = ()) -> tuple[Predictor, tuple[Member, ...]]:
    """The predictor of a run, together with those of other folders.

    All networks count alike. The first run says how volumes are predicted.

    Raises:
        FileNotFoundError: If a run has no checkpoint, or a folder is not one of a run.
        ValueError: If a checkpoint is not of its config, or scans are prepared for a run in
            another way than for the first.
    """
    first, member = _open(run)
    opened = [(first, member)]
    for folder in more:
        # Its own networks of its own best checkpoint: steps of different runs are not alike.
        chosen = run.config.predict.checkpoint
        which = chosen if chosen in ("best", "last") else "best"
        other = run_of(folder, infer=run.config.infer, checkpoint=which)
        _require_alike(run, other)
        opened.append(_open(other))
    together = dataclasses.replace(first, others=tuple(one for one, _ in opened[1:]))
    return together, tuple(member for _, member in opened)


def _open(run: Run) -> tuple[Predictor, Member]:
    step, networks = predictor.load(run)
    made = predictor.make_predictor(run, list(networks.values()))
    return made, Member(run.folder, step, tuple(networks))


def _require_alike(first: Run, other: Run) -> None:
    fields = (*_PREPARATION, *(("foreground",) if first.plan.normalize_first else ()))
    pairs = [(name, getattr(first.plan, name), getattr(other.plan, name)) for name in fields]
    pairs.append(("classes", first.classes, other.classes))
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"{other.folder}: {name} of its plan is {theirs}, that of {first.folder} {ours}; "
                "only runs whose scans are prepared alike can be averaged"
            )
