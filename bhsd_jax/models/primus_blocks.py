"""The transformer block of Primus: attention with rotary positions, and a gated MLP.

Source: timm 1.0.22, `models.eva.EvaBlock`, as `dynamic_network_architectures` 0.4.4 builds it
(Fang et al. 2023, EVA-02, arXiv:2303.11331); rotary positions: Su et al. 2021, arXiv:2104.09864.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bhsd_jax.models.attention import attend
from bhsd_jax.models.dense import Dense
from bhsd_jax.models.initializers import trunc_normal
from bhsd_jax.models.norms import LayerNorm

_SLOWEST = 10_000.0  # ratio of the fastest to the slowest turn, but for one step


def rotary_angles(grid: tuple[int, ...], width: int) -> np.ndarray:
    """Radians by which the pairs of channels of a head turn at every place, [N width/2] float32.

    Each of the three axes of the grid turns a third of the pairs; place n along it by n times a
    frequency, which falls geometrically from 1 over the pairs.
    """
    bands = width // 6
    exponents = np.arange(bands, dtype=np.float32) / np.float32(bands)
    frequencies = (1 / np.float32(_SLOWEST) ** exponents).astype(np.float32)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1)
    turns = places[..., None].astype(np.float32) * frequencies
    return turns.reshape(-1, len(grid) * bands)


def rotate(x: Float[Array, "B N h d"], angles: np.ndarray, skip: int) -> Float[Array, "B N h d"]:
    """Turns neighboring channels, 0 with 1, 2 with 3, ..., in float32, as the angles are.

    Those of the first `skip` tokens stay.
    """
    turned = x[:, skip:].astype(jnp.float32)
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (f(angles)[:, None] for f in (np.cos, np.sin))
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    turned = pairs.reshape(turned.shape).astype(x.dtype)
    return turned if skip == 0 else jnp.concatenate([x[:, :skip], turned], axis=1)


class PrimusBlock(nn.Module):
    """Pre-norm self-attention and gated MLP, each around a shortcut."""

    depth: int  # number of the block, from 1; its branches start smaller the deeper it lies
    heads: int
    hidden: int
    registers: int
    angles: Any  # of `rotary_angles`; None: no rotary positions
    norm_attention: bool
    layer_scale: float | None
    dropout: float
    attention_dropout: float
    drop_path: float
    train: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        for number, branch in ((1, self._attention), (2, self._mlp)):
            out = branch(norm(name=f"norm{number}")(x))
            if self.layer_scale is not None:
                start = nn.initializers.constant(self.layer_scale)
                out *= self.param(f"scale{number}", start, x.shape[-1:]).astype(self.dtype)
            x = x + self._drop(self.drop_path, (1, 2))(out)
        return x

    def _attention(self, x: Array) -> Array:
        width = x.shape[-1]
        each = (*x.shape[:2], self.heads, width // self.heads)
        query = self._linear(width, "query")(x).reshape(each)
        key = self._linear(width, "key", use_bias=False)(x).reshape(each)
        value = self._linear(width, "value")(x).reshape(each)
        if self.angles is not None:
            query, key = (rotate(part, self.angles, self.registers) for part in (query, key))
        # Each head is passed as a window: attention takes a few at a time, which a cache can hold.
        alone = [jnp.moveaxis(part, 2, 1)[..., None, :] for part in (query, key, value)]
        dropped = self.train and self.attention_dropout
        mixed = attend(*alone, drop=self._drop(self.attention_dropout) if dropped else None)
        mixed = jnp.moveaxis(mixed, 1, 2).reshape(x.shape)
        if self.norm_attention:
            mixed = LayerNorm(dtype=self.dtype, name="norm_attention")(mixed)
        out = self._linear(width, "out", last=True)(mixed)
        return self._drop(self.dropout)(out)

    def _mlp(self, x: Array) -> Array:
        gate = self._linear(self.hidden, "gate")(x)
        inner = jax.nn.silu(gate) * self._linear(self.hidden, "inner")(x)
        inner = self._drop(self.dropout)(inner)
        inner = LayerNorm(dtype=self.dtype, name="norm_mlp")(inner)
        out = self._linear(x.shape[-1], "mlp_out", last=True)(inner)
        return self._drop(self.dropout)(out)

    def _linear(self, features: int, name: str, *, last: bool = False, use_bias: bool = True):
        start = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5) if last else trunc_normal
        zeros = nn.initializers.zeros
        return Dense(features, use_bias, self.dtype, start, zeros, name=name)

    def _drop(self, rate: float, shared: tuple[int, ...] = ()) -> Callable[[Array], Array]:
        """Dropout; one draw along the `shared` axes."""
        return nn.Dropout(rate, broadcast_dims=shared, deterministic=not self.train)
