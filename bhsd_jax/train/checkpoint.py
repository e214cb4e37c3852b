"""Checkpoints with Orbax: state, input position, config and plan, written in the background.

Orbax restores flipped bits silently, so a step is used only if every file of it is what was
written; where the newest is not, the one before it is used.
"""

import errno
import json
import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import checkpoint_arrays as arrays
from bhsd_jax.train import checkpoint_files as disk
from bhsd_jax.train.agreement import agree
from bhsd_jax.types import Params, TrainState

logger = logging.getLogger(__name__)

# What file systems over object stores say where a folder is renamed; gcsfuse says the first.
_NO_RENAME = (errno.EMFILE, errno.ENOTSUP, errno.ENOSYS)


class SaveError(UserError, OSError):
    """A checkpoint could not be written; the text says what is left and what to do."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    step: int
    seconds: float  # from the call to the last file, most of it beside the training


class Checkpoints:
    """The checkpoints of one run: the last three, and the best by validation Dice.

    In a run of several processes all of them make the same calls; process 0 decides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        plan: Mapping[str, Any],
        recorded: Collection[int] = (),
    ):
        """Opens the folder; nothing in it is changed before the first save.

        What is in `extra` is saved with every step, each in a file of its own. `recorded` are steps
        known to have been saved: without one of them nothing starts at 0.
        """
        self.folder = folder.absolute()
        self.extra: dict[str, dict[str, Any]] = {"config": _plain(config), "plan": _plain(plan)}
        self.recorded = sorted(recorded)
        self._found: tuple[int | None, dict[int, str]] | None = None
        self._newest: int | None = None  # of this process
        self._saver = arrays.saver()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[Saved]] | None = None
        self._saved: list[Saved] = []

    def latest(self) -> int | None:
        """The newest step that is whole, or None in a run that has saved nothing.

        Raises:
            ValueError: If the run has saved steps, and none of them can be used.
        """
        if self._found is None:
            step, damaged = agree(self._search)
            self._found = step, {int(key): text for key, text in damaged.items()}
        return self._found[0]

    def config(self) -> dict[str, Any]:
        """What the latest checkpoint was trained with."""
        return disk.read(self.folder, self._step(), "config")

    def plan(self) -> dict[str, Any]:
        """The plan of the scans which the latest checkpoint was trained on."""
        return disk.read(self.folder, self._step(), "plan")

    def roles(self) -> dict[str, Any]:
        """What `extra` had as "roles" at the latest checkpoint; {} without, or without any."""
        step = self.latest()
        return {} if step is None else disk.read_if_kept(self.folder, step, "roles")

    def dice(self) -> float | None:
        """The validation Dice of the latest checkpoint; None if that step was not validated."""
        return agree(lambda: disk.listing(self.folder, self._step()).dice)

    def rate(self, dice: float) -> None:
        """Notes the Dice of the latest checkpoint, where it was validated only now."""
        step = self._step()
        agree(lambda: disk.rate(self.folder, step, dice))

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest state, on the shardings of `abstract`, and the input position.

        Raises:
            ValueError: If another objective trained it, or it does not fit the network or
                optimizer; names what differs.
        """
        step = self._step()
        if not disk.has(self.folder, step, "input"):
            raise UserError(
                f"{self.folder / str(step)}: holds imported weights and no training to go on with; "
                f"use another --workdir and --train.init_from={self.folder.parent}"
            )
        self._require_same_objective(step)
        state = arrays.restore(self.folder / str(step), abstract)
        return state, disk.read(self.folder, step, "input")

    def save(self, step: int, state: TrainState, position: Mapping[str, Any], dice: float) -> None:
        """Writes a checkpoint in the background; `dice` is this step's validation Dice or NaN.

        Raises:
            OSError: If this save or the one before it failed; says what to do.
        """
        if step == self._newest:
            return
        self.wait()
        begun = time.monotonic()
        try:
            agree(lambda: self._make_room(step))
            path = disk.unfinished(self.folder, step) / "state"
            self._saver.save(path, args=ocp.args.StandardSave(state))
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(step, error) from error
        self._newest, self._found = step, None
        self._pending = (
            step,
            self._pool.submit(
                self._finish, step, dice, {"input": dict(position), **self.extra}, begun
            ),
        )

    def finished(self) -> list[Saved]:
        """Checkpoints that have come to disk since the last call; does not wait.

        Raises:
            OSError: If a save failed; says why, what is left and what to do.
        """
        if self._pending is not None and self._pending[1].done():
            self.wait()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            OSError: As above.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            self._saved.append(future.result())
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Waits, then lets go of the folder.

        Raises:
            OSError: As above.
        """
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._saver.close()

    def _search(self) -> tuple[int | None, dict[int, str]]:
        saved = disk.steps(self.folder)
        step, damaged = disk.first_intact(self.folder, reversed(saved))
        old = any(disk.is_old(self.folder, other) for other in damaged)
        if step is None and (self.recorded or old):
            reasons = [f"step {other}: {text}" for other, text in damaged.items()]
            gone = [other for other in self.recorded if other not in saved]
            if gone:
                reasons.append(f"step {gone[-1]}: its folder is gone")
            raise UserError(
                f"{self.folder}: this run has saved checkpoints, and none can be used "
                f"({'; '.join(reasons)}); bring one of them back, choose another --workdir, or "
                f"move {self.folder.name}/ and metrics.jsonl away to begin anew"
            )
        instead = "training begins at step 0" if step is None else f"step {step} is used instead"
        disk.warn(self.folder, damaged, instead)
        return step, damaged

    def _step(self) -> int:
        step = self.latest()
        assert step is not None  # the caller has asked
        return step

    def _require_same_objective(self, step: int) -> None:
        """Two methods may have states of one shape, and neither goes on where the other was."""
        stored = disk.read(self.folder, step, "config").get("objective", {}).get("name")
        ours = self.extra["config"].get("objective", {}).get("name")
        if stored != ours:
            raise UserError(
                f"{self.folder / str(step)}: it was trained with objective {stored}, this config "
                f"has {ours}; use another --workdir or the config the run began with"
            )

    def _make_room(self, step: int) -> None:
        """Sets aside what stands in the way of this step, or of a step to come."""
        disk.make_room(self.folder, step)
        for other in self._found[1] if self._found else ():
            disk.set_aside(self.folder, other)

    def _finish(self, step: int, dice: float, facts: dict[str, Any], begun: float) -> Saved:
        """In the background: waits for all processes' files, then lists and names them."""
        self._saver.wait_until_finished()
        if jax.process_index() == 0:
            disk.finish(self.folder, step, dice, facts)
            try:
                disk.prune(self.folder)
            except OSError as error:
                logger.warning("an old checkpoint could not be deleted: %s", error)
        return Saved(step, time.monotonic() - begun)

    def _failure(self, step: int, error: Exception) -> SaveError:
        good = [other for other in disk.steps(self.folder) if disk.is_saved(self.folder, other)]
        left = f"the last good checkpoint is step {good[-1]}" if good else "there is no older one"
        remedy = "Make room or give the right to write there, then start the same command again"
        if isinstance(error, OSError) and error.errno in _NO_RENAME and error.filename2:
            remedy = (
                "This file system does not rename a folder with files in it, by which a step "
                "becomes whole: use another, or by gcsfuse a bucket with hierarchical namespace"
            )
        return SaveError(
            f"{self.folder / str(step)}: this checkpoint could not be written: "
            f"{arrays.cause(error)}; {left}. {remedy}"
        )


