"""From a config to data and names: what more than one verb needs, without JAX."""

import hashlib
import inspect
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax.build import build, find
from bhsd_jax.datasets import splits, splits_file
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.shards.store import Shards
from bhsd_jax.volume import Dataset, Plan, Shape


def shards_folder(config: Settings, workdir: Path) -> Path:
    """Where the shards and their plan lie."""
    return Path(config.preprocess.shards or workdir / "shards")


def dataset(config: Settings, workdir: Path) -> Dataset:
    """The data set as downloaded; the synthetic one lies in the run folder by default."""
    spec = dict(config.data)
    if not spec.get("root"):
        if not spec["name"].startswith("synthetic."):
            raise UserError(f"config.data.root is empty; say where {spec['name']} lies")
        spec["root"] = str(workdir / "synthetic")
    made = find("bhsd_jax.datasets", spec["name"])
    if "salt" in inspect.signature(made).parameters and not spec.get("salt"):
        spec["salt"] = _salt(shards_folder(config, workdir))  # its names are those in the shards
    return build("bhsd_jax.datasets", spec)


def load_plan(config: Settings, workdir: Path) -> Plan:
    """The run's own plan if it has one, else the shards'."""
    own = workdir / "plan.json"
    return Plan.load(own if own.is_file() else shards_folder(config, workdir))


def roles(config: Settings, workdir: Path) -> tuple[splits.Roles, list[str]]:
    """Who trains, validates and tests, and what had to be adjusted for it."""
    folder = shards_folder(config, workdir)
    asked = {k: v for k, v in vars(config.split).items() if k != "binary"}
    folds = splits_file.load(folder / splits_file.NAME)
    return splits.roles(Shards(folder).entries, folds=folds, **asked)


def classes(config: Settings, plan: Plan) -> tuple[str, ...]:
    """Names by class index, background first; one foreground class in binary tasks."""
    return (plan.classes[0], "any") if config.split.binary else plan.classes


def patch(config: Settings, plan: Plan) -> Shape:
    """What the network is trained on and applied to, D H W."""
    d, h, w = config.input.patch or plan.network.patch
    return d, h, w


def short_names(cases: Sequence[str], workdir: Path, show_ids: bool) -> dict[str, str]:
    """What to call scans outside this machine: salted hashes, or their ids if asked for.

    The salt stays in the run folder: a plain hash of a public list of ids can be reversed.
    """
    if show_ids:
        return {case: case for case in cases}
    salt = _salt(workdir)
    return {c: hashlib.sha256((salt + c).encode()).hexdigest()[:8] for c in cases}


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Names of the fields in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} ({old} -> {new})"


def _salt(folder: Path) -> str:
    """Drawn once; processes that ask for it at once are given the same."""
    path = folder / ".salt"
    drawn = secrets.token_hex(16)
    salt = path.read_text(errors="replace") if path.is_file() else files.write_first(path, drawn)
    if len(salt) != len(drawn):
        raise UserError(
            f"{path}: damaged ({len(salt)} characters, not {len(drawn)}); restore it from a copy, "
            "or remove it: then all scans it has given names to are called otherwise"
        )
    return salt
