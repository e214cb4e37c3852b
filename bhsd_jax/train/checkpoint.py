"""Checkpoints with Orbax: state, input position, config, plan and digests in one composite.

Orbax restores flipped bits silently, so a SHA-256 of every leaf is stored and checked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from bhsd_jax.types import Params, TrainState

METRIC = "dice"  # what "best" means: mean validation Dice


class Checkpoints:
    """The checkpoints of one run: the latest, and the best by validation Dice."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], plan: Mapping[str, Any]):
        self.folder = folder.absolute()
        self.extra = {"config": _plain(config), "plan": _plain(plan)}
        self.manager = _manager(self.folder)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, position: Mapping[str, Any], dice: float) -> None:
        """Writes a checkpoint in the background; `dice` is the newest validation Dice or NaN."""
        if step in self.manager.all_steps():
            return
        digests = _digests(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            input=ocp.args.JsonSave(dict(position)),
            digest=ocp.args.JsonSave(digests),
            **{name: ocp.args.JsonSave(value) for name, value in self.extra.items()},
        )
        score = dice if np.isfinite(dice) else -1.0
        self.manager.save(step, args=args, metrics={METRIC: score})

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest state, on the shardings of `abstract`, and the input position.

        Raises:
            ValueError: If another objective trained it, it does not fit the network or optimizer,
                or bits have changed on disk.
        """
        step = self.manager.latest_step()
        self._require_same_objective(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            input=ocp.args.JsonRestore(),
            digest=ocp.args.JsonRestore(),
        )
        try:
            found = self.manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.folder}: step {step} does not fit this config's network or optimizer "
                f"({reason}); use another --workdir or the config the run began with"
            ) from error
        _require_same(found["digest"], _digests(found["state"]), self.folder / str(step))
        return found["state"], found["input"]

    def _require_same_objective(self, step: int | None) -> None:
        """Two methods may have states of one shape, and neither goes on where the other was."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        stored = self.manager.restore(step, args=args)["config"].get("objective", {}).get("name")
        ours = self.extra["config"].get("objective", {}).get("name")
        if stored != ours:
            raise ValueError(
                f"{self.folder}: step {step} was trained with objective {stored}, this config has "
                f"{ours}; use another --workdir or the config the run began with"
            )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self.manager.wait_until_finished()
        self.manager.close()


def load_networks(folder: Path, which: str | int) -> tuple[int, Params, Params | None]:
    """Step, parameters and moving average of a run's checkpoint: "best", "last" or a step.

    Optimizer state is not read. "best" is the latest where no validation was made.

    Raises:
        FileNotFoundError: If there is no such checkpoint; lists those there are.
        ValueError: If bits have changed on disk.
    """
    folder = folder.absolute()
    steps = _complete(folder)
    step = _choose(folder, steps, which)
    path = folder / str(step)
    found = _read(path, ("params", "ema"))
    return step, found["params"], found.get("ema")


def load_statistics(folder: Path, step: int) -> dict[str, Params]:
    """The running statistics of BatchNorm by collection; none, unless the weights were imported.

    Raises:
        ValueError: If bits have changed on disk.
    """
    return _read(folder.absolute() / str(step), ("batch_stats",))


def _read(path: Path, names: Sequence[str]) -> dict[str, Params]:
    """Those of the trees that a checkpoint has."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path / "state").item_metadata.tree
        wanted = {name: tree[name] for name in names if tree.get(name) is not None}
        if not wanted:
            return {}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        found = reader.restore(
            path / "state",
            ocp.args.PyTreeRestore(item=shapes, restore_args=host, partial_restore=True),
        )
    stored = json.loads((path / "digest" / "metadata").read_text())
    ours = _digests(found)
    _require_same({key: stored.get(key) for key in ours}, ours, path)
    return found


def save_networks(
    folder: Path,
    params: Params,
    *,
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    statistics: Mapping[str, Params] | None = None,
) -> None:
    """Writes variables alone, as step 0, for the two functions above: imported weights."""
    folder = folder.absolute()
    tree = {"params": params, **(statistics or {})}
    with _manager(folder) as manager:
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            digest=ocp.args.JsonSave(_digests(tree)),
            config=ocp.args.JsonSave(_plain(config)),
            plan=ocp.args.JsonSave(_plain(plan)),
        )
        manager.save(0, args=args, metrics={METRIC: 0.0})
        manager.wait_until_finished()


def _complete(folder: Path) -> list[int]:
    """Steps whose every part was written to the end."""
    marks = folder.glob("*/commit_success.txt") if folder.is_dir() else []
    return sorted(int(mark.parent.name) for mark in marks if mark.parent.name.isdigit())


def _choose(folder: Path, steps: list[int], which: str | int) -> int:
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint; run the verb `train` first")
    if which == "last":
        return max(steps)
    if which == "best":
        return max(steps, key=lambda step: (_score(folder / str(step)), step))
    if int(which) in steps:
        return int(which)
    raise FileNotFoundError(
        f"{folder}: no checkpoint {which!r}; choose best, last, or a step of {sorted(steps)}"
    )


def _score(path: Path) -> float:
    file = path / "metrics" / "metrics"
    return json.loads(file.read_text())[METRIC] if file.is_file() else -1.0


def _manager(folder: Path) -> ocp.CheckpointManager:
    # Both best_fn and a policy: with the policy alone metrics are not written, with max_to_keep
    # alone the newest checkpoint is deleted and a resumed run goes backwards.
    options = ocp.CheckpointManagerOptions(
        create=True,
        best_fn=lambda metrics: metrics[METRIC],
        preservation_policy=keep.AnyPreservationPolicy(
            [keep.LatestN(1), keep.BestN(get_metric_fn=lambda metrics: metrics[METRIC], n=1)]
        ),
        # A folder counts only with its commit file: an empty "9/" is no checkpoint.
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def _digests(tree: Any) -> dict[str, str]:
    """SHA-256 by path of every leaf, None leaves left out."""
    digests = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            continue  # another process holds parts of it
        data = np.ascontiguousarray(jax.device_get(leaf))
        name = "/".join(_name(part) for part in path)
        digests[name] = hashlib.sha256(data.tobytes()).hexdigest()
    return digests


def _name(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _require_same(stored: Mapping[str, str | None], found: Mapping[str, str], path: Path) -> None:
    changed = sorted(key for key in found if stored.get(key) != found[key])
    if changed:
        raise ValueError(
            f"{path}: the arrays {', '.join(changed[:5])} are not what was saved "
            "(SHA-256 differs); delete this step and resume from an older one"
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))
