"""Which scans a run was not trained on, as its checkpoints say. Needs no JAX.

Folds are drawn from all scans there are, so that scans which are added, or other folds beside them,
make validation scans of some that a run was trained on. A checkpoint therefore keeps a digest of
the ids that validated, that were tested on and that were trained on.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhsd_jax import fields
from bhsd_jax.assemble import data
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.train import checkpoint_files as disk
from bhsd_jax.volume import Plan

logger = logging.getLogger(__name__)
_HELD_OUT = ("val", "test")
_SPLIT = ("fold", "binary", "seed")  # of `config.split`; each gives scans or classes other roles
_ANYBODYS = ("folder", "DICOM")  # names of data sets that say nothing of whose they are
_ADDED = "scans or masks were added, taken away or changed"
_DIVIDED = "splits_final.json, or what the data set says of its scans, divides them in another way"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint keeps of the training it is from."""

    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    roles: Mapping[str, str | None]  # as `record` made them; {} from versions that kept none

    @classmethod
    def of(cls, folder: Path) -> "Trained | None":
        """Reads the newest checkpoint in a run folder; None where nothing was trained.

        Imported weights are none: what they were trained on is not known.
        """
        checkpoints = folder / "checkpoints"
        for step in reversed(disk.steps(checkpoints)):
            if not disk.has(checkpoints, step, "input"):
                continue
            try:
                return cls(
                    config=disk.read(checkpoints, step, "config"),
                    plan=disk.read(checkpoints, step, "plan"),
                    roles=disk.read_if_kept(checkpoints, step, "roles"),
                )
            except (OSError, ValueError):
                continue  # damaged; whoever uses its weights says so
        return None

    def holds_out(self, cases: Iterable[str]) -> bool:
        """Whether these are the very scans that validated, or those that were tested on."""
        return _digest(cases) in {self.roles[part] for part in _HELD_OUT if self.roles}


def record(roles: Roles, before: Mapping[str, str | None]) -> dict[str, str | None]:
    """What a checkpoint is to keep of the roles: SHA-256 of sorted ids, none of which it tells.

    Args:
        roles: Of the training that begins or goes on.
        before: What the checkpoint keeps with which it goes on; {} if none.

    Returns:
        "val", "test" and "trained", masks or not; the last is None where it has changed meanwhile.
    """
    trained = _digest({*roles.train, *roles.unlabeled})
    same = not before or before["trained"] == trained
    held_out = {part: _digest(getattr(roles, part)) for part in _HELD_OUT}
    return {**held_out, "trained": trained if same else None}


def require_sequel(
    trained: Trained, config: Settings, workdir: Path, plan: Plan, roles: Roles
) -> None:
    """Refuses to go on with a training on other scans, or where they have other roles than before.

    Scans prepared in another way are others too.

    Raises:
        UserError: Says what has changed since the checkpoint, and how to train with it.
    """
    shards = data.shards_folder(config, workdir)
    if changed := _plan(Plan.from_json(trained.plan), plan):
        raise UserError(
            f"{workdir}: its weights were trained on shards of another plan: {changed}. What "
            "was a validation scan then may be one to train on now; train in another --workdir, "
            f"with --preprocess.shards={shards} and, if it is to begin with these weights, which "
            f"have seen scans that may validate there, --train.init_from={workdir}; or bring "
            f"back what {shards} was made from"
        )
    changed = _field(trained, config)
    if not changed and not all(_is_known(trained, roles, part) for part in _HELD_OUT):
        changed = _DIVIDED
    if changed:
        raise UserError(
            f"{workdir}: scans or classes had other roles in the training so far: {changed}. "
            "What was a validation scan then may be one to train on now; train in another "
            f"--workdir, with --preprocess.shards={shards}, or go on as it began"
        )


def require(config: Settings, workdir: Path, roles: Roles, part: str) -> None:
    """Refuses a part, "val" or "test", of which the run in a folder may have seen scans.

    Of an older version's run only plan and fold are compared, for the validation scans. Scans of
    another data set are never refused; of a folder that lies elsewhere it is not known whether it
    is another, and that is said.

    Raises:
        UserError: Says what has changed since the training.
    """
    trained, shards = Trained.of(workdir), data.shards_folder(config, workdir)
    if trained is None or trained.plan.get("dataset") != Plan.load(shards).dataset:
        return
    if changed := difference(trained, config, workdir, roles, part):
        if not is_same_place(trained, config):
            logger.warning(
                "split %s: these scans lie elsewhere than those that %s was trained on; if they "
                "are the same, it may have been trained on some of them",
                part,
                workdir,
            )
            return
        raise UserError(
            f"{workdir}: split {part} is not what this run held out of its training: {changed}. "
            "It may have been trained on some of these scans, and their scores would be too good; "
            f"bring back what {shards} was made from, or name scans that it has not seen "
            "(predict.images, evaluate.references)"
        )


def difference(
    trained: Trained, config: Settings, workdir: Path, roles: Roles, part: str = "trained"
) -> str:
    """Why the roles of today do not say whether a part was trained on; "" if they do."""
    if _is_known(trained, roles, part) and (trained.roles or part == "test"):
        return ""
    if changed := _field(trained, config):
        return changed
    source = Plan.load(data.shards_folder(config, workdir)).source_sha256
    if trained.plan.get("source_sha256") != source:
        return _ADDED
    return _DIVIDED if trained.roles else ""


def is_same_place(trained: Trained, config: Settings) -> bool:
    """False where both are of a kind of folder that anybody may have, and of two such folders."""
    roots = (trained.config.get("data", {}).get("root"), config.data.get("root"))
    return trained.plan.get("dataset") not in _ANYBODYS or roots[0] == roots[1]


def _plan(old: Plan, new: Plan) -> str:
    """In what two plans differ first but for notes and rounding; "" if in nothing."""
    told = {"notes": (), "version": new.version}
    was, now = (dataclasses.replace(plan, **told).to_json() for plan in (old, new))
    changed = next(fields.differences(was, _but_for_rounding(was, now)), "")
    return f"source_sha256: {_ADDED}" if changed.startswith("source_sha256") else changed


def _but_for_rounding(old: Any, new: Any) -> Any:
    """`new` with the numbers of `old` where they may differ by another processor's sums alone."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _but_for_rounding(old.get(key), value) for key, value in new.items()}
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return tuple(map(_but_for_rounding, old, new))
    if isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=1e-6):
        return old
    return new


def _is_known(trained: Trained, roles: Roles, part: str) -> bool:
    """Whether the ids of the part are those of then, or those trained on are: they exclude it."""
    now = record(roles, {})
    return not trained.roles or any(trained.roles[n] == now[n] for n in (part, "trained"))


def _field(trained: Trained, config: Settings) -> str:
    """The first field of `config.split` that gives other roles, with both values; "" if none."""
    was, now = trained.config.get("split", {}), vars(config.split)
    changed = [name for name in _SPLIT if name in was and was[name] != now[name]]
    return next((f"config.split.{n} ({was[n]} -> {now[n]})" for n in changed), "")


def _digest(ids: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()
