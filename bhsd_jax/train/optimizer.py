"""Optimizers and learning-rate schedules from plain numbers."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Params

_NEEDED = ("name", "lr", "schedule")  # of a config's optimizer; all else has a default here


def of_spec(
    spec: Mapping[str, Any], steps: Int[Array, ""] | int, *, parts: bool = False
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Learning rate by step, and the optimizer that follows it, as `config.optimizer` names them.

    None is a field's own default, but of `clip`, where it means that nothing is clipped.

    Raises:
        ValueError: If a field is missing, unknown or out of its range; names it.
    """
    given: dict[str, Any] = {
        name: value for name, value in spec.items() if value is not None or name == "clip"
    }
    if missing := [name for name in _NEEDED if name not in given]:
        raise UserError(
            f"config.optimizer: no {', '.join(missing)}; whoever replaces the whole group gives "
            f"{', '.join(_NEEDED)}, and whoever does not sets single fields of it, such as "
            "config.optimizer.lr"
        )
    timings = [name for name in inspect.signature(make_schedule).parameters if name != "steps"]
    rules = inspect.signature(make_optimizer).parameters
    known = dict.fromkeys(name for name in (*rules, *timings) if name != "parts")
    if unknown := sorted(given.keys() - known):
        raise UserError(
            f"config.optimizer: unknown {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    for name, value in given.items():
        if isinstance(value, str) and name not in ("name", "schedule"):
            raise UserError(f"config.optimizer.{name} is a number; got {value!r}")
    timing = {name: given.pop(name) for name in timings if name in given}
    schedule = make_schedule(steps=steps, **timing)
    return schedule, make_optimizer(schedule=schedule, parts=parts, **given)


def make_schedule(
    schedule: str,
    *,
    lr: float,
    steps: Int[Array, ""] | int,
    power: float = 0.9,
    warmup: float = 0,
    hold: int = 1,
    lag: int = 0,
) -> optax.Schedule:
    """Learning rate by step: `poly`, `cosine` or `constant`, after a linear warm-up from 0.

    `hold` keeps the rate for so many steps; nnU-Net's is 250 (one epoch). A `warmup` below 1 is
    a share of the training. The shape runs over the steps after the warm-up and ends at 0 with
    the training. `warmup_cosine` is MONAI's: its warm-up starts with a rate of 0 and reaches
    `lr` one `hold` before it ends. `poly_left` is `poly` reckoned from the steps that are left, so
    that its last rates have all their digits. A `lag` of 1 gives every step the rate of the one
    before, as where a script sets the rate after the step and with that step's number.

    `steps` may be a traced number: one program then serves trainings of any length.

    Source: MONAI research-contributions `LinearWarmupCosineAnnealingLR`, whose `hold` is an epoch.

    Raises:
        ValueError: If the name is unknown, the rate is below 0, a number of steps is too small, or
            the warm-up is as long as the training; the latter cannot be told of a traced length.
    """
    _require_within("lr", lr, 0)
    for name, value, least in (("hold", hold, 1), ("lag", lag, 0)):
        if value < least:
            raise UserError(f"optimizer.{name} counts steps, {least} or more; got {value}")
    rise = _warmup(warmup, steps)
    length = steps - rise

    def cosine(t):
        return 0.5 * (1 + jnp.cos(jnp.pi * t))

    shapes = {
        "poly": lambda t: (1 - t) ** power,
        "cosine": cosine,
        "warmup_cosine": cosine,
        "constant": lambda t: jnp.ones_like(t),
        "poly_left": lambda left: left**power,
    }
    if schedule not in shapes:
        raise UserError(f"optimizer.schedule is one of {', '.join(shapes)}; got {schedule!r}")
    shape = shapes[schedule]

    def rate(step):
        step = jnp.maximum(step - lag, 0) if lag else step
        held = (step // hold) * hold
        passed = steps - held if schedule == "poly_left" else held - rise
        t = jnp.clip(passed / length, 0.0, 1.0)
        rising = (step + 1) / (rise + 1)
        if schedule == "warmup_cosine":
            rising = jnp.minimum(held / jnp.maximum(1, rise - hold), 1.0)
        return jnp.where(step < rise, lr * rising, lr * shape(t))

    return rate


def _warmup(warmup: float, steps: Array | int) -> Array | int:
    """Steps of the warm-up, of which a value below 1 is a share of the training."""
    if not isinstance(steps, int):
        return jnp.round(warmup * steps).astype(int) if 0 < warmup < 1 else round(warmup)
    rise = round(warmup * steps if warmup < 1 else warmup)
    if not 0 <= rise < steps:
        raise UserError(f"optimizer.warmup is {rise} of {steps} steps; make it shorter")
    return rise


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float = 0.99,
    nesterov: bool = True,
    beta2: float = 0.999,
    weight_decay: float = 3e-5,
    decay_biases: bool = True,
    clip: float | None = 12.0,
    parts: bool = False,
) -> optax.GradientTransformation:
    """SGD with momentum, Adam, AdamW or Muon.

    In `sgd` and `adam` weight decay is added to the gradient (L2, as PyTorch does); in `adamw` it
    is decoupled. `muon` moves every kernel, as a matrix [inputs, outputs], by an orthogonal matrix
    of its momentum, with decoupled weight decay, and all else, without, by Adam with beta 1 of 0.9
    (NAdam if `nesterov`). Both at the rate of the schedule: the matrices are scaled to the length
    of Adam's steps. With `parts` every top-level key of the parameters is a network of its own and
    is clipped by its own norm.

    Source: nnU-Net 2.8.1's recipe is `sgd` with the defaults. Muon is optax's, scaled as in Liu et
    al. 2025, arXiv:2502.16982.

    Raises:
        ValueError: If the name is unknown, or a number means nothing.
    """
    _require_within("momentum", momentum, 0, below=1)
    _require_within("beta2", beta2, 0, below=1)
    _require_within("weight_decay", weight_decay, 0)
    if clip is not None and not clip > 0:
        # With 0 nothing is learned, and a negative norm would reverse every gradient.
        raise UserError(
            f"optimizer.clip is the largest gradient norm, above 0, or None, which clips nothing; "
            f"got {clip!r}"
        )
    mask = None if decay_biases else _matrices
    decay = optax.add_decayed_weights(weight_decay, mask)
    at_rate = optax.scale_by_learning_rate(schedule)
    rules = {
        "sgd": (decay, optax.trace(momentum, nesterov=nesterov), at_rate),
        "adam": (decay, optax.scale_by_adam(b1=momentum, b2=beta2), at_rate),
        "adamw": (optax.scale_by_adam(b1=momentum, b2=beta2), decay, at_rate),
        "muon": (_muon(schedule, momentum, beta2, weight_decay, nesterov),),
    }
    if name not in rules:
        raise UserError(f"optimizer.name is one of {', '.join(rules)}; got {name!r}")
    # The identity keeps the structure of the state: a checkpoint resumes with and without clipping.
    clipping = optax.identity() if clip is None else clip_each(clip, parts)
    return optax.chain(clipping, *rules[name])


def _require_within(name: str, value: float, least: float, below: float = math.inf) -> None:
    if not least <= value < below:
        most = f" and below {below:g}" if below < math.inf else ""
        raise UserError(f"optimizer.{name} is {least:g} or more{most}; got {value!r}")


def _muon(
    schedule: optax.Schedule, momentum: float, beta2: float, weight_decay: float, nesterov: bool
) -> optax.GradientTransformation:
    def matrices(params: Params) -> Params:
        """What a kernel's axes are: its last one counts outputs, all others inputs."""

        def axes(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
            # Tables of positions may have two axes too, but are no matrices: only kernels count.
            if path[-1].key != "kernel" or leaf.ndim < 2:
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(axes, params)

    return optax.contrib.muon(
        schedule,
        beta=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        adam_b2=beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )


def clip_each(max_norm: float, parts: bool = False) -> optax.GradientTransformation:
    """Scales gradients down to a global norm, with `parts` every twin for itself.

    One norm over both twins would let the louder one mute the other.
    """

    def clip(tree: Params) -> Params:
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(tree), 1e-12))
        return jax.tree.map(lambda leaf: leaf * factor, tree)

    def update(updates, state, params=None):
        del params
        return ({k: clip(v) for k, v in updates.items()} if parts else clip(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _matrices(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
