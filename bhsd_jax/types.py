"""Words shared by the device side: arrays, batches, state, and what a plug-in must offer.

Axis letters: L labeled and U unlabeled patches, B any patches; D slices, H rows, W columns
(see `volume`); C input channels (CT windows); K classes, 0 being background.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from bhsd_jax.volume import Millimeters, Network, Shape

Params = Any
Metrics = dict[str, Scalar]
Logits = tuple[Array, ...]  # each f32[B D H W K]; full resolution first, then coarser heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global training batch; every leaf is sharded over its first axis.

    As it leaves `input`: int16 HU (or float32 MR) with C = 1, at the size the spatial
    augmentation wants to cut from, label -1 outside the scan. Inside the loss: float32
    normalized channels at patch size, labels 0..K-1.
    """

    image: Any  # [L D H W C]
    label: Any  # int8 [L D H W]
    unlabeled: Any = None  # [U D H W C], or None
    # Per slice of `unlabeled`: int8 [U D K-1], 1 the slice shows the class, 0 it does not, -1 not
    # known; or None. What is said of a slice holds for the part of it inside the patch.
    slice_labels: Any = None
    # Which voxels of `unlabeled` lie in the scan: int8 [U D H W], 1 in it and -1 outside, inside
    # the loss bool; or None. The others count in no loss on the network's own answers.
    inside: Any = None


def all_possible(logits: Array) -> Array:
    """Logits as they are: no class is ruled out."""
    return logits


def in_turn(one: Callable[..., Any], *arguments: dict[str, Any]) -> dict[str, Any]:
    """Results of one function for every twin, one twin after another; all dicts by twin."""
    return {twin: one(*(each[twin] for each in arguments)) for twin in arguments[0]}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a training: everything that a step changes, and a checkpoint holds."""

    step: Int[Array, ""]  # updates done
    params: Params
    opt_state: Any
    ema: Params | None
    key: PRNGKeyArray


@dataclass(frozen=True)
class Learner:
    """The network as an objective sees it, inside the loss."""

    forward: Callable[..., Logits]  # (params, image, key) -> logits, training mode
    view: Callable[..., Array]  # (key, image) -> image under a fresh draw of intensity changes
    segmentation: Callable[..., Scalar]  # (logits, label) -> supervised loss, over all heads
    params: Params
    ema: Params | None
    step: Int[Array, ""]
    steps: Int[Array, ""] | int  # length of the whole training
    # (function, its arguments, each by twin) -> its results by twin: what runs the networks of an
    # objective with twins, for they may lie on different devices.
    each_twin: Callable[..., dict[str, Any]] = in_turn
    # Logits [U D H W K] that become pseudo-labels of `batch.unlabeled` -> the same without the
    # classes that cannot be.
    gate: Callable[[Array], Array] = all_possible


@runtime_checkable
class Objective(Protocol):
    """What is minimized. A frozen dataclass of hyper-parameters; all arrays come in as arguments.

    `batch.image` has had spatial and intensity augmentation; `batch.unlabeled` spatial only,
    so that an objective can take several intensity views of it with `learner.view`.
    """

    @property
    def twins(self) -> tuple[str, ...]:
        """Keys of its parameters that are networks of their own: the two of CPS; else ()."""
        ...

    @property
    def uses_unlabeled(self) -> bool:
        """Whether it reads unlabeled patches."""
        ...

    @property
    def ema_decay(self) -> float | None:
        """Not None: the step keeps a moving average in `state.ema`."""
        ...

    @property
    def ema_t0(self) -> int:
        """Weight of the initial value in that average, in updates: `train.step.moving_average`."""
        ...

    def init(self, model: nn.Module, image: Array, key: PRNGKeyArray) -> Params:
        """Initial trainable parameters, for one or more copies of `model`."""
        ...

    def loss(self, learner: Learner, batch: Batch, key: PRNGKeyArray) -> tuple[Scalar, Metrics]:
        """Scalar to minimize, and scalars to log."""
        ...

    def deployable(self, params: Params, ema: Params | None) -> dict[str, Params]:
        """Every single network one may test, by name; the first is the one to deploy."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """All that is asked of a network in `models/`: a linen module, found by the name of its class.

    Its fields are plain values that a config can hold, each with a default but `num_classes`; two
    networks with equal fields are equal and have the same parameters. Parameters are float32.
    Collections other than `params` are not allowed in training. A transposed convolution is
    Flax's own layer, or its class has `transposed: ClassVar[bool] = True`.

    A network of one's own must have `num_classes` and `__call__`. Without `for_plan` it is given
    the patch, and nothing else of a plan, if its constructor has an argument `patch`; with or
    without it, `dtype` and `remat` if it has arguments of these names.
    """

    num_classes: int  # K, background included
    dtype: DTypeLike  # of the computation
    remat: str  # "none", or "blocks": recompute activations in the backward pass; same numbers

    @property
    def stride(self) -> Shape:
        """D, H, W; the size of an image must be a multiple of it, axis by axis."""
        ...

    @classmethod
    def for_plan(
        cls, network: Network, patch: Shape, spacing_mm: Millimeters, /, **fields: Any
    ) -> "Backbone":
        """The network for patches [D H W] of that spacing, with what it takes from a plan.

        `network` is the plan's topology, for the plan's patch, which may be another. `fields` are
        those that a config gives, `num_classes` among them; they take precedence.

        Raises:
            ValueError: If plan and fields do not go together.
        """
        ...

    def __call__(self, image: Float[Array, "B D H W C"], *, train: bool) -> Logits:
        """Float32 logits; a tuple, full resolution first, one entry if there is one head.

        With `train` it may draw dropout, from the key "dropout".

        Raises:
            ValueError: If the size of the image does not fit; names the nearest that does.
        """
        ...

    # The methods of linen modules that the program calls.

    def init(self, rngs: PRNGKeyArray, image: Array, *, train: bool) -> Any:
        """Variables by collection, for images like this one [B D H W C]."""
        ...

    def apply(self, variables: Any, image: Array, *, train: bool, rngs: Any = None) -> Any:
        """`__call__` with these variables: logits [B D H W K], as many as there are heads."""
        ...

    def clone(self, **fields: Any) -> "Backbone":
        """The same network but for these fields, such as `dtype` and `remat`."""
        ...


@runtime_checkable
class SpatialAugment(Protocol):
    """Moves voxels: one patch and its label together.

    If it never mixes slices it may say so by an attribute `keeps_slices = True`: slice labels
    (`config.slice_loss`) then hold for its slices as they are, and are else trusted less.
    """

    def __call__(self, key: PRNGKeyArray, image: Array, label: Array) -> tuple[Array, Array]:
        """[D H W C], [D H W] -> same ranks; the chain vmaps or maps over the batch."""
        ...


@runtime_checkable
class IntensityAugment(Protocol):
    """Changes the intensities of one patch and leaves its label valid."""

    def __call__(self, key: PRNGKeyArray, image: Array) -> Array:
        """[D H W C] -> [D H W C]; the identity where its `p` is 0."""
        ...
