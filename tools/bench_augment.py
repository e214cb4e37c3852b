"""What nnU-Net's augmentation costs beside the train step, and against batchgeneratorsv2.

    python tools/bench_augment.py [--preset small] [--draws 8] [--peer-python PATH]

Ours runs inside jit on the device, with the operations of `configs/common.py`; the peer is the
pipeline of nnU-Net's trainer on a CPU, one patch after the other. Both get the same patches, wide
enough to be rotated. Most operations fire rarely, so a job is `--draws` batches with keys of their
own, and the share of the step is that of the mean.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import bench_pair
import bench_step
import numpy as np
from bench_networks import PRESETS

HERE = Path(__file__).parent


def main() -> None:
    """Runs one side as a worker, or both and prints how they compare."""
    args = parse(sys.argv[1:])
    if args.worker:
        sys.path.insert(0, str(HERE.parent))  # for configs/
        bench_step.load(args.batch or PRESETS[args.preset].batch)
        bench_pair.serve(functools.partial(setup, args), bench_step.device_peak)
        return
    settings = bench_step.platform(args)
    ours = bench_pair.Worker(sys.executable, HERE / "bench_augment.py", sys.argv[1:], **settings)
    peer = None
    if args.peer_python != "none":
        script = HERE / "bench_augment_peer.py"
        peer = bench_pair.Worker(args.peer_python, script, sys.argv[1:])
    found = bench_pair.summarize(bench_pair.take_turns(ours, peer, "augment", args.rounds))
    bench_pair.show(f"{args.draws} batches augmented, preset {args.preset}", found)
    if not args.no_step:
        step = bench_pair.summarize(bench_pair.take_turns(ours, None, "step", args.rounds))
        for key in ("wall", "cpu"):
            alone = found["ours"][key] / args.draws
            found[f"share_{key}"] = alone / step["ours"][key]
        print(
            f"  of our step without it ({step['ours']['wall']:.4g} s) augmentation is"
            f" {found['share_wall']:.1%} in wall time, {found['share_cpu']:.1%} in CPU time"
        )
    ours.close()
    if peer is not None:
        peer.close()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    """The options, which both workers get too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench_step.add_options(parser)
    parser.add_argument("--draws", type=int, default=8, help="batches per job")
    parser.add_argument("--no-step", action="store_true", help="only against the peer")
    parser.add_argument("--remat", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--pad-input", type=int, default=0, help=argparse.SUPPRESS)
    return bench_step.completed(parser.parse_args(words))


def patches(batch: int, size: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth normalized tissue and blobs of every class: [B D H W], [B D H W]."""
    random = np.random.default_rng(0)
    coarse = random.standard_normal((batch, *(-(-n // 8) for n in size))).astype(np.float32)
    image = coarse
    for axis in (1, 2, 3):
        image = np.repeat(image, 8, axis)
    image = image[:, : size[0], : size[1], : size[2]]
    label = np.clip(np.round(image * 2), 0, classes - 1).astype(np.int8)
    return image, label


def setup(args: argparse.Namespace) -> tuple[dict, bench_pair.Jobs]:
    """Compiles the augmentation alone and, unless told not to, the step without it."""
    import jax

    from bhsd_jax.augment.chain import IntensityChain, SpatialChain
    from bhsd_jax.build import build
    from bhsd_jax.configs import common
    from bhsd_jax.train import mesh as meshes

    preset, config = PRESETS[args.preset], common.get_config()
    batch = args.batch or preset.batch
    sequential = args.device == "cpu"

    def ops(specs) -> tuple:
        return tuple(build("bhsd_jax.augment", dict(spec)) for spec in specs)

    mesh = meshes.make_mesh(batches=(batch,))
    shared = mesh if mesh.size > 1 and sequential else None
    spatial = SpatialChain(ops(config.augment.spatial), preset.patch, sequential, shared)
    intensity = IntensityChain(ops(config.augment.intensity), sequential, shared)
    image, label = patches(batch, spatial.source_patch, preset.classes)
    rows = meshes.batch_sharding(mesh)
    image, label = jax.device_put((image[..., None], label), rows)

    @jax.jit
    def augment(key, image, label):
        spatial_key, intensity_key = jax.random.split(key)
        moved, classes = spatial(spatial_key, image, label)
        return intensity(intensity_key, moved), classes

    keys = [jax.random.key(0)]

    def run() -> None:
        keys[0] = jax.random.fold_in(keys[0], 1)
        for key in jax.random.split(keys[0], args.draws):
            jax.block_until_ready(augment(key, image, label))

    jobs = {"augment": run}
    run()
    if not args.no_step:
        jobs |= bench_step.setup_step(args)[1]
    return {"device": mesh.devices.flat[0].device_kind}, jobs


if __name__ == "__main__":
    main()
