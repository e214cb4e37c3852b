"""Masked-image modeling: hidden blocks of a patch are filled in from what is around them."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bhsd_jax.objectives.common import SingleModel, forward_both, require_fraction
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Shape


@dataclass(frozen=True)
class MaskedModeling(SingleModel):
    """The mean squared error of the intensities of hidden blocks; no mask of any scan is used.

    Hidden voxels are 0 once normalized: the mean of the scan in MR, of the foreground in CT. The
    first C logits of the full-resolution head, C being the channels of the image, are what is
    filled in; a training that begins with these weights (`train.init_from`) is to leave the head
    out, as `train.init_leave` can: where it has as many classes, all of it would fit.
    Labeled and unlabeled patches count alike, and every hidden voxel counts the same.

    Source: Xie et al. 2022 (SimMIM, arXiv:2111.09886, which predicts raw values of hidden squares
    alone); for U-Nets in three dimensions Wald et al. 2024, arXiv:2410.23132.
    """

    # Of the class, and so without a type: with one it would be a field of a config.
    segments = False  # the label maps of such a network would mean nothing
    block: tuple[int, int, int] = (4, 4, 4)  # D, H, W of what is hidden at once, voxels
    hidden: float = 0.6  # share of the blocks

    def __post_init__(self):
        super().__post_init__()
        require_fraction("masked: hidden", self.hidden, "share of the blocks")
        if min(self.block) < 1 or self.hidden in (0, 1):
            raise UserError(
                "masked: a block has at least one voxel, and some but not all blocks are hidden; "
                f"got block {self.block}, hidden {self.hidden}"
            )

    def loss(self, learner, batch, key):
        labeled_key, unlabeled_key, network_key = jax.random.split(key, 3)
        patches = batch.image, batch.unlabeled
        masks = [
            blocks(own, x, self.block, self.hidden)
            for own, x in zip((labeled_key, unlabeled_key), patches, strict=True)
        ]
        shown = [jnp.where(m[..., None], 0, x) for m, x in zip(masks, patches, strict=True)]
        heads = forward_both(learner, learner.params, shown[0], shown[1], network_key)
        errors = [squares(h[0], x) for h, x in zip(heads, patches, strict=True)]
        wrong = sum((jnp.where(m, e, 0).sum() for m, e in zip(masks, errors, strict=True)), 0.0)
        loss = wrong / jnp.maximum(sum(m.sum() for m in masks), 1)
        return loss, {"fill_in": loss}


def blocks(
    key: PRNGKeyArray, image: Float[Array, "B D H W C"], block: Shape, share: float
) -> Bool[Array, "B D H W"]:
    """True in a random `share` of the blocks of every patch; one at least is hidden, one shown.

    A block is at most half of the patch along each axis. Blocks at the upper ends may be cut.
    """
    batch, *size = image.shape[:4]
    sides = [min(side, max(1, n // 2)) for n, side in zip(size, block, strict=True)]
    counts = [-(-n // side) for n, side in zip(size, sides, strict=True)]
    number = math.prod(counts)
    order = jnp.argsort(jax.random.uniform(key, (batch, number)))
    hidden = jnp.argsort(order) < min(max(1, round(share * number)), max(1, number - 1))
    mask = hidden.reshape(batch, *counts)
    for axis, (n, side) in enumerate(zip(size, sides, strict=True), start=1):
        mask = jax.lax.slice_in_dim(jnp.repeat(mask, side, axis), 0, n, axis=axis)
    return mask


def squares(
    logits: Float[Array, "B D H W K"], image: Float[Array, "B D H W C"]
) -> Float[Array, "B D H W"]:
    """Squared error of every voxel, the mean over the channels of the image.

    Raises:
        ValueError: If the network has fewer outputs than the image has channels.
    """
    channels = image.shape[-1]
    if logits.shape[-1] < channels:
        raise UserError(
            f"masked: the network has {logits.shape[-1]} outputs and the image {channels} "
            "channels; pretrain with windows='plan', or with more classes"
        )
    return ((logits[..., :channels].astype(jnp.float32) - image) ** 2).mean(-1)
