"""From a config and a plan to the network and what stands around it."""

import inspect
import sys
from typing import Any

import jax
import jax.numpy as jnp

from bhsd_jax import windows
from bhsd_jax.assemble import setup
from bhsd_jax.build import build, find
from bhsd_jax.nnunet import planner
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.volume import Network, Plan

_THICK = 3  # ratio of spacings from which a backbone's own preset for thick slices is used


def network(config: Settings, plan: Plan) -> Network:
    """The plan's topology, or one for the patch and features the config pins."""
    wanted = setup.patch(config, plan)
    found = plan.network
    if wanted != found.patch:
        found = planner.topology(
            plan.spacing_mm, wanted, batch=found.batch, batch_dice=found.batch_dice
        )
    return found


def model(config: Settings, plan: Plan) -> Any:
    """The backbone, with what the plan knows filled in where the config says nothing.

    Raises:
        ValueError: If the config names an unknown class or argument.
    """
    spec = {k: v for k, v in config.model.items() if v is not None}
    made = find("bhsd_jax.models", spec["name"])
    accepted = inspect.signature(made).parameters
    known: dict[str, Any] = {}
    if "kernels" in accepted:  # nnU-Net's family takes its shape from the plan
        topology = network(config, plan)
        stages = len(spec.get("features", topology.features))
        known = {
            "features": topology.features,
            "strides": topology.strides[:stages],
            "kernels": topology.kernels[:stages],
            "convs_encoder": topology.convs_encoder[:stages],
            "convs_decoder": topology.convs_decoder[: stages - 1],
        }
    elif max(plan.spacing_mm) > _THICK * min(plan.spacing_mm):
        known = dict(getattr(sys.modules[made.__module__], "HEAD_CT", {}))
    known |= {
        "patch": setup.patch(config, plan),
        "dtype": compute_type(config.precision),
        "remat": config.train.remat,
    }
    filled = {k: v for k, v in known.items() if k in accepted and k not in spec}
    return build("bhsd_jax.models", spec, num_classes=len(setup.classes(config, plan)), **filled)


def objective(config: Settings) -> Any:
    """What is minimized."""
    return build("bhsd_jax.objectives", config.objective)


def normalization(config: Settings, plan: Plan) -> windows.Normalization:
    """Raw intensity to network channels: the plan's, or CT windows.

    Raises:
        ValueError: If windows are wanted of scans that the plan normalizes beforehand.
    """
    if config.windows == "plan":
        modality = "mr" if plan.normalize_first else plan.modality
        return windows.Normalization.from_plan(modality, plan.foreground)
    if plan.normalize_first:
        raise UserError("config.windows: this plan normalizes first, nothing is left in HU; 'plan'")
    return windows.Normalization.from_windows(config.windows)


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
