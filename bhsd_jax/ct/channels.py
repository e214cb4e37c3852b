"""The input channels of one scan: their common crop, nnU-Net's normalization, and its labels."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Num, UInt8
from scipy import ndimage

from bhsd_jax.ct import geometry
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.volume import Channel, Grid, Plan, Volume

Box = Float[np.ndarray, "d h w"]  # one channel inside the crop, before it is resampled

_SMALLEST = 1e-8  # that a channel is divided by
_LARGEST_COLOR = 255
_SAME_SPACING = 1e-3  # share by which the spacings of two channels may differ
_SAME_PLACE_MM = 0.01


def _ct(box: Box, mask: np.ndarray | None, channel: Channel) -> Box:
    low, mean, std, high = channel.foreground
    return (np.clip(box, low, high) - mean) / max(std, _SMALLEST)


def _z_scores(box: Box, mask: np.ndarray | None, channel: Channel) -> Box:
    inside = (box if mask is None else box[mask]).astype(np.float64)
    if not inside.size:
        return np.zeros_like(box)
    scores = (box - inside.mean()) / max(float(inside.std()), _SMALLEST)
    return scores if mask is None else np.where(mask, scores, 0)


def _unchanged(box: Box, mask: np.ndarray | None, channel: Channel) -> Box:
    return box


def _to_one(box: Box, mask: np.ndarray | None, channel: Channel) -> Box:
    lifted = box - box.min()
    return lifted / max(float(lifted.max()), _SMALLEST)


def _colors(box: Box, mask: np.ndarray | None, channel: Channel) -> Box:
    low, high = float(box.min()), float(box.max())
    if low < 0 or high > _LARGEST_COLOR:
        raise Refusal(
            Kind.NO_NUMBERS,
            f"channel {channel.name!r} is normalized as a color, 0 to {_LARGEST_COLOR}, but holds "
            f"{low:g} to {high:g}; name it otherwise in dataset.json",
        )
    return box / _LARGEST_COLOR


CT = "CTNormalization"
SCHEMES: dict[str, Callable[[Box, np.ndarray | None, Channel], Box]] = {
    CT: _ct,
    "ZScoreNormalization": _z_scores,
    "NoNormalization": _unchanged,
    "RescaleTo01Normalization": _to_one,
    "RGBTo01Normalization": _colors,
}


def alike(channels: Sequence[Volume], *, placed: bool) -> tuple[tuple[Volume, ...], list[Finding]]:
    """Channels voxel on voxel, and what is to be said of their places.

    Args:
        channels: As their files have them.
        placed: Whether all files state a place: then channels whose axes run in another order than
            those of the first, on the same voxels, are turned to it.

    Raises:
        Refusal: If shapes or spacings differ; affines may, which is said.
    """
    first, found = channels[0], []
    made = [first]
    for index, other in enumerate(channels[1:], start=1):
        turned = geometry.turned_onto(other, first) if placed else None
        if turned is not None:
            text = f"channel {index} has axes in another order than channel 0; turned to its"
            found.append(Finding(Kind.TURNED, "repaired", text))
            made.append(Volume(turned, first.affine, other.case))
            continue
        made.append(other)
        if other.voxels.shape != first.voxels.shape or not np.allclose(
            other.spacing_mm, first.spacing_mm, rtol=_SAME_SPACING
        ):
            raise Refusal(
                Kind.CHANNELS,
                f"channel {index} has {other.voxels.shape} voxels (D, H, W) of {other.spacing_mm} "
                f"mm, channel 0 {first.voxels.shape} of {first.spacing_mm}; register them first",
            )
        apart = geometry.distance_mm(other.affine, first.affine, first.voxels.shape)
        if apart > _SAME_PLACE_MM:
            text = f"channel {index} lies up to {apart:.3g} mm off channel 0, which is taken"
            found.append(Finding(Kind.CHANNELS, "kept", text))
    return tuple(made), found


def union(channels: Sequence[Volume]) -> Volume:
    """A scan that is not 0 where any channel is not: what the crop is of."""
    if len(channels) == 1:
        return channels[0]
    shown = np.zeros(channels[0].voxels.shape, bool)
    for each in channels:
        shown |= each.voxels != 0
    return Volume(shown, channels[0].affine, channels[0].case)


def prepare(
    channels: Sequence[Volume], grid: Grid, how: Sequence[Channel]
) -> Float32[np.ndarray, "D H W *C"]:
    """Every channel normalized inside the crop, resampled, and stacked last; one is not stacked.

    Raises:
        Refusal: If there is another number of channels than `how` says, or one cannot be
            normalized.

    Source: nnU-Net v2.8.1, `default_normalization_schemes`, `create_nonzero_mask`.
    """
    if len(channels) != len(how):
        names = ", ".join(one.name for one in how)
        text = f"the scan has {len(channels)} channels, the plan {len(how)}: {names}"
        raise Refusal(Kind.CHANNELS, text)
    mask = shown(channels, grid) if any(one.masked for one in how) else None
    made = []
    for volume, one in zip(channels, how, strict=True):
        box = geometry.native_box(volume.voxels, grid).astype(np.float32)
        whole = np.zeros(volume.voxels.shape, np.float32)
        normalized = SCHEMES[one.scheme](box, mask if one.masked else None, one)
        geometry.native_box(whole, grid)[...] = normalized
        made.append(geometry.to_grid(whole, grid, "image").astype(np.float32))
    return made[0] if len(made) == 1 else np.stack(made, axis=-1)


def shown(channels: Sequence[Volume], grid: Grid) -> Bool[np.ndarray, "d h w"]:
    """Voxels of the crop where a channel is not 0, and the holes in them."""
    inside: Num[np.ndarray, "d h w"] = geometry.native_box(union(channels).voxels, grid) != 0
    return np.asarray(ndimage.binary_fill_holes(inside))


def silence(
    image: Float32[np.ndarray, "D H W *C"],
    channels: Sequence[Volume],
    grid: Grid,
    masked: Sequence[int],
) -> Float32[np.ndarray, "D H W *C"]:
    """The prepared image with those channels at 0 outside `shown`, where resampling moved them.

    Source: nnU-Net v2.8.1, whose segmentation is -1 there, which `MaskImageTransform` reads.
    """
    whole = np.zeros(channels[0].voxels.shape, np.uint8)
    geometry.native_box(whole, grid)[...] = shown(channels, grid)
    outside = geometry.to_grid(whole, grid, "label") == 0
    stacked = image.reshape(*image.shape[:3], -1).copy()
    for index in masked:
        stacked[..., index][outside] = 0
    return stacked.reshape(image.shape)


def label_on(
    label: UInt8[np.ndarray, "d h w"], channels: Sequence[Volume], grid: Grid, plan: Plan
) -> UInt8[np.ndarray, "D H W"]:
    """A label map of the scan's own voxels on the grid.

    Where all channels are 0, but for holes, unlabeled voxels are a class of their own meanwhile, so
    that background does not outvote a label at the rim of the scan. A scan that is cropped to a
    head has no such place.

    Source: nnU-Net v2.8.1, `DefaultPreprocessor.run_case`, `crop_to_nonzero`.
    """
    # Of the highest value there is no further one.
    if plan.crop_hu is not None or label.max() == np.iinfo(np.uint8).max:
        return geometry.to_grid(label, grid, "label")
    empty = ~np.asarray(ndimage.binary_fill_holes(union(channels).voxels != 0))
    apart = np.where(empty & (label == 0), 0, label + 1).astype(np.uint8)
    return np.maximum(geometry.to_grid(apart, grid, "label"), 1) - 1
