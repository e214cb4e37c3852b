"""`train`: fits a network to the shards, resuming if the run folder has a checkpoint."""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bhsd_jax import fields
from bhsd_jax.assemble import data, held_out, pretrained, program, together
from bhsd_jax.assemble.recipe import (
    Recipe,
    make_mesh,
    make_recipe,
    require_matching,
    share_cores,
)
from bhsd_jax.assemble.run import Run
from bhsd_jax.assemble.validation import Validation
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.input.pipeline import Batches, Cache, Decoded, Stream
from bhsd_jax.platform import budget, cluster, files, locks, machine, step_log
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report import figures
from bhsd_jax.settings import Config, Settings, Train, as_saved_today
from bhsd_jax.shards.store import Shards
from bhsd_jax.train import barrier, processes, trackers
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints
from bhsd_jax.train.log import Log, heartbeat
from bhsd_jax.train.loop import Every, Interrupted, fit
from bhsd_jax.train.processes import Preemption
from bhsd_jax.train.profile import Span, profiling
from bhsd_jax.train.speed import Timed, watching
from bhsd_jax.training_settings import OF_A_CALL
from bhsd_jax.types import Metrics, TrainState
from bhsd_jax.verbs import parts
from bhsd_jax.volume import Plan

logger = logging.getLogger(__name__)

SAVED = "checkpoint/step"  # in metrics.jsonl: this step is on disk
_ELSEWHERE = ("mesh.", "train.profile")  # fields that say where and not what is trained


def run(config: Config, workdir: Path) -> None:
    """Trains until `config.train.steps`.

    Raises:
        ValueError: Where config, plan and data do not fit each other; before anything is compiled.
        FloatingPointError: If the loss is not finite.
    """
    config = Settings.of(config)
    span = Span.parse(config.train.profile, config.train.steps)
    trackers.require(config.train.trackers)
    parts.join(config, saves=True)
    # The run keeps nothing of who was which process: later calls are other processes.
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **OF_A_CALL))
    # The plan of the shards, and not the run's own: `require_sequel` compares them.
    run = Run.of(config, workdir, Plan.load(data.shards_folder(config, workdir)))
    share_cores(run)
    processes.say_devices()
    workdir.mkdir(parents=True, exist_ok=True)
    together.require_one_run(run)
    with _alone(workdir), Preemption() as asked, processes.together():
        try:
            _train(run, asked, span)
        except Interrupted as reason:
            logger.warning("%s; start the same command again to go on", reason)
            barrier.wait_for_all("end")
            sys.exit(cluster.TRY_AGAIN)


def _train(run: Run, asked: Preemption, span: Span | None) -> None:
    workdir, steps = run.folder, run.config.train.steps
    mesh = make_mesh(run)
    roles, notes = run.roles
    for note in (*notes, *data.on_other_scans(run.config, workdir, run.plan.dataset)):
        logger.warning("%s", note)
    with heartbeat("checking config, plan and network"):
        recipe = make_recipe(run, mesh)
        require_matching(run, recipe, roles, mesh)
        _require_slice_labels(run, recipe, roles)
    checkpoints = _open_run(run)
    state, saved = _start(recipe, checkpoints, mesh, run)
    position = saved["batches"]
    writes = jax.process_index() == 0
    if writes:  # not before: a config that the checkpoint refuses is not the run's
        files.write_json(workdir / "config.json", checkpoints.extra["config"])
        files.write_json(workdir / "plan.json", checkpoints.extra["plan"])
    if writes:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        # The newest, the best and the one being written; the last must fit beside what is there.
        budget.require_disk(workdir, 3 * size, "checkpoints", least=size)
    batches = _batches(run.config, run.shards, roles, recipe, mesh, position)
    train_step, flops = program.build_step(recipe, state, mesh, workdir)
    on_devices = Timed(map(partial(meshes.to_devices, mesh=mesh), batches))
    speed = program.speed(recipe, mesh, on_devices, flops)
    tracked = _trackers(run, position) if writes else ()
    log = Log(
        workdir / "metrics.jsonl",
        steps,
        position,
        writes=writes,
        speed=speed,
        means=saved.get("means"),
        tracked=tracked,
        validate_every=_validate_every(run.config.train, roles),
    )
    validation = Validation.of(run, roles.val, recipe, log, mesh, asked)
    record = _recorder(checkpoints, log, position)
    actions = _actions(run.config.train, log, validation, checkpoints, batches, asked)
    with log.ending():
        try:
            _catch_up(run.config.train, position, state, validation, checkpoints)
            with (
                watching(on_devices) as watch,
                profiling(span, workdir / "profile", position) as trace,
            ):
                every = [watch, record, trace, *actions]
                fit(state, on_devices, train_step, every, steps)
        finally:
            checkpoints.close()
            record()
    logger.info("trained %d steps; the run is %s", steps, workdir)


