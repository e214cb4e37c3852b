"""nnU-Net's network for a spacing: which axes are halved when, what that costs, what fits a GPU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bhsd_jax.platform.errors import UserError

_SHORTEST_EDGE = 4  # voxels an axis keeps at the bottleneck
_MIN_BATCH = 2
_REFERENCE_BATCH = {3: 2, 2: 12}  # by number of axes: the batch a planner's budget stands for
_START_EDGE = {3: 256, 2: 2048}  # by number of axes: of the first patch tried, were it a cube
_WIDEST = {3: 320, 2: 512}  # by number of axes: channels
_NARROWEST = 32  # channels


@dataclass(frozen=True)
class Planner:
    """Constants of one of nnU-Net's planner classes, and its U-Net."""

    kind: str  # nnU-Net's class
    plans_name: str  # nnU-Net's file name
    memory_gb: float  # GPU the budget was fitted to
    budget: Mapping[int, float]  # by number of axes: activations of a reference batch
    coverage: float  # of the data set's voxels, at most, in one batch
    residual: bool
    blocks: tuple[int, ...]  # encoder, per stage; the last number goes on
    convs: int  # decoder, per stage

    def encoder(self, stages: int) -> tuple[int, ...]:
        """Convolutions (residual: blocks) of every encoder stage."""
        return tuple(self.blocks[min(s, len(self.blocks) - 1)] for s in range(stages))

    def decoder(self, stages: int) -> tuple[int, ...]:
        """Convolutions of every decoder stage, one stage fewer than the encoder has."""
        return (self.convs,) * (stages - 1)


def _resenc(size: str, memory_gb: float, budget: Mapping[int, float]) -> Planner:
    kind, plans = f"nnUNetPlannerResEnc{size}", f"nnUNetResEncUNet{size}Plans"
    return Planner(kind, plans, memory_gb, budget, 1.0, True, (1, 3, 4, 6), 1)


PLANNERS = {
    "default": Planner(
        "ExperimentPlanner", "nnUNetPlans", 8, {3: 560e6, 2: 85e6}, 0.05, False, (2,), 2
    ),
    "resenc_m": _resenc("M", 8, {3: 680e6, 2: 135e6}),
    "resenc_l": _resenc("L", 24, {3: 2100e6, 2: 380e6}),
    "resenc_xl": _resenc("XL", 40, {3: 3600e6, 2: 560e6}),
}


def planner_named(name: str) -> Planner:
    """Looks a planner up.

    Raises:
        ValueError: If there is none of that name; lists the names.
    """
    if name not in PLANNERS:
        raise UserError(f"planner is one of {', '.join(PLANNERS)}; got {name!r}")
    return PLANNERS[name]


@dataclass(frozen=True)
class Pooling:
    """Strides and kernels of the stages, and the patch they fit; axes as in the spacing."""

    patch: tuple[int, ...]  # a multiple of `total_stride`
    strides: tuple[tuple[int, ...], ...]  # per stage; stage 0 is all 1
    kernels: tuple[tuple[int, ...], ...]  # per stage

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Product of the strides along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def pool(spacing_mm: Sequence[float], size: Sequence[float]) -> Pooling:
    """Halves the finest axes until they are short, and pads `size` up to what that asks for.

    An axis coarser than its neighbors waits: it is neither halved nor convolved across before the
    others have come within a factor of 2 of it. Once convolved across, always. The last stage has
    kernel 3 along every axis. `size` may hold halves (the median of an even number of scans).

    Source: nnU-Net v2.8.1, `network_topology.get_pool_and_conv_props`.
    """
    spacing, edge = list(spacing_mm), list(size)
    kernel = tuple(1 for _ in spacing)
    strides, kernels = [kernel], []
    while any(halved := _axes_to_halve(spacing, edge)):
        finest = min(spacing)
        kernel = tuple(3 if s / finest < 2 else k for s, k in zip(spacing, kernel, strict=True))
        kernels.append(kernel)
        strides.append(tuple(2 if yes else 1 for yes in halved))
        spacing = [s * 2 if yes else s for s, yes in zip(spacing, halved, strict=True)]
        edge = [math.ceil(n / 2) if yes else n for n, yes in zip(edge, halved, strict=True)]
    kernels.append((3,) * len(spacing))
    totals = [math.prod(axis) for axis in zip(*strides, strict=True)]
    patch = tuple(math.ceil(n / total) * total for n, total in zip(size, totals, strict=True))
    return Pooling(patch, tuple(strides), tuple(kernels))


