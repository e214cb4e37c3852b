"""Whole-volume prediction against nnU-Net's predictor: the same weights, tiles and mirrors.

    python tools/bench_infer.py [--preset small] [--volume 32,512,512] [--peer-python PATH]

The peer's network is drawn first and its weights are imported into ours, so that the logits can be
compared, too. Measured is a normalized volume in memory to logits in memory; `--mirrors` chooses
the eight mirrored versions, none, or both in turn. `--fast` gives ours, and only ours, the settings
of the config word `infer=fast`. The peer sums in float16, ours in float32.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import bench_pair
import bench_step
import numpy as np
from bench_networks import PRESETS, Preset

HERE = Path(__file__).parent
JOBS = {"both": ("plain", "mirrors"), "on": ("mirrors",), "off": ("plain",)}


def main() -> None:
    """Runs one side as a worker, or both and prints how they compare."""
    args = parse(sys.argv[1:])
    if args.worker:
        bench_step.load()
        import bhsd_jax.infer.sliding
        import bhsd_jax.torch_weights.importing  # noqa: F401

        bench_pair.serve(functools.partial(setup, args), bench_step.device_peak)
        return
    with tempfile.TemporaryDirectory() as folder:
        options = [*sys.argv[1:], "--folder", folder]
        peer = None
        if args.peer_python != "none":
            peer = bench_pair.Worker(args.peer_python, HERE / "bench_infer_peer.py", options)
        settings = bench_step.platform(args)
        ours = bench_pair.Worker(sys.executable, HERE / "bench_infer.py", options, **settings)
        found = {}
        for job in JOBS[args.mirrors]:
            table = bench_pair.summarize(bench_pair.take_turns(ours, peer, job, args.rounds))
            bench_pair.show(f"{args.preset}, volume {args.volume}, {job}", table)
            if peer is not None and not args.fast:
                table |= _agreement(ours, peer, Path(folder))
                print(
                    f"  logits differ by {table['difference']:.1e} of the largest (median);"
                    f" {table['equal']:.3%} of the labels are equal"
                )
            found[job] = table
        found["facts"] = {"ours": ours.facts, "peer": peer and peer.facts}
        ours.close()
        if peer is not None:
            peer.close()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    """The options, which both workers get too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bench_step.add_options(parser)
    parser.add_argument("--volume", default="32,512,512", help="D,H,W")
    parser.add_argument("--mirrors", choices=JOBS, default="both")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return bench_step.completed(parser.parse_args(words))


def volume(args: argparse.Namespace, preset: Preset) -> np.ndarray:
    """Normalized noise, [D H W C]; the same on both sides."""
    size = tuple(map(int, args.volume.split(",")))
    random = np.random.default_rng(0)
    return random.standard_normal((*size, preset.channels), dtype=np.float32)


def constructor(preset: Preset) -> dict:
    """The peer's arguments, as an importer wants them."""
    return {
        "input_channels": preset.channels,
        "n_stages": len(preset.features),
        "features_per_stage": preset.features,
        "kernel_sizes": preset.kernels,
        "strides": preset.strides,
        "n_conv_per_stage": 2,
        "num_classes": preset.classes,
        "n_conv_per_stage_decoder": 2,
        "conv_bias": True,
        "deep_supervision": True,
        "norm_op": "InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def setup(args: argparse.Namespace) -> tuple[dict, bench_pair.Jobs]:
    """Compiles our tile program and runs one tile."""
    import jax

    from bhsd_jax.infer.sliding import SlidingWindow
    from bhsd_jax.torch_weights import importing
    from bhsd_jax.train.mesh import make_mesh

    preset = PRESETS[args.preset]
    if args.peer_python == "none":
        module = bench_step.our_model(args, preset)
        image = np.zeros((1, *preset.patch, preset.channels), np.float32)
        variables = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), image)
    else:
        with np.load(Path(args.folder) / "weights.npz") as file:
            state = dict(file)
        module, variables = importing.load("PlainConvUNet", constructor(preset), state)
    module = module.clone(deep_supervision=False, dtype=args.dtype)

    def forward(params, image):
        return module.apply({"params": params}, image, train=False)

    image, last, jobs = volume(args, preset), {}, {}
    step = 0.75 if args.fast else 0.5
    mesh = make_mesh() if jax.device_count() > 1 else None
    for job, mirror in (("plain", False), ("mirrors", True)):
        window = SlidingWindow(forward, preset.patch, step, mirror, mesh=mesh)

        def run(window=window) -> None:
            last["logits"] = window.logits([variables["params"]], image)

        if job in JOBS[args.mirrors]:
            window.logits([variables["params"]], image[tuple(slice(n) for n in preset.patch)])
            jobs[job] = run
    jobs["save"] = lambda: np.save(Path(args.folder) / "ours.npy", last["logits"])
    return {"device": jax.devices()[0].device_kind, "tiles": window.count(image.shape[:3])}, jobs


def _agreement(ours: bench_pair.Worker, peer: bench_pair.Worker, folder: Path) -> dict:
    """Median difference as a share of the largest logit, and the share of equal labels.

    Not the largest difference: where only the rim of one tile reaches, the peer's weights are
    float16 numbers with one or two digits.
    """
    ours.run("save")
    peer.run("save")
    mine, theirs = (np.load(folder / f"{side}.npy").astype(np.float32) for side in ("ours", "peer"))
    return {
        "difference": float(np.median(np.abs(mine - theirs)) / np.abs(theirs).max()),
        "equal": float((mine.argmax(0) == theirs.argmax(0)).mean()),
    }


if __name__ == "__main__":
    main()
