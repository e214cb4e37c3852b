"""nnFormer: a U-Net of attention in windows, whose skips are joined by cross-attention.

Source: Zhou et al. 2021, arXiv:2109.03201; nnFormer d48aaeb, whose three copies of the network
(synapse, acdc, tumor) are fields here, with the same outputs and gradients.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.blocks import (
    gelu,
    has_thick_slices,
    rematerialized,
    require_patch,
    total_stride,
)
from bhsd_jax.models.conv import Triple
from bhsd_jax.models.nnformer_blocks import (
    Block,
    Conv,
    Expand,
    Options,
    Project,
    fit_window,
)
from bhsd_jax.models.norms import LayerNorm
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import Logits
from bhsd_jax.volume import Millimeters, Network

SYNAPSE: dict[str, Any] = {}  # the defaults; patch 64 x 128 x 128
ACDC: dict[str, Any] = {  # patch 14 x 160 x 160
    "embed": 96,
    "heads": (3, 6, 12, 24),
    "attn_windows": ((3, 5, 5), (3, 5, 5), (7, 10, 10), (3, 5, 5)),
    "embed_strides": ((1, 2, 2), (1, 2, 2)),
    "merge_strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    "odd_depth": True,
    "mask_shifted": False,
    "deep_supervision": False,
}
TUMOR: dict[str, Any] = {  # patch 128 x 128 x 128
    "embed": 96,
    "heads": (3, 6, 12, 24),
    # Bug of the reference: the list is reversed and cut at the wrong end, so that every stage has
    # twice the encoder's heads.
    "heads_decoder": (6, 12, 24),
    "embed_strides": ((2, 2, 2), (2, 2, 2)),
    "deep_supervision": False,
}
# For 5 mm slices, patch 20 x 320 x 256: acdc's network, whose depth may be halved evenly. Windows
# divide the grids 20 x 80 x 64, 20 x 40 x 32, 10 x 20 x 16, and 5 x 10 x 8: nothing is padded.
HEAD_CT: dict[str, Any] = ACDC | {
    "attn_windows": ((4, 5, 4), (4, 5, 4), (10, 10, 8), (5, 5, 4)),
    "odd_depth": False,
    "deep_supervision": True,
}


class NNFormer(nn.Module):
    """Four resolutions; the lowest is the neck; the decoder mirrors the three above.

    Defaults are the published ones for Synapse. Windows that shrink to the grid make the shapes of
    parameters depend on the patch: train and test with the same. With `deep_supervision` there are
    outputs at the resolutions of the three decoder stages times the patch embedding's stride.

    Raises:
        ValueError: If a field does not fit, or the patch is not accepted; names the nearest.
    """

    num_classes: int
    embed: int = 192  # channels at the first resolution; doubled at each further one
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks per resolution
    heads: tuple[int, ...] = (6, 12, 24, 48)  # per resolution
    heads_decoder: tuple[int, ...] = ()  # per resolution but the lowest; empty: as the encoder
    attn_windows: tuple[int | Triple, ...] = (4, 4, 8, 4)  # per resolution; see `fit_window`
    embed_strides: tuple[Triple, ...] = ((2, 2, 2), (1, 2, 2))
    merge_strides: tuple[Triple, ...] = ((2, 2, 2),) * 3  # between resolutions
    # acdc does not pad the depth of the last merging, so 2n + 1 slices become n: then up-sampling
    # appends a slice that is the bias alone.
    odd_depth: bool = False
    mask_shifted: bool = True  # bug of acdc: shifted windows see across the border
    reference_index: bool = True  # the reference's wrong rows of the position table
    drop_path: float = 0.2  # of the last block of encoder and decoder each; earlier ones less
    deep_supervision: bool = True
    dtype: DTypeLike = jnp.float32  # of the computation; parameters and logits are float32
    remat: str = "none"  # "blocks": recompute each block in the backward pass

    @classmethod
    def for_plan(
        cls, network: Network, patch: Triple, spacing_mm: Millimeters, /, **fields: Any
    ) -> "NNFormer":
        """`HEAD_CT` for thick slices, else the defaults; `fields` take precedence."""
        del network, patch  # nnU-Net's topology; any patch that `stride` accepts goes
        preset = HEAD_CT if has_thick_slices(spacing_mm) else {}
        return cls(**{**preset, **fields})

    @property
    def stride(self) -> Triple:
        """Total stride; the patch must be a multiple of it, unless `odd_depth`."""
        return total_stride((*self.embed_strides, *self.merge_strides))

    @nn.compact
    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        _require_fields(self)
        _require_depth(self, image.shape[1:4])
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        first, second = self.embed_strides
        x = Project(self.embed // 2, first, False, self.dtype, name="embed_0")(image)
        x = Project(self.embed, second, True, self.dtype, name="embed_1")(x)
        x = norm(name="embed_norm")(x)
        options = Options(self.mask_shifted, self.reference_index, train, self.dtype)
        rates, maps = _rates(self.drop_path, self.depths), []
        for i in range(4):
            block = self._block(options, i, x.shape[1:4], self.heads[i])
            for b, rate in enumerate(rates[i]):
                x = block(b % 2 == 1, rate, f"encoder_{i}_{b}")(x)
            maps.append(norm(name=f"norm_{i}")(x))
            if i < 3:
                x = self._merge(x, i)
        return self._decode(options, maps)

    def _block(self, options: Options, stage: int, grid: tuple[int, ...], heads: int) -> Any:
        window, shift = fit_window(self.attn_windows[stage], grid)
        block = rematerialized(Block, self.remat)

        def make(shifted: bool, rate: float, name: str) -> nn.Module:
            return block(options, heads, window, shift if shifted else (0, 0, 0), rate, name=name)

        return make

    def _merge(self, x: Array, i: int) -> Array:
        strides = self.merge_strides[i]
        kd, kh, kw = (1 if s == 1 else 3 for s in strides)
        depth = 0 if self.odd_depth and i == 2 else kd // 2
        # The reference has an activation here, before the norm, unlike other Swin transformers.
        x = LayerNorm(dtype=self.dtype, name=f"merge_norm_{i}")(gelu(x))
        features, padding = 2 * x.shape[-1], (depth, kh // 2, kw // 2)
        conv = Conv(features, (kd, kh, kw), strides, padding, self.dtype, name=f"merge_{i}")
        return conv(x)

    def _decode(self, options: Options, maps: list[Array]) -> Logits:
        # The deepest stage comes first, and has the lowest rates.
        rates = _rates(self.drop_path, self.depths[2::-1])[::-1]
        heads = self.heads_decoder or self.heads[:3]
        patch = total_stride(self.embed_strides)
        x, logits = maps[3], []
        for i in reversed(range(3)):
            skip = maps[i]
            x = LayerNorm(dtype=self.dtype, name=f"up_norm_{i}")(x)
            extra = self.odd_depth and i == 2
            up = Expand(skip.shape[-1], self.merge_strides[i], self.dtype, extra, name=f"up_{i}")
            x = up(x)
            block = self._block(options, i, x.shape[1:4], heads[i])
            x = block(False, rates[i][0], f"decoder_{i}_0")(x, skip)
            for b, rate in enumerate(rates[i][1:], start=1):
                # In the reference all these are shifted; the encoder shifts every second block.
                x = block(True, rate, f"decoder_{i}_{b}")(x)
            if i == 0 or self.deep_supervision:
                head = Expand(self.num_classes, patch, self.dtype, name=f"head_{i}")
                logits.append(head(x).astype(jnp.float32))
        return tuple(logits[::-1])


def _rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    rates = np.linspace(0, last, sum(depths))
    return [part.tolist() for part in np.split(rates, np.cumsum(depths)[:-1])]


def _require_fields(net: NNFormer) -> None:
    heads = (*net.heads, *(net.heads_decoder or net.heads[:3]))
    lengths = {"depths": 4, "heads": 4, "attn_windows": 4, "merge_strides": 3, "embed_strides": 2}
    for field, count in lengths.items():
        if len(getattr(net, field)) != count:
            raise UserError(f"NNFormer: {field} needs {count} entries; got {getattr(net, field)}")
    channels = [net.embed * 2**i for i in (0, 1, 2, 3, 0, 1, 2)]
    if len(heads) != 7 or net.embed % 2 or any(c % h for c, h in zip(channels, heads, strict=True)):
        raise UserError(
            f"NNFormer: heads {net.heads}, heads_decoder {net.heads_decoder} must be 4 and 3 (or"
            f" none), and divide embed {net.embed} times 1, 2, 4, 8; embed must be even"
        )


def _require_depth(net: NNFormer, patch: tuple[int, ...]) -> None:
    if not net.odd_depth:
        return require_patch("NNFormer", patch, net.stride)
    unit = total_stride((*net.embed_strides, *net.merge_strides[:2]))[0]
    height, width = net.stride[1:]
    depth = patch[0] // unit
    if patch[0] % unit == 0 and depth % 2 and depth > 1:
        return require_patch("NNFormer", patch, (patch[0], height, width))
    odd = unit * max(3, 2 * (patch[0] // (2 * unit)) + 1)
    plane = (
        max(1, (2 * n + s) // (2 * s)) * s for n, s in zip(patch[1:], net.stride[1:], strict=True)
    )
    raise UserError(
        f"NNFormer: D of patch {tuple(patch)} must be an odd multiple of {unit} above it"
        f" (odd_depth), H and W of {height} and {width}; nearest is {(odd, *plane)}"
    )
