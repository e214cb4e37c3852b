"""What slice labels add to an objective: a gate for pseudo-labels, and losses on predictions.

A label of a slice and class is 1 (shown), 0 (not shown) or -1 (not known). All terms are means over
what is known, and 0 where nothing is.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

from bhsd_jax.objectives.common import SemiSupervised, require_choice, require_fraction, total
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.supervised import WeaklySupervised
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Batch, Learner, Metrics, Objective, Params

_LOGGED = "weak"  # what `metrics.jsonl` has always called these terms
_NEVER = -1e9  # logit of a class that cannot be: its softmax is exactly 0

Rows = Int[Array, "U D C"]  # labels of slices, C = K - 1 foreground classes
Maps = Float[Array, "U D H W K"]  # logits


@dataclass(frozen=True)
class SliceTerms:
    """Which terms are on; a weight of 0 is off. The objective's own terms stay as they are.

    The losses count for every trained network, at full resolution.
    """

    gate_pseudo: bool = False  # teachers give no probability to classes a slice does not show
    neg_sup: float = 0.0  # weight of `negatives`; their labels are true: 1, without ramp-up
    negatives: str = "ce"  # "volume": mean probability of what cannot be
    mil: float = 0.0  # weight of `presence`, 0.01 to 0.1
    sharpness: float = 5.0  # r of `presence`: 0 pools by the mean, infinity by the maximum
    size: float = 0.0  # weight of `sizes`, 0.01
    sizes: str = "penalty"  # "barrier": log-barrier extension
    # Voxels a class covers at least in a slice that shows it. 1 is all that the labels say; the
    # smallest bleeds of the labeled scans say more.
    lesion_voxels: float = 10.0
    barrier: tuple[float, float] = (5.0, 1.1)  # its t at first, and its growth per 1 % of training
    start: float = 0.3  # share of the training before `mil` and `size` begin

    def __post_init__(self) -> None:
        require_choice("slice_loss.negatives", self.negatives, ("ce", "volume"))
        require_choice("slice_loss.sizes", self.sizes, ("penalty", "barrier"))
        require_fraction("slice_loss.start", self.start)
        for name in ("neg_sup", "mil", "size"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"slice_loss.{name} is a weight, 0 or above; got {getattr(self, name)}"
                )
        if not min(self.barrier) > 0:
            raise UserError(
                "slice_loss.barrier is a t and its growth, both above 0, for it divides; got "
                f"{self.barrier}"
            )
        for name in ("sharpness", "lesion_voxels"):
            if getattr(self, name) <= 0:
                raise UserError(f"slice_loss.{name} must be above 0; got {getattr(self, name)}")

    @property
    def active(self) -> bool:
        """Whether any term is on."""
        return self.gate_pseudo or self.weighted

    @property
    def weighted(self) -> bool:
        """Whether any loss on predictions is on."""
        return max(self.neg_sup, self.mil, self.size) > 0

    def __call__(self, learner: Learner, rows: Rows, *logits: Maps) -> tuple[Scalar, Metrics]:
        """Weighted sum over terms and networks, and what to log."""
        begun = learner.step >= self.start * learner.steps
        progress = learner.step / learner.steps
        terms = {
            "neg_sup": (self.neg_sup, partial(negatives, form=self.negatives)),
            "mil": (
                jnp.where(begun, self.mil, 0) if self.mil else 0.0,
                partial(presence, sharpness=self.sharpness, least=self.lesion_voxels),
            ),
            "size": (
                jnp.where(begun, self.size, 0) if self.size else 0.0,
                partial(sizes, least=self.lesion_voxels, barrier=self._barrier(progress)),
            ),
        }
        loss, metrics = jnp.zeros(()), {f"{_LOGGED}/known": (rows >= 0).mean()}
        for name, (weight, term) in terms.items():
            if isinstance(weight, float) and weight == 0:
                continue
            value = sum((term(x, rows) for x in logits), start=jnp.zeros(()))
            metrics[f"{_LOGGED}/{name}"] = value
            loss = loss + weight * value
        return loss, metrics

    def _barrier(self, progress: Array) -> Array | None:
        if self.sizes == "penalty":
            return None
        start, growth = self.barrier
        return start * growth ** (100 * progress)


@dataclass(frozen=True)
class WithSliceLoss:
    """An objective, to which the slice labels of its unlabeled patches add terms.

    Everything but the loss is the inner objective's, and so is the loss of a batch that has no
    slice labels.

    Raises:
        ValueError: If the inner objective does not return its terms one by one, or has no
            predictions for a loss that is on.
    """

    inner: Objective = field(default_factory=WeaklySupervised)
    slices: SliceTerms = field(default_factory=SliceTerms)

    def __post_init__(self) -> None:
        inner = self.inner
        if inner.uses_unlabeled and not isinstance(inner, SemiSupervised):
            raise UserError(
                f"slice_loss: objective {type(inner).__name__} has no `terms`, to which "
                "those of slice labels are added; make it an objectives.common.SemiSupervised, or "
                "set the weights of slice_loss to 0"
            )
        if self.slices.weighted and isinstance(inner, SemiSupervised) and not inner.has_students:
            raise UserError(
                "slice_loss: every patch that copy-paste learns from shows voxels of a labeled one "
                "too, so that neg_sup, mil and size have nothing to speak of; set them to 0 "
                "(gate_pseudo works), or choose objective w2s with pairing=unlabeled"
            )
        blends_logits = isinstance(inner, InterpolationConsistency) and inner.mix == "logit"
        if self.slices.gate_pseudo and blends_logits:
            raise UserError(
                "slice_loss.gate_pseudo: objective ict blends logits (mix=logit), in which a class "
                "that one of two patches lacks is lost to the other, too; choose mix=prob, or set "
                "gate_pseudo to False"
            )

    @property
    def twins(self) -> tuple[str, ...]:
        return self.inner.twins

    @property
    def one_view(self) -> bool | None:
        return getattr(self.inner, "one_view", None)

    @property
    def uses_unlabeled(self) -> bool:
        return self.inner.uses_unlabeled

    @property
    def ema_decay(self) -> float | None:
        return self.inner.ema_decay

    @property
    def ema_t0(self) -> int:
        return self.inner.ema_t0

    def init(self, model: nn.Module, image: Array, key: PRNGKeyArray) -> Params:
        return self.inner.init(model, image, key)

    def deployable(self, params: Params, ema: Params | None) -> dict[str, Params]:
        return self.inner.deployable(params, ema)

    def loss(self, learner: Learner, batch: Batch, key: PRNGKeyArray) -> tuple[Scalar, Metrics]:
        rows = batch.slice_labels
        if rows is None or not isinstance(self.inner, SemiSupervised):
            return self.inner.loss(learner, batch, key)
        if self.slices.gate_pseudo:
            learner = dataclasses.replace(learner, gate=partial(gate, rows=rows))
        terms = self.inner.terms(learner, batch, key)
        loss, metrics = total(learner, terms)
        if not terms.students:
            return loss, metrics
        added, said = self.slices(learner, terms.mixed(rows), *terms.students)
        return loss + added, metrics | said


def gate(logits: Maps, rows: Rows) -> Maps:
    """Logits whose softmax is renormalized over the classes a slice may show.

    p_c m_c / sum_j p_j m_j, where m is 0 for what a slice lacks and 1 for background and whatever
    is not known. With nothing known the logits come back bit for bit.

    Source: Papandreou et al. 2015, arXiv:1502.02734 (latent labels constrained by image labels).
    """
    return jnp.where(_absent(rows), _NEVER, logits)


def negatives(logits: Maps, rows: Rows, form: str = "ce") -> Scalar:
    """Minus the log probability of all that may be, over voxels where some class cannot be.

    Where every class is absent that is cross entropy with background, the supervised target. Soft
    Dice would do nothing here: its gradient on an empty target is 1e-5 over the squared volume.

    Source: marginal loss on known-absent classes; Ulrich et al. 2024, arXiv:2404.15718, penalize
    the same predictions.
    """
    logits, absent = logits.astype(jnp.float32), _absent(rows)
    if form == "volume":
        loss = jnp.where(absent, jax.nn.softmax(logits), 0).sum(-1)
    else:
        possible = jnp.where(absent, _NEVER, logits)
        loss = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(possible, -1)
    counts = absent.any(-1)
    size = counts.sum() * (loss.size // counts.size)  # `counts` has one value per slice
    return (loss * counts).sum() / jnp.maximum(size, 1)


def presence(logits: Maps, rows: Rows, sharpness: float = 5.0, least: float = 10.0) -> Scalar:
    """Cross entropy of slice labels with pooled margins, over slices of which something is known.

    The score of a slice of N voxels is its pooled margin plus log(N / least) / sharpness: 0 when
    `least` voxels sit at margin 0 and the others far below.

    Source: Pinheiro and Collobert 2015, arXiv:1411.6228 (log-sum-exp pooling).
    """
    margin = _margins(logits)
    score = pool(margin, sharpness) + jnp.log(_area(margin) / least) / sharpness
    labeled = rows >= 0
    loss = jax.nn.softplus(score) - score * (rows == 1)
    return (loss * labeled).sum() / jnp.maximum(labeled.sum(), 1)


def pool(margin: Float[Array, "U D H W C"], sharpness: float) -> Float[Array, "U D C"]:
    """(1/r) log mean exp(r m) over the slice: between mean (r to 0) and maximum (r to infinity)."""
    total = jax.nn.logsumexp(sharpness * margin, axis=(2, 3))
    return (total - jnp.log(_area(margin))) / sharpness


def sizes(
    logits: Maps, rows: Rows, least: float = 1.0, barrier: Array | float | None = None
) -> Scalar:
    """Violation of bounds on the soft area V of each class in each known slice of N voxels.

    A slice that shows the class has V between `least` and N, one that lacks it V = 0. The penalty
    is (max(0, least - V)^2 + max(0, V - most)^2) / N; with `barrier`, its t, the log-barrier
    extension of (least - V) / least and (V - most) / N.

    Source: Kervadec et al. 2019, arXiv:1805.04628 (penalty), arXiv:1904.04205 (barrier).
    """
    prob = jax.nn.softmax(logits.astype(jnp.float32))[..., 1:]
    volume, whole = prob.sum((2, 3)), _area(prob)
    shown, labeled = rows == 1, rows >= 0
    over = volume - jnp.where(shown, whole, 0)
    under = jnp.where(shown, least - volume, 0)
    if barrier is None:
        loss = (jnp.maximum(under, 0) ** 2 + jnp.maximum(over, 0) ** 2) / whole
    else:
        loss = log_barrier(over / whole, barrier)
        loss = loss + jnp.where(shown, log_barrier(under / least, barrier), 0)
    return (loss * labeled).sum() / jnp.maximum(labeled.sum(), 1)


def log_barrier(z: Array, t: Array | float) -> Array:
    """-log(-z) / t, and its tangent beyond z = -1/t^2: finite where the constraint z <= 0 fails."""
    edge = -1 / t**2
    inside = -jnp.log(-jnp.where(z <= edge, z, edge)) / t
    return jnp.where(z <= edge, inside, t * z - jnp.log(1 / t**2) / t + 1 / t)


def _absent(rows: Rows) -> Bool[Array, "U D 1 1 K"]:
    """Classes a slice does not show, background being never one of them."""
    absent = jnp.pad(rows == 0, ((0, 0), (0, 0), (1, 0)))
    return absent[:, :, None, None]


def _margins(logits: Maps) -> Float[Array, "U D H W C"]:
    """Log odds of every foreground class against all others."""
    log_prob = jax.nn.log_softmax(logits.astype(jnp.float32))
    classes = logits.shape[-1]
    others = [
        jax.nn.logsumexp(jnp.delete(log_prob, c, axis=-1, assume_unique_indices=True), -1)
        for c in range(1, classes)
    ]
    return log_prob[..., 1:] - jnp.stack(others, -1)


def _area(maps: Float[Array, "U D H W C"]) -> float:
    """Voxels of a slice."""
    return float(maps.shape[2] * maps.shape[3])
