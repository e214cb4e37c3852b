"""nnU-Net's two networks: a plain U-Net and one with a residual encoder.

Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, and 2024, arXiv:2404.09556;
`dynamic_network_architectures` 0.4.4, whose outputs and gradients these reproduce.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import ConvUnit, rematerialized, require_patch, total_stride
from bhsd_jax.models.conv import Conv, ConvTranspose, Triple
from bhsd_jax.nnunet import planner
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

# What nnU-Net plans for BHSD (5 mm slices, patch 20 x 320 x 256): in plane first, then in depth.
_STRIDES = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
_KERNELS = ((1, 3, 3),) * 3 + ((3, 3, 3),) * 4
_BLOCKS = (1, 3, 4, *(6,) * 10)  # as many as nnU-Net's planner has
NORMS = ("instance", "batch")


class PlainConvUNet(nn.Module):
    """U-Net of convolution, instance norm, leaky ReLU; one head per decoder stage.

    Stage 0 is the full resolution. A field left empty takes the first stages of the BHSD plan; a
    single count stands for every stage. With `deep_supervision` there is a head, and an output,
    for every stage but the lowest; without, only the full-resolution head exists (nnU-Net keeps
    the others as dead weights).

    Raises:
        ValueError: If a field does not fit the number of stages, or the patch not `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = ()  # per stage, of its first convolution
    kernels: tuple[Triple, ...] = ()  # per stage; odd
    convs_encoder: int | tuple[int, ...] = 2
    convs_decoder: int | tuple[int, ...] = 2  # per stage but the lowest, stage 0 first
    deep_supervision: bool = True
    conv_bias: bool = True
    epsilon: float = 1e-5  # of the norm
    affine: bool = True  # of the norm
    norm: str = "instance"  # "batch", of nnUNetTrainerBN, has fixed statistics: to predict with
    slope: float = 0.01
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each stage in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "PlainConvUNet":
        """The plan's topology, for another patch that of nnU-Net's rule; `fields` take precedence.

        Raises:
            ValueError: If the plan counts residual blocks and `fields` no convolutions; or the
                patch does not fit.
        """
        topology, shared = _planned(network, patch, spacing_mm, fields)
        if topology.residual and "convs_encoder" not in fields:
            raise UserError(
                f"PlainConvUNet: the plan is for a residual encoder, {topology.convs_encoder}"
                " blocks per stage, not convolutions; train nnunet.ResidualEncoderUNet"
                " (backbone=nnunet_resenc), or preprocess with preprocess.planner=default"
            )
        convs = topology.convs_encoder[: len(shared["strides"])]
        return cls(**{**shared, "convs_encoder": convs, **fields})

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return total_stride(strides_of(self))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        del train  # one function: no dropout, no running statistics
        require_patch(type(self).__name__, image.shape[1:4], self.stride)
        stage = rematerialized(ConvStage, self.remat)
        strides, kernels = strides_of(self), kernels_of(self)
        convs = counts(self, "convs_encoder", len(self.features))
        x, skips = image.astype(self.dtype), []
        for i, features in enumerate(self.features):
            unit = _unit(self, kernels[i])
            x = stage(unit, features, convs[i], strides[i], name=f"encoder_{i}")(x)
            skips.append(x)
        return _decode(self, skips)


class ResidualEncoderUNet(nn.Module):
    """U-Net whose encoder is a stem and stages of residual blocks (nnU-Net's "ResEnc" presets).

    Everything else, defaults included, is as in `PlainConvUNet`.

    Raises:
        ValueError: If a field does not fit the number of stages, or the patch not `stride`.
    """

    num_classes: int
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Triple, ...] = ()
    kernels: tuple[Triple, ...] = ()
    blocks_encoder: int | tuple[int, ...] = ()
    convs_decoder: int | tuple[int, ...] = 1
    bottleneck: tuple[int, ...] = ()  # inner channels per stage; (): blocks of two convolutions
    stem: int | None = None  # channels; None: those of stage 0
    deep_supervision: bool = True
    conv_bias: bool = True
    epsilon: float = 1e-5
    affine: bool = True
    norm: str = "instance"  # "batch", of nnUNetTrainerBN, has fixed statistics: to predict with
    slope: float = 0.01
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "ResidualEncoderUNet":
        """As `PlainConvUNet`, with the counts of blocks of a plan for a residual encoder.

        A plan for the plain network counts convolutions; then the blocks are the published ones.
        A `convs_decoder` of 1, the default, yields to a plan for a residual encoder.

        Raises:
            ValueError: If the patch does not fit.
        """
        topology, shared = _planned(network, patch, spacing_mm, fields)
        if topology.residual:
            shared["blocks_encoder"] = topology.convs_encoder[: len(shared["strides"])]
            if fields.get("convs_decoder") == 1:  # as `backbone=nnunet_resenc` has it for any plan
                del fields["convs_decoder"]
        return cls(**{**shared, **fields})

    @property
    def stride(self) -> Triple:
        """The patch must be a multiple of it, axis by axis."""
        return total_stride(strides_of(self))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        del train  # one function: no dropout, no running statistics
        require_patch(type(self).__name__, image.shape[1:4], self.stride)
        stage = rematerialized(ResidualStage, self.remat)
        strides, kernels = strides_of(self), kernels_of(self)
        stages = len(self.features)
        blocks = blocks_of(self)
        inner = counts(self, "bottleneck", stages) if self.bottleneck else (None,) * stages
        stem = self.features[0] if self.stem is None else self.stem
        x = _unit(self, kernels[0])(features=stem, name="stem")(image.astype(self.dtype))
        skips = []
        for i, features in enumerate(self.features):
            unit = _unit(self, kernels[i])
            x = stage(unit, features, blocks[i], strides[i], inner[i], name=f"encoder_{i}")(x)
            skips.append(x)
        return _decode(self, skips)


class ConvStage(nn.Module):
    """Convolution units in a row; the first may be strided."""

    unit: functools.partial
    features: int
    convs: int
    strides: Triple = (1, 1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        for i in range(self.convs):
            strides = self.strides if i == 0 else (1, 1, 1)
            x = self.unit(features=self.features, strides=strides, name=f"conv_{i}")(x)
        return x


class ResidualStage(nn.Module):
    """Residual blocks in a row; the first may be strided and change the channels.

    With `zero_last` the last norm before each addition starts at zero, so that a block starts as
    its shortcut.

    Source: He et al. 2019, arXiv:1812.01187 (ResNet-D: the shortcut pools, then projects).
    """

    unit: functools.partial
    features: int
    blocks: int
    strides: Triple
    inner: int | None  # channels inside a bottleneck block; None: a block of two convolutions
    zero_last: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B D H W C"]) -> Float[Array, "B d h w F"]:
        for i in range(self.blocks):
            x = self._block(x, self.strides if i == 0 else (1, 1, 1), f"block_{i}")
        return x

    def _block(self, x: Array, strides: Triple, name: str) -> Array:
        start = nn.initializers.zeros if self.zero_last else nn.initializers.ones
        last = {"features": self.features, "slope": None, "scale_init": start}
        pointwise = functools.partial(self.unit, kernel=(1, 1, 1))
        if self.inner is None:
            out = self.unit(features=self.features, strides=strides, name=f"{name}_conv1")(x)
            out = self.unit(**last, name=f"{name}_conv2")(out)
        else:
            out = pointwise(features=self.inner, name=f"{name}_conv1")(x)
            out = self.unit(features=self.inner, strides=strides, name=f"{name}_conv2")(out)
            out = pointwise(**last, name=f"{name}_conv3")(out)
        if strides != (1, 1, 1):
            x = nn.avg_pool(x, strides, strides)
        if x.shape[-1] != self.features:
            shortcut = {"slope": None, "use_bias": False, "name": f"{name}_skip"}
            x = pointwise(features=self.features, **shortcut)(x)
        return nn.leaky_relu(out + x, self.unit.keywords["slope"])


def _planned(
    network: Network, patch: Triple, spacing_mm: Millimeters, fields: Mapping[str, Any]
) -> tuple[Network, dict[str, Any]]:
    """Topology for the patch, and what both networks take of it: as many stages as `features`."""
    topology = planner.for_patch(network, patch, spacing_mm)
    stages = len(fields.get("features", topology.features))
    return topology, {
        "features": topology.features,
        "strides": topology.strides[:stages],
        "kernels": topology.kernels[:stages],
        "convs_decoder": topology.convs_decoder[: stages - 1],
    }


def _decode(net: Any, skips: list[Array]) -> Logits:
    """The decoder: up-samples, joins (up-sampled first, then skip), convolves; a head a stage."""
    stage = rematerialized(ConvStage, net.remat)
    strides, kernels = strides_of(net), kernels_of(net)
    convs = counts(net, "convs_decoder", len(skips) - 1)
    x, logits = skips[-1], []
    for i in reversed(range(len(skips) - 1)):
        features = net.features[i]
        up = ConvTranspose(features, strides[i + 1], net.conv_bias, net.dtype, name=f"up_{i}")
        x = jnp.concatenate([up(x), skips[i]], axis=-1)
        x = stage(_unit(net, kernels[i]), features, convs[i], name=f"decoder_{i}")(x)
        if i == 0 or net.deep_supervision:
            head = Conv(net.num_classes, (1, 1, 1), dtype=net.dtype, name=f"head_{i}")
            logits.append(head(x).astype(jnp.float32))
    return tuple(logits[::-1])


def _unit(net: Any, kernel: Triple) -> functools.partial:
    if net.norm not in NORMS:
        raise UserError(f"{type(net).__name__}: norm must be {' or '.join(NORMS)}; got {net.norm}")
    return functools.partial(
        ConvUnit,
        kernel=kernel,
        use_bias=net.conv_bias,
        epsilon=net.epsilon,
        affine=net.affine,
        slope=net.slope,
        norm=net.norm,
        dtype=net.dtype,
    )


def strides_of(net: Any) -> tuple[Triple, ...]:
    """Stride of the first convolution of every stage."""
    return _per_stage(net, "strides", _STRIDES)


def kernels_of(net: Any) -> tuple[Triple, ...]:
    """Size of the kernels of every stage."""
    kernels = _per_stage(net, "kernels", _KERNELS)
    if not all(k % 2 for kernel in kernels for k in kernel):
        raise UserError(f"{type(net).__name__}: kernels must be odd; got {kernels}")
    return kernels


def _per_stage(net: Any, field: str, default: tuple) -> tuple:
    """One entry per stage; an empty field takes the first of the BHSD plan."""
    stages = len(net.features)
    return counts(net, field, stages, default[:stages])


def blocks_of(net: Any) -> tuple[int, ...]:
    """Residual blocks per stage."""
    return _per_stage(net, "blocks_encoder", _BLOCKS)


def counts(net: Any, field: str, stages: int, default: tuple = ()) -> tuple:
    """One entry per stage of a field that may be one number for all."""
    given = getattr(net, field)
    if isinstance(given, int):
        return (given,) * stages
    given = tuple(given) or default
    if len(given) != stages:
        raise UserError(
            f"{type(net).__name__}: {field} needs {stages} entries for the {len(net.features)}"
            f" stages of features {net.features}; got {len(given)}: {given}"
        )
    return given
