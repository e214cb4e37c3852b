"""Draws a contact sheet of augmented training patches: rows are patches, columns are draws.

python tools/show_batch.py --synthetic --out batch.png
python tools/show_batch.py --shards runs/x/shards --out batch.png --patch 20 320 256
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.build import build
from bhsd_jax.configs import common
from bhsd_jax.phantom.case import Options, make_case
from bhsd_jax.shards.store import Shards
from bhsd_jax.volume import Shape
from bhsd_jax.windows import Normalization

Pair = tuple[np.ndarray, np.ndarray]  # raw intensity and label, both [D H W]
PHANTOM_HU = (2.0, 56.0, 17.0, 98.0)  # foreground of the synthetic heads, roughly
BRAIN_HU = (0.0, 80.0)  # level 40, width 80
COLORS = ("#ff4040", "#40c0ff", "#ffd030", "#60e060", "#e070ff")


def main() -> None:
    """Reads the arguments, writes one PNG."""
    options = _arguments()
    if options.synthetic:
        modality, patch = "ct", tuple(options.patch or (16, 160, 128))
        normalize = Normalization.from_plan("ct", PHANTOM_HU)
        pairs = phantoms(options.patches, options.seed)
    else:
        shards = Shards(options.shards)
        modality = shards.plan.modality
        patch = tuple(options.patch or shards.plan.network.patch)
        normalize = Normalization.from_plan(modality, shards.plan.foreground)
        pairs = cases(shards, options.patches, options.seed)
    spatial, intensity = chains(patch, normalize.fill(options.pad), options.always)
    rng = np.random.default_rng(options.seed)
    raw = normalize.pad_value(options.pad)
    cut = [around_bleed(*pair, spatial.source_patch, raw, rng) for pair in pairs]
    image = normalize(jnp.asarray(np.stack([pair[0] for pair in cut])[..., None]))
    label = jnp.asarray(np.stack([pair[1] for pair in cut]), jnp.int8)
    columns = [SpatialChain((), patch)(jax.random.key(0), image, label)]
    augment = jax.jit(lambda key: _augment(spatial, intensity, key, image, label))
    keys = jax.random.split(jax.random.key(options.seed), options.draws)
    columns += [augment(key) for key in keys]
    draw(columns, normalize, BRAIN_HU if modality == "ct" else (-2.0, 4.0), options.out)
    print(f"{options.out}: {len(cut)} patches of {patch}, cut from {spatial.source_patch}")


def chains(
    patch: Shape, fill: tuple[float, ...], always: bool
) -> tuple[SpatialChain, IntensityChain]:
    """The augmentation of `configs/common.py`."""
    specs = common.get_config().augment.to_dict()
    ops = {}
    for part, listed in specs.items():
        built = []
        for spec in listed:
            certain = {name: 1.0 for name in spec if name == "p" or name.endswith("_p")}
            extra = {"fill": fill} if spec["name"] == "spatial.Affine" else {}
            built.append(build("bhsd_jax.augment", spec | (certain if always else {}), **extra))
        ops[part] = tuple(built)
    return SpatialChain(ops["spatial"], patch, True), IntensityChain(ops["intensity"], True)


def phantoms(count: int, seed: int) -> list[Pair]:
    """Generated heads, turned to lie as prepared cases do (face up, the patient's right first)."""
    made = [
        make_case(seed + i, Options(size=192, slices=20, difficulty="easy")) for i in range(count)
    ]
    return [(hu[:, ::-1], label[:, ::-1]) for hu, label, _ in made]


def cases(shards: Shards, count: int, seed: int) -> list[Pair]:
    """Random labeled cases."""
    labeled = [entry.id for entry in shards.entries if entry.has_label]
    if not labeled:
        raise SystemExit(f"{shards.folder}: no case has a label; nothing to show")
    chosen = np.random.default_rng(seed).choice(labeled, count, replace=count > len(labeled))
    loaded = [shards.load(str(case)) for case in chosen]
    return [(case.image, case.label) for case in loaded if case.label is not None]


def around_bleed(
    image: np.ndarray, label: np.ndarray, size: Shape, raw: float, rng: np.random.Generator
) -> Pair:
    """A piece of that size about a random labeled voxel, if there is one; label -1 outside."""
    voxels = np.argwhere(label > 0)
    center = voxels[rng.integers(len(voxels))] if len(voxels) else np.array(label.shape) // 2
    reach = [(n, n) for n in size]
    start = [int(c) + n - n // 2 for c, n in zip(center, size, strict=True)]
    window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    padded = np.pad(image, reach, constant_values=image.dtype.type(raw))
    return padded[window], np.pad(label.astype(np.int8), reach, constant_values=-1)[window]


def draw(
    columns: list[tuple[jax.Array, jax.Array]],
    normalize: Normalization,
    limits: tuple[float, float],
    out: Path,
) -> None:
    """Shows the slice with most label of every patch, contours over it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = len(columns[0][0])
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(2.2 * len(columns), 2.4 * rows), squeeze=False
    )
    for column, (images, labels) in enumerate(columns):
        for row in range(rows):
            image, label = np.asarray(images[row, ..., 0]), np.asarray(labels[row])
            plane = int((label > 0).sum((1, 2)).argmax()) if (label > 0).any() else len(label) // 2
            axis = axes[row, column]
            shown = image[plane] * normalize.scale[0] + normalize.shift[0]
            axis.imshow(shown, cmap="gray", vmin=limits[0], vmax=limits[1])
            for value in np.unique(label[plane][label[plane] > 0]):
                color = COLORS[(int(value) - 1) % len(COLORS)]
                axis.contour(label[plane] == value, [0.5], colors=color, linewidths=0.8)
            axis.set_title("plain" if column == 0 else f"draw {column}", fontsize=8)
            axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(out, dpi=110)


def _augment(spatial, intensity, key, image, label):
    where_key, value_key = jax.random.split(key)
    moved, classes = spatial(where_key, image, label)
    return intensity(value_key, moved), classes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", type=Path, help="folder written by the verb preprocess")
    source.add_argument("--synthetic", action="store_true", help="generated heads instead")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--patches", type=int, default=4, help="rows")
    parser.add_argument("--draws", type=int, default=5, help="augmented columns")
    parser.add_argument("--patch", type=int, nargs=3, metavar=("D", "H", "W"))
    parser.add_argument("--pad", choices=("air", "nnunet"), default="air")
    parser.add_argument("--always", action="store_true", help="every operation, not by chance")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
