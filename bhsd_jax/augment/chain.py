"""Turns operations on one patch into a function of a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bhsd_jax.augment.spatial import Affine, center_crop, is_in_plane
from bhsd_jax.platform.errors import UserError
from bhsd_jax.types import IntensityAugment, SpatialAugment
from bhsd_jax.volume import Shape


@runtime_checkable
class Cutter(Protocol):
    """A spatial operation that needs a larger patch than it returns; only the first may be one."""

    def source_patch(self, patch: Shape) -> Shape:
        """Size to cut for a given size of the result."""
        ...

    def __call__(
        self, key: PRNGKeyArray, image: Array, label: Array, patch: Shape
    ) -> tuple[Array, Array]:
        """[D0 H0 W0 C], [D0 H0 W0] -> [D H W C], [D H W] with D H W = `patch`."""
        ...


@dataclass(frozen=True)
class SpatialChain:
    """Cuts patches of one size and moves their voxels; image and label alike.

    `sequential` maps over the batch one patch after another and skips what does not fire: faster on
    CPU. Where the batch is sharded, every device along `mesh`'s `data` axis does so with its own
    patches. Otherwise all patches go at once and both outcomes are computed: faster on
    accelerators. Same key, same numbers (to rounding) either way.

    nnU-Net mirrors after its intensity operations, we before: every one of those treats the two
    directions of an axis alike, so the law of the result is the same.

    Raises:
        ValueError: If an operation that cuts is not the first.
    """

    ops: tuple[SpatialAugment | Cutter, ...]
    patch: Shape
    sequential: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        late = [type(op).__name__ for op in self.ops[1:] if isinstance(op, Cutter)]
        if late:
            raise UserError(
                f"SpatialChain: {', '.join(late)} must come first, for it cuts the patch"
            )

    @property
    def source_patch(self) -> Shape:
        """Size the input must cut from the scan."""
        first = self.ops[0] if self.ops else None
        return first.source_patch(self.patch) if isinstance(first, Cutter) else self.patch

    @property
    def keeps_slices(self) -> bool:
        """Whether every slice of a patch is known to come from a single one: none is mixed.

        Of an operation of one's own it is known if it has an attribute `keeps_slices` that is True.
        """
        return all(
            is_in_plane(self.patch, op.dummy_2d) or op.rotation_p == op.scale_p == 0
            if isinstance(op, Affine)
            else getattr(op, "keeps_slices", False)
            for op in self.ops
        )

    def __call__(
        self,
        key: PRNGKeyArray,
        image: Float[Array, "B D0 H0 W0 C"],
        label: Int[Array, "B D0 H0 W0"] | None,
    ) -> tuple[Float[Array, "B D H W C"], Int[Array, "B D H W"] | None]:
        """Patches and labels 0..K-1; what was outside (-1) becomes background at the very end.

        The image comes out the same whether there is a label or not.

        Raises:
            ValueError: If the incoming patches are smaller than the outgoing ones.
        """
        if any(have < want for have, want in zip(image.shape[1:4], self.patch, strict=True)):
            raise UserError(
                f"SpatialChain: patches of {image.shape[1:4]} are smaller than {self.patch}; "
                f"cut {self.source_patch} from the scan"
            )
        if label is None:
            nothing = jnp.zeros(image.shape[:4], jnp.int8)  # dead code to the compiler
            return self._run(key, image, nothing)[0], None
        image, label = self._run(key, image, label)
        return image, jnp.maximum(label, 0)

    def _run(self, key: PRNGKeyArray, image: Array, label: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, len(image))
        return _over_batch(self._one, self, keys, image, label)

    def _one(self, key: PRNGKeyArray, image: Array, label: Array) -> tuple[Array, Array]:
        ops = self.ops
        if ops and isinstance(ops[0], Cutter):
            image, label = ops[0](jax.random.fold_in(key, 0), image, label, self.patch)
        else:
            image, label = center_crop(image, self.patch), center_crop(label, self.patch)
        for index, op in enumerate(ops):
            if not isinstance(op, Cutter):
                moved = op(jax.random.fold_in(key, index), image, label)
                _require_pair(op, moved, image, label)
                image, label = moved
        return image, label


@dataclass(frozen=True)
class IntensityChain:
    """Changes the values of patches, each by its own draw; order and mesh as in `SpatialChain`.

    Where all channels of `masked` are 0, that is outside the mask of their z-scores, they stay 0.

    Source: nnU-Net v2.8.1, `MaskImageTransform`.
    """

    ops: tuple[IntensityAugment, ...]
    sequential: bool = False
    mesh: Mesh | None = None
    masked: tuple[int, ...] = ()

    def __call__(
        self, key: PRNGKeyArray, image: Float[Array, "B D H W C"]
    ) -> Float[Array, "B D H W C"]:
        """Another view of the same patches."""
        keys = jax.random.split(key, len(image))
        return _over_batch(self._one, self, keys, image)

    def _one(self, key: PRNGKeyArray, image: Array) -> Array:
        changed = image
        for index, op in enumerate(self.ops):
            changed = op(jax.random.fold_in(key, index), changed)
            if getattr(changed, "shape", None) != image.shape:
                raise UserError(
                    f"{_name(op)}: must return one image of the shape it is given, {image.shape}; "
                    f"got {_told(changed)}"
                )
        if not self.masked:
            return changed
        own = np.asarray(self.masked)
        outside = (image[..., own] == 0).all(-1, keepdims=True)
        return changed.at[..., own].set(jnp.where(outside, 0, changed[..., own]))


def _require_pair(op: Any, moved: Any, image: Array, label: Array) -> None:
    """Refuses what is not image and label again: a loss of shifted ones could be computed."""
    if isinstance(moved, tuple) and len(moved) == 2:
        same = all(
            getattr(new, "shape", None) == old.shape
            and jnp.issubdtype(new.dtype, jnp.integer) == jnp.issubdtype(old.dtype, jnp.integer)
            for new, old in zip(moved, (image, label), strict=True)
        )
        if same:
            return
    raise UserError(
        f"{_name(op)}: must return image {image.shape} and label {label.shape}, integers, of the "
        f"shapes it is given; got {_told(moved)}"
    )


def _name(op: Any) -> str:
    return f"{type(op).__module__}.{type(op).__qualname__}"


def _told(value: Any) -> str:
    """Shapes and types of what somebody's function has returned."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_told, value))})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{shape} {value.dtype}"


def _over_batch(
    change: Callable[..., Any], chain: SpatialChain | IntensityChain, *batch: Array
) -> Any:
    """A `lax.cond` inside `change` becomes a selection under vmap, and stays a branch under map."""
    if not chain.sequential:
        return jax.vmap(change)(*batch)

    def one_by_one(*part: Array) -> Any:
        return lax.map(lambda patch: change(*patch), part)

    if chain.mesh is None:
        return one_by_one(*batch)
    rows = PartitionSpec("data")
    return jax.shard_map(one_by_one, mesh=chain.mesh, in_specs=rows, out_specs=rows)(*batch)
