"""From stored intensities to the network's input channels, in training and inference alike."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Array, Float, Num

from bhsd_jax.platform.errors import UserError

PADS = ("air", "nnunet")


@dataclass(frozen=True)
class CascadeInput:
    """Input of a cascade's second network: normalized channels, then one per foreground label.

    The last raw channel is the label map of the first network, -1 outside the scan.

    Source: nnU-Net v2.8.1, `MoveSegAsOneHotToDataTransform`, `convert_labelmap_to_one_hot`.
    """

    normalization: "Normalization"  # of all raw channels but the last
    raw_channels: int  # the label map's included
    labels: int  # of the foreground: 1, 2, ...

    def __call__(self, image: Num[Array, "*B D H W c"]) -> Float[Array, "*B D H W C"]:
        """What the network sees of a raw image."""
        import jax.numpy as jnp

        scan = self.normalization(image[..., :-1])
        return jnp.concatenate([scan, self.maps(image[..., -1])], axis=-1)

    def maps(self, label: Num[Array, "*B D H W"]) -> Float[Array, "*B D H W C"]:
        """1 where a voxel has the label of the channel, else 0."""
        import jax.numpy as jnp

        values = jnp.arange(1, self.labels + 1, dtype=label.dtype)
        return (label[..., None] == values).astype(jnp.float32)

    @property
    def channels(self) -> int:
        """Number of input channels of the network."""
        return self.normalization.channels + self.labels

    def pad_value(self, kind: str) -> tuple[float, ...]:
        """Raw value to put outside the scan, per raw channel."""
        return (self.normalization.pad_value(kind),) * (self.raw_channels - 1) + (-1.0,)

    def fill(self, kind: str) -> tuple[float, ...]:
        """The pad value as the network sees it: one number per channel."""
        return (*self.normalization.fill(kind), *(0.0,) * self.labels)


@dataclass(frozen=True)
class Normalization:
    """One clip and one affine map per input channel: (clip(x, low, high) - shift) / scale.

    Raises:
        ValueError: If the fields differ in length, or a scale or a clip range is not positive.
    """

    low: tuple[float, ...]  # raw intensity (CT: HU), one entry per channel; may be -inf
    high: tuple[float, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(field) for field in (self.low, self.high, self.shift, self.scale)}
        if len(lengths) != 1 or not self.low:
            raise UserError(
                f"Normalization: needs one entry per channel in every field; got {self}"
            )
        if min(self.scale) <= 0 or any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise UserError(f"Normalization: needs scale > 0 and low < high; got {self}")

    def __call__(self, image: Num[Array, "*B D H W c"]) -> Float[Array, "*B D H W C"]:
        """Float32 channels of a raw image of one channel, or of as many; any leading axes."""
        import jax.numpy as jnp  # here, because verbs that only name the channels need no JAX

        low, high, shift, scale = (
            jnp.asarray(field, jnp.float32)
            for field in (self.low, self.high, self.shift, self.scale)
        )
        return (jnp.clip(image.astype(jnp.float32), low, high) - shift) / scale

    @property
    def channels(self) -> int:
        """Number of input channels of the network."""
        return len(self.low)

    def pad_value(self, kind: str) -> float:
        """Raw intensity to put outside the scan.

        "air" is the lowest clip bound, which is the darkest value of every channel (0 for MR, whose
        range is open). "nnunet" is what channel 0 maps to 0: for CT the mean of the lesions, the
        color of blood; it is there for parity.

        Raises:
            ValueError: If `kind` is neither.
        """
        if kind not in PADS:
            raise UserError(f"windows: no pad {kind!r}; choose from {', '.join(PADS)}")
        if kind == "nnunet":
            return self.shift[0]
        return min(self.low) if math.isfinite(min(self.low)) else 0.0

    def fill(self, kind: str) -> tuple[float, ...]:
        """The pad value as the network sees it: one normalized number per channel."""
        raw = self.pad_value(kind)
        bounds = zip(self.low, self.high, self.shift, self.scale, strict=True)
        return tuple((min(max(raw, a), b) - shift) / scale for a, b, shift, scale in bounds)

    @classmethod
    def from_plan(
        cls, modality: str, foreground: tuple[float, float, float, float], channels: int = 1
    ) -> "Normalization":
        """nnU-Net's: CT by the statistics of the lesions, MR not at all (stored z-scored).

        Args:
            modality: "ct" or "mr".
            foreground: 0.5 percentile, mean, standard deviation, 99.5 percentile.
            channels: Of a stored scan; for "mr".

        Raises:
            ValueError: If the modality is another.

        Source: nnU-Net v2 2.8.1, `CTNormalization`.
        """
        if modality == "mr":
            kept = ((-math.inf,), (math.inf,), (0.0,), (1.0,))
            return cls(*(field * channels for field in kept))
        if modality != "ct":
            raise UserError(f"windows: no modality {modality!r}; choose 'ct' or 'mr'")
        low, mean, deviation, high = (float(value) for value in foreground)
        return cls((low,), (high,), (mean,), (max(deviation, 1e-8),))

    @classmethod
    def from_windows(cls, windows: Iterable[Iterable[float | int]]) -> "Normalization":
        """One channel per CT window (level_hu, width_hu), each mapped linearly onto [-1, 1].

        ((40, 160),) is the preprocessing of the BHSD paper: clip to -40..120 HU, subtract 40,
        divide by 80.

        Raises:
            ValueError: If there is no window, or a width is not positive.
        """
        pairs = [tuple(float(value) for value in window) for window in windows]
        if not pairs or any(len(pair) != 2 or pair[1] <= 0 for pair in pairs):
            raise UserError(
                f"windows: expected ((level_hu, width_hu), ...) with widths above 0; got {pairs}"
            )
        return cls(
            low=tuple(level - width / 2 for level, width in pairs),
            high=tuple(level + width / 2 for level, width in pairs),
            shift=tuple(level for level, _ in pairs),
            scale=tuple(width / 2 for _, width in pairs),
        )
