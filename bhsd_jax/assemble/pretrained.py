"""Weights to begin a training with: a run's, trained or imported, or a file of PyTorch's."""

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, traverse_util

from bhsd_jax.assemble import ensemble
from bhsd_jax.assemble.recipe import Recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.build import build
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import under_todays_names
from bhsd_jax.torch_weights import importing, weights_file
from bhsd_jax.torch_weights.recipe import recipe_for
from bhsd_jax.train.checkpoint import load_networks
from bhsd_jax.types import Params

logger = logging.getLogger(__name__)

_MOST_LINES = 20


@dataclass(frozen=True)
class Found:
    """Parameters of one or more networks by name, each flat: array by path."""

    origin: str
    networks: Mapping[str, Mapping[str, np.ndarray]]
    merging: str | None = None  # of a SwinUNETR, see there; None: nobody knows


def begin_from(
    path: str,
    params: Params,
    module: Any,
    channels: int,
    *,
    twins: Sequence[str],
    only: Sequence[str] = (),
    leave: Sequence[str] = (),
) -> Params:
    """`params` with all that fits taken from `path`; the log says what stays as it was drawn.

    A parameter fits if its name and its shape do. Each of several twins gets a network of its own
    where there are as many, else all get the first.

    Args:
        path: Folder of a run, trained or imported; or a file of PyTorch's names.
        params: As drawn; the leaves have shape and dtype.
        module: The network that is trained.
        channels: Of its input.
        twins: Keys of `params` that are networks of their own; ().
        only: First words of the names to take, such as "encoder_"; (): all.
        leave: First words of the names not to take, such as "head".

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it cannot be read, nothing in it fits, or a word of `only` or `leave` is the
            beginning of no name.
    """
    if Path(path).is_dir():
        found = _of_run(Path(path), getattr(type(module), "merging", None))
    else:
        found = _of_file(Path(path), module, channels)
    networks = list(found.networks.values())
    _compare_merging(found, getattr(module, "merging", None))
    taken = [*found.networks][: len(twins) or 1]
    if len(taken) < len(networks):
        text = "train.init_from: %s has %d networks; taken: %s"
        logger.warning(text, found.origin, len(networks), ", ".join(taken))
    if not twins:
        return _filled(found.origin, params, networks[0], only, leave)
    own = networks if len(networks) >= len(twins) else [networks[0]] * len(twins)
    if len(networks) < len(twins) > 1:
        logger.warning(
            "train.init_from: %s has one network, and the %d of the objective all begin with it",
            found.origin,
            len(twins),
        )
    pairs = zip(twins, own, strict=False)
    return {
        t: _filled(f"{found.origin}, {t}", params[t], network, only, leave) for t, network in pairs
    }


def _compare_merging(found: Found, own: str | None) -> None:
    """Warns where weights that fit would be multiplied with other channels than they learned."""
    if own in (None, found.merging):
        return
    if found.merging is not None:
        logger.warning(
            "train.init_from: %s merges patches in the order %r, and this network in the order %r: "
            "its weights of merging mean other channels; set --model.merging=%s",
            *(found.origin, found.merging, own, found.merging),
        )
    elif own == "fixed":
        logger.warning(
            "train.init_from: %s does not tell the order in which its patches are merged; if a "
            "MONAI before 1.5 built the network, as all that were published until 2025, set "
            "--model.merging=legacy",
            found.origin,
        )


def warn_of_seen(run: Run) -> None:
    """Says so where the run to begin with was trained on scans that this one holds out.

    Their scores would be too good, as of a network of another fold. Of a file of PyTorch's nobody
    knows what it has seen, nor of a run of which only config and checkpoints were kept.
    """
    folder = run.config.train.init_from
    if not Path(folder).is_dir():
        return
    for part, cases in (("validation", run.roles[0].val), ("test", run.roles[0].test)):
        try:
            count = ensemble.seen(run, [folder], cases).get(folder, 0) if cases else 0
        except (FileNotFoundError, UserError):
            return
        if count:
            logger.warning(
                "train.init_from: %s was, or may have been, trained on %d of the %d %s scans, "
                "whose scores would be too good; begin with a run that held them out, such as one "
                "of the same fold",
                *(folder, count, len(cases), part),
            )


def require_apart(recipe: Recipe, params: Params) -> None:
    """Refuses twins that begin alike where nothing makes them differ: they would stay one network.

    Raises:
        UserError: If two have equal weights, see the same patches and drop nothing at random.
    """
    twins = recipe.parts.objective.twins
    alike = any(_equal(params[a], params[b]) for a, b in itertools.combinations(twins, 2))
    if not alike or _differ_by_chance(recipe, params[twins[0]]):
        return
    raise UserError(
        f"config.train.init_from: the {len(twins)} networks of the objective would begin with the "
        "same weights, see the same patches and have no dropout: they would stay one network, at "
        f"the price of {len(twins)}. Leave something random, such as --train.init_leave=head, with "
        "its comma, or begin with a run of as many networks"
    )


