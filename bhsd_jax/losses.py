"""Losses on logits and integer labels; every sum in float32.

Source for the numbers: nnU-Net 2.8.1 (`DC_and_CE_loss`, `DeepSupervisionWrapper`) and MONAI 1.6.1
(`DiceCELoss`), both reproduced to float32 rounding by `DiceCE`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar


def cross_entropy(
    logits: Float[Array, "B D H W K"],
    label: Int[Array, "B D H W"],
    valid: Bool[Array, "B D H W"] | None = None,
    class_weight: tuple[float, ...] | None = None,
) -> Scalar:
    """Mean cross entropy over voxels, in nats.

    Voxels that are not `valid` do not count; with none valid the value is 0. With class weights it
    is the weighted mean, as in PyTorch.
    """
    nats = -_pick(jax.nn.log_softmax(logits.astype(jnp.float32)), label)
    if valid is None and class_weight is None:
        return nats.mean()
    weight = jnp.ones_like(nats)
    if class_weight is not None:
        weight = jnp.asarray(class_weight, jnp.float32)[label]
    if valid is not None:
        weight = weight * valid
    return (weight * nats).sum() / jnp.maximum(weight.sum(), 1e-8)


def entropy(logits: Float[Array, "B D H W K"], epsilon: float = 0.0) -> Float[Array, "B D H W"]:
    """Entropy of every voxel's classes as a share of the largest possible, log K: 0 to 1.

    `epsilon` is added to probabilities before the logarithm: 1e-6 in SSL4MIS, which a voxel notices
    that is sure to about as much.
    """
    log_prob = jax.nn.log_softmax(logits.astype(jnp.float32))
    if epsilon:
        prob = jnp.exp(log_prob)
        return -(prob * jnp.log(prob + epsilon)).sum(-1) / np.log(logits.shape[-1])
    # With log p from the log-softmax: the gradient of p log p is NaN where p underflows.
    return -(jnp.exp(log_prob) * log_prob).sum(-1) / np.log(logits.shape[-1])


def consistency(
    logits: Float[Array, "B D H W K"],
    target: Float[Array, "B D H W K"],
    valid: Bool[Array, "B D H W"] | None = None,
) -> Scalar:
    """Mean squared difference of probabilities, over voxels and classes; `target` sums to 1."""
    return valid_mean((jax.nn.softmax(logits.astype(jnp.float32)) - target) ** 2, valid)


def valid_mean(
    values: Float[Array, "B D H W *K"], valid: Bool[Array, "B D H W"] | None = None
) -> Scalar:
    """Mean over all voxels, or over those that are valid; 0 if there are none."""
    if valid is None:
        return values.mean()
    each = values.reshape(*valid.shape, -1).mean(-1)
    return jnp.where(valid, each, 0).sum() / jnp.maximum(valid.sum(), 1)


def both(
    counts: Bool[Array, "B D H W"], valid: Bool[Array, "B D H W"] | None
) -> Bool[Array, "B D H W"]:
    """Voxels that count and are valid."""
    return counts if valid is None else counts & valid


def soft_dice(
    logits: Float[Array, "B D H W K"],
    label: Int[Array, "B D H W"],
    *,
    valid: Bool[Array, "B D H W"] | None = None,
    batch: bool = False,
) -> Float[Array, "*rows C"]:
    """Soft Dice coefficient of every sample and foreground class; with `batch`, of every class.

    `batch` sums over the patches first: an absent class then leans on the patches that have it.
    With nnU-Net's smoothing, 1e-5, a class absent from a sample costs nothing until its probability
    mass is near 1e-5, and then almost a full class (nnU-Net issue 1395).
    """
    prob, truth = _of_classes(logits, label, background=False)
    return _coefficient(prob, truth, valid, batch=batch, squared=False, smooth=(1e-5, 1e-5))


def _of_classes(
    logits: Float[Array, "B D H W K"], label: Int[Array, "B D H W"], *, background: bool
) -> tuple[Float[Array, "B D H W C"], Float[Array, "B D H W C"]]:
    """Probability and truth of every class, with or without the background."""
    prob = jax.nn.softmax(logits.astype(jnp.float32))
    truth = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    return (prob, truth) if background else (prob[..., 1:], truth[..., 1:])


def _coefficient(
    prob: Float[Array, "B D H W C"],
    truth: Float[Array, "B D H W C"],
    valid: Bool[Array, "B D H W"] | None,
    *,
    batch: bool,
    squared: bool,
    smooth: tuple[float, float],
) -> Float[Array, "*rows C"]:
    """Dice of probabilities; `smooth` is added to numerator and denominator.

    The denominator never falls below 1e-8.

    Source: Milletari et al. 2016, arXiv:1606.04797, whose denominator is the `squared` one.
    """
    if valid is not None:
        prob, truth = prob * valid[..., None], truth * valid[..., None]
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    overlap = (prob * truth).sum(axes)
    total = ((prob**2 if squared else prob) + truth).sum(axes)
    return (2 * overlap + smooth[0]) / jnp.maximum(total + smooth[1], 1e-8)


@dataclass(frozen=True)
class DiceCE:
    """Weighted cross entropy plus soft Dice loss, over one head or several.

    The defaults are nnU-Net's, where the Dice part is minus the coefficient (-1 is perfect).
    """

    batch_dice: bool = False
    smooth: float = 1e-5
    smooth_denominator: float | None = None  # None: as `smooth`
    background: bool = False  # background counts as a class of the Dice part
    squared: bool = False
    from_one: bool = False  # the Dice part is one minus the coefficient (MONAI); same gradient
    dice_weight: float = 1.0
    ce_weight: float = 1.0
    class_weight: tuple[float, ...] | None = None
    ignore: int | None = None  # label whose voxels count in neither part

    def __call__(self, logits: Sequence[Array], label: Int[Array, "B D H W"]) -> Scalar:
        """Loss of all heads, in proportion 1, 1/2, 1/4 ... with the coarsest of several at 0."""
        weights = head_weights(len(logits))
        targets = [shrink_label(label, head.shape[1:4]) for head in logits]
        return self.heads(logits, targets, weights)

    def heads(
        self, logits: Sequence[Array], labels: Sequence[Array], weights: Sequence[float]
    ) -> Scalar:
        """Weighted sum over heads; a head of weight 0 is not computed."""
        parts = [
            weight * self.single(head, target)
            for head, target, weight in zip(logits, labels, weights, strict=True)
            if weight
        ]
        return jnp.asarray(sum(parts), jnp.float32)

    def single(self, logits: Float[Array, "B D H W K"], label: Int[Array, "B D H W"]) -> Scalar:
        """Loss of one head."""
        return self.ce_weight * self.cross_entropy(logits, label) + self.dice_weight * self.dice(
            logits, label
        )

    def cross_entropy(
        self, logits: Float[Array, "B D H W K"], label: Int[Array, "B D H W"]
    ) -> Scalar:
        """The cross-entropy part, unweighted."""
        label, valid = self._split(label)
        return cross_entropy(logits, label, valid, self.class_weight)

    def dice(self, logits: Float[Array, "B D H W K"], label: Int[Array, "B D H W"]) -> Scalar:
        """The Dice part, unweighted."""
        label, valid = self._split(label)
        prob, truth = self._compared(logits, label)
        below = self.smooth if self.smooth_denominator is None else self.smooth_denominator
        coefficient = _coefficient(
            prob,
            truth,
            valid,
            batch=self.batch_dice,
            squared=self.squared,
            smooth=(self.smooth, below),
        )
        loss = float(self.from_one) - coefficient
        if self.class_weight is not None:
            weight = jnp.asarray(self.class_weight, jnp.float32)
            loss = loss * (weight if self.background else weight[1:])
        return loss.mean()

    def _compared(self, logits: Array, label: Array) -> tuple[Array, Array]:
        """Probability and truth of all that has a Dice coefficient, in the last axis."""
        return _of_classes(logits, label, background=self.background)

    def _split(self, label: Array) -> tuple[Array, Array | None]:
        """The label map with 0 where it is to be ignored, and where it is not; None: nowhere."""
        if self.ignore is None:
            return label, None
        valid = label != self.ignore
        return jnp.where(valid, label, 0), valid


@dataclass(frozen=True)
class DiceBCE(DiceCE):
    """Binary cross entropy plus soft Dice loss of regions, which may overlap.

    Every output is a region, the union of some values of the label map. Voxels to ignore count in
    neither part; where there may be any, the cross entropy is the sum over regions, else the mean.

    Source: nnU-Net v2.8.1, `DC_and_BCE_loss`.
    """

    regions: tuple[tuple[int, ...], ...] = ()  # values of each output

    def cross_entropy(
        self, logits: Float[Array, "B D H W R"], label: Int[Array, "B D H W"]
    ) -> Scalar:
        """The cross-entropy part, unweighted."""
        label, valid = self._split(label)
        x, truth = logits.astype(jnp.float32), self._truth(label)
        nats = jnp.maximum(x, 0) - x * truth + jnp.log1p(jnp.exp(-jnp.abs(x)))
        if valid is None:
            return nats.mean()
        return (nats * valid[..., None]).sum() / jnp.maximum(valid.sum(), 1e-8)

    def _compared(self, logits: Array, label: Array) -> tuple[Array, Array]:
        return jax.nn.sigmoid(logits.astype(jnp.float32)), self._truth(label)

    def _truth(self, label: Int[Array, "B D H W"]) -> Float[Array, "B D H W R"]:
        regions = [
            jnp.stack([label == value for value in values]).any(0) for values in self.regions
        ]
        return jnp.stack(regions, axis=-1).astype(jnp.float32)


def head_weights(heads: int) -> tuple[float, ...]:
    """Deep-supervision weights, full resolution first; they sum to 1.

    Halved from head to head; the coarsest gets none unless it is alone.
    """
    raw = [0.5**i for i in range(heads)]
    if heads > 1:
        raw[-1] = 0.0
    return tuple(w / sum(raw) for w in raw)


def shrink_label(label: Int[Array, "B D H W"], shape: Sequence[int]) -> Int[Array, "B d h w"]:
    """Label map at a coarser head's size, by the voxel nearest to each center ("nearest-exact")."""
    for axis, new in enumerate(shape, start=1):
        old = label.shape[axis]
        if old != new:
            index = np.floor((np.arange(new) + 0.5) * (old / new)).astype(int)
            label = jnp.take(label, np.minimum(index, old - 1), axis=axis)
    return label


def average_target(
    target: Float[Array, "B D H W K"], shape: Sequence[int]
) -> Float[Array, "B d h w K"]:
    """Probabilities at a coarser head's size: the mean over the voxels each of its own covers."""
    return _blocks(target, shape).mean((2, 4, 6))


def all_valid(valid: Bool[Array, "B D H W"], shape: Sequence[int]) -> Bool[Array, "B d h w"]:
    """Voxels of a coarser head that cover valid voxels only."""
    return _blocks(valid, shape).all((2, 4, 6))


def _blocks(values: Array, shape: Sequence[int]) -> Array:
    """[B D H W ...] -> [B d D/d h H/h w W/w ...]; heads divide the patch."""
    batch, *sizes = values.shape[:4]
    split = [n for old, new in zip(sizes, shape, strict=True) for n in (new, old // new)]
    return values.reshape(batch, *split, *values.shape[4:])


def _pick(values: Float[Array, "B D H W K"], label: Int[Array, "B D H W"]) -> Array:
    # A masked sum: take_along_axis has a scatter for its gradient, which is slow everywhere.
    classes = jnp.arange(values.shape[-1])
    return jnp.where(label[..., None] == classes, values, 0).sum(-1)
