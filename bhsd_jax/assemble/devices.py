"""The networks of a run on the devices of this process, as a predictor."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.infer.sliding import SlidingWindow, bytes_per_tile
from bhsd_jax.models.cost import abstract_variables
from bhsd_jax.platform import allocator, machine, startup
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train import processes
from bhsd_jax.types import Params


def share_cores(run: Run) -> None:
    """On a CPU, makes a device of every core; before JAX starts.

    Each window takes as many of them as there is memory for its tiles, see `make_predictor`.
    """
    processes.share_cores(run.config.infer.tiles or 0)


def require_right_sums() -> None:
    """Refuses a JAX that adds up wrongly on this CPU; see `startup.settle_compiler`.

    Raises:
        UserError: If it was started before it could be told better.
    """
    if jax.default_backend() != "cpu":
        return
    ones = np.ones((6000, 8), np.float32)
    found = jax.jit(lambda x: jnp.square(x @ jnp.ones((8, 3), x.dtype)).sum(-1))(ones)
    if not (found == 3 * 8**2).all():
        raise UserError(
            f"jaxlib {jaxlib.version.__version__} adds up wrongly in this process: JAX was started "
            "before it could be told better; import bhsd_jax.api before the first computation, or "
            f"set XLA_FLAGS=--{'='.join(startup.RIGHT_SUMS)}"
        )


def make_predictor(run: Run, networks: Sequence[Params]) -> Predictor:
    """The predictor of a run, on the devices of this process that there is memory for a tile on.

    Raises:
        ValueError: If the networks are not the config's model.
    """
    config, model, network_input = run.config, wiring.model(run), run.network_input

    def forward(variables: Params, raw: jax.Array) -> Any:
        return model.apply(variables, network_input(raw), train=False)

    margin = getattr(model, "margin", (0, 0, 0))  # what it takes around the voxels it answers for
    seen = (n + 2 * m for n, m in zip(run.patch, margin, strict=True))
    sample = jax.ShapeDtypeStruct((1, *seen, network_input.channels), jnp.float32)
    expected = abstract_variables(model, sample)
    for variables in networks:
        _require_fit(variables, expected)
    window = SlidingWindow(
        forward,
        run.patch,
        step=config.infer.step,
        mirror=config.infer.mirror,
        # Along an axis of one voxel the mirrored version is the tile itself.
        mirror_axes=tuple(axis for axis in wiring.mirror_axes(run) if run.patch[axis] > 1),
        tiles_per_call=config.infer.tiles,
        law=config.infer.law,
        margin=margin,
        unit=model.stride if any(margin) else None,
        combine=config.predict.combine,
        # The mesh is of this process alone: each of several predicts scans of its own.
        # The margin takes little: for a tile of 60^3 in 140^3 voxels, BLAST-CT's network takes
        # 3.4 kB per voxel of the 60^3.
        mesh=_mesh(bytes_per_tile(run.patch), config.infer.tiles or 0),
        regions=run.labels.region_order,
        options=wiring.compiler_options(model),
    )
    return Predictor(
        window=window,
        networks=networks,
        fill=network_input.pad_value(config.input.pad),
        plan=run.plan,
        classes=run.classes,
        probabilities=config.predict.probabilities,
        present_ml=config.predict.present_ml,
        seg=config.predict.dicom.seg,
        maker=segmentation.Maker(f"{config.objective['name']} on {run.plan.dataset}"),
        meaning=run.labels,
        nnunet_probabilities=config.predict.nnunet_probabilities,
        keeps_logits=config.predict.logits,
    )


def _mesh(tile_bytes: int, tiles: int) -> Mesh | None:
    """The devices that share the tiles of a call; None: the first one alone.

    On accelerators all, for each has memory of its own. CPUs share half of the machine's; those
    that are not taken lend their cores to the others.

    Args:
        tile_bytes: Working memory of one tile.
        tiles: That the config asks for per call, to be shared evenly; 0: one on each device.
    """
    count = jax.local_device_count()
    if jax.default_backend() == "cpu":
        most = min(count, max(machine.memory() // 2 // tile_bytes, 1))
        count = max(n for n in range(1, most + 1) if tiles % n == 0)
    allocator.mind_memory(count * tile_bytes)
    return meshes.make_mesh(devices=jax.local_devices()[:count]) if count > 1 else None


def _require_fit(variables: Params, expected: Params) -> None:
    """Refuses variables of another network, naming the first that differs."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (variables, expected))
    )
    odd = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if odd:
        raise UserError(
            f"the checkpoint is not of the config's network: {odd[0]} has shape "
            f"{found.get(odd[0])}, the config asks for {wanted.get(odd[0])}; use "
            "--config=configs/from_run.py:<run folder>"
        )