def require_begun_so(run: Run, saved: str, step: int) -> None:
    """Refuses weights to begin with where a training has begun: they would change nothing.

    Those of then may lie elsewhere by now, as where each job copies them to a disk of its own: what
    is called the same passes for them where they are gone.

    Raises:
        UserError: Says how to go on, and how to begin with them.
    """
    asked = run.config.train.init_from
    if not asked:
        return
    one, other = Path(asked).resolve(), Path(saved).resolve()
    moved = one.name == other.name and not other.exists()
    if not saved or (one != other and not moved):
        raise UserError(
            f"config.train.init_from is {asked}, but {run.folder} has trained {step} steps, which "
            f"began with {saved or 'random weights'}; leave it out to go on, or name another "
            "--workdir to begin with these"
        )


def _equal(one: Params, other: Params) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def _differ_by_chance(recipe: Recipe, network: Params) -> bool:
    """Whether views or dropout tell twins apart; of an objective of one's own that is not known."""
    one_view = getattr(recipe.parts.objective, "one_view", None)
    if one_view is None or (not one_view and getattr(recipe.parts.view, "ops", True)):
        return True
    image = jax.ShapeDtypeStruct((1, *recipe.cut.patch, recipe.channels), jnp.float32)

    def without_chance(params: Params, image: Any) -> Any:
        return recipe.parts.model.apply({"params": params}, image, train=True)

    try:
        jax.eval_shape(without_chance, network, image)
    except errors.InvalidRngError:  # it asks for the key of its dropout
        return True
    return False


def _of_run(folder: Path, usual_merging: str | None) -> Found:
    """The networks that a run deploys, the first one first."""
    saved = folder / "config.json"
    if not saved.is_file() or not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"config.train.init_from: {folder} is no folder of a run, with config.json and "
            "checkpoints; weights of PyTorch in a folder are imported first (tools/import_torch.py)"
        )
    config = files.read_json(saved, under_todays_names, remedy="choose another run")
    step, params, ema = load_networks(folder / "checkpoints", "best")
    objective = build("bhsd_jax.objectives", config["objective"])
    networks = objective.deployable(params, ema)
    flat: Any = {name: traverse_util.flatten_dict(tree, sep="/") for name, tree in networks.items()}
    merging = config.get("model", {}).get("merging", usual_merging)
    return Found(f"{folder}, step {step}", flat, merging)


def _of_file(path: Path, module: Any, channels: int) -> Found:
    """Tensors under PyTorch's names for this network, as far as there are any."""
    recipe = recipe_for(module, channels)
    state = importing.of_network(recipe, weights_file.read(path).state)
    arrays = {}
    for name, value in state.items():
        weight = recipe.weights.get(recipe.canonical(name))
        if weight is not None and weight.path.startswith("params/"):
            arrays[weight.path.removeprefix("params/")] = importing.laid_out(weight, value)
    unused = len(state) - len(arrays)
    return Found(f"{path} ({unused} of its {len(state)} tensors have no place here)", {"": arrays})


def _filled(
    origin: str,
    drawn: Params,
    found: Mapping[str, np.ndarray],
    only: Sequence[str],
    leave: Sequence[str],
) -> Params:
    flat: Any = traverse_util.flatten_dict(drawn, sep="/")
    _require_known(flat, init_only=only, init_leave=leave)
    taken, random = {}, []
    for name, leaf in flat.items():
        value, why = found.get(name), ""
        if only and not name.startswith(tuple(only)):
            why = ": not among train.init_only"
        elif name.startswith(tuple(leave)):
            why = ": train.init_leave names it"
        else:
            why = _unfit(value, leaf.shape)
        if why:
            random.append(f"{name}{why}")
        else:
            taken[name] = np.asarray(value, leaf.dtype)
    if not taken:
        raise UserError(
            f"config.train.init_from: nothing in {origin} fits this network; the first: {random[0]}"
        )
    logger.info("train.init_from: %d of %d parameters are from %s", len(taken), len(flat), origin)
    for line in random[:_MOST_LINES]:
        logger.warning("train.init_from: random stays %s", line)
    if len(random) > _MOST_LINES:
        logger.warning("train.init_from: random stay %d more", len(random) - _MOST_LINES)
    return traverse_util.unflatten_dict({**flat, **taken}, sep="/")


def _require_known(names: Collection[str], **words: Sequence[str]) -> None:
    """Refuses words with which no parameter's name begins, by the field that has them."""
    for field, given in words.items():
        odd = [word for word in given if not any(name.startswith(word) for name in names)]
        if odd:
            parts = dict.fromkeys(name.partition("/")[0] for name in names)
            raise UserError(
                f"config.train.{field}: no parameter of this network begins with {odd[0]!r}; they "
                f"begin with {', '.join(parts)}"
            )


def _unfit(value: np.ndarray | None, shape: tuple[int, ...]) -> str:
    if value is None:
        return f" {list(shape)}: not there"
    return "" if value.shape == shape else f" {list(shape)}: there it is {list(value.shape)}"
