"""The networks that the benchmarks run, as plain data for both sides, and what they cost."""

import math
from dataclasses import dataclass

Triple = tuple[int, int, int]
_FLAT, _CUBE = (1, 3, 3), (3, 3, 3)
_ONE, _PLANE, _ALL = (1, 1, 1), (1, 2, 2), (2, 2, 2)


@dataclass(frozen=True)
class Preset:
    """A network and the patches it trains on; nnU-Net's have two convolutions a stage."""

    features: tuple[int, ...]
    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    patch: Triple
    batch: int = 2
    channels: int = 1
    classes: int = 6
    family: str = "plain"  # or "resenc"; of the others `features` is the feature size alone

    @property
    def heads(self) -> bool:
        """Whether it has nnU-Net's heads on every stage."""
        return self.family in ("plain", "resenc")


@dataclass(frozen=True)
class Layer:
    """One convolution: what it sees and does."""

    size: Triple  # of its input
    channels: int
    features: int
    kernel: Triple
    strides: Triple

    @property
    def flops(self) -> int:
        """Of one sample, forward; a multiplication and an addition are two."""
        places = math.prod(n // s for n, s in zip(self.size, self.strides, strict=True))
        return 2 * places * math.prod(self.kernel) * self.channels * self.features

    def __str__(self) -> str:
        size, kernel = ("x".join(map(str, axes)) for axes in (self.size, self.kernel))
        stride = "" if self.strides == _ONE else f" stride {'x'.join(map(str, self.strides))}"
        return f"{size} {self.channels}->{self.features} {kernel}{stride}"


BLOCKS = (1, 3, 4, 6)  # residual blocks per stage of the encoder
_DEEP = (32, 64, 128, 256, 320, 320, 320)
PRESETS = {
    "tiny": Preset((4, 8), (_ONE, _PLANE), (_FLAT, _CUBE), (4, 16, 16)),
    "swin": Preset((24,), (_ONE,), (_CUBE,), (32, 96, 96), family="swin"),
    "unetr": Preset((16,), (_ONE,), (_CUBE,), (32, 96, 96), family="unetr"),
    "cotr": Preset((64,), (_ONE,), (_CUBE,), (32, 96, 96), family="cotr"),
    "nnformer": Preset((96,), (_ONE,), (_CUBE,), (64, 64, 64), family="nnformer"),
    # The first four stages of nnU-Net's plan for BHSD (5 mm slices).
    "small": Preset(_DEEP[:4], (_ONE, *(_PLANE,) * 3), (*(_FLAT,) * 3, _CUBE), (16, 128, 128)),
    # With nnU-Net's residual encoder: 1, 3, 4 and 6 blocks.
    "resenc": Preset(
        _DEEP[:4],
        (_ONE, *(_PLANE,) * 3),
        (*(_FLAT,) * 3, _CUBE),
        (16, 128, 128),
        family="resenc",
    ),
    # The same sizes with kernels that are cubes from stage 1 on, as for thinner slices.
    "small3d": Preset(
        _DEEP[:4], (_ONE, _PLANE, _ALL, _ALL), (_FLAT, *(_CUBE,) * 3), (16, 128, 128)
    ),
    "bhsd": Preset(
        _DEEP,
        (_ONE, *(_PLANE,) * 3, *(_ALL,) * 2, _PLANE),
        (*(_FLAT,) * 3, *(_CUBE,) * 4),
        (20, 320, 256),
    ),
}


def layers(preset: Preset) -> list[Layer]:
    """Every convolution but the transposed ones and the heads, in the order they run."""
    found: list[Layer] = []
    size, channels, sizes = preset.patch, preset.channels, []
    for features, strides, kernel in zip(
        preset.features, preset.strides, preset.kernels, strict=True
    ):
        found.append(Layer(size, channels, features, kernel, strides))
        size = tuple(n // s for n, s in zip(size, strides, strict=True))
        found.append(Layer(size, features, features, kernel, _ONE))
        channels = features
        sizes.append(size)
    for i in reversed(range(len(sizes) - 1)):
        features, kernel = preset.features[i], preset.kernels[i]
        found.append(Layer(sizes[i], 2 * features, features, kernel, _ONE))
        found.append(Layer(sizes[i], features, features, kernel, _ONE))
    return found


def step_flops(preset: Preset) -> int:
    """Of the convolutions of one step over a batch: forward, and twice that backward."""
    forward, size = sum(layer.flops for layer in layers(preset)), preset.patch
    for i, features in enumerate(preset.features):
        size = tuple(n // s for n, s in zip(size, preset.strides[i], strict=True))
        if i:  # the transposed convolution upward
            block = math.prod(preset.strides[i])
            forward += 2 * math.prod(size) * features * block * preset.features[i - 1]
        if i < len(preset.features) - 1:
            forward += 2 * math.prod(size) * features * preset.classes
    return 3 * preset.batch * forward
