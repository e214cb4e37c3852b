"""Runs by their folders, and several of them as one predictor: folds, or other trainings alike."""

import dataclasses
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import deployed, devices, held_out, wiring
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.metrics import postprocessing
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Infer, Settings

logger = logging.getLogger(__name__)

_PREPARATION = (  # fields of a plan that decide what a network is given of a scan
    *("classes", "modality", "spacing_mm", "transpose", "axes", "crop_hu"),
    *("normalize_first", "use_mask_for_norm", "repaired", "law"),
    *("channels", "regions", "region_order", "ignore", "planar", "previous_stage"),
)

_MEANING = ("classes", "regions", "region_order")  # fields that decide what a label map says


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


def open_runs(
    run: Run,
    more: Sequence[str | Path] = (),
    *,
    apart: bool = False,
    mirror: bool | None = None,
) -> tuple[Predictor, tuple[Member, ...]]:
    """The predictor of a run, together with those of other folders.

    All networks whose scans are prepared alike count alike. With `apart` there may be several such
    groups, a 2D and a 3D network say, which count alike whatever their sizes. The first run says
    how volumes are predicted, but every network is mirrored as its own run says, unless `mirror`
    is given.

    Raises:
        FileNotFoundError: If a run has no checkpoint, or a folder is not one of a run.
        ValueError: If a checkpoint is not of its config, scans are prepared for a run in another
            way than for the first and `apart` is not set, or label maps mean something else.
    """
    first, member = _open(run)
    members, groups = [member], [(run, [first])]
    for folder in _each_once(run.folder, more):
        # A step that is chosen for the first run means nothing in another, which gives its best.
        chosen = run.config.predict.checkpoint
        which = chosen if chosen in ("best", "last") else "best"
        other = _as_first(run, run_of(folder, checkpoint=which), mirror)
        _require_alike(run, other, _MEANING if apart else _fields(run))
        alike = next((own for first, own in groups if not _unlike(first, other)), None)
        if alike is None:
            groups.append((other, alike := []))
        made, member = _open(other)
        alike.append(made)
        members.append(member)
    one, *others = (dataclasses.replace(own[0], others=tuple(own[1:])) for _, own in groups)
    return dataclasses.replace(one, apart=tuple(others)), tuple(members)


def _each_once(first: Path, more: Sequence[str | Path]) -> list[str | Path]:
    """Further folders without the first and without those that come twice: each counts alike."""
    found: dict[Path, str | Path] = {first.resolve(): first}
    for folder in more:
        found.setdefault(Path(folder).resolve(), folder)
    if len(found) <= len(more):
        logger.warning("runs that are named twice count once: these are %d", len(found))
    return list(found.values())[1:]


def seen(run: Run, more: Sequence[str | Path], cases: Sequence[str]) -> dict[str, int]:
    """Counts, by folder, the scans of a run that further runs were trained on; 0 is left out.

    That is known from their checkpoints, or from their shards where these are as they were then.
    Where they are not, are gone, or call the scans by other names, a run of the same data set and
    another fold may have been trained on all of them; of the same fold, if its checkpoints say that
    it held out others.
    """
    counts = {str(folder): _seen(run, run_of(folder), set(cases)) for folder in more}
    return {folder: count for folder, count in counts.items() if count}


def _seen(run: Run, other: Run, cases: set[str]) -> int:
    trained, shared = held_out.Trained.of(other.folder), False
    if trained is not None and trained.holds_out(cases):
        return 0
    changed = (
        trained is not None and bool(trained.roles) and held_out.is_same_place(trained, run.config)
    )
    try:
        roles, _ = other.roles
    except (FileNotFoundError, UserError):
        pass
    else:
        used = {*roles.train, *roles.unlabeled}
        shared = bool(cases & {*used, *roles.val, *roles.test})
        where = other.config, other.folder
        part = "test" if cases <= {*roles.test} else "trained"
        changed = trained is not None and bool(held_out.difference(trained, *where, roles, part))
        if shared and not changed:
            return len(cases & used)
    alike = shared or other.plan.dataset == run.plan.dataset
    differ = changed or other.config.split.fold != run.config.split.fold
    return len(cases) if alike and differ else 0


def rules(run: Run) -> tuple[postprocessing.Rule, ...]:
    """What the config has done to label maps (`predict.postprocessing`), in numbers of targets.

    Raises:
        FileNotFoundError: If it names a file that there is not.
        ValueError: If the file holds something else, or other classes.
    """
    path, labels = run.config.predict.postprocessing, run.labels
    values = [labels.values_of([index]) for index in range(len(labels.names))]
    return postprocessing.load(Path(path), labels.names, values) if path else ()


def as_asked(run: Run, other: Run) -> Run:
    """Another run in the precision, and with that averaged, which the caller asks of the first.

    That is what was changed of the first run's own config; what was not is as each run's own says.
    """
    asked, saved, config = run.config, run_of(run.folder).config, other.config
    if asked.precision != saved.precision:
        config = dataclasses.replace(config, precision=asked.precision)
    if asked.predict.combine != saved.predict.combine:
        predict = dataclasses.replace(config.predict, combine=asked.predict.combine)
        config = dataclasses.replace(config, predict=predict)
    return dataclasses.replace(other, config=config)


def _as_first(run: Run, other: Run, mirror: bool | None) -> Run:
    """Another run predicts as the first, but mirrored and tiled by the law that it was trained for.

    What the caller has changed in these of the first run's own config holds for all; see also
    `as_asked`.
    """
    other = as_asked(run, other)
    asked, saved = run.config.infer, run_of(run.folder).config.infer
    own = {
        name: getattr(other.config.infer, name)
        for name in ("mirror", "mirror_axes", "law")
        if getattr(asked, name) == getattr(saved, name)
    }
    own |= {} if mirror is None else {"mirror": mirror}
    config = dataclasses.replace(other.config, infer=dataclasses.replace(asked, **own))
    return dataclasses.replace(other, config=config)


def _open(run: Run) -> tuple[Predictor, Member]:
    step, networks = deployed.load(run)
    made = devices.make_predictor(run, list(networks.values()))
    return made, Member(run.folder, step, tuple(networks), wiring.mirror_axes(run))


def _fields(run: Run) -> tuple[str, ...]:
    return (*_PREPARATION, *(("foreground",) if run.plan.normalize_first else ()))


def _unlike(first: Run, other: Run, fields: Sequence[str] = ()) -> tuple[str, Any, Any] | None:
    """What of two runs differs first, by default in how scans are prepared; None: nothing."""
    fields = fields or _fields(first)
    pairs = [(name, getattr(first.plan, name), getattr(other.plan, name)) for name in fields]
    pairs.append(("classes", first.classes, other.classes))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _require_alike(first: Run, other: Run, fields: Sequence[str]) -> None:
    odd = _unlike(first, other, fields)
    if odd:
        name, ours, theirs = odd
        alike = "that mean the same" if fields == _MEANING else "whose scans are prepared alike"
        raise UserError(
            f"{other.folder}: {name} of its plan is {theirs}, that of {first.folder} {ours}; "
            f"only runs {alike} can be averaged"
        )