def _validate_every(settings: Train, roles: Roles) -> int:
    """Steps from one validation to the next; 0 where no case validates."""
    return settings.validate_every if roles.val[: settings.validate_cases] else 0


def _require_slice_labels(run: Run, recipe: Recipe, roles: Roles) -> None:
    """Refuses losses of slice labels where these say nothing, or only what is absent.

    Raises:
        UserError: If no slice of any unlabeled scan is known; for `mil` and `size`, known to bleed.
    """
    if recipe.slices is None:
        return
    terms, known = run.config.slice_loss, False
    least = 1 if terms.mil > 0 or terms.size > 0 else 0
    for case in roles.unlabeled:
        scan = run.shards.open(case)
        table = recipe.slices.table(scan.slice_labels, scan.bleeding, scan.shape[0])
        if (table >= least).any():
            return
        known = known or bool((table == 0).any())
    if known:
        raise UserError(
            f"slice_loss: of no slice of the {len(roles.unlabeled)} unlabeled scans is it known "
            "that it shows a bleed, so that mil and size would learn from absence alone; set "
            "slice_loss.mil=0 and slice_loss.size=0 (neg_sup and gate_pseudo need no such slice), "
            "or prepare scans with slice labels that show some"
        )
    raise UserError(
        f"slice_loss: of none of the {len(roles.unlabeled)} unlabeled scans a slice is known, so "
        f"that its terms do nothing; data set {run.plan.dataset} has no slice labels there (BHSD's "
        "layout, data=folder and data=dicom read slice_labels.csv and scan_labels.csv). Set "
        "slice_loss.gate_pseudo=False and its weights to 0, or prepare scans with such labels"
    )


def _trackers(run: Run, position: int) -> tuple[trackers.Tracker, ...]:
    """Those of the config; they are told what is trained, and no path."""
    told = ("model", "objective", "loss", "slice_loss", "optimizer", "split", "input", "train")
    config = run.config.to_dict()
    facts = {name: config[name] for name in told} | {"seed": run.config.seed}
    named = run.config.train.trackers
    return trackers.start(named, run.folder, position, run.config.name, facts)


def _actions(
    settings: Train,
    log: Log,
    validation: Validation,
    checkpoints: Checkpoints,
    batches: Batches,
    asked: Preemption,
) -> list[Callable[..., None]]:
    """What happens between steps, in this order."""

    def save(step: int, state: TrainState, metrics: Metrics) -> None:
        log.finite(step, metrics)  # else checkpoints that are of use would give way to this one
        position = {**batches.state(), "means": log.means.state()}
        checkpoints.save(step, state, position, validation.dice_at(step))

    def draw(*_: Any) -> None:
        begun = time.monotonic()
        if jax.process_index() == 0:
            figures.draw_progress(log.path, log.path.with_name("progress.png"))
        log.pause(time.monotonic() - begun)

    def stop(step: int, state: TrainState, metrics: Metrics) -> None:
        if asked():
            save(step, state, metrics)
            raise Interrupted(f"asked to stop; saved step {step}")

    steps = settings.steps
    return [
        log.count,
        Every((settings.log_every,), steps, log.train, seconds=8.0),
        # Validation first: the checkpoint manager keeps the best by this Dice.
        Every((settings.validate_every,), steps, validation),
        Every((settings.validate_every,), steps, draw),
        Every((settings.save_every, settings.validate_every), steps, save),
        stop,
    ]


def _catch_up(
    settings: Train, step: int, state: TrainState, validation: Validation, checkpoints: Checkpoints
) -> None:
    """Validates the step that the run goes on from, where it was asked to stop meanwhile."""
    due = step == settings.steps or step % settings.validate_every == 0
    if step and due and validation.cases and checkpoints.dice() is None:
        validation(step, state, {})
        checkpoints.rate(validation.dice_at(step))
        if validation.asked():
            raise Interrupted(f"asked to stop; step {step} is saved")


def _recorder(checkpoints: Checkpoints, log: Log, resumed_at: int) -> Callable[..., None]:
    """Notes in the log what has come to disk; raises a step later where a save has failed."""
    now = resumed_at
    if checkpoints.latest() is not None:  # the log has lost the lines of later steps
        log.write(now, {SAVED: now})

    def record(step: int | None = None, *_: Any) -> None:
        nonlocal now
        now = step or now
        for saved in checkpoints.finished():
            log.write(now, {SAVED: saved.step, "checkpoint/seconds": saved.seconds})

    return record


