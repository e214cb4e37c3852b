"""Our train step against the same step in PyTorch, taking turns on one machine.

    python tools/bench_step.py [--preset small] [--peer-python PATH] [--device cpu|gpu] [--layers]

A step is forward, deep-supervised Dice and cross entropy, backward, clipping, SGD with Nesterov
momentum, on patches that lie on the device; the peer is `dynamic_network_architectures`'
PlainConvUNet or ResidualEncoderUNet (`--preset resenc`), MONAI's SwinUNETR or UNETR (`swin`,
`unetr`), or what the authors of CoTr or nnFormer published (`cotr`, `nnformer`; `--peer-source` has
the folders of their packages), under nnU-Net's loss. `--objective cps` and `mean_teacher` add as
many unlabeled patches and the terms of those methods, on both sides. `--layers` compares the
convolutions of a U-Net instead. `--peer-python` names an interpreter that has those packages;
"none" measures ours alone.

On a GPU both sides compute in bfloat16 (`--dtype float32` changes both, `--peer-dtype` the peer, by
torch.autocast) and the peer goes through torch.compile. What may be tried there, and what is
expected of it for the `bhsd` preset:
`--pad-input 8` (the first convolution then fits the matrix units: 2 % of the step),
`--remat blocks` (half of the activations' memory for a third more arithmetic: slower),
`--xla-flags=--xla_gpu_enable_latency_hiding_scheduler=true` (nothing, on one GPU),
`--xla-flags=--xla_gpu_force_conv_nchw=true` (slower: transposes around every convolution),
`--xla-flags=--xla_gpu_autotune_level=4` (the default; 0 shows what autotuning is worth).
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import bench_pair
from bench_networks import BLOCKS, PRESETS, Layer, Preset, layers, step_flops

HERE = Path(__file__).parent
OBJECTIVES = ("supervised", "cps", "mean_teacher")


def main() -> None:
    """Runs one side as a worker, or both and prints how they compare."""
    args = parse(sys.argv[1:])
    if args.worker:
        args.split = load(args.batch or PRESETS[args.preset].batch)
        setup = setup_layers if args.layers else setup_step
        bench_pair.serve(functools.partial(setup, args), device_peak)
        return
    options = [a for a in sys.argv[1:] if a != "--worker"]
    ours = bench_pair.Worker(sys.executable, HERE / "bench_step.py", options, **platform(args))
    peer = None
    if args.peer_python != "none":
        peer = bench_pair.Worker(args.peer_python, HERE / "bench_step_peer.py", options)
    try:
        found = compare_layers(args, ours, peer) if args.layers else compare_step(args, ours, peer)
    finally:
        ours.close()
        if peer is not None:
            peer.close()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def parse(words: list[str]) -> argparse.Namespace:
    """The options, which both workers get too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--remat", choices=("none", "blocks"), default="none")
    parser.add_argument("--pad-input", type=int, default=0, help="input channels, zeros added")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--peer-source", default="", help="folders, as in PYTHONPATH")
    parser.add_argument("--objective", choices=OBJECTIVES, default="supervised")
    args = completed(parser.parse_args(words))
    if args.layers and PRESETS[args.preset].family != "plain":
        parser.error("--layers lists the convolutions of a plain nnU-Net; choose another preset")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of a network may be told."""
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--batch", type=int, help="patches; default: the preset's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), help="default: as ours")
    parser.add_argument("--xla-flags", action="append", default=[])
    parser.add_argument("--peer-format", choices=("default", "channels_last"), default="default")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """With the defaults that depend on others."""
    if args.dtype is None:
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    args.peer_dtype = args.peer_dtype or args.dtype
    return args


def platform(args: argparse.Namespace) -> dict[str, str]:
    """Environment of our worker."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), *args.xla_flags)))
    name = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    return {"JAX_PLATFORMS": name, "XLA_FLAGS": flags}


def compare_step(
    args: argparse.Namespace, ours: bench_pair.Worker, peer: bench_pair.Worker | None
) -> dict:
    """Step against step."""
    preset = PRESETS[args.preset]
    plain = preset.family == "plain" and args.objective == "supervised"
    flops = step_flops(preset) * (args.batch or preset.batch) / preset.batch if plain else 0
    found = bench_pair.summarize(bench_pair.take_turns(ours, peer, "step", args.rounds))
    found |= {"gflop": flops / 1e9, "facts": {"ours": ours.facts}}
    if flops:
        print(f"convolutions of a step: {flops / 1e9:.4g} GFLOP")
    for name, worker in (("ours", ours), ("peer", peer)):
        if worker is not None:
            found["facts"][name] = worker.facts
            rate = f"{flops / 1e9 / found[name]['wall']:.0f} GFLOP/s; " if flops else ""
            print(
                f"{name}: {worker.facts['device']}; set up and compiled in"
                f" {worker.facts['setup_s']:.1f} s at a peak of"
                f" {worker.facts['setup_peak'] / 1e9:.2f} GB; {rate}first"
                f" loss {worker.facts['loss']:.5f}"
            )
    bench_pair.show(f"train step, preset {args.preset}, {args.objective}", found)
    return found