def _axes_to_halve(spacing: Sequence[float], edge: Sequence[float]) -> list[bool]:
    long = [n >= 2 * _SHORTEST_EDGE for n in edge]
    if not any(long):
        return long
    finest = min(s for s, yes in zip(spacing, long, strict=True) if yes)
    halved = [yes and s / finest < 2 for s, yes in zip(spacing, long, strict=True)]
    # A stage that halves one axis alone is made only if that axis is longer than usual.
    if sum(halved) == 1 and edge[halved.index(True)] < 3 * _SHORTEST_EDGE:
        return [False] * len(halved)
    return halved


def widths(stages: int, axes: int = 3, base: int = _NARROWEST, widest: int = 0) -> tuple[int, ...]:
    """Channels per stage: doubled from `base` up to `widest` (0: nnU-Net's, by number of axes)."""
    return tuple(min(widest or _WIDEST[axes], base * 2**s) for s in range(stages))


def activations(pooling: Pooling, planner: Planner, num_classes: int) -> int:
    """Counts the values all convolutions of the U-Net put out for one patch: the memory proxy.

    A residual block has two convolutions, and a third for the skip where it halves; before them
    lies a stem. Each decoder stage has a transposed convolution besides its own; there is one head,
    at full resolution.

    Source: dynamic-network-architectures 0.4.4, `compute_conv_feature_map_size`.
    """
    stages, axes = len(pooling.strides), len(pooling.patch)
    edges, sizes = list(pooling.patch), []
    for stride, width in zip(pooling.strides, widths(stages, axes), strict=True):
        edges = [n // step for n, step in zip(edges, stride, strict=True)]
        sizes.append(width * math.prod(edges))
    # Residual stage 0 halves nothing; the third convolution counted for it is the stem, which
    # has its width and size.
    convs = [2 * n + 1 if planner.residual else n for n in planner.encoder(stages)]
    encoder = sum(n * size for n, size in zip(convs, sizes, strict=True))
    decoder = sum((n + 1) * size for n, size in zip(planner.decoder(stages), sizes, strict=False))
    head = num_classes * math.prod(pooling.patch) if stages > 1 else 0
    return encoder + decoder + head


def fit(
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    dataset_voxels: float,
    planner: Planner,
    *,
    num_classes: int,
    memory_gb: float,
) -> tuple[Pooling, int]:
    """Finds the largest patch, shaped like a block of tissue, that trains in memory; and the batch.

    Starts from a cube in mm, cut to the median scan, and shortens the axis that covers most of the
    median scan (the last of equals) until the activations are within budget. What is left goes into
    the batch, which never holds more than the planner's share of the data set, nor less than 2.

    Raises:
        ValueError: If no patch fits.

    Source: nnU-Net v2.8.1, `get_plans_for_configuration`.
    """
    axes = len(spacing_mm)
    budget = planner.budget[axes] * (memory_gb / planner.memory_gb)
    reference = _REFERENCE_BATCH[axes]
    pooling = pool(spacing_mm, _first_patch(spacing_mm, median_shape))
    cost = activations(pooling, planner, num_classes)
    # The residual planners compare a whole reference batch, in 2D too; the default one scales
    # to the smallest batch allowed.
    while (cost if planner.residual else cost / reference * _MIN_BATCH) > budget:
        pooling = _shorter(pooling, spacing_mm, median_shape)
        cost = activations(pooling, planner, num_classes)
    most = round(dataset_voxels * planner.coverage / math.prod(pooling.patch))
    return pooling, max(min(round(budget / cost * reference), most), _MIN_BATCH)


def _first_patch(spacing_mm: Sequence[float], median_shape: Sequence[float]) -> list[float]:
    axes = len(spacing_mm)
    density = [1 / s for s in spacing_mm]
    scale = (_START_EDGE[axes] ** axes / math.prod(density)) ** (1 / axes)
    return [min(round(n * scale), size) for n, size in zip(density, median_shape, strict=True)]


def _shorter(
    pooling: Pooling, spacing_mm: Sequence[float], median_shape: Sequence[float]
) -> Pooling:
    covered = [n / size for n, size in zip(pooling.patch, median_shape, strict=True)]
    axis = max(range(len(covered)), key=lambda i: (covered[i], i))
    # A patch that is one total stride shorter may be halved less often, and then smaller steps
    # are possible: 256 halved 6 times would jump to 192, past 224.
    edges = list(pooling.patch)
    edges[axis] -= pooling.total_stride[axis]
    step = pool(spacing_mm, edges).total_stride[axis]
    edges[axis] = pooling.patch[axis] - step
    if edges[axis] < 1:
        raise UserError(f"planner: not even a patch of {pooling.patch} voxels fits the memory")
    return pool(spacing_mm, edges)
