"""From a run to its network and its objective."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from bhsd_jax.assemble.run import Run
from bhsd_jax.build import (
    build,
    find,
    fitting_arguments,
    require_arguments,
    require_members,
)
from bhsd_jax.models import conv
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.types import Objective
from bhsd_jax.volume import Shape

_MODELS = "bhsd_jax.models"


def model(run: Run) -> Any:
    """The network (`types.Backbone`), with what it takes from the plan where the config is silent.

    A class without `for_plan` is given the patch, if it has an argument of that name.

    Raises:
        ValueError: If the config names an unknown class or argument, or class and plan do not go
            together.
    """
    config, plan = run.config, run.plan
    spec = {k: v for k, v in config.model.items() if v is not None}
    name = spec.pop("name")
    made = find(_MODELS, name)
    for_plan = getattr(made, "for_plan", None)
    offered = {"dtype": compute_type(config.precision), "remat": config.train.remat}
    if for_plan is None:
        offered["patch"] = run.patch
    accepted = inspect.signature(made).parameters
    fields = {k: v for k, v in offered.items() if k in accepted} | spec
    fields["num_classes"] = run.labels.outputs
    require_arguments(f"{_MODELS}.{name}", made, fields)
    fields = fitting_arguments(f"{_MODELS}.{name}", made, fields)
    if for_plan is None:
        network = made(**fields)
    else:
        network = for_plan(plan.network, run.patch, plan.spacing_mm, **fields)
    arguments = inspect.signature(network.__call__).parameters.values()
    if not any(one.name == "train" or one.kind is one.VAR_KEYWORD for one in arguments):
        raise UserError(
            f"{_MODELS}.{name}: its __call__ has no argument `train`, which says whether dropout "
            "is to be drawn: __call__(self, image, *, train)"
        )
    return network


def require_output(network: Any, patch: Shape, channels: int) -> None:
    """Refuses a network that does not answer as `types.Backbone` says, before it is trained.

    A loss of whatever it answers could be computed, for lower heads have fewer voxels.

    Raises:
        ValueError: Says what it returns, and what it should; or what it keeps beside parameters.
    """
    image = jax.ShapeDtypeStruct((1, *patch, channels), jnp.float32)
    start = functools.partial(network.init_with_output, train=False)
    found, variables = jax.eval_shape(start, jax.random.key(0), image)
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    if kept := sorted(set(variables) - {"params"}):
        raise UserError(
            f"{name}: keeps {', '.join(kept)} beside its parameters, as a batch norm does, which "
            "no training here updates; use a group or instance norm"
        )
    shapes = (
        [getattr(head, "shape", None) for head in found] if isinstance(found, tuple | list) else []
    )
    wanted = (1, *patch, network.num_classes)
    if not shapes or shapes[0] != wanted:
        got = shapes or getattr(found, "shape", type(found).__name__)
        raise UserError(
            f"{name}: returns {got} for patches {patch}; it must return a tuple whose first entry "
            f"is logits of {wanted}: [B D H W K], channels last, one voxel for each of the image"
        )


def objective(config: Settings) -> Any:
    """The training objective that the config names (`types.Objective`).

    Raises:
        ValueError: If the config names an unknown class or argument, or the class lacks a part.
    """
    made = build("bhsd_jax.objectives", config.objective)
    how = "; objectives.common.SingleModel brings all but `loss`"
    require_members(made, Objective, how)
    return made


def mirror_axes(run: Run) -> tuple[int, ...]:
    """Axes along which predictions are mirrored and averaged: 0 is D; () where none is.

    Where the config names none they are those that `spatial.Mirror` has mirrored in training, for
    of other mirrored versions the network has never seen one. What augmentations of one's own
    mirror is not known, and does not count.

    Raises:
        ValueError: If a `spatial.Mirror` of the config has an unknown argument.
    """
    infer = run.config.infer
    if not infer.mirror:
        return ()
    if infer.mirror_axes is not None:
        return infer.mirror_axes
    specs = (spec for spec in run.config.augment.spatial if spec["name"] == "spatial.Mirror")
    trained = [build("bhsd_jax.augment", spec) for spec in specs]
    return tuple(sorted({axis for op in trained if op.p > 0 for axis in op.axes}))


def compiler_options(network: Any) -> dict[str, bool]:
    """What XLA has to be told where a program with this network is compiled for our devices."""
    dtype, device = getattr(network, "dtype", jnp.float32), jax.local_devices()[0]
    return conv.compiler_options(dtype, device.platform, device.device_kind)


def compute_type(precision: str) -> Any:
    """float32 or bfloat16; "auto" is bfloat16 on accelerators.

    Raises:
        ValueError: If it is none of the three.
    """
    types = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if precision == "auto":
        return types["float32" if jax.default_backend() == "cpu" else "bfloat16"]
    if precision not in types:
        raise UserError(f"config.precision is auto, float32 or bfloat16; got {precision!r}")
    return types[precision]