def compare_layers(
    args: argparse.Namespace, ours: bench_pair.Worker, peer: bench_pair.Worker | None
) -> dict:
    """Convolution by convolution: GFLOP/s of both, and their ratio."""
    preset, found = PRESETS[args.preset], {}
    print("GFLOP/s of ours and the peer, and the ratio of wall time and CPU time [quartiles]")
    for index, layer in enumerate(distinct(preset)):
        for job, passes in (("forward", 1), ("both", 3)):
            name = f"{index} {job}"
            table = bench_pair.summarize(bench_pair.take_turns(ours, peer, name, args.rounds))
            flops = passes * layer.flops * (args.batch or preset.batch)
            text = f"{layer!s:36} {'forward' if passes == 1 else 'forward + backward':18}"
            for side in ("ours", "peer"):
                if side in table:
                    table[side]["gflops"] = flops / 1e9 / table[side]["wall"]
                    text += f" {table[side]['gflops']:6.1f}"
            for key in ("ratio_wall", "ratio_cpu"):
                if key in table:
                    text += "   {median:.2f} [{low:.2f}, {high:.2f}]".format(**table[key])
            print(text, flush=True)
            found[f"{layer} {job}"] = table
    return found


def distinct(preset: Preset) -> list[Layer]:
    """Every convolution of the network once."""
    return list(dict.fromkeys(layers(preset)))


def setup_step(args: argparse.Namespace) -> tuple[dict, bench_pair.Jobs]:
    """Compiles our step and runs it once."""
    import jax

    from bhsd_jax.models.conv import compiler_options
    from bhsd_jax.models.cost import count_parameters
    from bhsd_jax.platform import allocator
    from bhsd_jax.train import mesh as meshes
    from bhsd_jax.train import processes
    from bhsd_jax.train.step import init_state, make_train_step
    from bhsd_jax.types import Batch

    preset = PRESETS[args.preset]
    parts = our_parts(args, preset)
    batch, channels = args.batch or preset.batch, max(args.pad_input, preset.channels)
    if args.split and args.device == "cpu":
        parameters = count_parameters(parts.model, (1, *preset.patch, channels))
        processes.unite_cores(parameters, batch * math.prod(preset.patch))
    mesh = meshes.make_mesh(batches=(batch,))
    rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=rows)
    def draw(key):
        image_key, label_key = jax.random.split(key)
        image = jax.random.normal(image_key, (batch, *preset.patch, preset.channels))
        more = [(0, 0)] * 4 + [(0, channels - preset.channels)]
        label = jax.random.randint(label_key, (batch, *preset.patch), 0, preset.classes)
        image = jax.numpy.pad(image, more)
        unlabeled = None if args.objective == "supervised" else image[::-1]
        return Batch(image, label.astype("int8"), unlabeled)

    data = draw(jax.random.key(0))
    init = jax.jit(
        lambda image: init_state(parts, image, jax.random.key(1)), out_shardings=everywhere
    )
    state = init(data.image)
    step = jax.jit(make_train_step(parts), donate_argnums=0, out_shardings=everywhere)
    device = jax.devices()[0]
    told = compiler_options(parts.model.dtype, device.platform, device.device_kind)
    step = step.lower(state, data).compile(told)
    cost = step.memory_analysis()
    if args.device == "cpu":  # as `train` does
        allocator.settle(cost.temp_size_in_bytes, mesh.size)
    held = [step(state, data)]

    def run() -> None:
        held[0] = jax.block_until_ready(step(held[0][0], data))

    facts = {
        "device": f"{mesh.size} {mesh.devices.flat[0].device_kind}, jax {jax.__version__}",
        "loss": float(held[0][1]["loss"]),
        "temporaries": getattr(cost, "temp_size_in_bytes", 0),
    }
    run()
    return facts, {"step": run}