def load_networks(folder: Path, which: str | int) -> tuple[int, Params, Params | None]:
    """Step, parameters and moving average of a run's checkpoint: "best", "last" or a step.

    Optimizer state is not read. "best" is the latest where no validation was made. Where the best
    or the last is damaged, the next one is taken and the log says so; a step is taken or refused.

    Raises:
        FileNotFoundError: If there is no such checkpoint; lists those there are.
        ValueError: If it is not what was saved; names the file.
    """
    folder = folder.absolute()
    step = _choose(folder, which)
    networks = arrays.read(folder / str(step), ("params", "ema"))
    return step, networks["params"], networks.get("ema")


def load_statistics(folder: Path, step: int) -> dict[str, Params]:
    """The running statistics of BatchNorm by collection; none, unless the weights were imported.

    Of a step that `load_networks` has found whole: it is not compared with its list again.
    """
    return arrays.read(folder.absolute() / str(step), ("batch_stats",))


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
    disk.make_room(folder, 0)
    saver = arrays.saver()
    tree = {"params": params, **(statistics or {})}
    saver.save(disk.unfinished(folder, 0) / "state", args=ocp.args.StandardSave(tree))
    saver.close()  # waits
    disk.finish(folder, 0, None, {"config": _plain(config), "plan": _plain(plan)})


def _choose(folder: Path, which: str | int) -> int:
    saved = disk.steps(folder)
    if not saved:
        raise FileNotFoundError(f"{folder}: no checkpoint; run the verb `train` first")
    unread: dict[int, str] = {}
    if which == "last":
        candidates = saved[::-1]
    elif which == "best":
        candidates, unread = disk.by_rank(folder)
    elif str(which).isdecimal() and int(which) in saved:
        candidates = [int(which)]
    else:
        raise FileNotFoundError(
            f"{folder}: no checkpoint {which!r}; choose best, last, or a step of {saved}"
        )
    step, damaged = disk.first_intact(folder, candidates)
    damaged |= unread
    if step is None:
        reasons = "; ".join(f"step {other}: {text}" for other, text in sorted(damaged.items()))
        raise UserError(f"{folder}: no checkpoint {which!r} can be used ({reasons})")
    disk.warn(folder, damaged, f"step {step} is used instead")
    if which == "best" and disk.listing(folder, step).dice is None:
        logger.warning(
            "%s: none was validated; step %d, the last, stands for the best", folder, step
        )
    return step


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))
