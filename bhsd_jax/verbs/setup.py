"""From a config and a plan to objects: what more than one verb needs."""

import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bhsd_jax import windows
from bhsd_jax.build import build, find
from bhsd_jax.ct import plan as planner
from bhsd_jax.ct.shards import Shards
from bhsd_jax.datasets import splits
from bhsd_jax.volume import Dataset, Network, Plan, Shape


def shards_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where the shards and their plan lie."""
    return Path(config.preprocess.shards or workdir / "shards")


def dataset(config: ConfigDict, workdir: Path) -> Dataset:
    """The data set as downloaded; the synthetic one lies in the run folder by default."""
    spec = config.data.to_dict()
    if not spec.get("root"):
        if not spec["name"].startswith("synthetic."):
            raise ValueError(f"config.data.root is empty; say where {spec['name']} lies")
        spec["root"] = str(workdir / "synthetic")
    return build("bhsd_jax.datasets", spec)


def load_plan(config: ConfigDict, workdir: Path) -> Plan:
    """The run's own plan if it has one, else the shards'."""
    own = workdir / "plan.json"
    return Plan.load(own if own.is_file() else shards_folder(config, workdir))


def roles(config: ConfigDict, workdir: Path) -> tuple[splits.Roles, list[str]]:
    """Who trains, validates and tests, and what had to be adjusted for it."""
    entries = Shards(shards_folder(config, workdir)).entries
    return splits.roles(entries, **{k: v for k, v in config.split.items() if k != "binary"})


def classes(config: ConfigDict, plan: Plan) -> tuple[str, ...]:
    """Names by class index, background first; one foreground class in binary tasks."""
    return (plan.classes[0], "any") if config.split.binary else plan.classes


def patch(config: ConfigDict, plan: Plan) -> Shape:
    """What the network is trained on and applied to, D H W."""
    d, h, w = config.input.patch or plan.network.patch
    return d, h, w


def network(config: ConfigDict, plan: Plan) -> Network:
    """The plan's topology, or one for the patch and features the config pins."""
    wanted = patch(config, plan)
    found = plan.network
    if wanted != found.patch:
        found = planner.topology(
            plan.spacing_mm, wanted, batch=found.batch, batch_dice=found.batch_dice
        )
    return found


def model(config: ConfigDict, plan: Plan) -> Any:
    """The backbone, with what the plan knows filled in where the config says nothing.

    Raises:
        ValueError: If the config names an unknown class or argument.
    """
    spec = {k: v for k, v in config.model.to_dict().items() if v is not None}
    topology = network(config, plan)
    stages = len(spec.get("features", topology.features))
    known = {
        "in_channels": normalization(config, plan).channels,
        "patch": patch(config, plan),
        "features": topology.features,
        "strides": topology.strides[:stages],
        "kernels": topology.kernels[:stages],
        "convs_encoder": topology.convs_encoder[:stages],
        "convs_decoder": topology.convs_decoder[: stages - 1],
        "dtype": compute_type(config.precision),
        "remat": config.train.remat,
    }
    accepted = inspect.signature(find("bhsd_jax.models", spec["name"])).parameters
    filled = {k: v for k, v in known.items() if k in accepted and k not in spec}
    return build("bhsd_jax.models", spec, num_classes=len(classes(config, plan)), **filled)


def objective(config: ConfigDict) -> Any:
    """What is minimized."""
    return build("bhsd_jax.objectives", config.objective.to_dict())


def normalization(config: ConfigDict, plan: Plan) -> windows.Normalization:
    """Raw intensity to network channels: the plan's, or CT windows."""
    if config.windows == "plan":
        return windows.Normalization.from_plan(plan.modality, plan.foreground)
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
        raise ValueError(f"config.precision is auto, float32 or bfloat16; got {precision!r}")
    return types[precision]


def write_json(path: Path, data: Any) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