def our_parts(args: argparse.Namespace, preset: Preset):
    """What the step is made of: nnU-Net's recipe, patches given as they are."""
    from bhsd_jax.losses import DiceCE
    from bhsd_jax.objectives.cps import CrossPseudoSupervision
    from bhsd_jax.objectives.mean_teacher import MeanTeacher
    from bhsd_jax.objectives.supervised import Supervised
    from bhsd_jax.train.optimizer import make_optimizer, make_schedule
    from bhsd_jax.train.step import Parts

    schedule = make_schedule("poly", lr=0.01, steps=250_000, hold=250)
    kind = dict(zip(OBJECTIVES, (Supervised, CrossPseudoSupervision, MeanTeacher), strict=True))
    return Parts(
        our_model(args, preset).clone(remat=args.remat),
        kind[args.objective](),
        make_optimizer("sgd", schedule),
        schedule,
        DiceCE(),
        augment=lambda key, batch: batch,
        view=lambda key, image: image,
        steps=250_000,
    )


def our_model(args: argparse.Namespace, preset: Preset):
    """The network of a preset."""
    from bhsd_jax.models.cotr import CoTr
    from bhsd_jax.models.nnformer import TUMOR, NNFormer
    from bhsd_jax.models.nnunet import PlainConvUNet, ResidualEncoderUNet
    from bhsd_jax.models.swin_unetr import SwinUNETR
    from bhsd_jax.models.unetr import UNETR

    if preset.family == "swin":
        return SwinUNETR(preset.classes, feature_size=preset.features[0], dtype=args.dtype)
    if preset.family == "unetr":
        size = {"patch": preset.patch, "feature_size": preset.features[0]}
        return UNETR(preset.classes, **size, dtype=args.dtype)
    if preset.family == "cotr":
        return CoTr(preset.classes, deep_supervision=False, dtype=args.dtype)
    if preset.family == "nnformer":
        return NNFormer(preset.classes, dtype=args.dtype, **TUMOR)
    stages = {name: getattr(preset, name) for name in ("features", "strides", "kernels")}
    if preset.family == "resenc":
        stages["blocks_encoder"] = BLOCKS
        return ResidualEncoderUNet(preset.classes, **stages, dtype=args.dtype)
    return PlainConvUNet(preset.classes, **stages, dtype=args.dtype)


def setup_layers(args: argparse.Namespace) -> tuple[dict, bench_pair.Jobs]:
    """Compiles every distinct convolution, and with it its two gradients."""
    import jax

    from bhsd_jax.models.conv import conv3d
    from bhsd_jax.train import mesh as meshes

    preset, jobs = PRESETS[args.preset], {}
    mesh = meshes.make_mesh(batches=(args.batch or preset.batch,))
    rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    for index, layer in enumerate(distinct(preset)):
        padding = tuple((k // 2, k // 2) for k in layer.kernel)
        conv = functools.partial(conv3d, strides=layer.strides, padding=padding)
        shape = (args.batch or preset.batch, *layer.size, layer.channels)
        kernel_shape = (*layer.kernel, layer.channels, layer.features)
        keys = jax.random.split(jax.random.key(0), 3)
        image = jax.device_put(jax.random.normal(keys[0], shape, args.dtype), rows)
        kernel = jax.device_put(jax.random.normal(keys[1], kernel_shape, args.dtype), everywhere)
        grad = jax.random.normal(keys[2], jax.eval_shape(conv, image, kernel).shape, args.dtype)
        grad = jax.device_put(grad, rows)

        def both(image, kernel, grad, conv=conv):
            out, pull = jax.vjp(conv, image, kernel)
            return out, *pull(grad)

        jobs[f"{index} forward"] = _job(jax.jit(conv), image, kernel)
        backward = jax.jit(both, out_shardings=(rows, rows, everywhere))
        jobs[f"{index} both"] = _job(backward, image, kernel, grad)
    return {"device": f"{mesh.size} {mesh.devices.flat[0].device_kind}"}, jobs


def _job(function, *arrays):
    import jax

    def run() -> None:
        jax.block_until_ready(function(*arrays))

    run()
    return run


def load(*batches: int) -> bool:
    """Imports what the worker needs and wakes the devices, before memory is counted.

    Returns:
        Whether cores were made devices.
    """
    from bhsd_jax.platform import startup

    startup.settle_compiler()  # as `train` and `predict` do
    import jax

    import bhsd_jax.models.nnunet
    import bhsd_jax.objectives.supervised
    import bhsd_jax.train.step  # noqa: F401
    from bhsd_jax.train import processes

    split = processes.share_cores(*batches)
    jax.devices()
    return split


def device_peak() -> int | None:
    """Bytes on the device, if it counts them."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    main()
