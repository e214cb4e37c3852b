"""A run folder as training leaves it, with a tiny random network, and generated heads for it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.volume import Network, Plan

CLASSES = ("background", "IPH", "SDH")
TILE = (4, 16, 16)
PLAN = Plan(
    dataset="tiny",
    classes=CLASSES,
    modality="ct",
    spacing_mm=(5.0, 2.0, 2.0),
    transpose=(0, 1, 2),
    crop_hu=-200.0,
    foreground=(10.0, 60.0, 20.0, 110.0),
    median_shape=(7, 24, 20),
    network=Network(
        patch=TILE,
        batch=1,
        features=(4, 8),
        strides=((1, 1, 1), (1, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3)),
        convs_encoder=(1, 1),
        convs_decoder=(1,),
        batch_dice=False,
    ),
    source_sha256="",
    license="CC0",
)


def make(folder, seed=0, plan=PLAN, mirror=False):
    """Writes a run whose weights are drawn; returns its folder."""
    folder = Path(folder)
    config = common.get_config()
    config.infer.update(mirror=mirror, tiles=4)
    run = Run.of(config, folder, plan)
    model = wiring.model(run)
    image = jax.ShapeDtypeStruct((1, *TILE, run.network_input.channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), shapes["params"]
    )
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    plain = json.loads(json.dumps(config.to_dict()))
    (folder / "config.json").write_text(json.dumps(plain))
    save_networks(folder / "checkpoints", params, config=plain, plan=plan.to_json())
    return folder


def head(seed=0, shape=(20, 26, 7)):
    """HU [x y z] in RAS order: air, a head, two bleeds off its center."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[x**2 + y**2 + (0.8 * z) ** 2 < 0.8] = 30
    hu[(x - 0.4) ** 2 + (y + 0.2) ** 2 + (z - 0.2) ** 2 < 0.06] = 75
    hu[(x + 0.3) ** 2 + (y - 0.4) ** 2 + (z + 0.3) ** 2 < 0.04] = 100
    noise = np.random.default_rng(seed).normal(0, 3, x.shape)
    return np.rint(hu + np.where(hu > -500, noise, 0)).astype(np.int16)


def upright(spacing_mm=(2.0, 2.0, 5.0)):
    """RAS affine of (x, y, z) for a spacing in that order."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-17.25, -31.0, 44.5)
    return affine
