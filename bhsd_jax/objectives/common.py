"""What more than one objective needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

from bhsd_jax import losses
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Batch, Learner, Logits, Metrics, Params


@dataclass(frozen=True)
class SingleModel:
    """Trains one copy of the model; deploys its moving average if there is one.

    `tested` names the network that is deployed, if there are two: "teacher" or "student". The rule
    of the average is `train.step.moving_average`'s.
    """

    # Of the class, and so without a type: with one they would be fields of a config.
    twins = ()  # keys of `params` that are networks of their own
    uses_unlabeled = True
    ema_decay: float | None = None
    ema_t0: int = 0  # updates counted before the first: 0 SSL4MIS, 1 Tarvainen and Valpola
    tested: str = "teacher"

    def __post_init__(self):
        """Checks what all have in common; subclasses with checks of their own call it as well."""
        name = type(self).__name__
        require_choice(f"{name}: tested", self.tested, ("teacher", "student"))
        if self.ema_decay is not None:
            require_average(name, self.ema_decay, self.ema_t0)

    def init(self, model: nn.Module, image: Array, key: PRNGKeyArray) -> Params:
        """Parameters of one copy."""
        return model.init(key, image, train=False)["params"]

    def deployable(self, params: Params, ema: Params | None) -> dict[str, Params]:
        """The moving average, if there is one, and the trained network; `tested` first."""
        networks = {"student": params} if ema is None else {"teacher": ema, "student": params}
        return (
            {self.tested: networks[self.tested]} | networks if self.tested in networks else networks
        )


@runtime_checkable
class Ramped(Protocol):
    """An objective whose unlabeled term has a weight that rises."""

    @property
    def weight(self) -> float: ...

    @property
    def ramp(self) -> float: ...

    @property
    def ramp_steps(self) -> int: ...

    @property
    def staircase(self) -> int: ...


@dataclass(frozen=True)
class Ramp:
    """A weight that rises along a sigmoid at the start of a training, and then stays.

    From 0.007 of `weight` to all of it over a `fraction` of the training, or over `length` steps if
    that is not 0: exp(-5 (1 - t)^2). A fraction of 0 is all of it from the start.

    Raises:
        ValueError: If the fraction is not in 0..1, a number of steps is too small, or the weight
            below 0, with which networks would learn to contradict each other.

    Source: Laine and Aila 2017, arXiv:1610.02242, section 3.1; staircase as in SSL4MIS.
    """

    weight: float
    fraction: float
    staircase: int = 1  # steps for which the rising weight is held
    length: int = 0

    def __post_init__(self):
        require_least("objective.weight", self.weight, 0)
        require_fraction("ramp", self.fraction)
        for name, value, least in (
            ("staircase", self.staircase, 1),
            ("ramp_steps", self.length, 0),
        ):
            if value < least:
                raise UserError(f"objective.{name} counts steps, {least} or more; got {value}")

    @classmethod
    def of(cls, objective: Ramped) -> "Ramp":
        """The ramp that the fields of an objective describe.

        Raises:
            ValueError: If there is no such ramp; names the field.
        """
        return cls(objective.weight, objective.ramp, objective.staircase, objective.ramp_steps)

    def at(self, step: Int[Array, ""], steps: Int[Array, ""] | int) -> Float[Array, ""]:
        """The weight at a step of a training of `steps`."""
        if self.length == self.fraction == 0:
            return self.weight * jnp.ones(())
        length = self.length or self.fraction * steps
        held = (step // self.staircase) * self.staircase
        t = jnp.clip(held / length, 0.0, 1.0)
        return self.weight * jnp.exp(-5.0 * (1.0 - t) ** 2)


def unmixed(slice_labels: Array) -> Array:
    """Slice labels of patches that are seen as they are in the batch."""
    return slice_labels


@dataclass(frozen=True)
class Terms:
    """What a semi-supervised objective has computed on one batch, before it is summed."""

    supervised: Scalar
    name: str = ""  # of the unlabeled term in the log
    unlabeled: Scalar | None = None
    ramp: Ramp | None = None  # weight of the unlabeled term, if there is one
    # Full-resolution logits of every trained network on the unlabeled patches as it saw them, for
    # what slice labels add (`slice_loss`): nothing, where there are none.
    students: tuple[Array, ...] = ()
    mixed: Callable[[Array], Array] = unmixed  # slice labels of the batch -> of what they saw
    metrics: Metrics = field(default_factory=dict)  # more to log


class SemiSupervised:
    """An objective whose loss is the sum of its terms."""

    @property
    def has_students(self) -> bool:
        """Whether its terms have logits of unlabeled patches, which slice labels can speak of."""
        return True

    def terms(self, learner: Learner, batch: Batch, key: PRNGKeyArray) -> Terms:
        """What is summed."""
        raise NotImplementedError

    def loss(self, learner: Learner, batch: Batch, key: PRNGKeyArray) -> tuple[Scalar, Metrics]:
        """Scalar to minimize, and scalars to log."""
        return total(learner, self.terms(learner, batch, key))


def total(learner: Learner, terms: Terms) -> tuple[Scalar, Metrics]:
    """Supervised loss plus weighted unlabeled term, and what to log."""
    loss, metrics = terms.supervised, terms.metrics | {"supervised": terms.supervised}
    if terms.unlabeled is not None and terms.ramp is not None:
        weight = terms.ramp.at(learner.step, learner.steps)
        loss = loss + weight * terms.unlabeled
        metrics |= {terms.name: terms.unlabeled, "weight": weight}
    return loss, metrics


def forward_both(
    learner: Learner, params: Params, labeled: Array, unlabeled: Array, key: PRNGKeyArray
) -> tuple[Logits, Logits]:
    """Logits of labeled and unlabeled patches under one network.

    As many of each: one pass over the interleaved rows, which compiles to half the program.
    Otherwise two passes. The two agree exactly, for no network here mixes samples.
    """
    if len(labeled) == len(unlabeled):
        heads = learner.forward(params, interleave(labeled, unlabeled), key)
        pairs = [separate(head) for head in heads]
        return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    return learner.forward(params, labeled, key), learner.forward(params, unlabeled, key)


def follow_average(learner: Learner, image: Array, key: PRNGKeyArray) -> Array:
    """Full-resolution logits of the moving average, without gradient.

    Classes that the learner's gate rules out get none of the probability.
    """
    logits = learner.forward(learner.ema, image, key)[0]
    return jax.lax.stop_gradient(learner.gate(logits))


def over_heads(loss: Callable[[Array], Scalar], heads: Logits, deep: bool) -> Scalar:
    """`loss` of the full-resolution logits, or of all heads, weighted as in supervised training."""
    if not deep:
        return loss(heads[0])
    weights = losses.head_weights(len(heads))
    return jnp.asarray(sum(w * loss(head) for w, head in zip(weights, heads, strict=True) if w))


def follow_target(
    heads: Logits,
    target: Float[Array, "B D H W K"],
    valid: Bool[Array, "B D H W"] | None,
    deep: bool,
) -> Scalar:
    """Consistency with probabilities; with `deep` the coarser heads follow their local averages.

    Unlike the nearest voxel's, averages blend as their patches do and sum to 1.
    """

    def follow(logits: Array) -> Scalar:
        size = logits.shape[1:4]
        counts = None if valid is None else losses.all_valid(valid, size)
        return losses.consistency(logits, losses.average_target(target, size), counts)

    return over_heads(follow, heads, deep)


def interleave(labeled: Array, unlabeled: Array) -> Array:
    """Merges two batches row by row, so that every device keeps its own rows.

    Concatenation would order all labeled rows first and make XLA move them across devices.

    Raises:
        ValueError: If the batches differ in length.
    """
    if len(labeled) != len(unlabeled):
        raise UserError(f"need as many labeled as unlabeled: {len(labeled)} != {len(unlabeled)}")
    return jnp.stack([labeled, unlabeled], axis=1).reshape(-1, *labeled.shape[1:])


def separate(merged: Array) -> tuple[Array, Array]:
    """Undoes `interleave`."""
    pairs = merged.reshape(-1, 2, *merged.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is not among the choices.

    Raises:
        ValueError: Names the field and the choices.
    """
    if value not in choices:
        raise UserError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def require_average(objective: str, decay: float | None, t0: int) -> None:
    """Refuses a teacher without a decay between 0 and 1, or with updates before time.

    Raises:
        ValueError: Names the objective and the field.
    """
    if decay is None or not 0 <= decay <= 1:
        raise UserError(f"{objective}: ema_decay makes its teacher and lies in 0..1; got {decay}")
    if t0 < 0:
        raise UserError(f"{objective}: ema_t0 counts updates, 0 or more; got {t0}")


def require_fraction(name: str, value: float, what: str = "share of the training") -> None:
    """Refuses a share outside 0..1.

    Raises:
        ValueError: Names the field.
    """
    if not 0 <= value <= 1:
        raise UserError(f"{name} is a {what} and lies in 0..1; got {value}")


def require_range(name: str, value: tuple[float, float]) -> None:
    """Refuses what is no range of shares, from low to high.

    Raises:
        ValueError: Names the field.
    """
    low, high = value
    if not 0 <= low <= high <= 1:
        raise UserError(f"{name} is a range of shares, low to high in 0..1; got {value}")


def require_least(name: str, value: float, least: float) -> None:
    """Refuses what is less, and what is no number.

    Raises:
        ValueError: Names the field.
    """
    if not value >= least:
        raise UserError(f"{name} is {least:g} or more; got {value}")
