"""The train step: augment, loss, gradient, update, moving average."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray, Scalar

from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import layout
from bhsd_jax.types import (
    Batch,
    Learner,
    Logits,
    Metrics,
    Objective,
    Params,
    TrainState,
)

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Gradient = Callable[..., Any]  # (params, patches, key) -> (loss, metrics), gradients


@dataclass(frozen=True)
class Parts:
    """What a step is made of; all of it static."""

    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # learning rate by step, for the log
    segmentation: Callable[..., Array]  # (logits, label) -> supervised loss
    augment: Callable[[PRNGKeyArray, Batch], Batch]  # raw batch -> normalized, augmented patches
    view: Callable[[PRNGKeyArray, Array], Array]  # a fresh intensity draw
    steps: Int[Array, ""] | int  # of the whole training
    accumulate: int = 1  # parts in which a batch goes through the network: `_in_parts`
    mesh: Mesh | None = None  # where state and batch lie; None: on one device, or over `data` alone


def init_state(parts: Parts, image: Array, key: PRNGKeyArray) -> TrainState:
    """State at step 0; `image` is one batch of the network's input, [B D H W C]."""
    init_key, run_key = jax.random.split(key)
    params = parts.objective.init(parts.model, image, _quick(init_key))
    # A copy: the step donates its state, and one buffer cannot be donated twice.
    ema = None if parts.objective.ema_decay is None else jax.tree.map(jnp.copy, params)
    opt_state = parts.optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema, run_key)


def _quick(key: PRNGKeyArray) -> PRNGKeyArray:
    """A key for XLA's own generator: dozens of threefry draws take half a minute to compile."""
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")


def make_train_step(parts: Parts) -> TrainStep:
    """Closes the update over what never changes; the caller jits it."""

    # Jitted by itself, so that it is traced once for all networks and patches of one shape.
    @jax.jit
    def forward(params: Params, image: Array, key: PRNGKeyArray) -> Logits:
        with layout.keep_rows(parts.mesh):
            heads: Any = parts.model.apply(
                {"params": params}, image, train=True, rngs={"dropout": key}
            )
        # Of bfloat16, which a network of one's own may answer in, classes tie far too often.
        return tuple(head.astype(jnp.float32) for head in heads)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        patches = layout.keep_patches(parts.mesh, parts.augment(augment_key, batch))

        def loss_fn(params: Params, patches: Batch, key: PRNGKeyArray) -> tuple[Scalar, Metrics]:
            learner = Learner(
                forward,
                parts.view,
                parts.segmentation,
                layout.gathered(parts.mesh, params),
                layout.gathered(parts.mesh, state.ema),
                state.step,
                parts.steps,
                layout.each_twin(parts.mesh),
            )
            found = parts.objective.loss(learner, patches, key)
            _require_scalars(parts.objective, found)
            return found

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        if parts.accumulate > 1:
            gradient = _in_parts(gradient, parts.accumulate, parts.mesh)
        (loss, metrics), grads = gradient(state.params, patches, loss_key)
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay, t0 = parts.objective.ema_decay, parts.objective.ema_t0
        ema = moving_average(state.ema, params, decay, state.step, t0)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "lr": parts.schedule(state.step),
        }
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema
        )
        return state, metrics

    return train_step


def _require_scalars(objective: Objective, found: Any) -> None:
    """Refuses an objective whose loss is not one number with numbers to log; seen while tracing."""
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
    odd = [jnp.shape(found[0])] if pair and jnp.shape(found[0]) else []
    odd += [f"{k} {jnp.shape(v)}" for k, v in found[1].items() if jnp.shape(v)] if pair else []
    if not pair or odd:
        kind = type(objective)
        raise UserError(
            f"{kind.__module__}.{kind.__qualname__}: loss must return a pair, one number and a "
            f"dictionary of numbers to log; got {odd if pair else type(found).__name__}"
        )


def _in_parts(gradient: Gradient, count: int, mesh: Mesh | None) -> Gradient:
    """The mean of a loss, its metrics and its gradients over `count` parts of a batch.

    The parts go through the network one after another, each with a key of its own, so that only
    one of them is held. Of means over patches the result is that of the whole batch. What counts
    over a batch now counts over a part: batch Dice, and means over voxels that are sure, lie in
    the scan or have slice labels.
    """

    def mean(params: Params, patches: Batch, key: PRNGKeyArray) -> Any:
        dealt = jax.tree.map(lambda rows: deal(rows, count), patches)
        keys = jax.random.split(key, count)

        def add(total: Any, part: tuple[Batch, PRNGKeyArray]) -> tuple[Any, None]:
            patches, key = part
            values, grads = gradient(params, layout.keep_patches(mesh, patches), key)
            return jax.tree.map(jnp.add, total, (values, layout.keep_state(mesh, grads))), None

        first = jax.tree.map(lambda rows: rows[0], (dealt, keys))
        shapes = jax.eval_shape(gradient, params, *first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (dealt, keys))
        return jax.tree.map(lambda value: value / count, total)

    return mean


def deal(rows: Array, count: int) -> Array:
    """[B ...] -> [count B/count ...]; a device that has rows for every part keeps its own.

    Neighbors, which some objectives mix, stay together where a part has an even number of rows.
    """
    together = 2 if len(rows) % (2 * count) == 0 else 1
    parts = rows.reshape(-1, count, together, *rows.shape[1:]).swapaxes(0, 1)
    return parts.reshape(count, len(rows) // count, *rows.shape[1:])


def moving_average(
    ema: Params | None, params: Params, decay: float | None, step: Int[Array, ""], t0: int = 0
) -> Params | None:
    """Moves `ema` toward `params` by 1 - min(decay, 1 - 1/(step + t0 + 1)), in float32.

    `step` is the number of updates done before this one. Until `decay` takes over, the average is
    the plain mean of all parameters so far; the initial value is forgotten by the first update if
    `t0` is 0, and else counts as `t0` of them. A `t0` of 1/(1 - `decay`) means a constant decay.

    Source: `t0` 0 is SSL4MIS' `update_ema_variables`, 1 Tarvainen and Valpola's own code
    (mean-teacher 546348f).
    """
    if decay is None:
        return None
    rate = jnp.maximum(1 - decay, 1 / (step + t0 + 1))
    return jax.tree.map(lambda old, new: (1 - rate) * old + rate * new, ema, params)