def _open_run(run: Run) -> Checkpoints:
    """The run's checkpoints; says in what the config differs from theirs."""
    workdir = run.folder
    plain, plan = json.loads(json.dumps(run.config.to_dict())), run.plan.to_json()
    lines = step_log.read(workdir / "metrics.jsonl")
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        config=plain,
        plan=plan,
        recorded={line[SAVED] for line in lines if SAVED in line},
    )
    step, steps = checkpoints.latest(), run.config.train.steps
    if step is not None and step > steps:
        raise UserError(
            f"{workdir}: {step} steps are trained and saved, and config.train.steps is {steps}; "
            f"set {step} or more, or for a shorter training name another --workdir"
        )
    if step is not None:
        saved = as_saved_today(checkpoints.config())
        pretrained.require_begun_so(run, saved["train"]["init_from"], step)
        for field in fields.differences(saved, plain):
            if not field.startswith(_ELSEWHERE):
                logger.warning("resuming with another value of config.%s", field)
    elif lines:
        logger.warning("%s: stopped before its first checkpoint; beginning anew at step 0", workdir)
    checkpoints.extra["roles"] = held_out.record(run.roles[0], before=checkpoints.roles())
    return checkpoints


def _start(
    recipe: Recipe, checkpoints: Checkpoints, mesh: Mesh, run: Run
) -> tuple[TrainState, dict[str, Any]]:
    """State and position of input and log: the latest checkpoint's, or those of step 0."""
    key = jax.random.key(run.config.seed)
    shapes = jax.eval_shape(recipe.init, key)
    shardings = meshes.state_shardings(mesh, shapes)
    step = checkpoints.latest()
    if step is None:
        with heartbeat("initializing the network"):
            # Drawn whole, then spread: the draw must not depend on the mesh.
            drawn = jax.jit(recipe.init, out_shardings=meshes.replicated(mesh))(key)
            if run.config.train.init_from:
                drawn = _begun_from(run.config.train, recipe, drawn, mesh)
                pretrained.warn_of_seen(run)
            return jax.jit(lambda state: state, out_shardings=shardings)(drawn), {"batches": 0}
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    state, position = checkpoints.restore(abstract)
    kept = held_out.Trained(checkpoints.config(), checkpoints.plan(), checkpoints.roles())
    held_out.require_sequel(kept, run.config, run.folder, run.plan, run.roles[0])
    logger.info("resuming after step %d", step)
    return state, position


def _begun_from(settings: Train, recipe: Recipe, drawn: TrainState, mesh: Mesh) -> TrainState:
    """The first state with the weights that the config names; averages begin there too."""
    params = pretrained.begin_from(
        settings.init_from,
        drawn.params,
        recipe.parts.model,
        recipe.channels,
        twins=recipe.parts.objective.twins,
        only=settings.init_only,
        leave=settings.init_leave,
    )
    pretrained.require_apart(recipe, params)
    params = jax.device_put(params, meshes.replicated(mesh))
    ema = None if drawn.ema is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(drawn, params=params, ema=ema)


def _batches(
    config: Settings, shards: Shards, roles: Roles, recipe: Recipe, mesh: Mesh, position: int
) -> Batches:
    """Labeled and, if any, unlabeled patches; from `position` on."""

    def decoded(case: str) -> Decoded:
        whole = shards.load(case)
        return Decoded(
            whole.image, whole.label, whole.foreground, whole.slice_labels, whole.bleeding
        )

    cache = Cache(shards.open, decoded, _cache_bytes(config.input.cache_mb))
    two_stream = config.input.cases == "two_stream"
    streams = [
        Stream(
            cache,
            cases,
            recipe.cut,
            batch=batch,
            length=config.train.steps * batch,
            seed=(config.seed, number),
            labeled=number == 0,
            in_turn=config.input.cases == "in_turn",
            epoch=len(roles.train) // recipe.labeled if two_stream else 0,
            slices=recipe.slices,
        )
        for number, (cases, batch) in enumerate(
            [(roles.train, recipe.labeled), (roles.unlabeled, recipe.unlabeled)]
        )
    ]
    return Batches(
        streams,
        position=position,
        rows=[meshes.local_rows(mesh, count) for count in (recipe.labeled, recipe.unlabeled)],
        threads=config.input.threads,
        buffer=config.input.buffer,
    )


def _cache_bytes(asked_mb: int) -> int:
    """Memory for decoded scans: as asked, but half of what there is at most.

    A small container would be ended by the system, without a word, once enough scans were read.
    """
    asked, most = asked_mb * 2**20, machine.memory() // 2
    if not 0 < most < asked:
        return asked
    logger.info(
        "input.cache_mb is %d, but half of the memory is %s", asked_mb, budget.in_words(most)
    )
    return most


@contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Holds the run folder against a second trainer."""
    if jax.process_index():
        yield
        return
    with locks.held(workdir / locks.TRAINING) as ours:
        if not ours:
            raise UserError(
                f"{workdir}: another process trains in this folder; wait for it or choose another "
                "--workdir. Where its machine has crashed and none trains, remove .lock there"
            )
        yield
