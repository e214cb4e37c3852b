"""nnU-Net's side of `bench_infer.py`, which starts it; needs torch and nnunetv2."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_pair
import bench_step_peer
import numpy as np
import torch
from bench_infer import JOBS, parse, volume
from bench_networks import PRESETS
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


def main() -> None:
    """Serves as the peer."""
    args = parse(sys.argv[1:])
    torch.set_num_threads(args.threads)
    bench_pair.serve(functools.partial(setup, args), bench_step_peer.device_peak)


def setup(args) -> tuple[dict, bench_pair.Jobs]:
    """Draws the network, leaves its weights for the other side, and runs one tile."""
    preset = PRESETS[args.preset]
    device, layout = bench_step_peer.place(args)
    torch.manual_seed(0)
    net = bench_step_peer.network(preset)
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    np.savez(Path(args.folder) / "weights.npz", **state)
    net.decoder.deep_supervision = False
    net = net.to(device, memory_format=layout).eval()
    if args.device == "gpu":
        net = torch.compile(net)
    image = torch.from_numpy(np.moveaxis(volume(args, preset), -1, 0).copy())
    last, jobs = {}, {}
    for job, mirror in (("plain", False), ("mirrors", True)):
        predictor = nnUNetPredictor(
            0.5, True, mirror, device.type == "cuda", device=device, allow_tqdm=False
        )
        predictor.network = net
        predictor.configuration_manager = SimpleNamespace(patch_size=preset.patch)
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=preset.classes)
        predictor.allowed_mirroring_axes = (0, 1, 2)

        def run(predictor=predictor) -> None:
            last["logits"] = predictor.predict_sliding_window_return_logits(image).cpu().numpy()

        if job in JOBS[args.mirrors]:
            d, h, w = preset.patch
            predictor.predict_sliding_window_return_logits(image[:, :d, :h, :w])
            jobs[job] = run
    jobs["save"] = lambda: np.save(Path(args.folder) / "peer.npy", last["logits"])
    return {"device": bench_step_peer.name(args)}, jobs


if __name__ == "__main__":
    main()
